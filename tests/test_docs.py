"""The documentation says what the code is."""

import configparser
import re
from pathlib import Path

import sklearn_gradfeat

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "sklearn_gradfeat"


def modules(folder):
    return {
        path.name if path.is_dir() else path.stem
        for path in folder.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem != "__init__"
    }


def test_layers_of_the_page_are_those_that_are_checked():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    checked = config["importlinter:contract:layers"]["layers"].strip().splitlines()
    shown = re.findall(r"^\| \d+ \| (.*) \|$", PAGE, re.MULTILINE)
    assert [set(line.split(" | ")) for line in checked] == [
        set(re.findall(r"`(\w+)`", line)) for line in reversed(shown)
    ]


def test_every_module_is_on_the_page():
    for name in modules(PACKAGE):
        assert f"`{name}" in PAGE, name
    for folder in ("backbones", "features", "solvers", "tangent", "displays"):
        section = PAGE.partition(f"**`{folder}/`**")[2].partition("\n**")[0]
        for name in modules(PACKAGE / folder):
            assert f"`{name}.py`" in section, f"{folder}/{name}"


def test_every_public_name_is_in_the_reference():
    listed = (ROOT / "docs" / "api.md").read_text().split()
    assert set(sklearn_gradfeat.__all__) == set(listed) & set(dir(sklearn_gradfeat))
