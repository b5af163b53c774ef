"""The choice of the gradient layers θ₂."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase


def choose_parameters(
    gradient_layers: str | int | Sequence[str],
    names: Sequence[str],
    blocks: Callable[[], list[list[str]]],
    gone: dict[str, str],
) -> list[str]:
    """Return the names of the parameters that are differentiated.

    Parameters
    ----------
    gradient_layers : str, int or list of str
        ``"last"``, ``"all"``, a number of blocks, or names and glob patterns of
        submodules or parameters.
    names : sequence of str
        The parameters to choose from.
    blocks : callable
        Returns the parameter names of every block, from bottom to top.
    gone : dict of str to str
        Parameters that cannot be chosen, and why.

    Returns
    -------
    list of str
        In the order of ``names``.

    Raises
    ------
    ValueError
        If a pattern matches nothing, or there are fewer blocks than asked for.
    """
    if not names:
        raise ValueError("The backbone has no parameters to take gradients of.")
    if isinstance(gradient_layers, str) and gradient_layers == "all":
        return list(names)
    if isinstance(gradient_layers, str) and gradient_layers == "last":
        gradient_layers = 1
    if isinstance(gradient_layers, (str, Sequence)):
        patterns = [gradient_layers] if isinstance(gradient_layers, str) else gradient_layers
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(
                f"gradient_layers={gradient_layers!r}: a list holds one or more names or glob "
                "patterns of submodules or parameters."
            )
        chosen = {name for pattern in patterns for name in _match(pattern, names, gone)}
    else:
        found = [block for block in blocks() if block]
        if gradient_layers > len(found):
            raise ValueError(
                f"gradient_layers={gradient_layers} asks for more blocks than the backbone "
                f"has: {len(found)}. Pass a smaller number, or 'all'."
            )
        chosen = {name for block in found[-int(gradient_layers) :] for name in block}
    return [name for name in names if name in chosen]


def _match(pattern: str, names: Sequence[str], gone: dict[str, str]) -> list[str]:
    """Return the parameters that a pattern matches, themselves or through a submodule."""
    matched = [name for name in names if _covers(pattern, name)]
    if matched:
        return matched
    lost = [name for name in gone if _covers(pattern, name)]
    if lost:
        raise ValueError(
            f"gradient_layers={pattern!r} matches only parameters that cannot be chosen: "
            f"{lost[0]!r} {gone[lost[0]]}."
        )
    candidates = dict.fromkeys(part for name in names for part in _ancestors(name))
    nearest = difflib.get_close_matches(pattern, candidates, n=5, cutoff=0.0)
    raise ValueError(
        f"gradient_layers={pattern!r} matches no submodule and no parameter of the backbone. "
        f"The nearest names are {', '.join(map(repr, nearest))}."
    )


def _covers(pattern: str, name: str) -> bool:
    """Whether a pattern matches a parameter or one of the submodules around it."""
    return any(fnmatchcase(part, pattern) for part in _ancestors(name))


def _ancestors(name: str) -> list[str]:
    """Return a parameter's name and the paths of the submodules around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
