"""Docstrings of the public classes."""

import ast
import inspect
import re

import pytest

import sklearn_gradfeat
from sklearn_gradfeat.estimators._docstrings import with_shared_text

CLASSES = [
    kind
    for kind in (getattr(sklearn_gradfeat, name) for name in sklearn_gradfeat.__all__)
    if inspect.isclass(kind)
]
ESTIMATORS = [kind for kind in CLASSES if hasattr(kind, "fit")]
# Layout, summaries, and the agreement of parameters with the signature.
NUMPYDOC = {
    "GL01", "GL02", "GL03", "GL05", "GL06", "GL07", "GL08", "GL09", "GL10",
    "SS01", "SS02", "SS03", "SS04", "SS05", "PR01", "PR02", "PR03", "PR04", "PR05", "PR06",
    "PR07", "PR08", "PR09", "PR10", "RT01", "YD01",
}  # fmt: skip


def parameter_types(kind):
    """Return the types of the documented parameters by name."""
    text = inspect.getdoc(kind)
    section = re.search(r"^Parameters\n-+\n(.*?)(?=\n\n[A-Z][\w ]+\n-+\n|\Z)", text, re.M | re.S)
    return dict(re.findall(r"^(\w+) : (.*)$", section[1], re.M))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_parameters_are_those_of_the_constructor(kind):
    parameters, types = inspect.signature(kind).parameters, parameter_types(kind)
    assert list(types) == list(parameters)
    for name, parameter in parameters.items():
        _, given, default = types[name].rpartition("default=")
        assert bool(given) == (parameter.default is not parameter.empty), name
        assert not given or ast.literal_eval(default) == parameter.default, name


@pytest.mark.parametrize("kind", CLASSES)
def test_shared_text_is_in_its_place(kind):
    text = inspect.getdoc(kind)
    assert not re.search(r"%[A-Z_]+%", text)
    assert max(map(len, text.split("\n"))) <= 96


@with_shared_text
class Documented:
    """A class.

    References
    ----------
    %REFERENCES%
    """


def test_shared_text_has_the_indentation_of_the_docstring():
    lines = inspect.getdoc(Documented).split("\n")
    assert lines[4].startswith(".. [1] F. Mu")
    assert lines[5].startswith("   ICLR")


def test_without_docstrings():
    class Some:
        pass

    Some.__doc__ = None  # as under python -OO
    assert with_shared_text(Some).__doc__ is None


@pytest.mark.parametrize("kind", CLASSES)
def test_docstrings_are_valid_numpydoc(kind):
    validate = pytest.importorskip("numpydoc.validate").validate
    methods = [n for n, value in vars(kind).items() if callable(value) and n[0] != "_"]
    for name in ("", *(f".{n}" for n in methods)):
        found = validate(f"{kind.__module__}.{kind.__name__}{name}")["errors"]
        assert not [error for error in found if error[0] in NUMPYDOC], name
