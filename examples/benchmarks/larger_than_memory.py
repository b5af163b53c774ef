"""Memory and time of fits whose trunk output is in memory, and of fits that stream it from a file.

The images are random blocks of pixels in a memory map, 3 kB each, in a temporary folder; the class
says whether the upper or the lower half is brighter. The network is a small random convolutional
network. Its trunk output takes 8 kB and its activation 256 bytes for each image. Every fit runs in
a process of its own, once with a bound of --bound MiB on the memory for trunk output and
activations, and once with the default bound, half of the memory of the machine.

Peak memory is that of the whole process during `fit` and `predict`: all resident memory, and the
part that no file backs, without which the system cannot do. Both are measured on Linux only. A
table compares the growth of the streamed peak from row to row with what should grow: the
activations, which are mapped, and the vectors of the length of the samples, about 15 numbers in
float64 for each sample of two classes. --search-samples also measures a streamed search of
`GradientFeatureClassifierCV` with three folds.

A pass computes the derivatives of the linear model, forward and backward, for all images. Passes
with the trunk output in memory and in a file alternate after the fit, so the file is in the page
cache if that has room; the time is the median. The last table has the speed of reading all trunk
output, without the network, from one file with `preadv`, from a memory map, and by look-ups in the
LMDB file of a feature store.

    python examples/benchmarks/larger_than_memory.py --out larger_than_memory.json

`plot_memory.py` draws the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _setup import environment, resident, two_stages
from sklearn.exceptions import ConvergenceWarning
from torchvision.ops import Permute
from torchvision.transforms import v2

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    config_context,
)
from sklearn_gradfeat.cache._disk import disk_store
from sklearn_gradfeat.cache._sample_files import FileBoundary, SampleFile, mapped_tensor
from sklearn_gradfeat.cache._store import Boundary, HeldChunk, TrunkKey

SIZES = (2_000, 20_000, 100_000, 200_000)
BATCH = 256
# Bytes of a sample that a streamed fit has in memory: the mapped activations, and the vectors.
ACTIVATION, VECTORS = 64 * 4, 15 * 8


def network():
    """Return a random network; its last convolution is the gradient layer."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, stride=2, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    )  # fmt: skip


def write_images(folder, n):
    """Write a memory map of images and their classes, block by block."""
    X = np.lib.format.open_memmap(folder / "X.npy", "w+", np.uint8, (n, 32, 32, 3))
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=n)
    for start in range(0, n, 10_000):
        label = y[start : start + 10_000]
        small = rng.integers(0, 200, (len(label), 8, 8, 3), dtype=np.uint8)
        small[label == 0, :4] += 20
        small[label == 1, 4:] += 20
        X[start : start + 10_000] = small.repeat(4, 1).repeat(4, 2)
    X.flush()
    np.save(folder / "y.npy", y)


