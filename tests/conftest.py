"""Settings shared by all tests."""

import os

os.environ.setdefault("SCIPY_ARRAY_API", "1")  # before scipy is imported, for check_estimator

import torch

torch.set_warn_always(True)
