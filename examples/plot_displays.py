"""
Pictures of a fitted model
==========================

A small network learns to tell the digits 0 to 4 apart, and is then frozen. Its features serve to
tell 5 to 9 apart, from few images. Four pictures show how that goes. The script downloads nothing.
"""

# %%
# The network and its pretraining
# -------------------------------

import copy
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from sklearn_gradfeat import (
    FeatureComparisonDisplay,
    GradientFeatureClassifier,
    LayerContributionDisplay,
    ObjectiveDisplay,
    SaliencyDisplay,
)

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit(print("matplotlib is not installed, so there are no pictures: pip install matplotlib"))
plt.switch_backend("Agg")

digits = load_digits()
X, y = (digits.images[:, None] / 16).astype(np.float32), digits.target
first = y < 5
X_train, X_test, y_train, y_test = train_test_split(
    X[~first], y[~first], train_size=100, stratify=y[~first], random_state=0
)


def train(network, classifier, images, labels, epochs):
    model = nn.Sequential(network, classifier)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.LeakyReLU(),
    nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.LeakyReLU(),
    nn.Conv2d(32, 32, 3, padding=1), nn.LeakyReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)  # fmt: skip
train(network, nn.Linear(32, 5), X[first], y[first], epochs=10)

# %%
# A model for every kind of features, and fine-tuning
# ---------------------------------------------------
# Printing an estimator names its network and, once it is fitted, the layers θ₂.

models = {
    features: GradientFeatureClassifier(
        network, features=features, gradient_layers=2, alpha=1e-3, gradient_alpha=1e-4,
        tol=1e-5, max_iter=500,
    ).fit(X_train, y_train)
    for features in ("activation", "gradient", "full")
}  # fmt: skip
print(models["full"])

tuned, classifier = copy.deepcopy(network), nn.Linear(32, 5)
train(tuned, classifier, X_train, y_train - 5, epochs=100)
predictions = {name: model.predict(X_test) for name, model in models.items()}
with torch.no_grad():
    predictions["fine-tuned"] = classifier(tuned(torch.from_numpy(X_test))).argmax(1).numpy() + 5

# %%
# Which is best
# -------------
# The bars are standard errors over the test images. The models meet the same images, so their
# differences, on the right, are more certain than the bars on the left suggest.

figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
display = FeatureComparisonDisplay.from_predictions(y_test, predictions, ax=axes[0])
display.plot(axes[1], reference="activation")
figure.savefig("displays_comparison.png", dpi=120)

# %%
# Did the fit converge, and how fast
# ----------------------------------

display = ObjectiveDisplay.from_estimator(models)
display.figure_.savefig("displays_objective.png", dpi=120)

# %%
# Which layers decide, and how far they were moved
# ------------------------------------------------

display = LayerContributionDisplay.from_estimator(models["full"], X_test)
display.figure_.savefig("displays_layers.png", dpi=120)

# %%
# Which pixels move the gradient term
# -----------------------------------

chosen = [np.flatnonzero(y_test == digit)[0] for digit in range(5, 10)]
display = SaliencyDisplay.from_estimator(models["full"], X_test[chosen], method="occlusion")
display.figure_.savefig("displays_saliency.png", dpi=120)
print("Drawn: displays_comparison.png, _objective.png, _layers.png and _saliency.png")
