"""Tables 1 and 3 of the paper [1] for CIFAR-10, beside the figures that are printed there.

Penalties and learning rates are chosen on a tenth of the training images. The linear models are
then fitted to all of them; fine-tuning needs that tenth to know when to stop.

    python examples/benchmarks/paper_tables.py --data cifar10.zip --output paper_tables.json

[1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation Learning, ICLR 2020,
    arXiv:2004.05529.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from pathlib import Path

import torch
from _finetuning import RECIPES, Head, accuracy, below, fine_tune
from _setup import Task, encoder, need_data, save
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones._convnet import ConvNet
from sklearn_gradfeat.backbones._shipped import SHIPPED

TOP = ["conv3", "conv4", "conv5"]
LAYERS = {"conv5": TOP[2:], "conv4-5": TOP[1:], "conv3-5": TOP}
# Accuracies in percent, of "gradient" and "full" for each entry of LAYERS. The key: are θ₁, θ₂
# pretrained, is ω fitted?
TABLE_1 = {
    (False, False, False): ((23.09, 62.83), (26.30, 62.83), (27.52, 62.85)),
    (False, False, True): ((40.23, 63.11), (43.36, 63.42), (44.36, 63.38)),
    (False, True, False): ((32.50, 62.98), (33.20, 63.10), (35.13, 63.10)),
    (False, True, True): ((44.07, 63.99), (45.87, 64.21), (48.88, 64.51)),
    (True, False, False): ((53.39, 63.74), (56.24, 64.30), (57.20, 64.60)),
    (True, False, True): ((59.98, 65.46), (61.47, 65.38), (59.89, 64.73)),
    (True, True, False): ((70.28, 69.84), (71.08, 70.10), (71.60, 70.64)),
    (True, True, True): ((70.14, 70.51), (70.89, 70.78), (71.55, 71.37)),
}
TABLE_3 = {
    "bigan": {"activation": 62.87, "gradient": 70.14, "full": 70.51, "fine-tuning": 71.78},
    "vae": {"activation": 52.05, "gradient": 61.47, "full": 61.16, "fine-tuning": 65.16},
}


def choose(model, task, parameter, values):
    """Set the parameter to the value with the best score on the held-out tenth."""

    def score(value):
        candidate = clone(model).set_params(**{parameter: value})
        candidate.fit(task.X[task.rows], task.y[task.rows])
        return candidate.score(task.X[task.held_out], task.y[task.held_out])

    best = values[0] if len(values) == 1 else max(values, key=score)
    return model.set_params(**{parameter: best})


def measure(model, task):
    """Fit to all training images; return the test accuracy in percent, and how it went."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(task.X, task.y)
    return {
        "accuracy": 100 * model.score(task.X_test, task.y_test),
        "alpha": model.alpha,
        "gradient_alpha": None if model.features == "activation" else model.gradient_alpha,
        "converged": not any(w.category is ConvergenceWarning for w in caught),
        "passes": model.n_passes_,
        "seconds": time.perf_counter() - start,
    }


