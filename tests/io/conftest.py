"""A fitted estimator, and its file."""

import pytest

from tests.tiny import X, Y, estimator


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X, Y)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(fitted, path):
    fitted.save(path)
    return path
