"""Tables 1 to 3 of the paper [1] on your data, beside the published figures.

Table 3 compares the models "activation", "gradient" and "full" with fine-tuning, for an encoder
that was pretrained without labels. Table 1 repeats it with random parameters in parts of the
gradient term. Table 2 is multilabel classification with EfficientNet-Lite0. A held-out tenth of
the training images selects the penalties and the learning rates. The linear models are then fitted
to all training images. Fine-tuning keeps the tenth for early stopping.

    python examples/benchmarks/paper_tables.py --data cifar10.zip --output paper_tables.json

--data is a zip file or a folder of train/<class>/*.jpg and test/<class>/*.jpg, or the folder where
torchvision keeps CIFAR-10, CIFAR-100 or SVHN. Table 2 makes tiles of four such images, or reads
the folder of torchvision's VOCDetection (VOCdevkit/VOC2007/) or CocoDetection (annotations/,
train2014/, val2014/). Two details differ from the VOC07 protocol: average precision is that of
scikit-learn, where VOC07 averages the precision at eleven values of recall; and a difficult object
counts as absent, where VOC07 leaves out its image.

[1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation Learning, ICLR 2020,
    arXiv:2004.05529.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from _ablation import GradientsElsewhere, RandomOmegaClassifier, partly_random
from _datasets import MultiLabelTask, Task, need_data
from _finetuning import (
    RECIPES,
    Head,
    accuracy,
    below,
    fine_tune,
    fitted_to_rows,
    mean_average_precision,
    take,
)
from _setup import gain_on, pretrained, save
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureClassifierCV
from sklearn_gradfeat.backbones._builtin import SHIPPED

TOP = ["conv3", "conv4", "conv5"]
LAYERS = {"conv5": TOP[2:], "conv4-5": TOP[1:], "conv3-5": TOP}
# Published accuracies in percent: pairs of "gradient" and "full" for each entry of LAYERS. The key
# says whether θ̄₁ and θ̄₂ are pretrained, and whether Ω is fitted. The alternative is random.
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
# Published accuracies in percent by encoder and data, for each entry of MODELS.
TABLE_3 = {
    ("bigan", "SVHN"): (82.04, 89.91, 89.96, 91.15),
    ("bigan", "CIFAR-10"): (62.87, 70.14, 70.51, 71.78),
    ("bigan", "CIFAR-100"): (34.30, 38.99, 39.37, 41.05),
    ("vae", "SVHN"): (81.95, 91.44, 90.90, 93.61),
    ("vae", "CIFAR-10"): (52.05, 61.47, 61.16, 65.16),
    ("vae", "CIFAR-100"): (29.20, 35.10, 34.83, 37.86),
}
# Published mean average precisions in percent with ResNet18, for each entry of MODELS: from one
# crop (VOC07, table 2) and from ten crops (COCO14, table 4).
TABLES_2_AND_4 = {
    "VOC07": (82.65, 83.05, 83.50, 82.97),
    "COCO14": (62.98, 66.33, 66.45, 63.43),
}
MODELS = ("activation", "gradient", "full", "fine-tuning")
CONTROL = "input of θ₂"


def choose(model, task, parameter, values):
    """Set a penalty to the value with the best score on the held-out tenth."""
    if len(values) == 1:
        return model.set_params(**{parameter: values[0]})
    options = {"cv": task.held_out_fold, "refit": False}
    options["scoring"] = mean_average_precision_scorer if task.multilabel else "accuracy"
    if isinstance(model, RandomOmegaClassifier):  # the built-in search fits Ω
        search = fit_quietly(GridSearchCV(model, {parameter: values}, **options), task)
        return model.set_params(**search.best_params_)
    shared = model.get_params(deep=False)
    del shared["warm_start"], shared["checkpoint"]
    alpha, gradient_alpha = shared.pop("alpha"), shared.pop("gradient_alpha")
    alpha, gradient_alpha = (1.0 if p == "auto" else p for p in (alpha, gradient_alpha))
    grids = {"alphas": [alpha], "gradient_alphas": [gradient_alpha], f"{parameter}s": values}
    search = fit_quietly(GradientFeatureClassifierCV(**shared, **grids, **options), task)
    return model.set_params(**{parameter: getattr(search, f"{parameter}_")})


def fit_quietly(search, task):
    """Fit a search to all training images, and ignore models that did not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return search.fit(task.X, task.y)


