"""
Tabular data
============

The default backbone, a random network, against other classifiers on data sets of scikit-learn:
accuracy in three folds, and seconds. There is no pretrained network for tabular data, so this page
does not show the benefit of gradients of a pretrained one.
"""

# %%
# Data sets and models
# --------------------
# The models have default parameters, except for enough iterations to converge. Columns are scaled
# to mean zero and variance one.

import time

import numpy as np
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat import GradientFeatureClassifier

DATA = {
    "iris": load_iris(return_X_y=True),
    "wine": load_wine(return_X_y=True),
    "breast cancer": load_breast_cancer(return_X_y=True),
}
MODELS = {
    "logistic regression": LogisticRegression(max_iter=1000),
    "multi-layer perceptron": MLPClassifier(max_iter=1000, random_state=0),
    "boosted trees": HistGradientBoostingClassifier(random_state=0),
    'features="activation"': GradientFeatureClassifier(features="activation", random_state=0),
    'features="full"': GradientFeatureClassifier(random_state=0),
}

# %%
# Accuracy and time
# -----------------
# The number after ± is the standard error of the mean over three folds. The seconds include the
# search for penalties, all fits and predictions.

folds = StratifiedKFold(3, shuffle=True, random_state=0)
results = {}
for data, (X, y) in DATA.items():
    print(f"\n{data}: {X.shape[0]} samples, {X.shape[1]} columns, {len(np.unique(y))} classes")
    for name, model in MODELS.items():
        start = time.perf_counter()
        scores = cross_val_score(make_pipeline(StandardScaler(), model), X, y, cv=folds)
        seconds = time.perf_counter() - start
        results[data, name] = scores.mean(), scores.std(ddof=1) / np.sqrt(len(scores))
        mean, error = results[data, name]
        print(f"  {name:24} {mean:.3f} ± {error:.3f}  {seconds:5.1f} s", flush=True)

# %%
# Conclusion
# ----------
# Most differences are within the error bars. On small and easy data sets, logistic regression is
# hard to beat, and it is by far the fastest. The gradients of a random network add little to its
# activations.

try:
    import matplotlib
except ImportError:
    print("\nmatplotlib is not installed, so there is no figure: pip install matplotlib")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for i, name in enumerate(MODELS):
        means, errors = np.transpose([results[data, name] for data in DATA])
        places = np.arange(len(DATA)) + (i - 2) / 8
        axes.errorbar(places, means, errors, fmt="o", capsize=3, label=name)
    axes.set_xticks(range(len(DATA)), DATA)
    axes.set(ylabel="accuracy", title="Three folds, with the standard error of the mean")
    axes.legend()
    figure.savefig("tabular.png", dpi=120)
    print("\nFigure of the accuracies: tabular.png")
