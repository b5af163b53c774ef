"""Iterations and passes of the gradient stage, with and without the K-FAC preconditioner.

The optimum is the lowest objective that any run reached, one of them a long run with the
preconditioner. Both runs start at the fitted activations, so the initial gap is the same. The
fit of the activations keeps its preconditioner in either case, and its passes do not count.

    python examples/benchmarks/preconditioner.py --data cifar10.zip --output preconditioner.json
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from unittest import mock

from _setup import digits, environment, images
from sklearn.exceptions import ConvergenceWarning

from sklearn_gradfeat import _stages
from sklearn_gradfeat.tangent import _inverses

SHARES = (0.1, 0.01, 0.001)


class IdentityInGradientStage:
    """No preconditioner where there are displacements, the usual one elsewhere."""

    real = _inverses.Preconditioner
    curvature = None

    def __init__(self, objective, logits, _):
        self.solve = self.real(objective, logits) if objective.tangent is None else None

    def __call__(self, x):
        return x if self.solve is None else self.solve(x)


class CountPasses:
    """An objective that counts passes as the solver does."""

    def __init__(self, objective):
        self.objective, self.passes = objective, 0

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def adjoint(self, cotangent):
        self.passes += 1
        return self.objective.adjoint(cotangent)

    def forward_adjoint(self, direction, logits):
        self.passes += 1
        return self.objective.forward_adjoint(direction, logits)


def run(model, X, y, max_iter, preconditioned):
    """Return the objective, the passes and the seconds after every iteration."""
    minimize = _stages.minimize
    records = []

    def recording(objective, *args, callback, **kwargs):
        if objective.tangent is None:
            return minimize(objective, *args, callback=callback, **kwargs)
        counted, start = CountPasses(objective), time.perf_counter()

        def watch(iteration, value, x):
            seconds = time.perf_counter() - start
            records.append((value, counted.passes, seconds))
            return callback(iteration, value, x)

        # tol=0 would also hold back the fit of the activations, so it is set here alone.
        kwargs.update(tolerance=0.0, max_iter=max_iter)
        return minimize(counted, *args, callback=watch, **kwargs)

    solver = _inverses.Preconditioner if preconditioned else IdentityInGradientStage
    with (
        mock.patch.object(_stages, "minimize", recording),
        mock.patch.object(_inverses, "Preconditioner", solver),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.set_params(max_iter=max_iter).fit(X, y)
    return {"start": float(model.objective_path_[0]), "records": records}


def first_below(result, target):
    """Return iterations, passes and seconds until the objective is below a target."""
    for number, (value, passes, seconds) in enumerate(result["records"], 1):
        if value <= target:
            return {"iterations": number, "passes": passes, "seconds": round(seconds, 2)}
    return None


def compare(name, model, X, y, *, max_iter, long):
    """Return one row for each run and each share of the initial gap."""
    results = {on: run(model, X, y, long if on else max_iter, on) for on in (True, False)}
    optimum = min(value for r in results.values() for value, *_ in r["records"])
    rows = []
    for on, result in results.items():
        for share in SHARES:
            target = optimum + share * (result["start"] - optimum)
            row = {"data": name, "n_samples": len(X), "preconditioner": on, "gap": share}
            reached = first_below(result, target)
            rows.append({**row, "limit": long if on else max_iter, "reached": reached})
    return rows


def table(rows):
    """Return the rows as a Markdown table."""
    lines = ["| data | preconditioner | gap | iterations | passes | seconds |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in rows:
        found = row["reached"]
        missed = f"> {row['limit']} |  | "
        cells = " | ".join(str(value) for value in found.values()) if found else missed
        switch = "K-FAC" if row["preconditioner"] else "none"
        lines.append(f"| {row['data']} | {switch} | {100 * row['gap']:g} % | {cells} |")
    return "\n".join(lines)


def main():
    """Run what was asked for, write JSON, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/<class>/*.jpg")
    parser.add_argument("--n-train", type=int, default=2000)
    parser.add_argument("--max-iter", type=int, default=200, help="without preconditioner")
    parser.add_argument("--long", type=int, default=200, help="with it, to find the optimum")
    parser.add_argument("--output", type=Path, default=Path("preconditioner.json"))
    arguments = parser.parse_args()
    limits = {"max_iter": arguments.max_iter, "long": arguments.long}
    rows = compare("digits, random network", *digits(), **limits)
    if arguments.data is not None:
        network = images(arguments.data, arguments.n_train)
        rows += compare(f"{arguments.data.stem}, EfficientNet-Lite0", *network, **limits)
    result = {"environment": environment(), "limits": limits, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
