"""Fits in processes that may crash or be killed.

Tests run this module as a program, which calls a function of a test module and prints its result.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.tiny import X, Y, estimator

ROOT = Path(__file__).parents[2]


class Pointwise(nn.Module):
    """A network whose frozen part has the same bits for a sample in any batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.shift = (nn.Parameter(torch.randn(64)) for _ in range(2))
        self.top = nn.Linear(64, 6)

    def forward(self, x):
        return self.top((x.flatten(1) * self.scale + self.shift).tanh()).tanh()


NETWORK = Pointwise()


def fit(path, shift=0.0):
    """Fit a model with a feature store, or without one; return the bytes of its numbers."""
    options = {"gradient_layers": "top", "batch_size": 8, "max_iter": 5}
    model = estimator(NETWORK, feature_store=path, **options).fit(X + np.float32(shift), Y)
    arrays = [model.coef_, model.intercept_, *model.gradient_coef_.values()]
    return b"".join(array.tobytes() for array in arrays)


def run(function, *arguments, timeout):
    """Call a function of a test module in a new process; return its result."""
    texts = [str(a) if isinstance(a, Path) else a for a in arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", __name__, function.__module__, function.__name__, json.dumps(texts)],
        env=environment, timeout=timeout, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])  # Gloo of torch 2.9 prints before it


if __name__ == "__main__":
    module, name, arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))
