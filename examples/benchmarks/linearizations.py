"""Several linearisations against fine-tuning, with everything chosen on held-out training samples.

Models of the same samples and the same layers θ₂:

* "LogisticRegressionCV": scikit-learn, on the activations;
* "activation", "one linearization", "linearizations": the estimator with default penalties, and
  ``features="activation"``, ``n_linearizations=1`` or ``"auto"``;
* "... of several layers": likewise, with the default ``activation_layer``, the output and four
  blocks below θ₂; the others have the output alone;
* "AdamW, 15 epochs", "AdamW, 40 epochs", "SGD, 15 epochs": fine-tuning of θ₂ and the output
  weights, which start from the "activation" model (Kumar et al., ICLR 2022, arXiv:2202.10054), with
  a one-cycle schedule. A fifth of the training samples chooses the rate; then it trains on all of
  them;
* "AdamW, whole network": likewise, with all weights of the network.

A time includes all choices and excludes the frozen layers. Fine-tuning is not charged for the
"activation" model. Batch norms stay folded into convolutions. The test images also come blurred,
noisy and with low contrast.

The problems "tiles" are multilabel: four photographs make an image, and the targets are the classes
in it. Their accuracy is the mean over the labels, and their loss is summed over the labels. The
"LogisticRegressionCV" is one for each label.

    python examples/benchmarks/linearizations.py --data cifar10.zip --problems efficientnet-3
    python examples/benchmarks/linearizations.py --table linearizations.json
    python examples/benchmarks/linearizations.py --summary linearizations-*.json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _datasets import read_images, tiles
from _finetuning import Head, below, summed_binary_cross_entropy, take
from _setup import docstrings, empty_store, gain_on, pretrained, save
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import train_test_split
from sklearn.multioutput import MultiOutputClassifier
from sklearn.preprocessing import MultiLabelBinarizer
from torch.nn.functional import cross_entropy

from sklearn_gradfeat import GradientFeatureClassifier

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH_SIZE = 32
N_POOL = 12_000
N_TEST = 2000
# More training sentences than these need docstrings of classes and methods.
N_SENTENCES = 1000


class Tuning(NamedTuple):
    """An optimiser, the rates to choose from, the numbers of epochs, and the layers to train."""

    optimizer: Any
    rates: tuple[float, ...]
    epochs: tuple[int, ...]
    whole: bool = False


# Without a momentum that follows the rate, which torch's one-cycle schedule has for AdamW.
SGD = functools.partial(torch.optim.SGD, momentum=0.9)
TUNINGS = {
    "AdamW": Tuning(torch.optim.AdamW, (1e-4, 3e-4, 1e-3, 3e-3), (15, 40)),
    "SGD": Tuning(SGD, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (15,)),
    "AdamW, whole network": Tuning(
        torch.optim.AdamW, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), (15,), whole=True
    ),
}


class Problem(NamedTuple):
    """A network and its gradient layers."""

    network: str
    gradient_layers: int
    n_train: int
    multilabel: bool = False


PROBLEMS = {
    "efficientnet-head": Problem("efficientnet", 1, 1000),
    "efficientnet-1": Problem("efficientnet", 2, 1000),
    "efficientnet-3": Problem("efficientnet", 4, 1000),
    "efficientnet-6": Problem("efficientnet", 7, 1000),
    "tiles-1": Problem("efficientnet", 2, 1000, multilabel=True),
    "tiles-3": Problem("efficientnet", 4, 1000, multilabel=True),
    "rotation-1": Problem("convnet-rotation", 1, 2000),
    "rotation-2": Problem("convnet-rotation", 2, 2000),
    "vae-1": Problem("convnet-vae", 1, 2000),
    "vae-2": Problem("convnet-vae", 2, 2000),
    "sentences-1": Problem("sentences", 1, 1000),
    "sentences-2": Problem("sentences", 2, 1000),
}


@functools.cache
def samples(name, path, multilabel, n_pool):
    """Return the parameters that name a network, training samples, and test samples.

    Targets are class indices, or an indicator matrix. ``n_pool`` is the least number of samples to
    draw training samples from.
    """
    if name == "sentences":
        many = n_pool > N_SENTENCES
        model, X, y = docstrings(1000 if many else 400, methods=many)
        codes = np.unique(y, return_inverse=True)[1]
        parts = train_test_split(X, codes, test_size=600, stratify=y, random_state=0)
        network = {"backbone": model.backbone, "activation_layer": None}
        return network, parts[::2], parts[1::2]
    if multilabel:
        images = read_images(path, "train", n_pool), read_images(path, "test")
        parts = [tiles(*some, 0) for some in images]
        encode = MultiLabelBinarizer().fit(parts[0][1]).transform
    else:
        parts = read_images(path, "train", n_pool), read_images(path, "test", N_TEST)
        classes = np.unique(parts[0][1])
        encode = functools.partial(np.searchsorted, classes)
    train, test = (
        (X[:n], encode(y[:n])) for (X, y), n in zip(parts, (n_pool, N_TEST), strict=True)
    )
    return pretrained(name), train, test


def disturbances(X):
    """Return images blurred, with noise, and with low contrast, by name; none for other samples."""
    if X.ndim != 4:
        return {}
    x, rng = X.astype(np.float32), np.random.default_rng(0)
    neighbours = [np.roll(x, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    found = {
        "blurred": sum(neighbours) / len(neighbours),
        "noisy": x + rng.normal(0, 25, x.shape),
        "low contrast": 0.4 * x + 0.6 * x.mean((1, 2, 3), keepdims=True),
    }
    return {name: images.round().clip(0, 255).astype(np.uint8) for name, images in found.items()}


def measures(logits, codes):
    """Return which predictions are correct, and the mean log loss, summed over labels."""
    if codes.ndim == 2:
        losses = np.logaddexp(0, logits) - codes * logits
        return (logits > 0) == codes, float(losses.sum(1).mean())
    loss = -log_softmax(logits, axis=1)[np.arange(len(codes)), codes].mean()
    return logits.argmax(1) == codes, float(loss)


def timed(function, *arguments):
    """Return a result, and the wall-clock and processor seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = function(*arguments)
    return result, (time.perf_counter() - start, time.process_time() - cpu)


