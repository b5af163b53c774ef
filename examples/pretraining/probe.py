"""Score an exported encoder by a linear probe: logistic regression on its activations.

python examples/pretraining/probe.py vae.safetensors --data cifar10.zip
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _images import load_images, to_network
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat.backbones._builtin import load_convnet


def activations(network, pixels):
    """Return the activations of all images, as an array of shape (n, 512)."""
    with torch.inference_mode():
        return torch.cat([network(to_network(batch)) for batch in pixels.split(500)]).numpy()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="file that a pretext task exported")
    parser.add_argument(
        "--data", type=Path, required=True, help="zip file or folder, train/ and test/<class>/*.jpg"
    )
    arguments = parser.parse_args(argv)
    network, _ = load_convnet(arguments.weights)
    pixels, classes = load_images(arguments.data)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
    probe.fit(activations(network, pixels), classes)
    pixels, classes = load_images(arguments.data, "test")
    print(f"linear probe: {probe.score(activations(network, pixels), classes):.4f}")


if __name__ == "__main__":
    main()
