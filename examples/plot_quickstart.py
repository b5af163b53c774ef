"""
Quick start
===========

Three linear models of handwritten digits: logistic regression on the pixels, and
:class:`~sklearn_gradfeat.GradientFeatureClassifier` on the activations of a network, and on its
activations and gradients.

The network is part of the package, so nothing is downloaded. It is a small convolutional network
that was pretrained without labels on photographs of 32 x 32 pixels. These differ much from digits,
so its gradients add little here. For photographs, such as CIFAR-10 in a folder or zip file of
``train/<class>/*.jpg`` and ``test/<class>/*.jpg``::

    python examples/plot_quickstart.py --data cifar10.zip
"""

# %%
# The data
# --------
# A few hundred images to fit. Grey images and other sizes are allowed: the transform of the network
# repeats the channel and resizes.

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_gradfeat import GradientFeatureClassifier, ImageFiles

parser = argparse.ArgumentParser(description="Gradient features of a network of the package.")
parser.add_argument("--data", type=Path, help="folder or zip file; default: the digits")
parser.add_argument("--n-train", type=int, default=200)
parser.add_argument("--n-test", type=int, default=1000)
arguments = parser.parse_args()


def read_images(folder, n_images):
    images, labels = ImageFiles.from_folder(folder, size=32)  # as the network takes them
    classes = np.unique(labels)
    n_each = max(1, n_images // len(classes))
    rows = np.concatenate([np.flatnonzero(labels == label)[:n_each] for label in classes])
    return np.asarray(images[rows]), labels[rows]


n_train, n_test = arguments.n_train, arguments.n_test
if arguments.data is None:
    digits = load_digits()
    X_train, X_test, y_train, y_test = train_test_split(
        digits.images / 16, digits.target, train_size=n_train, test_size=n_test,
        stratify=digits.target, random_state=0,
    )  # fmt: skip
else:
    root = arguments.data
    if root.is_file():
        unpacked = tempfile.TemporaryDirectory()
        root = Path(unpacked.name)
        shutil.unpack_archive(arguments.data, root)
    X_train, y_train = read_images(root / "train", n_train)
    X_test, y_test = read_images(root / "test", n_test)
print(f"{len(X_train)} images to fit, {len(X_test)} to score, shape {X_train.shape[1:]}\n")

# %%
# Three models
# ------------
# ``features`` selects the terms of the model. The gradients are those of the topmost convolution,
# and the gradient term has its own penalty. Every fit chooses its penalties on held-out images.

flat = FunctionTransformer(lambda X: X.reshape(len(X), -1) / X_train.max())
models = {"pixels (LogisticRegression)": make_pipeline(flat, LogisticRegression(max_iter=1000))}
for features in ("activation", "full"):
    models[f'features="{features}"'] = GradientFeatureClassifier(features=features)

# %%
# The seconds include the search for the penalties. An infinite ``gradient_alpha`` means that the
# gradients did not help on held-out images.

print(f"{'model':28} accuracy  seconds  gradient_alpha")
accuracies = {}
for name, model in models.items():
    start = time.perf_counter()
    model.fit(X_train, y_train)
    seconds = time.perf_counter() - start
    accuracies[name] = model.score(X_test, y_test)
    penalty = f"{model.gradient_alpha_:14.1e}" if hasattr(model, "gradient_alpha_") else ""
    print(f"{name:28} {accuracies[name]:8.3f}  {seconds:7.1f}  {penalty}")

# %%
# The objective
# -------------
# It is convex, and no iteration increases it. ``"full"`` starts at the optimum of ``"activation"``,
# and stays there if ``gradient_alpha`` is infinite.

try:
    import matplotlib
except ImportError:
    print("\nmatplotlib is not installed, so there is no figure: pip install matplotlib")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.barh([name.replace(" (", "\n(") for name in accuracies], list(accuracies.values()))
    left.set(xlabel="accuracy", xlim=(0.9 * min(accuracies.values()), 1), title="Test images")
    left.invert_yaxis()
    for name, model in models.items():
        if isinstance(model, GradientFeatureClassifier):
            right.semilogy(model.objective_path_, marker=".", label=name)
    right.set(xlabel="iteration", ylabel="objective", title="Training objective")
    right.legend()
    figure.savefig("quickstart.png", dpi=120)
    print("\nFigure of accuracies and objectives: quickstart.png")
