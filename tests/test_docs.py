"""The documentation says what the code is."""

import configparser
import importlib
import re
from pathlib import Path

import pytest

import sklearn_gradfeat

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "sklearn_gradfeat"


def rooms():
    """Return the rooms in the order of the page."""
    return re.findall(r"^\| \d+ \| `(\w+)` \|", PAGE, re.MULTILINE)


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_order_of_the_rooms_is_the_checked_one():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    checked = config["importlinter:contract:layers"]["layers"].split()
    assert checked[::-1] == rooms()
    drawn = re.search(r"^    data( → .*\n +→ .*)$", PAGE, re.MULTILINE)[1]
    assert re.findall(r"\w+", drawn) == rooms()[1:]


def test_every_folder_is_a_room_and_no_module_lies_flat():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(rooms())
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("room", rooms())
def test_the_page_lists_the_modules_of_every_room(room):
    listed = PAGE.partition(f"\n**`{room}/`**\n")[2].partition("\n**")[0].partition("\n## ")[0]
    modules = {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"^\| `(\w+\.py)` \|", listed, re.MULTILINE)) == modules


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`(\w+\._\w+\.[\w.]+)`", section("One fit"))))
)
def test_the_walk_through_a_fit_names_real_functions(name):
    room, module, *path = name.split(".")
    found = importlib.import_module(f"sklearn_gradfeat.{room}.{module}")
    for attribute in path:
        found = getattr(found, attribute)
    assert callable(found)
    assert found.__module__ == f"sklearn_gradfeat.{room}.{module}"


def test_rooms_are_imported_through_their_interface():
    for path in PACKAGE.glob("*/*.py"):
        for room, module in re.findall(r"from sklearn_gradfeat\.(\w+)\.(\w+)", path.read_text()):
            assert room == path.parent.name, f"{path} imports {room}.{module}"


def test_every_public_name_is_in_the_reference():
    listed = (ROOT / "docs" / "api.md").read_text().split()
    assert set(sklearn_gradfeat.__all__) == set(listed) & set(dir(sklearn_gradfeat))
