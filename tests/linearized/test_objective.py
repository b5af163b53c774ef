"""The objective as a linear map of its unknowns."""

import numpy as np
import pytest
import torch

from sklearn_gradfeat.cache import _runner
from sklearn_gradfeat.training import TwoStageFit
from tests.reads import ReadValues
from tests.tiny import X, Y, estimator


@pytest.mark.parametrize("batch_size", [24, 5])
def test_a_pass_reads_at_most_two_values(batch_size, monkeypatch):
    """Batches that move from the host to the device do not count."""
    monkeypatch.setattr(_runner, "to_device", lambda tensor, device: tensor)
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


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.item,
        bool,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        np.asarray,
        torch.Tensor.cpu,
        lambda x: x.to("cpu"),
        lambda x: x.to(device=torch.device("cpu")),
    ],
)
def test_reads_of_the_host_are_counted(read):
    """Copies to the host count on a CPU, too, where they do nothing."""
    x = torch.ones(())
    with ReadValues() as seen:
        read(x.to(x) + 1)
    assert seen.read == 1
