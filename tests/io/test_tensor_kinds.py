"""Networks that hold tensors of every dtype and layout: the same to the bit, or refused by name."""

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import load
from tests.tiny import X, Y, estimator

FLOATS = ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
COMPLEX = ["complex32", "complex64", "complex128"]
PACKED = ["float4_e2m1fn_x2", "bits8", "bits16", "uint4", "int4", "uint1"]


class Scaled(nn.Module):
    """A network that multiplies four values by tensors of its own."""

    def __init__(self, tensors, as_parameters=False):
        super().__init__()
        torch.manual_seed(0)
        self.lower, self.upper = nn.Linear(64, 4), nn.Linear(4, 6)
        for i, tensor in enumerate(tensors):
            if as_parameters:
                has_gradient = tensor.is_floating_point() or tensor.is_complex()
                setattr(self, f"factor{i}", nn.Parameter(tensor, requires_grad=has_gradient))
            else:
                self.register_buffer(f"factor{i}", tensor)
        self.n_factors = len(tensors)

    def forward(self, x):
        z = self.lower(x.flatten(1))
        total = z
        for i in range(self.n_factors):
            factor = getattr(self, f"factor{i}").flatten()[:4]
            if factor.is_complex():
                product = z * factor.to(torch.complex64)
                total = total + product.real - product.imag
            elif factor.numel():
                total = total + z * factor.to(z.dtype)
        return self.upper(total.tanh())


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def complexes(*shape):
    return torch.view_as_complex(numbers(*shape, 2))


def cast(values, dtype):
    return lambda: values.to(getattr(torch, dtype))


# Functions, since torch warns of some of these tensors when they are made.
DENSE = {name: cast(numbers(4).abs(), name) for name in FLOATS}
DENSE |= {name: cast(torch.tensor([1, 0, 3, 2]), name) for name in INTEGERS}
DENSE |= {name: cast(complexes(4), name) for name in COMPLEX}
DENSE |= {
    "scalar": lambda: torch.tensor(2.0),
    "complex scalar": lambda: torch.tensor(2 + 1j),
    "empty": lambda: torch.empty(0, 3),
    "expanded": lambda: torch.tensor([2.0]).expand(4),
    "windows": lambda: numbers(5).unfold(0, 4, 1),
    "every second": lambda: numbers(8)[::2],
    "transposed": lambda: complexes(4, 1).T,
    "conjugated": lambda: complexes(4).conj(),
    "negated": lambda: torch._neg_view(numbers(4)),
    "real part": lambda: complexes(4).real,
    "negative zero": lambda: torch.tensor([-0.0, 1.0, 3.0, 2.0]),
}
WARNINGS = pytest.mark.filterwarnings(
    "ignore:ComplexHalf support is experimental:UserWarning",
    "ignore:Sparse .* tensor support is in beta:UserWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
)


@WARNINGS
@pytest.mark.parametrize("as_parameters", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_same_to_the_bit(as_parameters, path):
    network, blank = (Scaled([f() for f in DENSE.values()], as_parameters) for _ in range(2))
    model = estimator(network, features="activation", activation_layer=None).fit(X, Y)
    with torch.no_grad():
        np.testing.assert_allclose(model.transform(X), network(torch.from_numpy(X)), atol=1e-5)
        for i, kind in enumerate(DENSE):
            if kind not in ("expanded", "windows"):  # torch refuses to write to these
                getattr(blank, f"factor{i}").zero_()
    model.save(path)
    assert np.array_equal(load(path, blank).predict_proba(X), model.predict_proba(X))


class Subclass(torch.Tensor):
    """A tensor of another class."""


REFUSED = {
    "sparse": (lambda: torch.eye(4).to_sparse(), "the layout torch.sparse_coo"),
    "compressed": (lambda: torch.eye(4).to_sparse_csr(), "the layout torch.sparse_csr"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "is quantised",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "is a nested tensor",
    ),
    "meta": (lambda: torch.empty(4, device="meta"), "is on the meta device"),
    "subclass": (lambda: torch.ones(4).as_subclass(Subclass), "of the class Subclass"),
}
REFUSED |= {
    name: (
        lambda name=name: torch.ones(4, dtype=torch.uint8).view(getattr(torch, name)),
        f"is quantised .torch.{name}",
    )
    for name in PACKED
}


@WARNINGS
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=f"'factor0' of backbone .*{message}.*dense tensors"):
        estimator(Scaled([make()])).fit(X, Y)