def fitted_activation(network, preprocess, task, arguments):
    """Return the logistic regression on activations, with the best penalty."""
    model = GradientFeatureClassifier(
        network, preprocess=preprocess, features="activation", max_iter=arguments.max_iter,
        random_state=arguments.seed,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return choose(model, task, "alpha", arguments.alphas)


def gradient_models(activation, task, alphas, **parameters):
    """Iterate over ("gradient", figures) and ("full", figures), with the best penalties."""
    for features in ("gradient", "full"):
        model = clone(activation).set_params(features=features, **parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            choose(model, task, "gradient_alpha", alphas)
        yield features, measure(model, task)


def fine_tuning(network, preprocess, activation, task, arguments):
    """Iterate over (recipe, figures) of fine-tuning the topmost convolution."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bottom = len(list(network.children())) - 1
    z, z_test = (below(network, bottom, preprocess, X, device) for X in (task.X, task.X_test))
    y, y_test = torch.from_numpy(task.y), torch.from_numpy(task.y_test)
    train, held_out = ((z[rows], y[rows]) for rows in (task.rows, task.held_out))
    # Not the fit to all images: it would seem too good on the held-out ones.
    fitted = clone(activation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit(task.X[task.rows], task.y[task.rows])
    for name, recipe in RECIPES.items():
        start, best, rate = time.perf_counter(), (-1.0, None), recipe.rate
        for factor in arguments.rate_factors:
            head = Head(network, bottom, fitted.coef_, fitted.intercept_).to(device)
            limits = (recipe.rate * factor, arguments.patience, arguments.seed)
            score = fine_tune(head, train, held_out, recipe, *limits)
            if score > best[0]:
                best, rate = (score, head), recipe.rate * factor
        seconds = time.perf_counter() - start
        result = {"accuracy": 100 * accuracy(best[1], z_test, y_test), "rate": rate}
        yield f"fine-tuning, {name}", {**result, "seconds": seconds}


def table_3(name, task, arguments):
    """Iterate over the rows of an encoder: three linear models, two ways of fine-tuning."""
    network, preprocess = encoder(name)
    published = next((v for k, v in TABLE_3.items() if k in Path(name).stem), {})
    activation = fitted_activation(network, preprocess, task, arguments)
    rows = itertools.chain(
        [("activation", measure(activation, task))],
        gradient_models(activation, task, arguments.gradient_alphas),
        fine_tuning(network, preprocess, activation, task, arguments),
    )
    for model, figures in rows:
        row = {"table": 3, "encoder": name, "model": model, **figures}
        yield {**row, "published": published.get(model.partition(",")[0])}


def partly_random(network, layers, below_pretrained, layers_pretrained, seed):
    """Return a copy with random weights (He's) in ``layers``, below them, in both or nowhere."""
    copied = ConvNet(network.slope)
    copied.load_state_dict(network.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in copied.named_children():
            if not (layers_pretrained if name in layers else below_pretrained):
                nn.init.kaiming_normal_(layer.weight, network.slope)
                nn.init.zeros_(layer.bias)
    return copied


def table_1(name, task, arguments):
    """Iterate over the rows of an encoder: what is random, by the gradient layers."""
    network, preprocess = encoder(name)
    activation = fitted_activation(network, preprocess, task, arguments)
    for (lower, upper, fitted), published in TABLE_1.items():
        for (layers, names), figures in zip(LAYERS.items(), published, strict=True):
            other = partly_random(network, names, lower, upper, arguments.seed)
            options = {
                "gradient_layers": names,
                "gradient_backbone": None if lower and upper else other,
                "omega": "fitted" if fitted else "random",
            }
            models = gradient_models(activation, task, arguments.gradient_alphas, **options)
            for (features, result), known in zip(models, figures, strict=True):
                row = {"table": 1, "encoder": name, "theta_1": lower, "theta_2": upper}
                row |= {"omega": fitted, "layers": layers, "model": features, **result}
                yield {**row, "published": known}


def markdown(rows):
    """Return the rows as Markdown tables."""
    lines = []
    for number, title in ((3, "encoder | model"), (1, "encoder | θ̄₁ | θ̄₂ | ω̄ | θ₂ | model")):
        if not (chosen := [row for row in rows if row["table"] == number]):
            continue
        of = "published, %" if number == 3 else "published for BiGAN, %"
        lines += ["", f"Table {number}", "", f"| {title} | accuracy, % | {of} | seconds |"]
        lines.append(f"|{'---|' * (title.count('|') + 1)}---:|---:|---:|")
        for row in chosen:
            cells = [Path(row["encoder"]).stem]
            if number == 1:
                words = ("random", "pretrained"), ("random", "pretrained"), ("random", "fitted")
                keys = ("theta_1", "theta_2", "omega")
                cells += [pair[row[key]] for pair, key in zip(words, keys, strict=True)]
                cells.append(row["layers"])
            unfinished = "" if row.get("converged", True) else " (not converged)"
            cells += [row["model"], f"{row['accuracy']:.2f}{unfinished}"]
            known = "" if row["published"] is None else f"{row['published']:.2f}"
            cells += [known, f"{row['seconds']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(argv=None):
    """Run what was asked for; write JSON and Markdown after every row, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="zip file of train/ and test/<class>/*.jpg")
    add("--tables", type=int, nargs="+", default=[3, 1], choices=[1, 3])
    add("--encoders", nargs="+", default=list(SHIPPED), help="names, or files of weights")
    add("--n-train", type=int, help="default: all")
    add("--n-test", type=int, help="default: all")
    add("--alphas", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    add("--gradient-alphas", type=float, nargs="+", default=[1e-4, 1e-5, 1e-6, 1e-7])
    add("--rate-factors", type=float, nargs="+", default=[1.0, 0.1, 0.01])
    add("--patience", type=int, default=10, help="epochs of fine-tuning without a better one")
    add("--max-iter", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("paper_tables.json"))
    arguments = parser.parse_args(argv)
    need_data(arguments.data)
    task = Task(arguments)
    sizes = {"n_train": len(task.y), "n_test": len(task.y_test)}
    rows = []
    for number, name in itertools.product(arguments.tables, arguments.encoders):
        for row in (table_3 if number == 3 else table_1)(name, task, arguments):
            rows.append(row)
            save(rows, arguments, **sizes)
            arguments.output.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
