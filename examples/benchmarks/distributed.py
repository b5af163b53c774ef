"""Time and bytes of a pass by the number of processes that fit together, and a model of both.

The images are random blocks of 4 x 4 pixels, the network is a shipped encoder. The classes are
those of the nearest of ten images. Every process has one thread and a share of the images, and
communicates by gloo on this machine. Seconds are those of the processor, of the busiest process,
so they hardly depend on other load. A pass is the second stage divided by its passes over the head.

Bytes are counted where torch.distributed is called: the size of the tensors of one process. They
are compared with the arithmetic: one gradient for each pass, one gradient of the coarse space for
each of its iterations, and a header of 32 bytes before each.

The model of a pass on K machines, with n images and a ring all-reduce of B bytes, is::

    n / K * seconds_per_image  +  2 (K - 1) / K * B / bandwidth  +  calls * 2 (K - 1) * latency

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
from sklearn_gradfeat.training import TwoStageFit

PENALTIES = {"alpha": 1e-3, "gradient_alpha": 1e-5}
SIZES = (1_000_000, 100_000_000)
LARGEST = 4096  # processes in the model


@contextmanager
def counted():
    """Count the calls and bytes of collectives, and the iterations in the coarse space."""
    noted = {"calls": 0, "bytes": 0, "coarse": 0, "coordinates": 0}

    def of_tensor(name, size):
        function = getattr(dist, name)

        def counting(*arguments, **options):
            noted["calls"] += 1
            noted["bytes"] += size(arguments)
            return function(*arguments, **options)

        return mock.patch.object(dist, name, counting)

    def adjoint(self, cotangent, function=Subspace.adjoint):
        noted["coarse"] += 1
        noted["coordinates"] = sum(self.sizes)
        return function(self, cotangent)

    with (
        of_tensor("all_reduce", lambda given: given[0].nbytes),
        of_tensor("all_gather", lambda given: given[1].nbytes),
        of_tensor("broadcast", lambda given: given[0].nbytes),
        mock.patch.object(Subspace, "adjoint", adjoint),
    ):
        yield noted


@contextmanager
def second_stage(noted):
    """Note processor time, calls and bytes of the second stage of a fit."""
    found, fit_gradient = {}, TwoStageFit.fit_gradient

    def measured(self, first, *arguments):
        before, start, wall = dict(noted), time.process_time(), time.perf_counter()
        result = fit_gradient(self, first, *arguments)
        found.update({key: noted[key] - before[key] for key in ("calls", "bytes", "coarse")})
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
    """Return what one process measures during a fit."""
    torch.set_num_threads(1)
    rank, size = task["rank"], task["size"]
    images = random_images(task["n_train"])
    classes, own = nearest(images, 10), slice(rank, None, size)
    options = {"gradient_layers": task["gradient_layers"], "feature_store": None, **PENALTIES}
    model = GradientFeatureClassifier(task["network"], max_iter=task["max_iter"], **options)
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
        "coordinates": noted["coordinates"],
        "unknowns": model.coef_.size
        + model.intercept_.size
        + sum(value.size for value in model.gradient_coef_.values()),
    }


def together(arguments, size):
    """Return what the processes of one group measure."""
    setting = ("n_train", "network", "max_iter", "gradient_layers")
    task = {key: getattr(arguments, key) for key in setting} | {"size": size}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(size):
            one = json.dumps(task | {"rank": rank, "store": f"{folder}/store"})
            command = [sys.executable, __file__, "--task", one]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return [json.loads(process.communicate()[0]) for process in processes]


def row(size, runs):
    """Return the medians over runs of the busiest process."""
    busiest = [max(run, key=lambda one: one["seconds"]) for run in runs]
    passes = busiest[0]["passes"]
    per_pass = {
        key: statistics.median(one[key] / passes for one in busiest)
        for key in ("seconds", "wall", "calls", "bytes", "coarse")
    }
    one = busiest[0]
    expected = 4 * (one["unknowns"] + per_pass["coarse"] * one["coordinates"])
    links = [one[key] for key in ("latency", "bandwidth") for one in busiest if one[key]]
    known = {key: one[key] for key in ("objective", "unknowns", "coordinates")}
    known |= {"expected_bytes": expected if size > 1 else 0, "passes": passes}
    if links:
        for key in ("latency", "bandwidth"):
            known[key] = statistics.median(one[key] for one in busiest)
    return {"processes": size, **per_pass, **known}


def modelled(rows, arguments):
    """Return seconds of a pass by images and processes, and where the network is the bound."""
    one, several = rows[0], rows[-1]
    per_image = one["seconds"] / arguments.n_train

    def parts(n, k):
        ring = 2 * (k - 1) / k * several["bytes"] / arguments.bandwidth
        return n / k * per_image, ring + several["calls"] * 2 * (k - 1) * arguments.latency

    found = []
    for n in SIZES:
        counts = [2**i for i in range(LARGEST.bit_length())]
        bound = next((k for k in counts if parts(n, k)[0] < parts(n, k)[1]), None)
        totals = {k: sum(parts(n, k)) for k in counts}
        found.append({"n_samples": n, "seconds": totals, "network_bound_from": bound})
    return {"seconds_per_image": per_image, "sizes": found}


def main():
    """Run the benchmark, write JSON, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n-train", type=int, default=20000, help="number of images")
    parser.add_argument("--network", default="convnet-rotation")
    parser.add_argument("--gradient-layers", default="last")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
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
    repeats = range(arguments.repeats)
    rows = [row(size, [together(arguments, size) for _ in repeats]) for size in arguments.processes]
    model = modelled(rows, arguments)
    save(rows, arguments, **PENALTIES, model=model)
    print("| processes | pass, s of a processor | calls a pass | bytes a pass | expected |")
    print("|---:|---:|---:|---:|---:|")
    for one in rows:
        print(
            f"| {one['processes']} | {one['seconds']:.3f} | {one['calls']:.0f} | "
            f"{one['bytes']:.4g} | {one['expected_bytes']:.4g} |"
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
