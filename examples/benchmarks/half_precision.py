"""Time of bfloat16 in units of that of float32: in the frozen layers, and in a pass over the head.

A pass computes `J u` and `Jᵀ g` of all samples at the same point. The errors are those of the
change of the logits and of the gradient, relative to their norms. The runs of a repeat follow one
another.

    python examples/benchmarks/half_precision.py --data cifar10.zip --output half_precision.json

With --stored, the frozen layers and a pass are in float32, and the output of the frozen layers is
stored in bfloat16 (`store_dtype`) or in float32. Both models are fitted to a small `tol`. The
change of the logits is relative to their norm, on test images. Passes with both kinds of storage,
in memory and streamed from a file, are in turn; the CPU time is the median.

    python examples/benchmarks/half_precision.py --stored --data cifar10.zip --output stored.json
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from _datasets import need_data, read_images
from _setup import empty_store, save, scaled_images, two_stages
from larger_than_memory import medians, one_pass
from sklearn.base import clone
from sklearn.metrics import log_loss
from solver import PROBLEMS, second_stage
from torchvision.models import resnet18

from sklearn_gradfeat import GradientFeatureClassifier, config_context


def resnet(path, n_train):
    """Return a model and data: ResNet18 with random weights."""
    network = resnet18()
    network.fc = torch.nn.Identity()
    X, y = read_images(path, "train", n_train)
    model = GradientFeatureClassifier(
        network, preprocess=scaled_images(224), gradient_layers="layer4.1", alpha=0.1,
        gradient_alpha=1e-4, batch_size=64, activation_layer=None,
    )  # fmt: skip
    return model, X, y


CHOICES = {name: PROBLEMS[name] for name in ("conv5", "conv4-5", "head", "text")}
CHOICES["resnet"] = ("ResNet18, layer4.1", resnet)


def seconds(run):
    """Return the seconds and the result of a call."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def compare(name, load, path, n_train, repeats):
    """Return the row of a problem."""
    model, X, y = load(path, n_train)
    objective, x = second_stage(model, X, y)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(x), generator=generator)
    logits = objective.forward(x)
    trunk, passes = [], []
    for _ in range(repeats):
        times = {}
        for precision in ("float32", "bfloat16"):
            empty_store()
            options = {"precision": precision, "features": "activation", "max_iter": 1, "tol": 1e9}
            times[precision] = seconds(lambda o=options: clone(model).set_params(**o).fit(X, y))[0]
        trunk.append(times["bfloat16"] / times["float32"])
        full, exact = seconds(lambda: objective.forward_adjoint(direction, logits))
        with torch.autocast("cpu", torch.bfloat16):
            half, rounded = seconds(lambda: objective.forward_adjoint(direction, logits))
        passes.append(half / full)
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(exact, rounded, strict=True)]
    ratios = {"frozen layers": statistics.median(trunk), "pass": statistics.median(passes)}
    return {"problem": name, "n_samples": len(X), **ratios, "errors": errors, "seconds": full}


STORED = {"conv5": ["conv5"], "conv4-5": ["conv4", "conv5"]}
STORE_DTYPES = ("auto", "bfloat16")


def compare_stored(name, layers, arguments):
    """Return the row of a choice of layers: models and passes over stored float32 and bfloat16."""
    X, y = read_images(arguments.data, "train", arguments.n_train)
    X_test, y_test = read_images(arguments.data, "test", arguments.n_test)
    models, rows, functions, logits = {}, {}, {}, {}
    for store_dtype in STORE_DTYPES:
        model = models[store_dtype] = GradientFeatureClassifier(
            "convnet-rotation", gradient_layers=layers, alpha=1e-3, gradient_alpha=1e-4,
            store_dtype=store_dtype, tol=1e-6, max_iter=500, activation_layer=None,
        )  # fmt: skip
        model.fit(X, y)
        logits[store_dtype] = model.decision_function(X_test)
        (stored,) = two_stages(model, X, y).samples.boundary.take(slice(0, 1))
        rows[store_dtype] = {
            "bytes": stored.nbytes,
            "objective": float(model.objective_path_[-1]),
            "accuracy": 100 * model.score(X_test, y_test),
            "log_loss": log_loss(y_test, model.predict_proba(X_test)),
        }
        functions[f"{store_dtype}_memory"] = one_pass(model, X, y)
        with warnings.catch_warnings(), config_context(memory_bytes=0):
            warnings.filterwarnings("ignore", "The output of the frozen layers takes")
            functions[f"{store_dtype}_streamed"] = one_pass(model, X, y)
    full, half = (logits[store_dtype] for store_dtype in STORE_DTYPES)
    return {
        "layers": name, "n_train": len(X), "n_test": len(X_test), "float32": rows["auto"],
        "bfloat16": rows["bfloat16"],
        "change": float(np.linalg.norm(half - full) / np.linalg.norm(full)),
        "changed_classes": 100 * float(np.mean(half.argmax(1) != full.argmax(1))),
        "seconds": medians(functions, arguments.repeats),
    }  # fmt: skip


def table_stored(rows):
    """Return the rows of --stored as a Markdown table."""
    lines = [
        "| layers | images | stored as | kB each | objective | accuracy | log loss | "
        "change of logits | other class | a pass, s of CPU | streamed, s of CPU |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        for name, store_dtype in (("float32", "auto"), ("bfloat16", "bfloat16")):
            found, seconds = row[name], row["seconds"]
            changes = ["", ""]
            if name == "bfloat16":
                changes = [f"{row['change']:.1e}", f"{row['changed_classes']:.2f} %"]
            cells = [
                row["layers"], row["n_train"], name, f"{found['bytes'] / 1000:.1f}",
                f"{found['objective']:.6f}", f"{found['accuracy']:.2f}",
                f"{found['log_loss']:.4f}", *changes, f"{seconds[store_dtype + '_memory_cpu']:.2f}",
                f"{seconds[store_dtype + '_streamed_cpu']:.2f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def table(rows):
    """Return the rows as a Markdown table."""
    lines = ["| frozen layers | a pass | problem | samples | error of `J u` | of the gradient |"]
    lines.append("|---:|---:|---|---:|---:|---:|")
    for row in rows:
        errors = " | ".join(f"{error:.0e}" for error in row["errors"])
        lines.append(
            f"| {row['frozen layers']:.2f} | {row['pass']:.2f} | {row['problem']} | "
            f"{row['n_samples']} | {errors} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/<class>/*.jpg")
    parser.add_argument("--problems", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--stored", action="store_true", help="compare store_dtype instead")
    parser.add_argument("--n-train", type=int, default=300)
    parser.add_argument("--n-test", type=int, default=2000, help="for --stored")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("half_precision.json"))
    arguments = parser.parse_args()
    need_data(arguments.data)
    if arguments.stored:
        rows = [compare_stored(*choice, arguments) for choice in STORED.items()]
        save(rows, arguments)
        print(table_stored(rows))
        return
    chosen = [CHOICES[name] for name in arguments.problems]
    rows = [compare(*c, arguments.data, arguments.n_train, arguments.repeats) for c in chosen]
    save(rows, arguments)
    print("Time in bfloat16, in units of float32:\n")
    print(table(rows))


if __name__ == "__main__":
    main()
