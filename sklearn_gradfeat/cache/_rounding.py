"""The trunk output rounded to bfloat16, which takes half of the memory of float32.

bfloat16 has the exponents of float32 and a significand of 8 bits, so the relative error of a
rounded number is at most 2⁻⁸. This includes numbers above the largest one of bfloat16 and not above
that of float32, such as the lowest float32 in masks of attention: they become the largest one.
Larger numbers, of float64, are errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sklearn_gradfeat.cache._store import Tensors

_LARGEST = torch.finfo(torch.bfloat16).max


def rounded(tensors: Tensors) -> Tensors:
    """Return real floating tensors in bfloat16, and all others as they are.

    Raises
    ------
    ValueError
        If a finite number is beyond the range of float32.
    """
    return tuple(_rounded(z) if z.is_floating_point() else z for z in tensors)


def unrounded(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Return tensors in bfloat16 in another dtype, and all others as they are."""
    return tuple(z.to(dtype) if z.dtype == torch.bfloat16 else z for z in tensors)


def _rounded(z: Tensor) -> Tensor:
    narrow = z.to(torch.bfloat16)
    overflows = narrow.isinf() & z.isfinite()
    if overflows.any():
        if (z[overflows].abs() > torch.finfo(torch.float32).max).any():
            raise ValueError(
                "The output of the frozen layers has values beyond the range of bfloat16. Set "
                "store_dtype='auto', or scale X."
            )
        narrow[overflows] = (z[overflows].sign() * _LARGEST).to(narrow.dtype)
    return narrow
