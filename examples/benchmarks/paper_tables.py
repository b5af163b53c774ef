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
import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from _finetuning import RECIPES, Head, below, fine_tune, predict
from _setup import Task, encoder, need_data, save
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureClassifierCV
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
    if len(values) == 1:
        return model.set_params(**{parameter: values[0]})
    penalties = {
        "alpha": [model.alpha],
        "gradient_alpha": [1.0 if model.gradient_alpha is None else model.gradient_alpha],
        parameter: values,
    }
    shared = model.get_params(deep=False)
    for name in ("alpha", "gradient_alpha", "warm_start"):
        del shared[name]
    search = GradientFeatureClassifierCV(
        **shared, cv=task.held_out_fold, refit=False,
        **{f"{name}s": grid for name, grid in penalties.items()},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(task.X, task.y)
    return model.set_params(**{parameter: getattr(search, f"{parameter}_")})


def measure(model, task):
    """Fit to all training images; return how it went, and which test images are right."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(task.X, task.y)
    return {
        "right": model.predict(task.X_test) == task.y_test,
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
        tol=arguments.tol, random_state=arguments.seed,
    )  # fmt: skip
    return choose(model, task, "alpha", arguments.alphas)


def gradient_model(activation, features, task, alphas, **parameters):
    """Return a model with gradients and the best penalty."""
    model = clone(activation).set_params(features=features, **parameters)
    return choose(model, task, "gradient_alpha", alphas)


def fine_tuning(network, preprocess, activation, task, arguments):
    """Iterate over (recipe, figures) of fine-tuning the topmost convolution.

    The recipe that does better on the held-out tenth runs again with other seeds.
    """
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

    def run(recipe, factor, seed):
        head = Head(network, bottom, fitted.coef_, fitted.intercept_).to(device)
        limits = (recipe.rate * factor, arguments.patience, seed)
        return fine_tune(head, train, held_out, recipe, *limits), head

    best = {}
    for name, recipe in RECIPES.items():
        start = time.perf_counter()
        scores = [(*run(recipe, f, arguments.seed), f) for f in arguments.rate_factors]
        score, head, factor = max(scores, key=lambda entry: entry[0])
        best[name] = (score, factor, [head], time.perf_counter() - start)
    better = max(best, key=lambda name: best[name][0])
    for name, (_, factor, heads, seconds) in best.items():
        recipe = RECIPES[name]
        for seed in range(1, arguments.seeds if name == better else 1):
            heads.append(run(recipe, factor, arguments.seed + seed)[1])
        right = np.stack([predict(head, z_test) == y_test.numpy() for head in heads])
        figures = {"right": right, "rate": recipe.rate * factor, "seconds": seconds}
        yield f"fine-tuning, {name}", figures


def compared(figures, base):
    """Replace the test images that are right by their share and its distance from the base's.

    Both in percent, with standard errors: of a share, and of a difference between two on the
    same images. Several seeds are averaged.
    """
    right = np.atleast_2d(figures.pop("right"))
    difference = 100 * (right.mean(0) - base)
    accuracies = 100 * right.mean(1)
    n = right.shape[1]
    mean = float(accuracies.mean())
    return {
        "accuracy": mean,
        "error": math.sqrt(mean * (100 - mean) / n),
        "accuracies": accuracies.tolist(),
        "gain": float(difference.mean()),
        "gain_error": float(difference.std()) / math.sqrt(n),
        **figures,
    }


def table_3(name, task, arguments):
    """Iterate over the rows of an encoder: three linear models, two ways of fine-tuning."""
    network, preprocess = encoder(name)
    published = next((v for k, v in TABLE_3.items() if k in Path(name).stem), {})
    activation = fitted_activation(network, preprocess, task, arguments)

    def models():
        yield "activation", measure(activation, task)
        for features in ("gradient", "full"):
            model = gradient_model(activation, features, task, arguments.gradient_alphas)
            yield features, measure(model, task)
        yield from fine_tuning(network, preprocess, activation, task, arguments)

    base = None
    for model, figures in models():
        base = figures["right"] if base is None else base
        row = {"table": 3, "encoder": name, "model": model, **compared(figures, base)}
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
    """Iterate over the rows of an encoder: what is random, by the gradient layers.

    The penalty is chosen with the topmost layer alone, and kept for more of them.
    """
    network, preprocess = encoder(name)
    activation = fitted_activation(network, preprocess, task, arguments)
    figures = measure(activation, task)
    base = figures["right"]
    row = {"table": 1, "encoder": name, "model": "activation", **compared(figures, base)}
    yield {**row, "published": TABLE_3["bigan"]["activation"]}
    alphas = {}
    for (layers, names), (key, published) in itertools.product(LAYERS.items(), TABLE_1.items()):
        lower, upper, fitted = key
        other = partly_random(network, names, lower, upper, arguments.seed)
        options = {
            "gradient_layers": names,
            "gradient_backbone": None if lower and upper else other,
            "omega": "fitted" if fitted else "random",
        }
        known = published[list(LAYERS).index(layers)]
        for features, of_paper in zip(("gradient", "full"), known, strict=True):
            candidates = alphas.get((key, features), arguments.gradient_alphas)
            model = gradient_model(activation, features, task, candidates, **options)
            alphas[key, features] = [model.gradient_alpha]
            result = compared(measure(model, task), base)
            row = {"table": 1, "encoder": name, "theta_1": lower, "theta_2": upper}
            row |= {"omega": fitted, "layers": layers, "model": features, **result}
            yield {**row, "published": of_paper}


def markdown(rows):
    """Return the rows as Markdown tables."""
    lines = []
    for (number, name), chosen in itertools.groupby(rows, lambda r: (r["table"], r["encoder"])):
        lines += ["", f"Table {number}, {Path(name).stem}", ""]
        lines += (per_model if number == 3 else per_combination)(list(chosen))
    return "\n".join([*lines, ""])


def per_model(rows):
    """Return a table with a line for each model."""
    lines = [
        "| model | accuracy, % | more than activation | published, % | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        unfinished = "" if row.get("converged", True) else " (not converged)"
        cells = [row["model"], f"{row['accuracy']:.2f} ± {row['error']:.2f}{unfinished}"]
        gain = f"{row['gain']:+.2f} ± {row['gain_error']:.2f}"
        cells += ["" if row["model"] == "activation" else gain]
        cells += ["" if row["published"] is None else f"{row['published']:.2f}"]
        lines.append(f"| {' | '.join([*cells, format(row['seconds'], '.0f')])} |")
    return lines


def per_combination(rows):
    """Return a table with a line for what is random, and published figures in parentheses."""
    activation, *rows = rows
    figures = {(r["theta_1"], r["theta_2"], r["omega"], r["layers"], r["model"]): r for r in rows}
    columns = list(itertools.product(LAYERS, ("gradient", "full")))
    lines = [
        f"activation: {activation['accuracy']:.2f} ({activation['published']:.2f})",
        "",
        f"| θ̄₁ | θ̄₂ | ω̄ | {' | '.join(map(' '.join, columns))} |",
        f"|---|---|---|{'---:|' * len(columns)}",
    ]
    for key in TABLE_1:
        cells = [("random", "pretrained")[pretrained] for pretrained in key[:2]]
        cells.append(("random", "fitted")[key[2]])
        for column in columns:
            row = figures.get(key + column)
            unfinished = "" if row is None or row["converged"] else "*"
            known = (
                "" if row is None else f"{row['accuracy']:.2f}{unfinished} ({row['published']:.2f})"
            )
            cells.append(known)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "*: not converged"]


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
    add("--seeds", type=int, default=3, help="runs of the better way of fine-tuning")
    add("--max-iter", type=int, default=100)
    add("--tol", type=float, default=1e-4, help="of the linear models")
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
