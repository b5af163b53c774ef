"""
Regression
==========

Two tables, one almost linear and one not, and four linear models of each:
:class:`~sklearn.linear_model.Ridge` on the columns, then
:class:`~sklearn_gradfeat.GradientFeatureRegressor` on the activations of a network, on its
gradients, and on both. All penalties are chosen by cross-validation.

The network for rows is a random one: nothing about it was learnt from data. So this page shows how
the regressor is used, and what to expect without pretraining, which is not much of gradients. The
script downloads nothing.
"""

# %%
# The data
# --------
# Progression of diabetes in 442 patients, from ten columns; and a function of five columns out of
# ten with products and squares, with noise.

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat import GradientFeatureRegressor

tables = {
    "diabetes": load_diabetes(return_X_y=True),
    "friedman": make_friedman1(600, noise=1.0, random_state=0),
}

# %%
# Units
# -----
# Penalties mean the same in both tables once the targets have variance one as well. That is what
# ``TransformedTargetRegressor`` does. ``gradient_alpha`` needs it more than ``alpha``: the
# displacements of the network have no unit, so they do not grow with the targets.


def search(regressor, grid):
    scaled = TransformedTargetRegressor(regressor, transformer=StandardScaler())
    pipeline = Pipeline([("scale", StandardScaler()), ("model", scaled)])
    grid = {f"model__regressor__{name}": values for name, values in grid.items()}
    return GridSearchCV(pipeline, grid, cv=3)


# %%
# Four models
# -----------
# The loss is a mean here and a sum in ``Ridge``, so its ``alpha`` is the number of samples times
# ours. The gradient models also search the penalty of the displacements.

penalties = [0.001, 0.03, 1.0]
grid = {"alpha": penalties, "gradient_alpha": penalties}


def gradient_feature(features):
    return GradientFeatureRegressor(features=features, random_state=0)


models = {
    "columns (Ridge)": search(Ridge(), {"alpha": np.logspace(-1, 3, 9)}),
    'features="activation"': search(
        gradient_feature("activation"), {"alpha": np.logspace(-3, 0, 7)}
    ),
    'features="gradient"': search(gradient_feature("gradient"), grid),
    'features="full"': search(gradient_feature("full"), grid),
}

# %%
# Half of the rows to fit and to choose the penalties, half to score: the share of the variance of
# the targets that is explained.

print(f"{'':24}" + "".join(f"{name:>10}" for name in tables))
scores = {}
for name, model in models.items():
    for table, (X, y) in tables.items():
        X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.5, random_state=0)
        scores[name, table] = model.fit(X_train, y_train).score(X_test, y_test)
    print(f"{name:24}" + "".join(f"{scores[name, table]:10.3f}" for table in tables))

# %%
# Ridge on the columns cannot bend, so it falls behind where the targets do. A random network's
# gradients help on one table and not on the other: search ``features`` as well.
