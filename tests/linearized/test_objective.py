"""The objective as a linear map of its unknowns."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sklearn_gradfeat.training import TwoStageFit
from tests.tiny import X, Y, estimator


class ReadValues(TorchDispatchMode):
    """Counts what waits for a device: values read by Python, and tensors moved to the host."""

    def __init__(self):
        super().__init__()
        self.read = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name
        moved = name in ("aten::_to_copy", "aten::copy_") and found.device != args[-1].device
        self.read += moved or name in ("aten::_local_scalar_dense", "aten::nonzero")
        return found


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
