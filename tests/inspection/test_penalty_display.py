"""Curves of the held-out loss."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sklearn_gradfeat import GradientFeatureClassifierCV, PenaltyDisplay, load
from tests import tiny
from tests.tiny import NET, X, Y

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def fitted():
    return tiny.estimator(alpha="auto", gradient_alpha="auto").fit(X, Y)


def drawn(errorbars):
    """Return penalties, losses and half lengths of the bars."""
    penalties, losses = errorbars.lines[0].get_data()
    ends = np.array(errorbars.lines[2][0].get_segments())
    return penalties, losses, np.diff(ends[:, :, 1], axis=1)[:, 0] / 2


def test_both_paths_are_drawn(fitted):
    display = PenaltyDisplay.from_estimator(fitted)
    scores = fitted.validation_scores_
    n_alphas = np.flatnonzero(np.isinf(scores["gradient_alpha"]))[-1]
    for name, part in {
        "alpha": slice(n_alphas),
        "gradient_alpha": slice(n_alphas + 1, None),
    }.items():
        i = list(display.paths).index(name)
        order = np.argsort(scores[name][part])
        columns = (scores[key][part][order] for key in (name, "loss", "standard_error"))
        for expected, found in zip(columns, drawn(display.errorbars_[i]), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12)
        assert display.axes_[i].get_xscale() == "log"
        assert display.axes_[i].get_xlabel() == name
    (horizontal,) = (
        line for line in display.axes_[1].lines if line.get_label().startswith("no gradient term")
    )
    assert set(horizontal.get_ydata()) == {scores["loss"][n_alphas]}


def test_the_chosen_value_is_marked(fitted):
    axes = PenaltyDisplay.from_estimator(fitted).axes_[0]
    (line,) = (line for line in axes.lines if line.get_label().startswith("chosen: "))
    assert set(line.get_xdata()) == {fitted.alpha_}


@pytest.mark.parametrize(
    ("given", "drawn"), [({"alpha": 0.1}, "gradient_alpha"), ({"gradient_alpha": 0.1}, "alpha")]
)
def test_a_single_path_is_drawn_on_given_axes(given, drawn):
    model = tiny.estimator(**{"alpha": "auto", "gradient_alpha": "auto", **given}).fit(X, Y)
    ax = plt.figure().add_axes((0, 0, 1, 1))
    display = PenaltyDisplay.from_estimator(model, ax=ax, color="k")
    assert list(display.paths) == [drawn]
    assert display.axes_[0] is ax
    assert display.errorbars_[0].lines[0].get_color() == "k"


def test_a_model_of_gradients_alone_has_no_infinite_penalty():
    model = tiny.estimator(alpha="auto", gradient_alpha="auto", features="gradient").fit(X, Y)
    display = PenaltyDisplay.from_estimator(model)
    scores = model.validation_scores_
    assert len(display.paths["alpha"]["loss"]) == np.isinf(scores["gradient_alpha"]).sum()
    assert np.isfinite(display.paths["gradient_alpha"]["penalty"]).all()


def test_infinite_values_have_no_place_on_the_axes():
    path = {
        "penalty": np.array([np.inf, 1.0, 0.1]),
        "loss": np.array([0.5, 0.6, np.inf]),
        "standard_error": np.array([0.0, 0.1, np.nan]),
    }
    display = PenaltyDisplay(paths={"gradient_alpha": path}, chosen={"gradient_alpha": np.inf})
    axes = display.plot().axes_[0]
    assert drawn(display.errorbars_[0])[0].tolist() == [1.0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["no gradient term, chosen"]
    display.figure_.canvas.draw()


def test_a_model_from_a_file_is_drawn(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    display = PenaltyDisplay.from_estimator(load(tmp_path / "model", backbone=NET))
    assert list(display.paths) == ["alpha", "gradient_alpha"]


def test_estimators_without_scores_are_refused():
    with pytest.raises(ValueError, match=r"compared no penalties. Fit it with alpha='auto'"):
        PenaltyDisplay.from_estimator(tiny.estimator().fit(X, Y))
    search = GradientFeatureClassifierCV(NET, alphas=[0.1], gradient_alphas=[0.1], cv=2).fit(X, Y)
    with pytest.raises(TypeError, match="which GradientFeatureClassifierCV does not have"):
        PenaltyDisplay.from_estimator(search)


def test_every_alpha_has_a_curve_of_its_own():
    path = {
        "penalty": np.array([np.inf, 1.0, 0.1, 1.0, 0.01]),
        "loss": np.array([0.5, 0.6, 0.4, 0.3, 0.2]),
        "standard_error": np.full(5, 0.1),
        "alpha": np.array([0.1, 1.0, 1.0, 0.1, 0.1]),
    }
    display = PenaltyDisplay(paths={"gradient_alpha": path}, chosen={"gradient_alpha": 0.01})
    display.plot()
    curves = [(list(found[0]), list(found[1])) for found in map(drawn, display.errorbars_)]
    assert curves == [([0.1, 1.0], [0.4, 0.6]), ([0.01, 1.0], [0.2, 0.3])]
    assert [bars.get_label() for bars in display.errorbars_] == ["alpha 1", "alpha 0.1"]
