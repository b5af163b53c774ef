"""
Regression
==========

Four linear models of two data sets, one almost linear and one nonlinear:
:class:`~sklearn.linear_model.RidgeCV` on the columns, and
:class:`~sklearn_gradfeat.GradientFeatureRegressor` on the activations of a network, on its
gradients, and on both. Every fit chooses its penalties on samples that are left out.

The network for tabular data is random, not pretrained. This page shows the use of the regressor,
and that gradients without pretraining add little. The script downloads nothing.
"""

# %%
# The data
# --------
# The progression of diabetes in 442 patients, from ten columns; and a noisy function of five of ten
# columns, with products and squares.

import numpy as np
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat import GradientFeatureRegressor

tables = {
    "diabetes": load_diabetes(return_X_y=True),
    "friedman": make_friedman1(600, noise=1.0, random_state=0),
}

# %%
# Four models
# -----------
# The regressor chooses its penalties by leave-one-out, as ``RidgeCV`` does.

models = {"columns (RidgeCV)": RidgeCV(np.logspace(-1, 3, 9))} | {
    f'features="{features}"': GradientFeatureRegressor(features=features, random_state=0)
    for features in ("activation", "gradient", "full")
}

# %%
# One half of the samples fits the models. The other half gives the score,
# the share of the variance of the targets that is explained.

print(f"{'':24}" + "".join(f"{name:>10}" for name in tables))
scores = {}
for name, model in models.items():
    for table, (X, y) in tables.items():
        X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.5, random_state=0)
        scaled = make_pipeline(StandardScaler(), model).fit(X_train, y_train)
        scores[name, table] = scaled.score(X_test, y_test)
    print(f"{name:24}" + "".join(f"{scores[name, table]:10.3f}" for table in tables))

# %%
# Ridge on the columns cannot fit a nonlinear function. The gradients of a random network help on
# one data set and hardly on the other.
