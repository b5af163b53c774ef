"""The linear model that is fitted, on the side of torch and on that of numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearModel:
    """A linear model, with the displacements in the units of the parameters.

    ``weights`` and ``omega`` have shape (n_outputs, n_features), ``intercept`` has shape
    (n_outputs,), and ``displacements`` those of the parameters that they displace.
    """

    weights: Tensor
    intercept: Tensor
    omega: Tensor
    displacements: dict[str, Tensor]

    @classmethod
    def from_estimator(cls, fitted: Any, device: torch.device, dtype: torch.dtype) -> LinearModel:
        """Return the model that the attributes of a fitted estimator hold."""

        def tensor(array: Any) -> Tensor:
            return torch.tensor(array, device=device, dtype=dtype)

        return cls(
            tensor(fitted.coef_),
            tensor(fitted.intercept_),
            tensor(fitted.omega_),
            {name: tensor(value) for name, value in fitted.gradient_coef_.items()},
        )

    def shifted(self, offset: npt.NDArray[np.float64]) -> LinearModel:
        """Return the model that predicts as much more of every output."""
        return replace(self, intercept=self.intercept + torch.from_numpy(offset).to(self.intercept))

    def scaled(self, factors: npt.NDArray[np.float64]) -> LinearModel:
        """Return the model that predicts so many times as much of every output."""
        column = torch.from_numpy(factors).to(self.intercept)[:, None]
        return replace(
            self,
            weights=self.weights * column,
            intercept=self.intercept * column[:, 0],
            omega=self.omega * column,
        )

    def attributes(self) -> dict[str, Any]:
        """Return the model as attributes of a fitted estimator."""
        return {
            "coef_": to_numpy(self.weights),
            "intercept_": to_numpy(self.intercept),
            "omega_": to_numpy(self.omega),
            "gradient_coef_": {name: to_numpy(t) for name, t in self.displacements.items()},
            "gradient_layers_": list(self.displacements),
        }


def to_numpy(tensor: Tensor) -> Any:
    """Copy a tensor into an array of its own dtype."""
    return np.array(tensor.detach().cpu().numpy())
