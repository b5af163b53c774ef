"""Print the oldest versions that pyproject.toml promises, as constraints for pip.

The lower bounds themselves are in pyproject.toml and nowhere else.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOWER_BOUND = re.compile(r"([\w.-]+)>=([\w.]+)$")

project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
groups = [project["dependencies"], *project["optional-dependencies"].values()]
for requirement in dict.fromkeys(requirement for group in groups for requirement in group):
    if bound := LOWER_BOUND.match(requirement):
        print(f"{bound[1]}=={bound[2]}")
