"""Fixtures of the tests of the cache."""

import pytest

from tests.counting import Counted


@pytest.fixture
def counted(tmp_path):
    return Counted(str(tmp_path / "passes"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"
