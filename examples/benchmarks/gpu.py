"""Fits on a CUDA device: agreement with the CPU, speed, memory, and what one pass consists of.

One command, at most eight minutes on a data-centre GPU, with nothing but the package and torch:

    python examples/benchmarks/gpu.py --output gpu.json

It runs the tests marked ``cuda``, if pytest and the tests are there. Then, for ResNet-50 and
ViT-B/16 with random weights on made images, and for the network of the package on CIFAR images if
``--data`` names them, it reports

* the relative difference of the objective to that of a fit of few images on the CPU;
* a fit in units of a forward pass in float32, passes, images per second, peak memory, and a fit
  that chooses its penalties in units of one that knows them; torch's default forward pass, with
  TF32 in convolutions, is timed, too;
* a fit in little memory, whose batches are halved;
* one pass under the profiler: seconds in kernels, seconds without a kernel, synchronisations with
  the host, copies from and to it;
* the error of a gradient in TF32 and in bfloat16, relative to float64.

``--device cpu --n-samples 16 --size 64 --networks resnet18`` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from _datasets import read_images
from _setup import empty_store, encoder, nearest, random_images, save, scaled_images, two_stages
from torch.profiler import ProfilerActivity, profile

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones import neutral_state
from sklearn_gradfeat.linearized import LinearizedHead

ROOT = Path(__file__).parents[2]
LAYERS = {"resnet50": "layer4.2", "resnet18": "layer4.1", "vit_b_16": 1}
HEADS = {"vit_b_16": "heads"}
FEW = 64


def cuda_tests():
    """Run the tests marked ``cuda``; return the last line of pytest."""
    if importlib.util.find_spec("pytest") is None or not (ROOT / "tests").is_dir():
        return "not run: no pytest, or no tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, "tests"], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = run.stdout.strip().splitlines() or run.stderr.strip().splitlines()
    return "\n".join(lines[-15:] if run.returncode else lines[-1:])


def problem(name, arguments):
    """Return an estimator and images with labels."""
    if name == "convnet-rotation":
        X, y = read_images(arguments.data, "train", arguments.n_samples)
        network, preprocess = encoder(name)
        layers = "last"
    else:
        X = random_images(arguments.n_samples)
        y = nearest(X, 10)
        torch.manual_seed(0)
        extra = {"image_size": arguments.size} if name == "vit_b_16" else {}
        network = torchvision.models.get_model(name, weights=None, **extra)
        layers = LAYERS[name]
        setattr(network, HEADS.get(name, "fc"), torch.nn.Identity())
        preprocess = scaled_images(arguments.size)
        set_batch_norms(network, preprocess(torch.from_numpy(X[:FEW])))
    model = GradientFeatureClassifier(
        network, preprocess=preprocess, gradient_layers=layers, alpha=0.1, gradient_alpha=1e-3,
        device=arguments.device, batch_size=arguments.batch_size, activation_layer=None,
    )  # fmt: skip
    return model, X, y


@torch.no_grad()
def set_batch_norms(network, x):
    """Let batch norms divide by the deviations of a batch, as those of a trained network do."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    network.train()(x)
    network.eval()


