"""Models over many networks, compared with the networks themselves.

Every network has random weights, and a classifier is fitted on it in float64 with the default
``gradient_layers``. Its logits are compared with ``b + W f + Ω J w₂``, where ``J w₂`` comes from
central differences of the original network. The gradient of its objective comes from autograd on
the original network. Saved, pickled and exported models are compared with the fitted one.

    python examples/benchmarks/architectures.py --output architectures.json
    python examples/benchmarks/architectures.py --networks 'timm/*' --output architectures.json

The second command replaces the rows of these networks in the file and keeps the others.
``--derivatives-only`` takes a third of the time: the solver stops after two steps, and models are
neither saved nor exported. ``--page`` writes the table into a Markdown file, between two comments.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import pickle
import re
import tempfile
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from _architectures import NETWORKS, build
from _setup import save
from scipy.special import logsumexp, softmax
from sklearn.exceptions import ConvergenceWarning
from torch.func import functional_call

import sklearn_gradfeat
from sklearn_gradfeat import GradientFeatureClassifier

N_TRAIN = 5
MARKS = "<!-- table of architectures.py -->", "<!-- end of the table -->"
# Steps of central differences, relative to the parameters, tried until the error is small enough.
# The short one is for a ReLU that changes sign within a step, the long one for networks that
# compute in float32 inside.
_STEPS, _EXACT = (1e-6, 1e-8, 1e-3), 1e-6


class Original:
    """The activation of a network as a function of the displacements of a fitted model.

    A displacement of a layer that a batch norm was folded into is one of the layer or of the batch
    norm, times a constant.
    """

    def __init__(self, network, model):
        self.network = network
        backbone, names = model._extractor.backbone, list(model.gradient_coef_)
        ones = {n: torch.ones(v.shape).double() for n, v in model.gradient_coef_.items()}
        at = backbone.displaced_state({})

        def slopes(moved):
            state = backbone.displaced_state({n: ones[n] for n in moved})
            return {k: v - at[k] for k, v in state.items() if not torch.equal(v, at[k])}

        together = slopes(names)
        self.slopes = {n: (n, together[n]) for n in names if n in together}
        for name in names:
            if name not in together:
                ((key, slope),) = slopes([name]).items()
                self.slopes[name] = key, slope
        self.at = {key: at[key] for key, _ in self.slopes.values()}

    def activation(self, x, state):
        """Return the activation, one row for every sample."""
        output = functional_call(self.network, state, (x,))
        return output.flatten(2).mean(2) if output.ndim > 2 else output

    def tangent(self, x, moves, step):
        """Return ``J w₂`` by central differences with a relative step."""
        changes = {key: slope * moves[name] for name, (key, slope) in self.slopes.items()}
        size = _norm(self.at.values()) / _norm(changes.values()) * step
        ends = []
        for sign in (1, -1):
            state = {key: self.at[key] + sign * size * change for key, change in changes.items()}
            with torch.no_grad():
                ends.append(self.activation(x, state))
        return (ends[0] - ends[1]) / (2 * size)

    def gradient(self, x, cotangent):
        """Return ``Jᵀ v`` by autograd, by parameter."""
        state = {key: value.clone().requires_grad_() for key, value in self.at.items()}
        keys = [key for key, _ in self.slopes.values()]
        found = torch.autograd.grad(
            self.activation(x, state), [state[key] for key in keys], cotangent
        )
        pairs = zip(self.slopes.items(), found, strict=True)
        return {name: slope * gradient for (name, (_, slope)), gradient in pairs}


def _norm(tensors):
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def digest(network):
    """Return a hash of everything that a fit must leave as it is."""
    found = hashlib.blake2b()
    for layer in network.modules():
        hooks = len(layer._forward_hooks), len(layer._forward_pre_hooks)
        found.update(repr((type(layer), layer.training, hooks, sorted(vars(layer)))).encode())
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        found.update(repr((name, value.dtype, value.requires_grad)).encode())
        found.update(value.detach().contiguous().numpy().data)
    return found.hexdigest()


def fit(network, x, y, **settings):
    """Return a fitted classifier with penalties at which both terms matter."""
    settings |= {"precision": "float64", "parametrization": "standard", "tol": 1e-8}
    settings |= {"feature_store": None, "activation_layer": None}
    own = copy.deepcopy(network)  # some networks keep what a pass computes
    with torch.no_grad():
        output = own(x)
    f = output.flatten(2).mean(2) if output.ndim > 2 else output
    alpha = 0.03 * float(f.var(0).sum())
    first = GradientFeatureClassifier(network, alpha=alpha, gradient_alpha=np.inf, **settings)
    first.fit(x, y)
    residual = (softmax(first.decision_function(x), 1) - np.eye(3)[y]) / len(y)
    gradient = Original(own, first).gradient(x, torch.from_numpy(residual @ first.omega_))
    gradient_alpha = 3 * _norm(gradient.values()) ** 2
    model = GradientFeatureClassifier(
        network, alpha=alpha, gradient_alpha=gradient_alpha, **settings
    )
    return model.fit(x, y)


def measure(network, x, derivatives_only=False):
    """Return the figures of a network in float64 and a batch of samples."""
    x, y = x.double() if x.is_floating_point() else x, np.arange(N_TRAIN) % 3
    n_parameters = sum(p.numel() for p in network.parameters())
    row, before = {"parameters": n_parameters}, digest(network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if derivatives_only:
            warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            model = fit(network, x[:N_TRAIN], y, max_iter=2 if derivatives_only else 300)
        except (ValueError, TypeError) as error:
            return {**row, "status": "refused", "reason": str(error)}
        messages = list(dict.fromkeys(str(w.message) for w in caught))
    refusals = [re.search(r"captured as a graph \((.*)\)\. Every", m, re.S) for m in messages]
    reasons = [found[1] for found in refusals if found]
    row |= {"status": "eager" if reasons else "captured", "reason": "".join(reasons)}
    row["warnings"] = [m for m, found in zip(messages, refusals, strict=True) if not found]
    names = model.gradient_layers_
    row |= {"gradient_layers": common_path(names), "tensors": len(names)}
    boundary = model._extractor.network(names).boundary(x[:2])
    row["stored"] = sum(z[0].numel() for z in boundary)
    original = Original(copy.deepcopy(network), model)
    row |= logit_error(original, model, x)
    if not derivatives_only:
        row |= optimality(original, model, x, y) | round_trips(model, x)
    row["unchanged"] = digest(network) == before
    return row


def common_path(names):
    """Return the submodule that holds all parameters."""
    paths = [name.split(".")[:-1] for name in names]
    shared = zip(*paths, strict=False)
    n = next((i for i, parts in enumerate(shared) if len(set(parts)) > 1), min(map(len, paths)))
    return ".".join(paths[0][:n])


def logit_error(original, model, x):
    """Return the error of the gradient term, relative to its size, and its share of the logits."""
    logits, omega = model.decision_function(x), torch.from_numpy(model.omega_)
    moves = {name: torch.from_numpy(move) for name, move in model.gradient_coef_.items()}
    with torch.no_grad():
        f = original.activation(x, {}).numpy()
    term, error = logits - f @ model.coef_.T - model.intercept_, math.inf
    for step in _STEPS:
        found = (original.tangent(x, moves, step) @ omega.T).numpy()
        error = min(error, float(np.abs(term - found).max() / np.abs(term).max()))
        if error < _EXACT:
            break
    return {"error": error, "share": float(term.std() / logits.std())}


def optimality(original, model, x, y):
    """Return the gradient relative to its terms, and the error of the objective."""
    x, eye = x[: len(y)], np.eye(3)
    with torch.no_grad():
        f = original.activation(x, {}).numpy()
    logits, alpha, gradient_alpha = model.decision_function(x), model.alpha_, model.gradient_alpha_
    residual = (softmax(logits, 1) - eye[y]) / len(y)
    pulled = original.gradient(x, torch.from_numpy(residual @ model.omega_))
    penalty = {name: gradient_alpha * move for name, move in model.gradient_coef_.items()}
    penalty = {name: torch.from_numpy(move) for name, move in penalty.items()}
    gradients = [
        _norm([g + penalty[n] for n, g in pulled.items()]) / _norm(penalty.values()),
        np.linalg.norm(residual.T @ f + alpha * model.coef_) / np.linalg.norm(alpha * model.coef_),
        np.linalg.norm(residual.sum(0)) / np.linalg.norm(residual),
    ]
    objective = float(np.mean(logsumexp(logits, 1) - (logits * eye[y]).sum(1)))
    objective += alpha / 2 * float((model.coef_**2).sum())
    objective += _norm(penalty.values()) ** 2 / (2 * gradient_alpha)
    return {
        "stationarity": max(map(float, gradients)),
        "objective": abs(objective / float(model.objective_path_[-1]) - 1),
    }


def round_trips(model, x):
    """Return whether a model keeps all bits in a file and a pickle, and the error of the export."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        pickle.loads(pickle.dumps(model)).save(path)
        restored = sklearn_gradfeat.load(path, backbone=model.backbone)
    row = {"restored": np.array_equal(restored.decision_function(x), model.decision_function(x))}
    try:
        with torch.no_grad():
            found = model.to_torch()(x).numpy()
    except ValueError as error:
        return {**row, "exported": str(error)}
    return {**row, "exported": float(np.abs(found - model.predict_proba(x)).max())}


