"""Transforms and networks of an installed package, since outputs of others are not cached."""

import sys
from pathlib import Path

_FOLDER = str(Path(__file__).parent / "site-packages")
if _FOLDER not in sys.path:
    sys.path.append(_FOLDER)

from counting_networks import Logged  # noqa: E402
from counting_transforms import Counted, Halved  # noqa: E402

__all__ = ["Counted", "Halved", "Logged"]
