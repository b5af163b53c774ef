"""The objective as a linear map of its unknowns."""

import pytest
import torch

from sklearn_gradfeat.training import TwoStageFit
from tests.reads import ReadValues
from tests.tiny import X, Y, estimator


@pytest.mark.parametrize("batch_size", [24, 5])
def test_a_pass_reads_at_most_two_values(batch_size):
    model = estimator(batch_size=batch_size)
    problem = model._problem(Y, None)
    stages = TwoStageFit(model._prepare(X, problem.weights), problem)
    objective = stages.second_objective(stages.fit_activation(0.1), 0.1)
    x = torch.ones_like(objective.penalty)
    logits = objective.forward(x)
    passes = (
        lambda: objective.forward(x),
        lambda: objective.adjoint(logits),
        lambda: objective.forward_adjoint(x, logits),
    )
    for run in passes:
        with ReadValues() as seen:
            run()
        assert seen.read <= 2
    with ReadValues() as seen:  # the counter works
        objective.forward(x).sum().item()
    assert seen.read > 0
