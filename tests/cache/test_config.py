"""Settings are validated, bound the stores, and are restored."""

import multiprocessing
import os

import pytest

from sklearn_gradfeat import config_context, get_config, set_config
from sklearn_gradfeat.cache import _config

SIZES = {"store_bytes": "auto", "memory_bytes": "auto"}
DEFAULTS = {**SIZES, "checkpoint_seconds": 60}


def test_auto_is_a_share_of_the_memory(monkeypatch):
    monkeypatch.setattr(_config, "_total_memory", lambda: 4000)
    assert (_config.store_bytes(), _config.memory_store_bytes()) == (1000, 1000)
    assert _config.memory_bytes() == 2000
    with config_context(store_bytes=7, memory_bytes=5):
        assert (_config.store_bytes(), _config.memory_store_bytes()) == (7, 7)
        assert _config.memory_bytes() == 5


def test_auto_is_shared_among_worker_processes(monkeypatch):
    monkeypatch.setattr(_config, "_total_memory", lambda: 4000)
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert (_config.store_bytes(), _config.memory_store_bytes()) == (1000, 200)
    assert _config.memory_bytes() == 400
    with config_context(store_bytes=7, memory_bytes=5):
        assert (_config.memory_store_bytes(), _config.memory_bytes()) == (7, 5)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [-1, 1.5, True, "all"])
def test_invalid_sizes(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer .*got {value!r}"):
        set_config(**{name: value})
    assert get_config() == DEFAULTS


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "all"])
def test_invalid_seconds(value):
    with pytest.raises(ValueError, match=f"checkpoint_seconds must be .*got {value!r}"):
        set_config(checkpoint_seconds=value)
    assert get_config() == DEFAULTS


def test_context_restores_settings_after_an_error():
    with (
        pytest.raises(KeyError, match="inside"),
        config_context(store_bytes=7, checkpoint_seconds=0.5),
    ):
        assert get_config() == {**DEFAULTS, "store_bytes": 7, "checkpoint_seconds": 0.5}
        raise KeyError("inside")
    assert get_config() == DEFAULTS


def test_settings_are_a_copy():
    get_config()["store_bytes"] = 7
    assert get_config() == DEFAULTS
