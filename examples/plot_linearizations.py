"""
Several linearisations
======================

The linear model is the first-order approximation of fine-tuning. With ``n_linearizations``, the
network moves to the optimum of the linear model and is linearised again there. This page shows the
test accuracy and the objective after every move, and how far each layer moved.

A small network learns to tell the digits 0 to 4 apart. Then its two layers are adapted to the
digits 5 to 9, of which there are a hundred labelled images.
"""

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier

X, y = load_digits(return_X_y=True)
X = X / 16
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()).double()
with_classes = nn.Sequential(network, nn.Linear(32, 5).double())
images, classes = torch.from_numpy(X[y < 5]), torch.from_numpy(y[y < 5])
optimizer = torch.optim.Adam(with_classes.parameters(), lr=1e-3)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(with_classes(images), classes).backward()
    optimizer.step()
X_train, X_test, y_train, y_test = train_test_split(
    X[y >= 5], y[y >= 5], train_size=100, stratify=y[y >= 5], random_state=0
)

# %%
# The first models are the logistic regression on the activations, and the linear model around the
# pretrained network. Then the number of linearisations grows, with the penalties of the first.

adapted = {"backbone": network, "gradient_layers": "all"}
probe = GradientFeatureClassifier(**adapted, features="activation").fit(X_train, y_train)
penalties = {"alpha": probe.alpha_, "gradient_alpha": probe.alpha_}
numbers = range(1, 7)
models = [
    GradientFeatureClassifier(**adapted, **penalties, n_linearizations=n).fit(X_train, y_train)
    for n in numbers
]
accuracies = [model.score(X_test, y_test) for model in (probe, *models)]

# %%
# The objective never increases, and most of its fall comes from the first moves.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot([0, *numbers], accuracies, marker="o")
left.set(xlabel="linearisations", ylabel="test accuracy")
right.plot(models[-1].objective_path_, marker="o")
right.set(xlabel="linearisations", ylabel="objective")

# %%
# The fit returns weights that load into the network. So it is easy to see how far each layer moved,
# in units of its weights.

before, after = network.state_dict(), models[-1].fine_tuned_state_dict()
for name in models[-1].gradient_layers_:
    print(f"{name:9} {float((after[name] - before[name]).norm() / before[name].norm()):.2f}")

# %%
# With ``"auto"``, held-out samples choose the number and the penalties.

automatic = GradientFeatureClassifier(**adapted, n_linearizations="auto").fit(X_train, y_train)
print(f"activations        {probe.score(X_test, y_test):.3f}")
print(f"one linearisation  {models[0].score(X_test, y_test):.3f}")
print(f"{automatic.n_linearizations_} linearisations   {automatic.score(X_test, y_test):.3f}")