class Peak(threading.Thread):
    """Notes the peak of the memory that no file backs, which Linux does not note by itself."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self._done = resident("RssAnon"), threading.Event()

    def run(self):
        while not self._done.wait(0.005):
            self.peak = max(self.peak, resident("RssAnon"))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_exception):
        self._done.set()
        self.join()


def measure(task):
    """Return memory and times of one fit."""
    folder, n = Path(task["folder"]), task["n_samples"]
    X, y = np.load(folder / "X.npy", mmap_mode="r")[:n], np.load(folder / "y.npy")[:n]
    scale = torch.nn.Sequential(
        Permute([0, 3, 1, 2]), v2.ToDtype(torch.float32), v2.Normalize([127.0] * 3, [60.0] * 3)
    )
    kind, penalties = GradientFeatureClassifier, {"alpha": 1e-3, "gradient_alpha": 1e-4}
    if task["search"]:
        kind = GradientFeatureClassifierCV
        penalties = {"alphas": [1e-3], "gradient_alphas": [1e-4], "cv": 3}
    model = kind(
        network(), preprocess=scale, batch_size=BATCH, max_iter=task["max_iter"],
        feature_store=None, **penalties,
    )  # fmt: skip
    bound = task["bound"] * 2**20 if task["streamed"] else "auto"
    with warnings.catch_warnings(), config_context(memory_bytes=bound):
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The output of the frozen layers takes")
        resident("VmHWM", reset_peak=True)
        with Peak() as anonymous:
            start = time.perf_counter()
            model.fit(X, y)
            seconds = time.perf_counter() - start
            correct = int((model.predict(X) == y).sum())
        result = {
            "peak": resident("VmHWM"), "anonymous": anonymous.peak, "fit": seconds,
            "n_passes": model.n_passes_, "accuracy": 100 * correct / n,
            "coefficients": [model.intercept_.tolist(), float(np.linalg.norm(model.coef_))],
        }  # fmt: skip
        if task["streamed"] and not task["search"]:
            result |= passes(model, X, y)
    return result


def passes(model, X, y):
    """Return the times of passes, streamed and from memory in turn."""
    functions = {"streamed_pass": one_pass(model, X, y)}
    with config_context(memory_bytes="auto"):
        functions["memory_pass"] = one_pass(model, X, y)
    return medians(functions)


def one_pass(model, X, y):
    """Return a function that passes all samples forward and backward through the model."""
    stages = two_stages(model, X, y)
    first = stages.fit_activation(model.alpha)
    objective = stages.second_objective(first, model.gradient_alpha)
    x = torch.ones(sum(objective.sizes))
    logits = objective.forward(x)
    return lambda: objective.forward_adjoint(x, logits)


def medians(functions, repeats=3):
    """Return the median seconds of functions that are called in turn: of the wall, of the CPU."""
    clocks = {"": time.perf_counter, "_cpu": time.process_time}
    seconds = {name + kind: [] for name in functions for kind in clocks}
    for _ in range(repeats):
        for name, function in functions.items():
            starts = {kind: clock() for kind, clock in clocks.items()}
            function()
            for kind, clock in clocks.items():
                seconds[name + kind].append(clock() - starts[kind])
    return {name: float(np.median(found)) for name, found in seconds.items()}


def engines(folder, n, width=2048):
    """Return the time of reading all rows and of reading a fold of 80 %, batch by batch."""
    file = SampleFile(n, (torch.empty(1, width),), folder)
    mapped = mapped_tensor((n, width), torch.float32, folder)
    places = []
    with config_context(store_bytes=2 * n * width * 4 + 2**26):
        store, owner = disk_store(folder / "store"), torch.nn.Identity()
        key = TrunkKey(b"k" * 16, True, owner)
        for start in range(0, n, BATCH):
            part = torch.randn(min(BATCH, n - start), width)
            file.write(start, (part,))
            mapped[start : start + len(part)] = part
            names = [i.to_bytes(16, "little") for i in range(start, start + len(part))]
            store.add(key, names, HeldChunk((part,)), ())
            places += store.find(key, names)
    every = np.arange(n)
    fold = np.flatnonzero(np.random.default_rng(0).random(n) < 0.8)
    stored = Boundary(places)

    def of_map(rows):
        return lambda part: mapped[torch.from_numpy(rows[part])]

    readers = {
        "preadv": lambda rows: FileBoundary(file, rows).take,
        "memory map": of_map,
        "LMDB": lambda rows: stored.subset(rows).take,
    }
    rates = {name: {} for name in readers}
    for kind, rows in (("all", every), ("fold", fold)):
        read = {
            name: partial(read_all, reader(rows), len(rows)) for name, reader in readers.items()
        }
        seconds = medians(read)
        for name in readers:
            rates[name][kind] = len(rows) * width * 4 / 2**30 / seconds[name]
    return [{"engine": name, **rate} for name, rate in rates.items()]


def read_all(take, n_rows):
    """Read all rows, batch by batch."""
    for start in range(0, n_rows, BATCH):
        take(slice(start, min(start + BATCH, n_rows)))


def in_process(task):
    """Return the result of :func:`measure` in a new process."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def table(result):
    """Return the result as Markdown tables."""
    lines = [
        "| images | trunk output, MiB | peak, MiB | streamed, MiB | anonymous, MiB | "
        "streamed, MiB | pass, s | streamed, s | ratio | of CPU time | fit, s | streamed, s |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        held, streamed = r["memory"], r["streamed"]
        lines.append(
            f"| {r['n_samples']} | {r['trunk_output']:.0f} | {held['peak']:.0f} | "
            f"{streamed['peak']:.0f} | {held['anonymous']:.0f} | {streamed['anonymous']:.0f} | "
            f"{streamed['memory_pass']:.2f} | {streamed['streamed_pass']:.2f} | "
            f"{streamed['streamed_pass'] / streamed['memory_pass']:.2f} | "
            f"{streamed['streamed_pass_cpu'] / streamed['memory_pass_cpu']:.2f} | "
            f"{held['fit']:.1f} | {streamed['fit']:.1f} |"
        )
    lines += [
        "",
        "| images | kind | growth of the peak, MiB | activations, MiB | vectors, MiB |",
        "|---|---|---:|---:|---:|",
    ]
    for kind, copies in (("streamed", 1), ("search", 2)):  # a fold has its activations, too
        rows = [r for r in result["rows"] if kind in r]
        for before, after in itertools.pairwise(rows):
            n = after["n_samples"] - before["n_samples"]
            lines.append(
                f"| {before['n_samples']} to {after['n_samples']} | {kind} | "
                f"{after[kind]['peak'] - before[kind]['peak']:.0f} | "
                f"{copies * n * ACTIVATION / 2**20:.0f} | {n * VECTORS / 2**20:.0f} |"
            )
    lines += ["", "| engine | all, GiB/s | fold of 80 %, GiB/s |", "|---|---:|---:|"]
    lines += [f"| {r['engine']} | {r['all']:.2f} | {r['fold']:.2f} |" for r in result["engines"]]
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n-samples", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--search-samples", type=int, nargs="*", default=[], help="of --n-samples")
    parser.add_argument("--bound", type=int, default=64, help="MiB for trunk output, activations")
    parser.add_argument("--max-iter", type=int, default=2)
    parser.add_argument("--engine-samples", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, help="for temporary files; default: of the system")
    parser.add_argument("--out", type=Path, default=Path("larger_than_memory.json"))
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task is not None:
        print(json.dumps(measure(arguments.task)))
        return
    result = {
        "environment": environment(),
        "setting": {"bound": arguments.bound, "max_iter": arguments.max_iter, "batch_size": BATCH},
        "rows": [],
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        result["engines"] = engines(folder, arguments.engine_samples)
        write_images(folder, max(arguments.n_samples))
        for n in arguments.n_samples:
            task = {
                "folder": name, "n_samples": n, "bound": arguments.bound,
                "max_iter": arguments.max_iter,
            }  # fmt: skip
            row = {"n_samples": n, "trunk_output": n * 8 / 1024}
            for kind in ("memory", "streamed"):
                row[kind] = in_process({**task, "streamed": kind == "streamed", "search": False})
            if n in arguments.search_samples:
                row["search"] = in_process({**task, "streamed": True, "search": True})
            result["rows"].append(row)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
