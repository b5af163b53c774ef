"""
Displays of a fitted model
==========================

A small network is trained to classify the digits 0 to 4, and is then frozen. Linear models over it
classify 5 to 9, from few images. Five figures compare and explain them. Nothing is downloaded.
"""

# %%
import copy
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    LayerContributionDisplay,
    ObjectiveDisplay,
    PenaltyDisplay,
    SaliencyDisplay,
)

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit(print("matplotlib is not installed, so there are no figures: pip install matplotlib"))

digits = load_digits()
X, y = (digits.images[:, None] / 16).astype(np.float32), digits.target
first = y < 5
X_train, X_test, y_train, y_test = train_test_split(
    X[~first], y[~first], train_size=100, stratify=y[~first], random_state=0
)


def train(network, classifier, images, labels, epochs):
    model = nn.Sequential(network, classifier)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = map(torch.from_numpy, (images, labels))
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
# Three linear models, and fine-tuning
# ------------------------------------
# The text of a fitted estimator names its network and the gradient layers θ₂.

models = {
    features: GradientFeatureClassifier(network, features=features, gradient_layers=2).fit(
        X_train, y_train
    )
    for features in ("activation", "gradient", "full")
}
print(models["full"])

tuned, classifier = copy.deepcopy(network), nn.Linear(32, 5)
train(tuned, classifier, X_train, y_train - 5, epochs=100)
predictions = {name: model.predict(X_test) for name, model in models.items()}
with torch.no_grad():
    predictions["fine-tuned"] = classifier(tuned(torch.from_numpy(X_test))).argmax(1).numpy() + 5

# %%
# Which model is best
# -------------------
# Bars are standard errors of the mean over the test images. The gain is that over "activation". It
# compares the same images, so its error is smaller than that of two separate accuracies.

correct = {name: predicted == y_test for name, predicted in predictions.items()}
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for name, values in correct.items():
    panels = {"accuracy, %": values, "gain, %": 1.0 * values - correct["activation"]}
    for axis, (label, sample) in zip(axes, panels.items(), strict=True):
        mean, error = 100 * sample.mean(), 100 * sample.std() / np.sqrt(len(sample))
        axis.errorbar(mean, name, xerr=error, fmt="o", capsize=3)
        axis.set_xlabel(label)
        print(f"{mean:5.1f} ± {error:.1f} %", end="   ")
    print(name)
axes[0].invert_yaxis()
figure.savefig("displays_comparison.png", dpi=120)

# %%
# Did the fit converge, and how fast
# ----------------------------------

ObjectiveDisplay.from_estimator(models).figure_.savefig("displays_objective.png", dpi=120)

# %%
# Which penalties are best
# ------------------------
# The models above have given penalties. A fit can also choose them by the loss of held-out images.

auto = GradientFeatureClassifier(network, gradient_layers=2).fit(X_train, y_train)
PenaltyDisplay.from_estimator(auto).figure_.savefig("displays_penalties.png", dpi=120)

# %%
# How much each layer contributes
# -------------------------------

contributions = LayerContributionDisplay.from_estimator(models["full"], X_test)
contributions.figure_.savefig("displays_layers.png", dpi=120)

# %%
# Which pixels change the gradient term
# -------------------------------------

chosen = [np.flatnonzero(y_test == digit)[0] for digit in range(5, 10)]
saliency = SaliencyDisplay.from_estimator(models["full"], X_test[chosen], method="occlusion")
saliency.figure_.savefig("displays_saliency.png", dpi=120)
print("Figures: displays_comparison, _objective, _penalties, _layers and _saliency.png")
