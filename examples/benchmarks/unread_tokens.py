"""What it saves to leave out the tokens that nobody reads, for transformers with a class token.

A pass computes `J u` and `Jᵀ g` of all samples from the stored output of the frozen layers. Times
are processor times of one thread. The networks have random weights. The errors are those of both
products against the whole graph, relative to their norms. The runs of a repeat follow one another.

    python examples/benchmarks/unread_tokens.py --output unread_tokens.json
"""

from __future__ import annotations

import argparse
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
    """Return torchvision's vision transformer, and the shape of an image."""
    return without_classifier(vit_b_16(weights=None)), (3, 224, 224)


def deit():
    """Return timm's small DeiT, and the shape of an image."""
    import timm

    return timm.create_model("deit_small_patch16_224", num_classes=0), (3, 224, 224)


def registers():
    """Return timm's small DINOv2 with four registers, and the shape of an image."""
    import timm

    name = "vit_small_patch14_reg4_dinov2"
    return timm.create_model(name, num_classes=0, img_size=224), (3, 224, 224)


NETWORKS = {"vit_b_16": vit, "deit_small": deit, "dinov2_small_reg4": registers}


def frozen(module, images, whole):
    """Return a frozen network, with the whole graph or without the tokens that nobody reads."""
    backbone = _frozen.FrozenBackbone(module, images[:2], torch.float32, None)
    if whole:
        with mock.patch.object(_frozen, "without_unread_tokens", lambda captured: captured):
            backbone.computed
    return backbone


class Pass:
    """A pass over the stored output of the frozen layers of a network."""

    def __init__(self, backbone, images, gradient_layers):
        network = backbone.network(backbone.choose(gradient_layers))
        self.head = LinearizedHead(network.head, network.parameters, "ntk")
        self.u = torch.randn(self.head.size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.boundary = network.boundary(images)

    def __call__(self):
        """Return `J u` and its pullback."""
        return self.head.jvp_then_vjp(self.boundary, self.u, lambda tangent: tangent)


def seconds(run):
    """Return the processor time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(name, arguments):
    """Iterate over the rows of a network, one for each choice of gradient layers."""
    torch.manual_seed(0)
    module, shape = NETWORKS[name]()
    images = torch.rand(arguments.n_samples, *shape)
    backbones = [frozen(module.eval(), images, whole) for whole in (True, False)]
    for layers in arguments.layers:
        whole, part = (Pass(backbone, images, layers) for backbone in backbones)
        pairs = zip(whole(), part(), strict=True)
        errors = [float((a - b).norm() / a.norm()) for a, b in pairs]
        times = [(seconds(part), seconds(whole)) for _ in range(arguments.repeats)]
        stored = [sum(z[0].nbytes for z in run.boundary) for run in (part, whole)]
        yield {
            "network": name,
            "gradient_layers": layers,
            "bytes": stored[0],
            "bytes_whole": stored[1],
            "pass": statistics.median(a / b for a, b in times),
            "seconds": statistics.median(a for a, _ in times),
            "errors": errors,
        }


def table(rows):
    """Return the rows as a Markdown table."""
    lines = [
        "| a pass | stored, kB per sample | before | network | `gradient_layers` |",
        "|---:|---:|---:|---|---|",
    ]
    for row in rows:
        kilobytes = (f"{row[key] / 1000:.0f}" for key in ("bytes", "bytes_whole"))
        lines.append(
            f"| {row['pass']:.3f} | {' | '.join(kilobytes)} | {row['network']} | "
            f'`"{row["gradient_layers"]}"` |'
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--layers", nargs="+", default=["last", "after_attention"])
    parser.add_argument("--n-samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", "--out", type=Path, default=Path("unread_tokens.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in arguments.networks for row in compare(name, arguments)]
    save(rows, arguments)
    print("A pass in units of that over the whole graph:\n")
    print(table(rows))


if __name__ == "__main__":
    main()
