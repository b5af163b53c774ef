"""Time and bytes of a pass by the number of processes that fit together, and a model of both.

The images are random blocks of 4 x 4 pixels, the network is a shipped encoder. The classes are
those of the nearest of ten images. Every process has one thread and a share of the images, and
communicates by gloo on this machine. Seconds are those of the processor, of the busiest process,
so they hardly depend on other load. A pass is the second stage divided by its passes over the head.

Bytes are counted where torch.distributed is called: the size of the tensors of one process. They
are compared with the arithmetic: the gradients, of all unknowns and of the coordinates of the
coarse space, the Kronecker factors of the layers, and the headers.

One process fits all images and half of them, which separates the time of an image from that of
work that every process repeats, such as the preconditioner. The model of a pass on K machines,
with n images, a ring all-reduce of B bytes, and C calls, most of them of 32 bytes, is::

    n / K * seconds_per_image + fixed_seconds + 2 (K - 1) / K * B / bandwidth + C (K - 1) * latency

    python examples/benchmarks/distributed.py --n-train 20000 --output distributed.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from _setup import nearest, random_images, save
from sklearn.exceptions import ConvergenceWarning

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.curvature._coarse_space import Subspace
from sklearn_gradfeat.curvature._kfac import Factor
from sklearn_gradfeat.linearized import TangentObjective
from sklearn_gradfeat.training import TwoStageFit

PENALTIES = {"alpha": 1e-3, "gradient_alpha": 1e-5}
SIZES = (1_000_000, 100_000_000)
LARGEST = 4096  # processes in the model
HEADER = 32  # bytes


@contextmanager
def counted():
    """Count calls and bytes of collectives, and the bytes of gradients, factors and headers."""
    noted = {"calls": 0, "bytes": 0, "expected": 0}

    def of_tensor(name, size):
        function = getattr(dist, name)

        def counting(*arguments, **options):
            noted["calls"] += 1
            noted["bytes"] += size(arguments)
            noted["expected"] += HEADER if name == "all_gather" else 0
            return function(*arguments, **options)

        return mock.patch.object(dist, name, counting)

    def gradient(kind):
        function = kind._join if kind is TangentObjective else kind.adjoint

        def counting(self, *arguments):
            found = function(self, *arguments)
            if kind is Subspace or self.tangent is not None:
                noted["expected"] += found.nbytes
            return found

        return mock.patch.object(kind, function.__name__, counting)

    def factor(self, function=Factor.sum_over_ranks):
        function(self)
        few = sum(rows.nbytes // dist.get_world_size() for rows in self.rows)
        noted["expected"] += (few or self.inputs.nbytes) + self.output.nbytes

    with (
        of_tensor("all_reduce", lambda given: given[0].nbytes),
        of_tensor("all_gather", lambda given: given[1].nbytes),
        of_tensor("broadcast", lambda given: given[0].nbytes),
        gradient(TangentObjective),
        gradient(Subspace),
        mock.patch.object(Factor, "sum_over_ranks", factor),
    ):
        yield noted


@contextmanager
def second_stage(noted):
    """Note processor time, calls and bytes of the second stage of a fit."""
    found, fit_gradient = {}, TwoStageFit.fit_gradient

    def measured(self, first, *arguments):
        before, start, wall = dict(noted), time.process_time(), time.perf_counter()
        result = fit_gradient(self, first, *arguments)
        found.update({key: noted[key] - before[key] for key in ("calls", "bytes", "expected")})
        found.update(seconds=time.process_time() - start, wall=time.perf_counter() - wall)
        return result

    with mock.patch.object(TwoStageFit, "fit_gradient", measured):
        yield found


def link(size):
    """Return seconds for each small collective, and bytes a second of a large all-reduce."""
    if size == 1:
        return {"latency": None, "bandwidth": None}
    found = {}
    for name, n, repeats in (("small", 4, 200), ("large", 2**22, 5)):
        tensor = torch.ones(n)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(tensor)
        found[name] = (time.perf_counter() - start) / repeats
    per_step = 2 * (size - 1)
    return {
        "latency": found["small"] / per_step,
        "bandwidth": per_step / size * 2**24 / found["large"],
    }


def measure(task):
    """Return the seconds, bytes and calls of a fit in one process."""
    torch.set_num_threads(1)
    rank, size = task["rank"], task["size"]
    images = random_images(task["n_train"])
    classes, own = nearest(images, 10), slice(rank, None, size)
    options = {"gradient_layers": task["gradient_layers"], "feature_store": None, **PENALTIES}
    model = GradientFeatureClassifier(
        task["network"], max_iter=task["max_iter"], **options, activation_layer=None
    )
    with warnings.catch_warnings(), counted() as noted, second_stage(noted) as found:
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(images[:64], np.arange(64) % 2)  # loads libraries and captures the graph
        if size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{task['store']}", rank=rank, world_size=size
            )
        model.fit(images[own], classes[own])
        connection = link(size)
    return {
        **found,
        **connection,
        "passes": model.n_passes_,
        "objective": model.objective_path_[-1],
        "unknowns": model.coef_.size
        + model.intercept_.size
        + sum(value.size for value in model.gradient_coef_.values()),
    }


def together(arguments, size, n_train):
    """Return the measurements of all processes of a group."""
    setting = ("network", "max_iter", "gradient_layers")
    task = {key: getattr(arguments, key) for key in setting} | {"size": size, "n_train": n_train}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(size):
            one = json.dumps(task | {"rank": rank, "store": f"{folder}/store"})
            command = [sys.executable, __file__, "--task", one]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return [json.loads(process.communicate()[0]) for process in processes]


def row(size, n_train, runs):
    """Return the medians over runs of the busiest process."""
    busiest = [max(run, key=lambda one: one["seconds"]) for run in runs]
    passes = busiest[0]["passes"]
    per_pass = {
        key: statistics.median(one[key] / passes for one in busiest)
        for key in ("seconds", "wall", "calls", "bytes", "expected")
    }
    one = busiest[0]
    known = {key: one[key] for key in ("objective", "unknowns", "passes")}
    if size > 1:
        for key in ("latency", "bandwidth"):
            known[key] = statistics.median(one[key] for one in busiest)
    return {"processes": size, "n_train": n_train, **per_pass, **known}


def modelled(rows, arguments):
    """Return seconds of a pass by images and processes, and where the network is the bound."""
    half, one, several = rows[0], rows[1], rows[-1]
    per_image = (one["seconds"] - half["seconds"]) / (one["n_train"] - half["n_train"])
    fixed = max(0.0, one["seconds"] - one["n_train"] * per_image)

    def parts(n, k):
        ring = 2 * (k - 1) / k * several["bytes"] / arguments.bandwidth
        network = ring + several["calls"] * (k - 1) * arguments.latency
        return n / k * per_image + fixed, network

    found = []
    for n in SIZES:
        counts = [2**i for i in range(LARGEST.bit_length())]
        bound = next((k for k in counts if parts(n, k)[0] < parts(n, k)[1]), None)
        totals = {k: sum(parts(n, k)) for k in counts}
        found.append({"n_samples": n, "seconds": totals, "network_bound_from": bound})
    return {"seconds_per_image": per_image, "fixed_seconds": fixed, "sizes": found}


def main():
    """Run the benchmark, write JSON, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n-train", type=int, default=20000, help="number of images")
    parser.add_argument("--network", default="convnet-rotation")
    parser.add_argument("--gradient-layers", default="last")
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    parser.add_argument("--max-iter", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--bandwidth", type=float, default=1.25e9, help="bytes a second of the model's network"
    )
    parser.add_argument(
        "--latency", type=float, default=5e-5, help="seconds of a message in the model"
    )
    parser.add_argument("--output", type=Path, default=Path("distributed.json"))
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task is not None:
        sys.exit(print(json.dumps(measure(arguments.task))))
    n, repeats = arguments.n_train, range(arguments.repeats)
    rows = [
        row(size, n_train, [together(arguments, size, n_train) for _ in repeats])
        for size, n_train in ((1, n // 2), (1, n), (arguments.processes, n))
    ]
    model = modelled(rows, arguments)
    save(rows, arguments, **PENALTIES, model=model)
    print(
        "| processes | images | pass, s of a processor | calls a pass | bytes a pass | expected |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    for one in rows:
        print(
            f"| {one['processes']} | {one['n_train']} | {one['seconds']:.3f} | "
            f"{one['calls']:.0f} | {one['bytes']:.4g} | {one['expected']:.4g} |"
        )
    for size in model["sizes"]:
        seconds = ", ".join(
            f"{k}: {s:.3g}" for k, s in size["seconds"].items() if k in (1, 8, 64, 512)
        )
        print(
            f"\n{size['n_samples']} images, seconds of a pass by processes: {seconds}. The network "
            f"is the bound from {size['network_bound_from']} processes."
        )


if __name__ == "__main__":
    main()
