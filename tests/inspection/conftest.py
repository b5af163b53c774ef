"""Models to draw, and figures that are closed after each test."""

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pytest

from tests import tiny
from tests.inspection.pictures import DOUBLE
from tests.tiny import X, Y


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def models():
    """Return fitted estimators by ``features``; tests must not change them."""
    return {
        kind: tiny.estimator(features=kind, gradient_layers="all", **DOUBLE).fit(X, Y)
        for kind in ("activation", "gradient", "full")
    }
