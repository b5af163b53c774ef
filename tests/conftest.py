"""Settings shared by all tests."""

import os

os.environ.setdefault("SCIPY_ARRAY_API", "1")  # before scipy is imported, for check_estimator

import gc
import importlib

import pytest
import torch

torch.set_warn_always(True)


def pytest_configure(config):
    """Run on the CPU, whose results have the same bits every time, without ``-m cuda``."""
    if "cuda" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when the device is first used


def pytest_collection_finish():
    """Leave what the imports made out of garbage collections, each of which would take a second."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """Skip the tests marked ``cuda`` without such a device."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def scripts(request, monkeypatch):
    """Import the scripts in SCRIPTS of the module by name, as Python does for their own folder."""
    monkeypatch.syspath_prepend(str(request.module.SCRIPTS))
    return importlib.import_module
