"""The code in README.md and in the user documentation runs and prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# A block of Python, and the output below it: a fence without a language.
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Return code and output of every block, with the number of its first line."""
    text = (ROOT / page).read_text("utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1)) + 1
        yield line, match[1], match[2]


@pytest.mark.parametrize("page", PAGES)
def test_code_prints_the_output_below_it(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {"__name__": "__main__"}
    with threadpool_limits(1):
        for line, code, expected in blocks(page):
            # Padding makes the line numbers of a traceback those of the page.
            compiled = compile("\n" * (line - 1) + code, page, "exec")
            if expected is None:  # it may need a download, or a network of the reader
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compiled, namespace)
            assert printed.getvalue() == expected, f"{page}, line {line}"


def test_pages_have_outputs_to_compare():
    compared = {page for page in PAGES for *_, expected in blocks(page) if expected is not None}
    assert {"README.md", "docs/tutorial.md"} <= compared
