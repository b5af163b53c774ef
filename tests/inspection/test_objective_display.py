"""Curves of the objective."""

import numpy as np
import pytest

from sklearn_gradfeat import ObjectiveDisplay
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def test_the_gap_is_the_objective_less_its_last_value(models):
    display = ObjectiveDisplay.from_estimator(models)
    assert display.ax_.get_yscale() == "log"
    for line, (name, model) in zip(display.lines_, models.items(), strict=True):
        path = model.objective_path_
        gap = path[:-1] - path[-1]
        drawn = line.get_ydata()
        np.testing.assert_allclose(drawn[gap > 0], gap[gap > 0])
        assert np.isnan(drawn[gap <= 0]).all()
        assert line.get_label() == f"{name} ({model.n_passes_} passes)"


def test_the_objective_itself_is_drawn_over_given_axes(models):
    first = ObjectiveDisplay.from_estimator(models["full"], quantity="objective")
    second = ObjectiveDisplay.from_estimator(
        models["gradient"], name="g", quantity="objective", ax=first.ax_, color="k"
    )
    assert second.ax_ is first.ax_
    assert second.figure_ is first.figure_
    assert len(first.ax_.lines) == 2
    np.testing.assert_array_equal(second.lines_[0].get_ydata(), models["gradient"].objective_path_)
    assert second.lines_[0].get_color() == "k"
    texts = [text.get_text() for text in first.ax_.get_legend().get_texts()]
    assert [text.split()[0] for text in texts] == ["full", "g"]


def test_a_fit_without_iterations_has_an_empty_curve():
    display = ObjectiveDisplay(objective_paths={"a": np.array([0.5])}, n_passes={"a": 1}).plot()
    assert len(display.lines_[0].get_ydata()) == 0
    display.figure_.canvas.draw()


def test_the_axis_names_what_it_counts():
    one = tiny.estimator().fit(tiny.X, tiny.Y)
    three = tiny.estimator(n_linearizations=3).fit(tiny.X, tiny.Y)
    for models, name in (
        ({"one": one}, "Iteration"),
        ({"three": three}, "Linearization"),
        ({"one": one, "three": three}, "Iteration, or linearization"),
    ):
        assert ObjectiveDisplay.from_estimator(models).ax_.get_xlabel() == name
