"""What it saves to leave out the tokens that nobody reads, for transformers with a class token.

A pass computes the activation, `J u` and `Jᵀ g` of all samples from the stored output of the frozen
layers. The networks have random weights. The runs of a repeat follow one another, on one thread.

    python examples/benchmarks/unread_tokens.py --output unread_tokens.json
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from _setup import save
from torchvision.models import vit_b_16

from sklearn_gradfeat.backbones import _frozen
from sklearn_gradfeat.backbones._sources import without_classifier
from sklearn_gradfeat.linearized import LinearizedHead


def vit():
    """Return torchvision's vision transformer and a batch of images."""
    return without_classifier(vit_b_16(weights=None)), (3, 224, 224)


def deit():
    """Return timm's small DeiT, with a class token, and the shape of an image."""
    import timm

    return timm.create_model("deit_small_patch16_224", num_classes=0), (3, 224, 224)


def registers():
    """Return timm's small DINOv2 with four registers, and the shape of an image."""
    import timm

    name = "vit_small_patch14_reg4_dinov2"
    return timm.create_model(name, num_classes=0, img_size=224), (3, 224, 224)


NETWORKS = {"vit_b_16": vit, "deit_small": deit, "dinov2_small_reg4": registers}


class Run:
    """A network that is cut in two below some of its parameters."""

    def __init__(self, module, images, gradient_layers):
        backbone = _frozen.FrozenBackbone(module, images[:2], torch.float32, None)
        self.network = backbone.network(backbone.choose(gradient_layers))
        self.head = LinearizedHead(self.network.head, self.network.parameters, "ntk")
        self.images, generator = images, torch.Generator().manual_seed(0)
        self.u = torch.randn(self.head.size, generator=generator)
        self.frozen()

    @torch.no_grad()
    def frozen(self):
        """Run the frozen layers, and keep their output."""
        self.boundary = self.network.boundary(self.images)

    def sweep(self):
        """Compute the activation, `J u` and its pullback."""
        return self.head.jvp_then_vjp(self.boundary, self.u, lambda tangent: tangent)


def seconds(run):
    """Return the processor time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(name, gradient_layers, arguments):
    """Return the row of a network with some gradient layers."""
    torch.manual_seed(0)
    module, shape = NETWORKS[name]()
    images = torch.rand(arguments.n_samples, *shape)
    with mock.patch.object(_frozen, "without_unread_tokens", lambda captured: captured):
        whole = Run(module.eval(), images, gradient_layers)
    rows = Run(module, images, gradient_layers)
    expected, found = whole.sweep(), rows.sweep()
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(expected, found, strict=True)]
    ratios = {"frozen layers": [], "pass": []}
    for _ in range(arguments.repeats):
        ratios["frozen layers"].append(seconds(rows.frozen) / seconds(whole.frozen))
        ratios["pass"].append(seconds(rows.sweep) / seconds(whole.sweep))
    stored = [sum(z[0].nbytes for z in run.boundary) for run in (whole, rows)]
    return {
        "network": name,
        "gradient_layers": gradient_layers,
        "bytes_whole": stored[0],
        "bytes": stored[1],
        **{key: statistics.median(values) for key, values in ratios.items()},
        "errors": errors,
    }


def table(rows):
    """Return the rows as a Markdown table."""
    lines = [
        "| network | `gradient_layers` | kB of a sample | before | frozen layers | a pass |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        kilobytes = (f"{row[key] / 1000:.0f}" for key in ("bytes", "bytes_whole"))
        lines.append(
            f"| {row['network']} | `{row['gradient_layers']!r}` | {' | '.join(kilobytes)} | "
            f"{row['frozen layers']:.2f} | {row['pass']:.3f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--layers", nargs="+", default=["last", "after_attention"])
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("unread_tokens.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = itertools.product(arguments.networks, arguments.layers)
    rows = [compare(*pair, arguments) for pair in pairs]
    save(rows, arguments)
    print("Time in units of that of the whole graph:\n")
    print(table(rows))


if __name__ == "__main__":
    main()
