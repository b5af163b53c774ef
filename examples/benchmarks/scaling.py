"""Time and memory of a fit by number of images, classes and gradient layers, and by batch size.

One number changes at a time, and the others keep their defaults. The network is
"convnet-rotation". Every fit runs in a process of its own, with an empty feature store, after a
short fit of other images, which loads libraries and captures the graph. The time of a pass is that
of the second stage divided by its passes over the head, so it includes a share of the
preconditioner. "before" is the time of everything else, the trunk and the first stage. Memory is
the peak of the resident memory during the fit, minus the memory before it, so it leaves out the
images; it is measured on Linux only. On CUDA, the memory that torch allocated there is added.

Images are those of --data, or else random blocks of 4 x 4 pixels. Classes are those of --data.
For random images, and wherever the number of classes changes, the class of an image is the nearest
of as many images.

    python examples/benchmarks/scaling.py --data cifar10.zip --output scaling.json
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
from pathlib import Path

import numpy as np
import torch
from _datasets import read_images
from _setup import environment, nearest, random_images, resident, timed_second_stage
from sklearn.exceptions import ConvergenceWarning

from sklearn_gradfeat import GradientFeatureClassifier

STUDIES = {
    "n_samples": (500, 2000, 5000, 20000, 50000),
    "n_classes": (10, 2, 100, 1000),
    "gradient_layers": (1, 2, 3, 4),
    "batch_size": (256, 16, 64, 1024),
}  # the first value is the unit
PENALTIES = {"alpha": 1e-3, "gradient_alpha": 1e-5}
MEASURES = ("pass", "seconds", "host", "cuda")


def load(arguments):
    """Return images and classes in random order."""
    if arguments.data is None:
        X = random_images(max(arguments.largest, arguments.n_train))
        return X, nearest(X, 10)
    X, y = read_images(arguments.data, "train")
    order = np.random.default_rng(0).permutation(len(X))
    return X[order], np.unique(y, return_inverse=True)[1][order]


def measure(task):
    """Return times, passes and memory of one fit, after a short one in the same process."""
    X = np.load(f"{task['folder']}/X.npy", mmap_mode="r")[: task["n_samples"]].copy()
    y = np.load(f"{task['folder']}/y.npy")[: len(X)]
    if task["n_classes"] is not None:
        y = nearest(X, task["n_classes"])
    options = {k: task[k] for k in ("gradient_layers", "batch_size")}
    model = GradientFeatureClassifier(
        "convnet-rotation", **PENALTIES, **options, activation_layer=None
    )
    with warnings.catch_warnings(), timed_second_stage() as second:
        warnings.simplefilter("ignore", ConvergenceWarning)
        short = GradientFeatureClassifier(
            "convnet-rotation", max_iter=1, **options, activation_layer=None
        )
        short.set_params(feature_store=None).fit(random_images(32, seed=1), np.arange(32) % 2)
        host, cuda = resident("VmRSS", reset_peak=True), torch.cuda.memory_allocated()
        start = time.perf_counter()
        model.fit(X, y)
        seconds = time.perf_counter() - start
    return {
        "pass": second["seconds"] / model.n_passes_,
        "seconds": seconds,
        "before": seconds - second["seconds"],
        "passes": model.n_passes_,
        "converged": model.n_iter_ < model.max_iter,
        "host": resident("VmHWM") - host,
        "cuda": (torch.cuda.max_memory_allocated() - cuda) / 2**20,
        "classes": len(model.classes_),
        "theta": sum(v.size for v in model.gradient_coef_.values()),
    }


def in_new_process(task):
    """Return the result of :func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout)
    print(task | measured, file=sys.stderr)  # a full run takes hours
    return measured


def tasks(arguments, folder, n_images):
    """Return the settings of a fit for every value of every study."""
    n_train = min(arguments.n_train, n_images)
    limits = {"n_samples": min(arguments.largest, n_images), "n_classes": n_train}
    found = {}
    for study in arguments.studies:
        default = {"n_samples": n_train, "n_classes": None, "gradient_layers": 1, "batch_size": 256}
        for value in sorted({min(v, limits.get(study, v)) for v in STUDIES[study]}):
            found[study, value] = {"folder": str(folder), **default, study: value}
    return found


def rows(found, runs):
    """Return one row for each value: medians, and ratios to the first value of the study."""
    result = []
    for (study, value), task in found.items():
        unit = (study, min(STUDIES[study][0], max(v for s, v in found if s == study)))
        own = [run[study, value] for run in runs]
        row = {"study": study, "value": value, **{k: v for k, v in task.items() if k != "folder"}}
        for key in MEASURES[:2]:
            ratios = [run[study, value][key] / run[unit][key] for run in runs]
            row[f"ratio_{key}"] = statistics.median(ratios)
        keys = (*MEASURES, "before", "passes")
        row |= {key: statistics.median(one[key] for one in own) for key in keys}
        result.append(row | {key: own[0][key] for key in ("converged", "classes", "theta")})
    return result


def slopes(table_rows):
    """Return the exponents of the power laws in the number of images; 1 is proportional."""
    of_n = [row for row in table_rows if row["study"] == "n_samples"]
    n = np.log([row["n_samples"] for row in of_n])
    keys = [key for key in MEASURES if len(of_n) > 1 and all(row[key] > 0 for row in of_n)]
    return {key: np.polyfit(n, np.log([row[key] for row in of_n]), 1)[0] for key in keys}


def table(table_rows):
    """Return the rows as a Markdown table."""
    lines = ["| pass ÷ | fit ÷ | | images | classes | θ₂ | pass, s | passes | before, s | fit, s |"]
    lines[0] += " host, MiB | CUDA, MiB |"
    lines.append("|---:|---:|---|" + "---:|" * 9)
    for row in table_rows:
        passes = f"{row['passes']:g}" if row["converged"] else f"> {row['passes']:g}"
        lines.append(
            f"| {row['ratio_pass']:.2f} | {row['ratio_seconds']:.2f} | {row['study']}="
            f"{row['value']} | {row['n_samples']} | {row['classes']} | {row['theta']} | "
            f"{row['pass']:.3f} | {passes} | {row['before']:.1f} | {row['seconds']:.1f} | "
            f"{row['host']:.0f} | {row['cuda']:.0f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/<class>/*.jpg")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--largest", type=int, default=50000, help="largest number of images")
    parser.add_argument(
        "--n-train", type=int, default=4000, help="number of images in the other studies"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task is not None:
        sys.exit(print(json.dumps(measure(arguments.task))))
    X, y = load(arguments)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/X.npy", X)
        np.save(f"{folder}/y.npy", y)
        found = tasks(arguments, folder, len(X))
        runs = [{k: in_new_process(t) for k, t in found.items()} for _ in range(arguments.repeats)]
    images = "random" if arguments.data is None else arguments.data.stem
    setting = {k: v for k, v in vars(arguments).items() if k not in ("data", "output", "task")}
    result = {"environment": environment(), "setting": {**setting, "images": images, **PENALTIES}}
    result |= {"rows": rows(found, runs), "slopes": slopes(rows(found, runs))}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    units = ", ".join(f"{study}={values[0]}" for study, values in STUDIES.items())
    print(f"Images: {images}. In units of {units}:\n")
    print(table(result["rows"]))
    for key, slope in result["slopes"].items():
        print(f"\nSlope of {key} by number of images, log-log: {slope:.2f}")


if __name__ == "__main__":
    main()
