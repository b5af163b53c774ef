"""Targets and weights as losses."""

import numpy as np
import pytest
import torch

from sklearn_gradfeat.data import weighted_mean, weighted_median
from sklearn_gradfeat.linearized import Bernoulli, Huber, LinearModel, Multinomial, Squared
from sklearn_gradfeat.training import classification_problem, regression_problem

CPU = torch.device("cpu")
WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("targets", "n_classes", "loss", "kind", "n_outputs"),
    [
        ([0, 1, 1, 0], 2, "log_loss", Bernoulli, 1),
        ([0, 1, 2, 0], 3, "log_loss", Multinomial, 3),
        ([[0, 1], [1, 1], [0, 0], [1, 0]], 2, "log_loss", Bernoulli, 2),
        ([0, 1, 1, 0], 2, "squared", Squared, 1),
        ([0, 1, 2, 0], 3, "squared", Squared, 3),
        ([[0, 1], [1, 1], [0, 0], [1, 0]], 2, "squared", Squared, 2),
    ],
)
def test_losses_of_classes(targets, n_classes, loss, kind, n_outputs):
    targets = np.array(targets)
    problem = classification_problem(np.arange(n_classes), targets, WEIGHTS, loss)
    found = problem.loss(CPU)
    assert type(found) is kind
    assert found.n_outputs == n_outputs
    assert np.array_equal(found.weights, WEIGHTS)
    assert problem.attributes["_multilabel"] == (targets.ndim == 2)
    assert not problem.offset.any()


def test_targets_of_squared_errors_are_plus_and_minus_one():
    problem = classification_problem(np.arange(3), np.array([0, 1, 2, 0]), WEIGHTS, "squared")
    minimizer = problem.loss(CPU).quadratic_minimizer
    assert minimizer.tolist() == [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, -1, -1]]


@pytest.mark.parametrize("epsilon", [None, 0.5])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_losses_of_real_targets(shape, fit_intercept, epsilon):
    y = np.random.default_rng(0).normal(size=shape) + 100
    problem = regression_problem(y, WEIGHTS, epsilon, fit_intercept)
    loss = problem.loss(CPU)
    assert type(loss) is (Squared if epsilon is None else Huber)
    assert problem.attributes == {"_single_output": len(shape) == 1}
    columns = y.reshape(4, -1)
    centre = weighted_mean if epsilon is None else weighted_median
    expected = centre(columns, WEIGHTS) if fit_intercept else np.zeros(columns.shape[1])
    np.testing.assert_allclose(problem.offset, expected)
    centred = torch.from_numpy(columns - problem.offset)
    assert not loss.gradient(centred).any()


def test_models_of_shifted_targets():
    problem = regression_problem(np.array([1.0, 2.0, 3.0, 4.0]), WEIGHTS, None, True)
    model = LinearModel(torch.ones(1, 2), torch.zeros(1), torch.ones(1, 2), {})
    restored = problem.restored(model)
    assert restored.intercept.tolist() == pytest.approx([3.0])
    assert problem.reduced(restored).intercept.tolist() == pytest.approx([0.0])
