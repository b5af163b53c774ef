"""
Quick start
===========

Handwritten digits as rows of 64 numbers, and four linear models of them: a logistic
regression on the pixels, then :class:`~sklearn_gradfeat.GradientFeatureClassifier` on the
activations of a network, on its gradients, and on both.

Rows have no pretrained network, so the backbone is a wide random one. The difference between
the last three models is small here; it is a pretrained network that makes gradients pay
(see the example with images). The script downloads nothing.
"""

# %%
# The data
# --------
# Half of the digits to fit, half to score. The random network expects columns of mean zero and
# variance one, which is what the pipelines below take care of.

import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat import GradientFeatureClassifier

X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=0)
print(f"{len(X_train)} digits to fit, {len(X_test)} to score, {X.shape[1]} pixels each\n")

# %%
# Four models
# -----------
# ``features`` chooses the terms of the model. The gradients are those of the topmost layer, a
# matrix and its bias. The penalties are the default ones.

models = {"pixels (LogisticRegression)": LogisticRegression(max_iter=1000)}
for features in ("activation", "gradient", "full"):
    models[f'features="{features}"'] = GradientFeatureClassifier(features=features, random_state=0)

# %%
# Iterations and passes over the data are those of the last fit. The seconds are those of
# everything: ``"gradient"`` and ``"full"`` fit the activations first.

print(f"{'model':28} accuracy  iterations  passes  seconds")
for name, model in models.items():
    pipeline = make_pipeline(StandardScaler(), model)
    start = time.perf_counter()
    pipeline.fit(X_train, y_train)
    seconds = time.perf_counter() - start
    accuracy = pipeline.score(X_test, y_test)
    iterations = np.max(model.n_iter_)
    passes = getattr(model, "n_passes_", "")
    print(f"{name:28} {accuracy:8.4f}  {iterations:10}  {passes:6}  {seconds:7.1f}")

# %%
# What was learnt
# ---------------
# The displacements are those of a parameter of the network, in its own shape, so they can be
# looked at, or added to it. The weights of the activations are as in scikit-learn.

fitted = models['features="full"']
print(f"\ncoef_ has shape {fitted.coef_.shape}")
for name, displacement in fitted.gradient_coef_.items():
    print(f"gradient_coef_[{name!r}] has shape {displacement.shape}")

# %%
# The objective
# -------------
# It is convex and never increases. ``"full"`` starts at the optimum of ``"activation"``, so it
# can only end lower.

try:
    import matplotlib
except ImportError:
    print("\nmatplotlib is not installed, so there is no picture: pip install matplotlib")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, model in models.items():
        if isinstance(model, GradientFeatureClassifier):
            axes.semilogy(model.objective_path_, marker=".", label=name)
    axes.set(xlabel="iteration", ylabel="objective", title="Training objective")
    axes.legend()
    figure.savefig("quickstart.png", dpi=120)
    print("\nThe objective of every iteration is drawn in quickstart.png")
