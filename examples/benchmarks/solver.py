"""Passes and seconds of the second stage until the gap to the optimum falls to given shares.

The gap is that of the objective, and the shares are those of the gap at the start. Solvers start at
the fitted activation term and run without a tolerance, one after the other:

* "both levels", the solver of `fit`: quasi-Newton steps, preconditioned by K-FAC, each followed by
  a coarse-space solve in the leading subspace, where there is one;
* "from a quarter": the same, after five iterations on every fourth sample;
* "K-FAC alone": without coarse-space solves;
* "Newton-CG": conjugate gradients on the exact Hessian, with the same preconditioner;
* "no preconditioner": plain L-BFGS, for comparison.

The optimum is the lowest objective of all solvers, which is exact up to float32 if one of them had
enough iterations. A pass is one evaluation of the head over all samples: the linear map, or its
adjoint, or both at the same point. Building the subspace is not a pass. The seconds include it and
the preconditioner.

    python examples/benchmarks/solver.py --data cifar10.zip --output solver.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _datasets import read_images
from _setup import digits, docstrings, images, save, two_stages
from scipy.optimize import minimize_scalar

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.curvature import Inverses
from sklearn_gradfeat.solvers import minimize

SHARES = (0.1, 0.01, 0.001, 0.0001)


def convnet(path, n_train, layers):
    """Return a model and data: a network of the package."""
    X, y = read_images(path, "train", n_train)
    model = GradientFeatureClassifier(
        "convnet-vae", gradient_layers=layers, alpha=1e-4, gradient_alpha=1e-5
    )
    return model, X, y


def efficientnet(path, n_train, layers):
    """Return a model and data: EfficientNet-Lite0."""
    model, X, y = images(path, n_train)
    return model.set_params(gradient_layers=layers), X, y


PROBLEMS = {
    "digits": ("digits, random MLP", lambda path, n: digits()),
    "text": ("docstrings, MiniLM's last layer", lambda path, n: docstrings()),
    "conv5": ("VAE encoder, conv5", lambda path, n: convnet(path, n, ["conv5"])),
    "conv4-5": ("VAE encoder, conv4-5", lambda path, n: convnet(path, n, ["conv4", "conv5"])),
    "head": ("EfficientNet-Lite0, head conv", lambda path, n: efficientnet(path, n, "last")),
    "blocks": (
        "EfficientNet-Lite0, top 3",
        lambda path, n: efficientnet(path, n, 3),
    ),
}


class Watched:
    """An objective that counts passes and records the values that a solver reaches."""

    def __init__(self, objective):
        self.objective, self.passes, self.records = objective, 0, []
        self.start = time.perf_counter()

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def forward(self, x):
        self.passes += bool(self.objective.split(x).u.any())
        return self.objective.forward(x)

    def adjoint(self, cotangent):
        self.passes += 1
        return self.objective.adjoint(cotangent)

    def forward_adjoint(self, direction, logits):
        self.passes += 1
        return self.objective.forward_adjoint(direction, logits)

    def reached(self, _iteration, value, *_rest):
        """Record the objective, the passes and the seconds so far."""
        self.records.append((value, self.passes, time.perf_counter() - self.start))


def lbfgs(objective, x, inverses, max_iter, *, precondition=True, coarse=True):
    """Minimise with the solver of the package, without some of its parts."""
    inverse = inverses.at(objective.objective)
    minimize(
        objective, x, inverse if precondition else lambda logits: torch.clone,
        tolerance=lambda _: 0.0, max_iter=max_iter, callback=objective.reached,
        coarse=inverses.coarse(objective.objective) if coarse else None,
    )  # fmt: skip


class Curved:
    """The quadratic part of a loss at given logits."""

    def __init__(self, loss, logits):
        self.loss, self.logits, self.n_outputs = loss, logits, loss.n_outputs

    def gradient(self, change, rows=slice(None)):
        """Return the product of the Hessian with a change of logits."""
        at = (self.logits[rows],)
        return torch.func.jvp(lambda logits: self.loss.gradient(logits, rows), at, (change,))[1]


def conjugate_gradients(objective, gradient, logits, inverse, share):
    """Return an approximate Newton step, and the change of the logits along it.

    It solves ``H s = -g`` up to ``share`` of the initial residual, in the norm of the
    preconditioner.
    """
    quadratic = replace(objective.objective, loss=Curved(objective.loss, logits))
    zero = torch.zeros_like(logits)
    step, moved, residual = torch.zeros_like(gradient), zero.clone(), -gradient
    preconditioned = inverse(residual)
    direction, square = preconditioned, residual @ preconditioned
    goal = share**2 * square
    for _ in range(50):
        objective.passes += 1
        change, product = quadratic.forward_adjoint(direction, zero)
        product += objective.penalty * direction
        length = square / (direction @ product)
        step, moved = step + length * direction, moved + float(length) * change
        residual = residual - length * product
        preconditioned, former = inverse(residual), square
        square = residual @ preconditioned
        if square <= goal:
            break
        direction = preconditioned + square / former * direction
    return step, moved


def newton_cg(objective, x, inverses, max_iter):
    """Minimise by truncated Newton steps: conjugate gradients, then an exact line search."""
    loss, penalty = objective.loss, objective.penalty
    logits, share = objective.forward(x), 0.3
    inverse = inverses.at(objective.objective)(logits)
    value = value_at(objective, x, logits)
    while objective.passes < max_iter:
        gradient = objective.adjoint(loss.gradient(logits)) + penalty * x
        direction, change = conjugate_gradients(objective, gradient, logits, inverse, share)

        def along(step, x=x, logits=logits, direction=direction, change=change):
            return value_at(objective, x + step * direction, logits + step * change)

        found = minimize_scalar(along, bracket=(0.0, 1.0))
        if found.fun >= value:
            return
        x, logits, value = x + found.x * direction, logits + found.x * change, found.fun
        share = max(share / 2, 0.01)
        objective.reached(None, value)


def value_at(objective, x, logits):
    """Return the objective at a point with known logits."""
    penalty = float(objective.penalty.double() @ x.double().square())
    return objective.loss.value(logits) + penalty / 2


def thinned(objective):
    """Return the objective of every fourth sample."""

    def batches(stride=1):
        start = 0
        for _, boundary in objective.tangent.batches(4 * stride):
            rows = slice(start, start + len(boundary[0]))
            start = rows.stop
            yield rows, boundary

    loss, few = objective.loss, slice(None, None, 4)
    weights = loss.weights[few] / loss.weights[few].sum()
    loss = replace(loss, targets=loss.targets[few], weights=weights)
    tangent = replace(objective.tangent, batches=batches)
    activation = objective.activation[few]
    return replace(
        objective, loss=loss, tangent=tangent, activation=activation, n_samples=len(activation)
    )


def from_a_quarter(objective, x, inverses, max_iter):
    """Minimise over every fourth sample first; a pass over these counts as a quarter."""
    few, own = Watched(thinned(objective.objective)), Inverses()
    inverse, coarse = own.at(few.objective), own.coarse(few.objective)
    x = minimize(few, x, inverse, tolerance=lambda _: 0.0, max_iter=5, coarse=coarse).x
    objective.passes += few.passes / 4
    lbfgs(objective, x, inverses, max_iter)


SOLVERS = {
    "both levels": lbfgs,
    "from a quarter": from_a_quarter,
    "K-FAC alone": partial(lbfgs, coarse=False),
    "Newton-CG": newton_cg,
    "no preconditioner": partial(lbfgs, precondition=False, coarse=False),
}


def second_stage(model, X, y):
    """Return the objective of the second stage and its start."""
    stages = two_stages(model, X, y)
    first = stages.fit_activation(model.alpha)
    gradient_alpha = model.alpha if model.gradient_alpha is None else model.gradient_alpha
    objective = stages.second_objective(first, gradient_alpha)
    return objective, torch.cat([first.solution.x, stages.like.new_zeros(objective.sizes[2])])


def compare(name, model, X, y, solvers, max_iter):
    """Return one row for each solver: passes and seconds to every share of the gap."""
    objective, x = second_stage(model, X, y)
    runs = {}
    for solver in solvers:
        watched = Watched(objective)
        SOLVERS[solver](watched, x, Inverses(), max_iter)
        runs[solver] = watched.records
    start = value_at(objective, x, objective.forward(x))
    optimum = min(value for records in runs.values() for value, *_ in records)
    rows = []
    for solver, records in runs.items():
        row = {"problem": name, "n_samples": len(X), "n_unknowns": len(x), "solver": solver}
        for share in SHARES:
            goal = optimum + share * (start - optimum)
            row[f"{share:g}"] = next(((p, s) for value, p, s in records if value <= goal), None)
        rows.append({**row, "passes": records[-1][1], "seconds": records[-1][2]})
    return rows


def table(rows):
    """Return the rows as a Markdown table: passes, and seconds."""
    lines = [f"| problem | solver | {' | '.join(f'{100 * share:g} %' for share in SHARES)} |"]
    lines.append(f"|---|---|{'---:|' * len(SHARES)}")
    for row in rows:
        found = [row[f"{share:g}"] for share in SHARES]
        limit = f"> {row['passes']:g} ({row['seconds']:.1f} s)"
        cells = [limit if f is None else f"{f[0]:g} ({f[1]:.1f} s)" for f in found]
        lines.append(f"| {row['problem']} | {row['solver']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/<class>/*.jpg")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--n-train", type=int, default=10_000, help="images")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument(
        "--max-iter", type=int, default=200, help="iterations; of Newton-CG: passes"
    )
    parser.add_argument("--output", type=Path, default=Path("solver.json"))
    arguments = parser.parse_args()
    rows = []
    for problem in arguments.problems:
        name, load = PROBLEMS[problem]
        if problem in ("conv5", "conv4-5", "head", "blocks") and arguments.data is None:
            print(f"{name}: skipped without --data.")
            continue
        task = load(arguments.data, arguments.n_train)
        rows += compare(name, *task, arguments.solvers, arguments.max_iter)
        save(rows, arguments)
    print(table(rows))


if __name__ == "__main__":
    main()
