"""Time to capture a network as a graph, in units of ``torch.export`` alone.

*First* is the capture of a network whose architecture is new to the process, *second* that of
another network of the same architecture, and *run_decompositions* what torch's own removal of
writes would cost after the export. Networks have random weights; times are those of the processor
(``time.process_time``). The names of torchvision come without a prefix, those of timm after
``timm/``.

    python examples/benchmarks/capture.py --output capture.json
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch
import torchvision
from _setup import save

from sklearn_gradfeat.backbones import _capture
from sklearn_gradfeat.backbones._graph import ActivationModule

TIMES = ("export", "run_decompositions", "first", "second")
TIMM = ("efficientvit_m0", "hiera_tiny_224", "davit_tiny", "res2net50_14w_8s")
LARGE = ("vit_h_14", "regnet_y_128gf")  # 2.5 GB of weights each


def network(name):
    """Return a network with random weights, and the side of its images."""
    if name.startswith("timm/"):
        import timm

        module = timm.create_model(name.removeprefix("timm/"), pretrained=False)
        return module, module.default_cfg["input_size"][-1]
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **extra), 224


def seconds(function, *arguments):
    """Return the processor time of a call, and its result."""
    start = time.process_time()
    result = function(*arguments)
    return time.process_time() - start, result


def export(module, example):
    """Return a module as a program of ``torch.export``."""
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=shapes)


def one(name):
    """Return the seconds of every kind for one network."""
    times = {}
    modules = []
    for _ in range(3):
        module, side = network(name)
        modules.append(ActivationModule(module.eval(), None).requires_grad_(False))
    example = torch.rand(2, 3, side, side)
    for module in modules:  # as in a fit, whose first check of a network runs it
        module(example)
    times["export"], program = seconds(export, modules.pop(), example)
    times["run_decompositions"], _ = seconds(program.run_decompositions, {})
    _capture._exported.clear()
    for kind, module in zip(("first", "second"), modules, strict=True):
        times[kind], _ = seconds(_capture.capture, module, example)
    return times


def table(rows):
    """Return the rows as a Markdown table, with their sum."""
    lines = ["| network | export, s | run_decompositions | first | second |"]
    lines.append("|---|---:|---:|---:|---:|")
    total = {kind: sum(row[kind] for row in rows) for kind in TIMES}
    for row in [*rows, {"network": "sum", **total}]:
        ratios = " | ".join(f"{row[kind] / row['export']:.2f}" for kind in TIMES[1:])
        lines.append(f"| {row['network']} | {row['export']:.1f} | {ratios} |")
    return "\n".join(lines)


def main():
    """Print the table and write JSON after every network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = torchvision.models.list_models(module=torchvision.models)
    default = [*(n for n in known if n not in LARGE), *(f"timm/{name}" for name in TIMM)]
    parser.add_argument("--networks", nargs="+", default=default)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("capture.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.networks:
        runs = [one(name) for _ in range(arguments.repeats)]
        rows.append({"network": name})
        rows[-1] |= {kind: statistics.median(run[kind] for run in runs) for kind in TIMES}
        save(rows, arguments)
    print(table(rows))


if __name__ == "__main__":
    main()