def few(X):
    """Return a slice of few samples, which are of all classes."""
    return slice(None, None, max(1, len(X) // FEW))


def synchronize(device):
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device, function, *arguments):
    """Return the seconds of a call, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = function(*arguments)
    synchronize(device)
    return time.perf_counter() - start, result


def forward(model, X):
    """Run the plain network over all images, by default with TF32 in convolutions."""
    network = copy.deepcopy(model.backbone).eval().to(model.device)
    with torch.inference_mode():
        for batch in torch.from_numpy(X).split(model.batch_size):
            network(model.preprocess(batch.to(model.device)))


def agreement(model, X, y):
    """Return the relative difference of the objectives on both devices, for few images."""
    some = few(X)
    options = {"tol": 1e-6, "max_iter": 200}
    reached = {}
    for device in {"cpu", model.device}:
        fitted = model.__class__(**{**model.get_params(), "device": device, **options})
        reached[device] = fitted.fit(X[some], y[some]).objective_path_[-1]
    return abs(reached[model.device] / reached["cpu"] - 1)


def speed(model, X, y, repeats):
    """Return seconds of fits and predictions, alone and in units of a forward pass."""
    device, rows = model.device, []
    seconds(device, model.fit, X[few(X)], y[few(X)])  # captures the graph, loads kernels
    searching = model.__class__(**{**model.get_params(), "alpha": "auto", "gradient_alpha": "auto"})
    for _ in range(repeats):
        row = {"forward": seconds(device, neutral_state()(forward), model, X)[0]}
        row["forward with TF32"] = seconds(device, forward, model, X)[0]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        empty_store()
        row["cold fit"] = seconds(device, model.fit, X, y)[0]
        row["warm fit"] = seconds(device, model.fit, X, y)[0]
        row["predict"] = seconds(device, model.set_params(feature_store=None).predict, X)[0]
        model.set_params(feature_store="auto")
        rows.append(row)
    middle = {kind: statistics.median(row[kind] for row in rows) for kind in rows[0]}
    middle["search"] = seconds(device, searching.fit, X, y)[0]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return {
        "seconds": middle,
        "in forward passes": {k: v / middle["forward"] for k, v in middle.items()},
        "search / warm fit": middle["search"] / middle["warm fit"],
        "images per second": len(X) / middle["cold fit"],
        "passes": int(model.n_passes_),
        "peak MiB": peak,
    }


@neutral_state()
def one_pass(model, X, y):
    """Return the objective of the second stage, a direction, the logits at the start.

    The last item is whether the network was captured as a graph.
    """
    stages = two_stages(model, X, y)
    first = stages.fit_activation(model.alpha)
    objective = stages.second_objective(first, model.gradient_alpha)
    x = torch.cat([first.solution.x, stages.like.new_zeros(objective.sizes[2])])
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(x), generator=generator).to(x) / len(x) ** 0.5
    return objective, direction, objective.forward(x), stages._prepared.network.graph is not None


@neutral_state()
def profiled(objective, direction, logits, captured, device):
    """Return the kernels, waits and copies of a pass, by torch's profiler."""
    objective.forward_adjoint(direction, logits)
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        wall, _ = seconds(device, objective.forward_adjoint, direction, logits)
    events = list(found.events())
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    busy, end = 0.0, 0.0
    for event in sorted(kernels, key=lambda e: e.time_range.start):
        start = max(event.time_range.start, end)
        busy += max(0.0, event.time_range.end - start)
        end = max(end, event.time_range.end)
    by_time = {}
    for event in kernels:
        by_time[event.name] = by_time.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    slowest = sorted(by_time.items(), key=lambda item: -item[1])[:8]
    return {
        "captured": captured,
        "seconds": wall,
        "kernels": len(kernels),
        "seconds with a kernel": busy / 1e6,
        "seconds without": wall - busy / 1e6,
        "slowest kernels": {name[:80]: value for name, value in slowest},
        "synchronisations": sum("Synchronize" in e.name for e in events),
        "copies": sum("Memcpy" in e.name and "DtoD" not in e.name for e in kernels),
        "scalars read": sum(e.name == "aten::_local_scalar_dense" for e in events),
    }


def errors(model, X, y):
    """Return the relative errors of a gradient in TF32 and bfloat16, on few images."""
    with neutral_state():
        stages = two_stages(model, X[few(X)], y[few(X)])
    network = stages._prepared.network
    rows, boundary = next(iter(stages.samples.batches()))
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(rows.stop - rows.start, stages.samples.activation.shape[1],
                            generator=generator)  # fmt: skip

    def gradient(dtype):
        head = replace(network, _head=copy.deepcopy(network._head).to(dtype)).head
        values = {name: value.to(dtype) for name, value in network.parameters.items()}
        inputs = tuple(z.to(dtype) if z.is_floating_point() else z for z in boundary)
        linear = LinearizedHead(head, values, "standard")
        return linear.vjp(inputs, cotangent.to(inputs[0].device, dtype)).double()

    exact, found = gradient(torch.float64), {}
    for kind, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        found[kind] = float((gradient(dtype) - exact).norm() / exact.norm())
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    return found


def in_little_memory(model, X, y):
    """Return the warnings of a fit in a part of the memory, and its batch size at the end."""
    if model.device != "cuda":
        return None
    empty_store()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    fraction = (torch.cuda.memory_reserved() + 1.5 * 2**30) / total
    torch.cuda.set_per_process_memory_fraction(fraction)
    large = model.__class__(**{**model.get_params(), "batch_size": 4096, "max_iter": 3})
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            large.fit(X, y)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    halved = [str(w.message) for w in seen if "Memory ran out" in str(w.message)]
    return {"fraction": fraction, "halvings": len(halved), "last": halved[-1:]}


def main():
    """Write JSON after every part, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="zip file or folder of images: fits the network of the package")
    add("--networks", nargs="+", default=["resnet50", "vit_b_16"], choices=list(LAYERS))
    add("--n-samples", type=int, default=4000)
    add("--size", type=int, default=224)
    add("--batch-size", type=int, default=256)
    add("--repeats", type=int, default=2)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--skip-tests", action="store_true")
    add("--output", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit(print("There is no CUDA device: nothing to measure."))
    known, rows = {"tests": None if arguments.skip_tests else cuda_tests()}, []
    print(known["tests"])
    names = [*arguments.networks, *(["convnet-rotation"] if arguments.data else [])]
    for name in names:
        model, X, y = problem(name, arguments)
        rows.append({"network": name, "n_samples": len(X)})
        for part, measure in (
            ("speed", lambda model=model, X=X, y=y: speed(model, X, y, arguments.repeats)),
            ("pass", lambda m=model, X=X, y=y: profiled(*one_pass(m, X, y), m.device)),
            ("errors", lambda model=model, X=X, y=y: errors(model, X, y)),
            ("difference to the CPU", lambda model=model, X=X, y=y: agreement(model, X, y)),
            ("little memory", lambda model=model, X=X, y=y: in_little_memory(model, X, y)),
        ):
            start = time.perf_counter()
            try:
                rows[-1][part] = measure()
            except Exception as error:  # the other parts are worth their time on the device
                rows[-1][part] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            print(name, part, rows[-1][part], f"({time.perf_counter() - start:.0f} s)", flush=True)
            save(rows, arguments, **known)


if __name__ == "__main__":
    main()