def table(rows):
    """Return the rows as a Markdown table."""
    lines = [
        '| network | million parameters | `gradient_layers="last"` | tensors | numbers stored per '
        "sample | graph | error |",
        "|---|---:|---|---:|---:|---|---:|",
    ]
    for row in rows:
        line = f"| {row['network']} | {row['parameters'] / 1e6:.3g} | "
        if row["status"] == "refused":
            reason = ". ".join(row["reason"].split(". ")[:2])
            lines.append(line + f"| | | refused: {reason} | |")
            continue
        graph = "captured" if row["status"] == "captured" else f"eager: {row['reason']}"
        line += f"`{row['gradient_layers']}` | {row['tensors']} | {row['stored']:,} | "
        error = f"{row['error']:.0e}" if "error" in row else ""
        lines.append(line + f"{graph} | {error} |")
    return "\n".join(lines)


def write_page(path, rows):
    """Replace the table between the two comments of a page."""
    start, end = map(re.escape, MARKS)
    text = path.read_text("utf-8")
    made = f"{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}"
    path.write_text(re.sub(f"{start}.*{end}", lambda _: made, text, flags=re.S), "utf-8")


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--networks", nargs="+", default=["*"], help="names or glob patterns")
    add("--output", type=Path, default=Path("architectures.json"))
    add("--derivatives-only", action="store_true", help="neither solve, save nor export")
    add("--page", type=Path, help="Markdown file to write the table into")
    arguments = parser.parse_args()
    page, rows = arguments.page, {}
    del arguments.page
    if arguments.output.exists():
        rows = {row["network"]: row for row in json.loads(arguments.output.read_text())["rows"]}
    for name in NETWORKS:
        if any(fnmatchcase(name, pattern) for pattern in arguments.networks):
            found = measure(*build(name), arguments.derivatives_only)
            rows[name] = {"network": name, **found}
            ordered = [rows[name] for name in NETWORKS if name in rows]
            save(ordered, arguments)
            print(json.dumps(rows[name]), flush=True)
    if page:
        write_page(page, [rows[name] for name in NETWORKS if name in rows])


if __name__ == "__main__":
    main()