def mean_average_precision_scorer(model, X, y):
    """Return the mean average precision of a model."""
    return mean_average_precision(model.decision_function(X), y)


def measure(model, task):
    """Fit to all training images; return figures of the fit and results on the test images.

    ``"test"`` is a list with one array: logits of multilabel images, or whether the predicted class
    is correct.
    """
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(task.X, task.y)
    seconds = time.perf_counter() - start
    found = (model.decision_function if task.multilabel else model.predict)(task.X_test)
    return {
        "test": [found if task.multilabel else found == task.y_test],
        "alpha": model.alpha,
        "gradient_alpha": None if model.features == "activation" else model.gradient_alpha,
        "converged": not any(w.category is ConvergenceWarning for w in caught),
        "passes": model.n_passes_,
        "seconds": seconds,
    }


def activation_model(network, task, arguments):
    """Return an unfitted logistic regression on the activations, with the best penalty."""
    model = GradientFeatureClassifier(
        **network, features="activation", max_iter=arguments.max_iter, tol=arguments.tol,
        random_state=arguments.seed,
    )  # fmt: skip
    return choose(model, task, "alpha", arguments.alphas)


def gradient_model(activation, features, task, alphas, **parameters):
    """Return an unfitted model with a gradient term, with the best penalty for it."""
    model = clone(activation).set_params(features=features, **parameters)
    return choose(model, task, "gradient_alpha", alphas)


def on_input(activation, task, arguments):
    """Return an unfitted logistic regression on the input of the gradient layers, and its task.

    ``activation`` must be fitted.
    """
    flat = copy.copy(task)
    for name in ("X", "X_test"):
        tensors = below(activation, getattr(task, name), torch.device("cpu"))
        setattr(flat, name, torch.cat([t.flatten(1) for t in tensors], 1).numpy())
    model = clone(activation).set_params(
        backbone=nn.Identity(), preprocess=None, activation_layer=None, precision="float32"
    )
    return choose(model, flat, "alpha", arguments.alphas), flat


