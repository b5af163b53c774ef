"""Fitted models over networks of torchvision, timm and transformers, against these networks.

The networks and the comparison are those of examples/benchmarks/architectures.py, whose results
are in docs/results. ``-k`` selects networks: ``pytest -m slow -k timm/hrnet tests/reliability``.
"""

import copy
import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.encoder import NET
from tests.networks import build

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "benchmarks"
NETWORKS = runpy.run_path(str(SCRIPTS / "_architectures.py"))["NETWORKS"]
ROWS = json.loads((ROOT / "docs" / "results" / "architectures.json").read_text("utf-8"))["rows"]
KNOWN = {row["network"]: row for row in ROWS}


def check(row, derivatives_only=False):
    assert row["status"] in ("captured", "eager"), row["reason"]
    narrow = any("casts to lower precision" in message for message in row["warnings"])
    assert row["error"] < (1e-2 if narrow else 1e-5)
    assert row["share"] > 0.01, "the gradient term plays no part"
    assert row["unchanged"], "the fit changed the network"
    if derivatives_only:
        return
    assert row["stationarity"] < 1e-2
    assert row["objective"] < (1e-4 if narrow else 1e-10)
    assert row["restored"], "a saved or pickled model has other predictions"
    if row["status"] == "captured":
        assert row["exported"] < (1e-4 if narrow else 1e-10)
    else:
        assert "cannot be exported" in row["exported"]


class Branching(nn.Module):
    """A network that cannot be captured as a graph."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) if float(x.sum()) < 1e9 else x


IMAGES = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["residual", "normed", "branching"])
def test_tiny_network(kind, scripts):
    module, _ = build("normed" if kind == "normed" else "residual")
    if kind == "branching":
        module = Branching(copy.deepcopy(module)).eval()
    derivatives_only = kind == "residual"
    row = scripts("architectures").measure(module, IMAGES, derivatives_only)
    assert row["status"] == ("eager" if kind == "branching" else "captured")
    check(row, derivatives_only)


def test_tiny_text_encoder(scripts):
    tokens = scripts("_architectures").tokens()
    row = scripts("architectures").measure(copy.deepcopy(NET).double(), tokens, True)
    assert row["status"] == "captured"
    check(row, True)


def test_table(scripts, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before\n" + "\n".join(scripts("architectures").MARKS) + "\nafter")
    row = scripts("architectures").measure(build("residual")[0], IMAGES, True)
    refused = {"network": "b", "parameters": 2_000_000, "status": "refused", "reason": "Too odd."}
    scripts("architectures").write_page(page, [{"network": "a", **row}, refused])
    lines = page.read_text().split("\n")
    assert lines[0] == "Before" and lines[-1] == "after"
    assert lines[5].startswith("| a | 0.000684 | `block.1` | 4 | 100 | captured | ")
    assert lines[6] == "| b | 2 | | | | refused: Too odd. | |"


def test_network_that_is_refused(scripts):
    row = scripts("architectures").measure(nn.Dropout(0.1).double(), torch.randn(6, 4))
    assert row["status"] == "refused"
    assert "no parameters to differentiate" in row["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_architecture(name, scripts):
    pytest.importorskip(name.partition("/")[0])
    row = scripts("architectures").measure(*scripts("_architectures").build(name))
    known = KNOWN.get(name, row)
    assert [row[key] for key in ("status", "reason")] == [known["status"], known["reason"]]
    if row["status"] != "refused":
        assert row["gradient_layers"] == known.get("gradient_layers", row["gradient_layers"])
        check(row)
