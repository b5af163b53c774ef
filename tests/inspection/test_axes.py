"""Estimators and axes that displays accept."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_gradfeat import (
    GradientFeatureClassifierCV,
    LayerContributionDisplay,
    ObjectiveDisplay,
    PenaltyDisplay,
    SaliencyDisplay,
)
from tests import tiny
from tests.inspection.pictures import DOUBLE
from tests.tiny import X, Y

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def test_axes_are_taken_or_divided(models):
    model = models["full"]
    _, given = plt.subplots(1, 2)
    display = LayerContributionDisplay.from_estimator(model, X, ax=given)
    assert display.axes_[0] is given[0]
    assert display.axes_[1] is given[1]
    figure, ax = plt.subplots()
    display.plot(ax)
    assert display.figure_ is figure
    assert len(figure.axes) == 3
    with pytest.raises(ValueError, match="draws on 1 x 2 axes, ax holds 3"):
        display.plot(plt.subplots(3)[1])
    with pytest.raises(ValueError, match="in no grid"):
        display.plot(plt.figure().add_axes((0, 0, 1, 1)))


def test_pipelines_and_searches_are_opened(models):
    double = FunctionTransformer(lambda x: 2 * x)
    pipeline = make_pipeline(double, tiny.estimator(**DOUBLE)).fit(X, Y)
    display = LayerContributionDisplay.from_estimator(pipeline, X)
    total = sum(display.parts.values()) + display.activation + pipeline[-1].intercept_
    np.testing.assert_allclose(total, pipeline.decision_function(X), atol=1e-10)
    search = GridSearchCV(tiny.estimator(max_iter=3), {"alpha": [0.1]}, cv=2).fit(X, Y)
    display = ObjectiveDisplay.from_estimator(search)
    assert list(display.objective_paths) == ["full"]


def test_searches_of_this_package_are_drawn():
    model = GradientFeatureClassifierCV(tiny.NET, alphas=[0.1], gradient_alphas=[0.1], cv=2)
    model.fit(X, Y)
    assert list(ObjectiveDisplay.from_estimator(model).objective_paths) == ["full"]
    pipeline = make_pipeline(FunctionTransformer(), model)
    assert LayerContributionDisplay.from_estimator(pipeline, X).figure_ is not None


def test_pictures_may_be_drawn_under_inference_mode(models):
    with torch.inference_mode():
        SaliencyDisplay.from_estimator(models["full"], X[:1])
        LayerContributionDisplay.from_estimator(models["full"], X)


CALLS = {
    "ObjectiveDisplay": ObjectiveDisplay.from_estimator,
    "PenaltyDisplay": PenaltyDisplay.from_estimator,
    "LayerContributionDisplay": lambda e: LayerContributionDisplay.from_estimator(e, X),
    "SaliencyDisplay": lambda e: SaliencyDisplay.from_estimator(e, X[:1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_or_unfitted_estimators_are_refused(name):
    with pytest.raises(TypeError, match=r"of an estimator of sklearn_gradfeat.*got Logistic"):
        CALLS[name](LogisticRegression())
    with pytest.raises(ValueError, match="not fitted"):
        CALLS[name](tiny.estimator())


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"PenaltyDisplay"}))
def test_unknown_options_are_refused(models, name):
    with pytest.raises((ValueError, TypeError), match=r"must be|unexpected keyword"):
        {
            "ObjectiveDisplay": lambda: ObjectiveDisplay.from_estimator(
                models["full"], quantity="x"
            ),
            "LayerContributionDisplay": lambda: LayerContributionDisplay.from_estimator(
                models["full"], X, by="x"
            ),
            "SaliencyDisplay": lambda: SaliencyDisplay.from_estimator(models["full"], X, by="x"),
        }[name]()


@pytest.mark.parametrize("name", CALLS)
def test_without_matplotlib_the_error_says_what_to_install(models, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=rf"{name}.from_estimator requires matplotlib"):
        CALLS[name](models["full"])