def fine_tuning(activation, task, arguments):
    """Iterate over (model, figures) of fine-tuning the gradient layers by each recipe.

    The recipe with the better score on the held-out tenth is repeated with other seeds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fitted = fitted_to_rows(activation, task)
    z, z_test = (below(fitted, X, device) for X in (task.X, task.X_test))
    parts = [(take(z, rows), task.y[rows]) for rows in (task.rows, task.held_out)]
    metric = mean_average_precision if task.multilabel else accuracy

    def run(recipe, factor, seed):
        head = Head(fitted, device)
        limits = (recipe.rate * factor, arguments.patience, seed)
        best = fine_tune(head, *parts, recipe, *limits, metric)
        logits = head.logits(z_test)
        return best, logits if task.multilabel else logits.argmax(1) == task.y_test

    tuned = {}
    for name, recipe in RECIPES.items():
        start = time.perf_counter()
        runs = [(*run(recipe, f, arguments.seed), f) for f in arguments.rate_factors]
        best, test, factor = max(runs, key=lambda entry: entry[0])
        tuned[name] = (best, [test], factor, time.perf_counter() - start)
    better = max(tuned, key=lambda name: tuned[name][0])
    for name, (_, tests, factor, seconds) in tuned.items():
        recipe = RECIPES[name]
        for more in range(1, arguments.seeds if name == better else 1):
            tests.append(run(recipe, factor, arguments.seed + more)[1])
        figures = {"test": tests, "rate": recipe.rate * factor, "seconds": seconds}
        yield f"fine-tuning, {name}", figures


def compared(figures, base, task):
    """Replace the results on the test images by the score and the gain over ``base``.

    Both are in percent, with standard errors over the test images. The error of the gain is that of
    the paired difference. Results of several seeds are averaged image by image.
    """
    tests = np.stack(figures.pop("test"))
    (base,) = base
    if task.multilabel:
        scores = [mean_average_precision(logits, task.y_test) for logits in tests]
        gain = statistics.mean(scores) - mean_average_precision(base, task.y_test)
        error, gain_error = bootstrap(tests, base, task.y_test)
        gained = {"gain": 100 * gain, "gain_error": 100 * float(gain_error)}
    else:
        scores = tests.mean(1)
        error = tests.mean(0).std() / math.sqrt(len(base))
        gained = gain_on(base, tests.mean(0))
    return {
        "score": 100 * float(np.mean(scores)),
        "error": 100 * float(error),
        "scores": [100 * float(value) for value in scores],
        **gained,
        **figures,
    }


def bootstrap(tests, base, y, n_draws=200):
    """Return the standard errors of the mean average precision and of its gain over ``base``."""
    rng = np.random.default_rng(0)
    draws = []
    for rows in rng.integers(len(y), size=(n_draws, len(y))):
        scores = [mean_average_precision(logits[rows], y[rows]) for logits in [base, *tests]]
        draws.append((statistics.mean(scores[1:]), statistics.mean(scores[1:]) - scores[0]))
    return np.std(draws, axis=0)


def four_models(activation, task, arguments, published):
    """Iterate over the rows of a network: three linear models, and fine-tuning by two recipes.

    A control that the paper lacks is added: a logistic regression on the whole input of the
    gradient layers.
    """

    def models():
        yield "activation", measure(activation, task)
        for features in ("gradient", "full"):
            if features in arguments.models:
                model = gradient_model(activation, features, task, arguments.gradient_alphas)
                yield features, measure(model, task)
        if CONTROL in arguments.models:
            yield CONTROL, measure(*on_input(activation, task, arguments))
        if "fine-tuning" in arguments.models:
            yield from fine_tuning(activation, task, arguments)

    base, known = None, dict(zip(MODELS, published or (), strict=False))
    for model, figures in models():
        base = figures["test"] if base is None else base
        row = {"model": model, **compared(figures, base, task)}
        yield {**row, "published": known.get(model.partition(",")[0])}


def table_2(task, arguments):
    """Iterate over the rows of multilabel classification with EfficientNet-Lite0."""
    activation = activation_model(pretrained("efficientnet", arguments.side), task, arguments)
    for row in four_models(activation, task, arguments, TABLES_2_AND_4.get(task.source)):
        yield {"table": 2, "encoder": "EfficientNet-Lite0", "data": task.source, **row}


def table_3(name, task, arguments):
    """Iterate over the rows of an encoder."""
    keys = ((known, task.source) for known in ("bigan", "vae") if known in Path(name).stem)
    published = TABLE_3.get(next(keys, None))
    activation = activation_model(pretrained(name), task, arguments)
    for row in four_models(activation, task, arguments, published):
        yield {"table": 3, "encoder": name, **row}


def table_1(name, task, arguments):
    """Iterate over the rows of an encoder with parts of the gradient term random.

    The penalties are selected with the first choice of layers, and kept for the others.
    """
    network = pretrained(name)
    activation = activation_model(network, task, arguments)
    figures = measure(activation, task)
    base = figures["test"]
    row = {"table": 1, "encoder": name, "model": "activation", **compared(figures, base, task)}
    yield {**row, "published": TABLE_3.get(("bigan", task.source), (None,))[0]}
    alphas = {}
    for layers, (key, published) in itertools.product(arguments.layers, TABLE_1.items()):
        theta_1, theta_2, fitted = key
        ablated = ablation(activation, LAYERS[layers], *key, arguments.seed)
        of_cifar10 = task.source == "CIFAR-10"
        known = published[list(LAYERS).index(layers)] if of_cifar10 else (None, None)
        for features, of_paper in zip(("gradient", "full"), known, strict=True):
            candidates = alphas.get((key, features), arguments.gradient_alphas)
            model = gradient_model(ablated, features, task, candidates)
            alphas[key, features] = [model.gradient_alpha]
            result = compared(measure(model, task), base, task)
            row = {"table": 1, "encoder": name, "theta_1": theta_1, "theta_2": theta_2}
            row |= {"omega": fitted, "layers": layers, "model": features, **result}
            yield {**row, "published": of_paper}


def ablation(activation, layers, theta_1, theta_2, fitted, seed):
    """Return an unfitted model: are θ̄₁ and θ̄₂ pretrained, is Ω fitted, or are they random?"""
    parameters = {**activation.get_params(deep=False), "gradient_layers": layers}
    if not (theta_1 and theta_2):
        network = activation.backbone
        other = partly_random(network, layers, theta_1, theta_2, seed)
        parameters["backbone"] = GradientsElsewhere(network, other)
        parameters["gradient_layers"] = [f"gradient.{layer}" for layer in layers]
    return (GradientFeatureClassifier if fitted else RandomOmegaClassifier)(**parameters)


def markdown(rows):
    """Return the rows as Markdown tables."""
    lines = []
    for (number, name), chosen in itertools.groupby(rows, lambda r: (r["table"], r["encoder"])):
        lines += ["", f"Table {number}, {Path(name).stem}", ""]
        lines += (per_combination if number == 1 else per_model)(list(chosen))
    return "\n".join([*lines, ""])


def per_model(rows):
    """Return the lines of a table with one row for each model."""
    metric = "mean average precision" if rows[0]["table"] == 2 else "accuracy"
    lines = [
        f"| model | {metric}, % | gain over activation | published, % | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        unfinished = "" if row.get("converged", True) else " (not converged)"
        cells = [row["model"], f"{row['score']:.2f} ± {row['error']:.2f}{unfinished}"]
        gain = f"{row['gain']:+.2f} ± {row['gain_error']:.2f}"
        cells += ["" if row["model"] == "activation" else gain]
        cells += ["" if row["published"] is None else f"{row['published']:.2f}"]
        lines.append(f"| {' | '.join([*cells, format(row['seconds'], '.0f')])} |")
    return lines


def beside(row):
    """Return a score with the published one in parentheses."""
    unfinished = "" if row["converged"] else "*"
    published = "" if row["published"] is None else f" ({row['published']:.2f})"
    return f"{row['score']:.2f}{unfinished}{published}"


def per_combination(rows):
    """Return the lines of a table with one row for each combination of random parts.

    The published figures are in parentheses.
    """
    activation, *rows = rows
    figures = {(r["theta_1"], r["theta_2"], r["omega"], r["layers"], r["model"]): r for r in rows}
    columns = list(itertools.product(dict.fromkeys(r["layers"] for r in rows), MODELS[1:3]))
    lines = [
        f"activation: {beside(activation)}",
        "",
        f"| θ̄₁ | θ̄₂ | Ω | {' | '.join(map(' '.join, columns))} |",
        f"|---|---|---|{'---:|' * len(columns)}",
    ]
    for key in TABLE_1:
        cells = [("random", "pretrained")[pretrained] for pretrained in key[:2]]
        cells.append(("random", "fitted")[key[2]])
        for column in columns:
            cells.append("")
            if (row := figures.get(key + column)) is not None:
                cells[-1] = beside(row)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "*: not converged"]


def main(argv=None):
    """Write JSON and Markdown after every row, and print the Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="zip file or folder of images, see the top of this file")
    add("--tables", type=int, nargs="+", default=[3, 2, 1], choices=[1, 2, 3])
    add(
        "--encoders",
        nargs="+",
        default=list(SHIPPED),
        help="names, or files of weights; tables 1 and 3",
    )
    add("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS), help="table 1")
    models = [*MODELS[1:3], CONTROL, MODELS[3]]
    add("--models", nargs="+", default=models, choices=models, help="tables 2 and 3")
    add("--n-train", type=int, help="default: all")
    add("--n-test", type=int, help="default: all")
    add("--side", type=int, default=96, help="height and width of images in table 2")
    add("--alphas", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
    add("--gradient-alphas", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4, 1e-5])
    add("--rate-factors", type=float, nargs="+", default=[1.0, 0.1, 0.01])
    add(
        "--patience",
        type=int,
        default=10,
        help="epochs without a better score after which fine-tuning stops",
    )
    add("--seeds", type=int, default=3, help="runs of the better recipe of fine-tuning")
    add("--max-iter", type=int, default=100)
    add("--tol", type=float, default=1e-4, help="tolerance of the linear models")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("paper_tables.json"))
    arguments = parser.parse_args(argv)
    need_data(arguments.data)
    read = functools.cache(lambda kind: kind(arguments))
    rows, sizes = [], {}
    for number in arguments.tables:
        task = read(MultiLabelTask if number == 2 else Task)
        sizes[f"table_{number}"] = {
            "data": task.source, "n_train": len(task.y), "n_test": len(task.y_test)
        }  # fmt: skip
        if number == 2:
            found = table_2(task, arguments)
        else:
            table = {1: table_1, 3: table_3}[number]
            tables = (table(name, task, arguments) for name in arguments.encoders)
            found = itertools.chain.from_iterable(tables)
        for row in found:
            rows.append(row)
            save(rows, arguments, sizes=sizes)
            arguments.output.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
