"""How estimators are printed."""

import re

import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_html_repr
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureClassifierCV
from sklearn_gradfeat.backbones._builtin import SHIPPED
from tests import tiny
from tests.tiny import NET, X, Y

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

FITTED = "Sequential: 262 params; θ₂: 222 params in 2"


@pytest.fixture(scope="module")
def fitted():
    return tiny.estimator().fit(X, Y)


def captions(html):
    return re.findall(r'class="caption">([^<]*)<', html)


def test_a_network_is_printed_by_name_and_size():
    printed = repr(tiny.estimator())
    assert "backbone=<Sequential: 262 params>" in printed
    assert "Conv2d" not in printed
    assert len(printed) < 150


def test_a_fitted_estimator_names_its_gradient_layers(fitted):
    assert f"backbone=<{FITTED}>" in repr(fitted)
    assert "θ₂" not in repr(tiny.estimator(features="activation").fit(X, Y))


@pytest.mark.parametrize(
    ("samples", "name"), [(X.clip(0, 1), SHIPPED[0]), (X.reshape(24, -1), "random MLP")]
)
def test_the_default_is_named_once_it_is_known(samples, name):
    model = GradientFeatureClassifier(features="activation").fit(samples, Y)
    assert f"backbone=<{name}>" in repr(model)


def test_many_layers_are_shortened():
    deep = nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(5)])
    printed = repr(tiny.estimator(deep, gradient_layers="all", max_iter=2).fit(X, Y))
    assert "<Sequential: 10 params; θ₂: 10 params in 0, …, 4 (5 layers)>" in printed


def test_pipelines_and_searches_print_the_network_truncated():
    """scikit-learn prints the parameters of inner estimators itself, in about 700 characters."""
    deep = tiny.estimator(nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(50)]))
    pipeline = make_pipeline(FunctionTransformer(), deep)
    search = GridSearchCV(pipeline, {"gradientfeatureclassifier__alpha": [1, 2]})
    for outer in (pipeline, search):
        printed = repr(outer)
        assert "GradientFeatureClassifier(alpha=0.1" in printed
        assert "Conv2d(1, 1" in printed
        assert len("".join(printed.split())) < 800


@pytest.mark.parametrize(
    ("backbone", "printed"),
    [(None, "GradientFeatureClassifier()"), ("resnet18", "backbone='resnet18'")],
)
def test_short_text_stays_as_it_is(backbone, printed):
    assert printed in repr(GradientFeatureClassifier(backbone))


def test_the_diagram_has_a_caption(fitted):
    pipeline = make_pipeline(FunctionTransformer(), fitted)
    search = GridSearchCV(pipeline, {"gradientfeatureclassifier__alpha": [1, 2]})
    for outer in (fitted, pipeline, search):
        html = estimator_html_repr(outer)
        assert FITTED in captions(html)
        assert "alpha" in html
    assert captions(estimator_html_repr(tiny.estimator())) == ["Sequential: 262 params"]


def test_an_estimator_alone_is_shown_without_the_network(fitted):
    search = GradientFeatureClassifierCV(NET, alphas=[0.1], gradient_alphas=[0.1], cv=2)
    for model in (fitted, tiny.estimator(), search, clone(search).fit(X, Y)):
        assert "Conv2d" not in estimator_html_repr(model)
        assert "Conv2d" not in repr(model)
        assert "backbone=<Sequential: 262 params" in repr(model)


@pytest.mark.parametrize(
    ("backbone", "caption"),
    [
        (None, "default network"),
        ("resnet18", "resnet18"),
        (tiny.tiny_net, "tiny_net()"),
        (nn.LazyLinear(3), "LazyLinear: 0 params"),
        (nn.Linear(2000, 1000), "Linear: 2M params"),
        (nn.Linear(9999, 100, bias=False), "Linear: 1M params"),
    ],
)
def test_captions_of_all_kinds_of_backbones(backbone, caption):
    assert captions(estimator_html_repr(GradientFeatureClassifier(backbone))) == [caption]


def test_parameters_stay_as_they_were_passed(fitted):
    assert fitted.get_params()["backbone"] is NET
    assert make_pipeline(fitted).get_params()["gradientfeatureclassifier__backbone"] is NET
