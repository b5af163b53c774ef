"""
Regression
==========

Four linear models of two data sets, one almost linear and one nonlinear:
:class:`~sklearn.linear_model.Ridge` on the columns, and
:class:`~sklearn_gradfeat.GradientFeatureRegressor` on the activations of a network, on its
gradients, and on both. All penalties are selected by cross-validation.

The network for tabular data is random, not pretrained. This page shows the use of the regressor,
and that gradients without pretraining add little. The script downloads nothing.
"""

# %%
# The data
# --------
# The progression of diabetes in 442 patients, from ten columns; and a noisy function of five of ten
# columns, with products and squares.

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
# ``TransformedTargetRegressor`` scales the targets to variance one, so that a penalty has the same
# meaning for both data sets. ``gradient_alpha`` depends on the scale of the targets more than
# ``alpha``, because the displacements of the network have no unit.


def search(regressor, grid):
    scaled = TransformedTargetRegressor(regressor, transformer=StandardScaler())
    pipeline = Pipeline([("scale", StandardScaler()), ("model", scaled)])
    grid = {f"model__regressor__{name}": values for name, values in grid.items()}
    return GridSearchCV(pipeline, grid, cv=3)


# %%
# Four models
# -----------
# The loss is a mean here and a sum in ``Ridge``, so ``alpha`` differs by a factor, the number
# of samples. The models with gradients also search ``gradient_alpha``.

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
# One half of the samples fits the models and selects the penalties. The other half gives the score,
# the share of the variance of the targets that is explained.

print(f"{'':24}" + "".join(f"{name:>10}" for name in tables))
scores = {}
for name, model in models.items():
    for table, (X, y) in tables.items():
        X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.5, random_state=0)
        scores[name, table] = model.fit(X_train, y_train).score(X_test, y_test)
    print(f"{name:24}" + "".join(f"{scores[name, table]:10.3f}" for table in tables))

# %%
# Ridge on the columns cannot fit a nonlinear function. The gradients of a random network help on
# one data set and not on the other, so search ``features`` as well.