def trained(head, z, y, tuning, rate, epochs, seed):
    """Train a head with a one-cycle schedule, and return it."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = tuning.optimizer(head.parameters(), lr=rate)
    steps = epochs * -(-len(y) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, cycle_momentum=tuning.optimizer is not SGD
    )
    loss_of = cross_entropy if y.ndim == 1 else summed_binary_cross_entropy
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(BATCH_SIZE):
            loss = loss_of(head(*(t.to(DEVICE) for t in take(z, rows))), y[rows].to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head


def fine_tuned(start, z, codes, tuning, epochs, seed):
    """Choose the rate on a fifth of the samples, train on all, and return the head and the rate."""
    multilabel = codes.ndim == 2
    y = torch.from_numpy(codes.astype(np.float32) if multilabel else codes)
    train, held_out = train_test_split(
        np.arange(len(y)), test_size=0.2, stratify=None if multilabel else codes, random_state=seed
    )

    def loss(rate):
        head = trained(Head(start, DEVICE), take(z, train), y[train], tuning, rate, epochs, seed)
        return measures(head.logits(take(z, held_out)), codes[held_out])[1]

    rate = min(tuning.rates, key=loss)
    return trained(Head(start, DEVICE), z, y, tuning, rate, epochs, seed), rate


def whole_network(start, X, codes):
    """Return an "activation" model whose gradient layers are all layers of the network."""
    penalties = {"alpha": start.alpha_, "gradient_alpha": np.inf}
    return clone(start).set_params(gradient_layers="all", **penalties).fit(X, codes)


def estimators(problem, network):
    """Return the estimators by name."""
    common = {**network, "gradient_layers": problem.gradient_layers}
    several = {**common, "activation_layer": "auto"}
    found = {
        "activation": {**common, "features": "activation"},
        "activation of several layers": {**several, "features": "activation"},
        "one linearization": common,
        "linearizations": {**common, "n_linearizations": "auto"},
        "linearizations of several layers": {**several, "n_linearizations": "auto"},
    }
    return {name: GradientFeatureClassifier(**parameters) for name, parameters in found.items()}


def compare(name, arguments, seed):
    """Iterate over the rows of one split."""
    problem = PROBLEMS[name]
    n_train = arguments.n_train or problem.n_train
    n_pool = n_train if problem.network == "sentences" else max(N_POOL, n_train)
    asked = problem.network, arguments.data, problem.multilabel, n_pool
    network, (X, codes), (X_test, codes_test) = samples(*asked)
    rows = np.random.default_rng(seed).permutation(len(X))[:n_train]
    X, codes = X[rows], codes[rows]
    tests = {"": X_test, **disturbances(X_test)}

    def row(model, logits_of, seconds, **known):
        found = {"problem": name, "n_train": n_train, "seed": seed, "model": model}
        found |= {"seconds": seconds[0], "cpu_seconds": seconds[1], **known}
        if problem.multilabel:
            found["n_labels"] = codes.shape[1]
        for kind, images in tests.items():
            correct, loss = measures(logits_of(kind, images), codes_test)
            key = f" {kind}" if kind else ""
            found |= {f"accuracy{key}": 100 * float(correct.mean()), f"loss{key}": loss}
            found[f"correct{key}"] = np.packbits(correct).tobytes().hex()
        return found

    fitted: dict[str, Any] = {}
    for model, estimator in estimators(problem, network).items():
        if model not in arguments.models:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fill the store
            estimator.set_params(alpha=1.0, gradient_alpha=np.inf, max_iter=1).fit(X, codes)
        estimator.set_params(alpha="auto", gradient_alpha="auto", max_iter=100)
        fitted[model], seconds = timed(estimator.fit, X, codes)
        known = {
            "alpha": fitted[model].alpha_, "gradient_alpha": fitted[model].gradient_alpha_,
            "n_linearizations": fitted[model].n_linearizations_,
        }  # fmt: skip
        logits = estimator.decision_function if problem.multilabel else estimator.predict_log_proba
        yield row(model, lambda _, x, f=logits: f(x), seconds, **known)
    start = fitted["activation"]
    if "LogisticRegressionCV" in arguments.models:
        probe = LogisticRegressionCV(
            Cs=10, cv=5, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0,),
            use_legacy_attributes=False,
        )  # fmt: skip
        if problem.multilabel:
            probe = MultiOutputClassifier(probe)
        _, seconds = timed(probe.fit, start.transform(X), codes)

        def logits_of(x):
            if problem.multilabel:
                return np.stack([label.decision_function(x) for label in probe.estimators_], 1)
            return probe.predict_log_proba(x)

        yield row("LogisticRegressionCV", lambda _, x: logits_of(start.transform(x)), seconds)
    for model, tuning in TUNINGS.items():
        if model not in arguments.models:
            continue
        base = whole_network(start, X, codes) if tuning.whole else start
        z, z_test = below(base, X, DEVICE), {k: below(base, x, DEVICE) for k, x in tests.items()}
        for epochs in tuning.epochs:
            (head, rate), seconds = timed(fine_tuned, base, z, codes, tuning, epochs, seed)
            yield row(
                model if tuning.whole else f"{model}, {epochs} epochs",
                lambda k, _, h=head, z=z_test: h.logits(z[k]),
                seconds,
                rate=rate,
            )


def correct_of(row, key="correct"):
    """Return the share of correct labels of every test sample of a row."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row[key]), np.uint8))
    n_labels = row.get("n_labels", 1)
    return bits[: len(bits) // n_labels * n_labels].reshape(-1, n_labels).mean(1)


def disturbed(rows):
    """Return the mean accuracy on disturbed images with a decimal; nothing for other samples."""
    found = [row[key] for row in rows for key in row if key.startswith("accuracy ")]
    return f"{statistics.fmean(found):.1f}" if found else ""


def table(rows):
    """Return a Markdown table; gains are over "activation", with standard errors of pairs."""
    lines = ["| problem | samples | model | accuracy, % | gain | log loss | disturbed, % | CPU s |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|---:|")
    for problem, n in dict.fromkeys((row["problem"], row["n_train"]) for row in rows):
        chosen = [row for row in rows if (row["problem"], row["n_train"]) == (problem, n)]
        base = {row["seed"]: correct_of(row) for row in chosen if row["model"] == "activation"}
        for model in dict.fromkeys(row["model"] for row in chosen):
            of_model = [row for row in chosen if row["model"] == model]
            accuracy, loss, seconds = (
                statistics.fmean(row[key] for row in of_model)
                for key in ("accuracy", "loss", "cpu_seconds")
            )
            before = np.mean([base[row["seed"]] for row in of_model], axis=0)
            gain = gain_on(before, np.mean([correct_of(row) for row in of_model], axis=0))
            lines.append(
                f"| {problem} | {n} | {model} | {accuracy:.1f} | "
                f"{gain['gain']:+.1f} ± {gain['gain_error']:.1f} | {loss:.3f} | "
                f"{disturbed(of_model)} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def summary(rows):
    """Return a Markdown table, a line for each problem and number of samples, and the means.

    Of several rows of the same split and model, the last one counts. Cells are accuracy and log
    loss, means of the splits. Fine-tuning is the most accurate kind that has all splits of the
    linearisations; the gain over it has a standard error of pairs. "Disturbed" has the accuracies
    of both on the disturbed images. The last column is the processor time of the linearisations,
    divided by that of AdamW with both numbers of epochs.
    """
    lines = ["| problem | samples | splits | activation | default layers | linearizations |"]
    lines[0] += " fine-tuning | kind | gain | disturbed | time |"
    lines.append("|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|")
    found, gains, times = {}, [], []
    for row in sorted(rows, key=lambda row: row["seed"]):
        models = found.setdefault((row["problem"], row["n_train"]), {})
        models.setdefault(row["model"], {})[row["seed"]] = row
    for (problem, n), models in sorted(found.items()):
        ours = models.get("linearizations of several layers", {})
        others = {name: models[name] for name in models if name.split(",")[0] in TUNINGS}
        others = {name: of for name, of in others.items() if ours and not ours.keys() - of.keys()}
        if not others:
            continue

        def mean(of, key, seeds=tuple(ours)):
            return statistics.fmean(of[seed][key] for seed in seeds)

        best = max(others, key=lambda name: mean(others[name], "accuracy"))
        correct = [
            np.mean([correct_of(of[s]) for s in ours], axis=0) for of in (others[best], ours)
        ]
        gain = gain_on(*correct)
        both = ", ".join(disturbed(of[seed] for seed in ours) for of in (ours, others[best]))
        shown = [
            f"{mean(of, 'accuracy'):.1f}, {mean(of, 'loss'):.3f}"
            for of in (
                models["activation"], models["activation of several layers"], ours, others[best]
            )
        ]  # fmt: skip
        tuned = [others[name] for name in others if name.startswith("AdamW, ") and "epochs" in name]
        gains.append(gain["gain"])
        times.append(mean(ours, "cpu_seconds") / sum(mean(of, "cpu_seconds") for of in tuned))
        lines.append(
            f"| {problem} | {n} | {len(ours)} | {' | '.join(shown)} | {best} | "
            f"{gain['gain']:+.1f} ± {gain['gain_error']:.1f} | {both.strip(', ')} | "
            f"{times[-1]:.2f} |"
        )
    lines.append(
        f"\nMeans: gain {statistics.fmean(gains):+.2f}, time {statistics.fmean(times):.2f}."
    )
    return "\n".join(lines)


def main(arguments=None):
    """Run the benchmark, write JSON after every row, and print a Markdown table."""
    models = ["LogisticRegressionCV", *TUNINGS, *estimators(PROBLEMS["rotation-1"], {})]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="zip file or folder of images, as for paper_tables.py")
    add("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS), metavar="NAME")
    add("--models", nargs="+", default=models, choices=models, metavar="MODEL")
    add("--n-train", type=int, help="training samples, instead of the number of the problem")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--output", type=Path, default=Path("linearizations.json"))
    add("--table", type=Path, help="print the table of this file, and fit nothing")
    add("--summary", type=Path, nargs="+", help="print one line for each problem of these files")
    arguments = parser.parse_args(arguments)
    if arguments.summary is not None:
        files = [json.loads(file.read_text())["rows"] for file in arguments.summary]
        return print(summary([row for rows in files for row in rows]))
    if arguments.table is not None:
        return print(table(json.loads(arguments.table.read_text())["rows"]))
    arguments.models = list(dict.fromkeys(["activation", *arguments.models]))
    rows = []
    for name in arguments.problems:
        images = PROBLEMS[name].network != "sentences"
        if images and (arguments.data is None or not arguments.data.exists()):
            print(f"{name}: skipped, --data must name a zip file or folder of images.")
            continue
        for seed in arguments.seeds:
            empty_store()
            for row in compare(name, arguments, seed):
                rows.append(row)
                print({k: v for k, v in row.items() if not k.startswith("correct")}, flush=True)
                save(rows, arguments)
    return print(table(rows) if rows else "There is nothing to measure.")


if __name__ == "__main__":
    main()
