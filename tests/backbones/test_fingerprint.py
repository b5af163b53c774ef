"""Digests: equal for equal values in every process, and none for code of the user."""

import copy
import functools
import os
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sklearn.base import clone
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import sklearn_gradfeat
from sklearn_gradfeat.backbones import _fingerprint
from sklearn_gradfeat.backbones._builtin import ToConvNet
from sklearn_gradfeat.backbones._fingerprint import UndigestibleError, digest
from sklearn_gradfeat.backbones._images import ImagePreprocess
from sklearn_gradfeat.backbones._sources import timm_transform
from sklearn_gradfeat.cache._runner import Trunk
from tests.backbones.test_sources import CONFIG
from tests.tiny import X, Y, estimator, tiny_net

ROOT = Path(sklearn_gradfeat.__file__).parents[1]

# Each makes a new object, of the same value in every process.
DIGESTIBLE = {
    "None": lambda: None,
    "numbers": lambda: (1, 2.0, True, 3j, np.float64(0.5)),
    "text": lambda: ["a", "".join(["a", "b"]), b"c"],
    "dict": lambda: {"a": 1, 2: ["b"], None: {"c": 3}},
    "set": lambda: {"a", "b", "c", 1, None},
    "array": lambda: np.arange(6.0).reshape(2, 3),
    "array of objects": lambda: np.array([None, "a", 1], dtype=object),
    "tensor": lambda: torch.arange(6.0).reshape(2, 3),
    "bfloat16": lambda: torch.tensor(2, dtype=torch.bfloat16),
    "no elements": lambda: torch.ones(0, 3),
    "dtype": lambda: [torch.float32, torch.device("cpu"), torch.channels_last, np.dtype("f4")],
    "function": lambda: [torch.mul, torch.Tensor.mul, nn.functional.gelu, len],
    "partial": lambda: functools.partial(torch.mul, other=2.0),
    "method": lambda: nn.Softmax(1).forward,
    "modules": lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Tanh(), nn.Softmax(1))),
    "module with tensors": tiny_net,
    "normalize": lambda: v2.Normalize([0.5], [0.2]),
    "compose": lambda: v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize(4)]),
    "torchvision": torchvision.models.ResNet18_Weights.DEFAULT.transforms,
    "timm": lambda: ImagePreprocess(timm_transform(CONFIG)),
    "package": lambda: ImagePreprocess(ToConvNet()),
}


class Own(nn.Module):
    """A transform whose code may change under the same name."""

    def forward(self, batch):
        return batch


class Named:
    """An object that pickles as the name of a value."""

    def __reduce__(self):
        return "NAMED"


NAMED = Named()


def double(batch):
    return 2 * batch


def hooked():
    module = nn.Identity()
    module.register_forward_hook(lambda *_arguments: None)
    return module


def cyclic():
    items = []
    items.append(items)
    return items


UNDIGESTIBLE = {
    "function": double,
    "lambda": lambda batch: batch,
    "class": Own,
    "instance": Own(),
    "name of an instance": NAMED,
    "in a partial": functools.partial(double),
    "in a module": nn.Sequential(nn.Identity(), Own()),
    "in a transform": v2.Lambda(double),
    "in a hook": hooked(),
    "in a dict": {"a": double},
    "as a key": {double: 1},
    "in a set": {double},
    "in an array": np.array([double], dtype=object),
    "method": Own().forward,
    "method of a module": Own().state_dict,
    "lock": threading.Lock(),
    "cycle": cyclic(),
}


# --- digests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIGESTIBLE)
def test_equal_values_have_equal_digests(kind):
    value = DIGESTIBLE[kind]()
    assert digest(value) == digest(DIGESTIBLE[kind]())
    assert digest(value) == digest(copy.deepcopy(value))
    assert digest(value) == digest(pickle.loads(pickle.dumps(value)))
    assert len(digest(value)) == 16


def test_different_values_have_different_digests():
    assert len({digest(make()) for make in DIGESTIBLE.values()}) == len(DIGESTIBLE)
    assert digest(1, 2) != digest((1, 2))


def all_digests():
    return {kind: digest(make()).hex() for kind, make in DIGESTIBLE.items()}


def test_digests_are_the_same_in_another_process():
    code = "from tests.backbones.test_fingerprint import all_digests; print(all_digests())"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip().splitlines()[-1] == str(all_digests())


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (functools.partial(sum, a=1, b=2), functools.partial(sum, b=2, a=1)),
        ({1, "a", None}, {None, "a", 1}),
        (["ab", "ab"], ["ab", "".join(["a", "b"])]),
        ([[1], [1]], [[1]] * 2),
        (torch.arange(6).reshape(2, 3).mT, torch.arange(6).reshape(2, 3).mT.contiguous()),
        (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(2, 3).T.copy()),
    ],
    ids=["dict", "keywords", "set", "text", "identity", "strides of tensor", "strides of array"],
)
def test_order_and_identity_do_not_count(one, two):
    assert digest(one) == digest(two)


def batch_norm(mean):
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(mean)
    return module


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.zeros(2), torch.zeros(2).double()),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.tensor([0.0, 1e-30])),
        (torch.zeros(2), np.zeros(2, "f4")),
        (torch.zeros(3, 2, 2), tv_tensors.Image(torch.zeros(3, 2, 2))),
        (np.zeros(2), np.zeros(2, ">f8")),
        (1, True),
        (nn.Softmax(0), nn.Softmax(1)),
        (nn.Softmax(0), nn.LogSoftmax(0)),
        (batch_norm(0.0), batch_norm(1.0)),
        (nn.Dropout(), nn.Dropout().eval()),
        (nn.Sequential(nn.Tanh(), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.Tanh())),
        (functools.partial(torch.mul, other=2.0), functools.partial(torch.mul, other=3.0)),
        (functools.partial(torch.mul, other=2.0), functools.partial(torch.add, other=2.0)),
        (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    ],
)
def test_changed_values_have_other_digests(one, two):
    assert digest(one) != digest(two)


def test_order_of_submodules_counts():
    one, two = nn.Tanh(), nn.Softmax(1)
    first = nn.Sequential(OrderedDict(a=one, b=two))
    second = nn.Sequential(OrderedDict(b=two, a=one))
    assert digest(first) != digest(second)


@pytest.mark.parametrize("kind", ["partial", "modules", "torchvision", "package"])
def test_version_of_the_package_counts(kind, monkeypatch):
    before = digest(DIGESTIBLE[kind]())
    for package in (torch, torchvision, sklearn_gradfeat):
        monkeypatch.setattr(package, "__version__", "0.0")
    _fingerprint._version.cache_clear()
    try:
        assert digest(DIGESTIBLE[kind]()) != before
    finally:
        monkeypatch.undo()
        _fingerprint._version.cache_clear()
    assert digest(DIGESTIBLE[kind]()) == before


@pytest.mark.parametrize("kind", UNDIGESTIBLE)
def test_code_of_the_user_has_no_digest(kind):
    with pytest.raises(UndigestibleError, match=r"not belong to an installed package|no digest of"):
        digest(UNDIGESTIBLE[kind])


def test_main_module_is_code_of_the_user(monkeypatch):
    """Also where a program of an installed package runs it, such as pytest."""
    monkeypatch.setattr(Own, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", torch.__file__, raising=False)
    with pytest.raises(UndigestibleError, match="__main__ does not belong"):
        digest(Own())


def test_module_that_shadows_the_standard_library_is_code_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "this.py").write_text("class Transform:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "this", raising=False)
    from this import Transform

    try:
        with pytest.raises(UndigestibleError, match="this does not belong"):
            digest(Transform())
    finally:
        del sys.modules["this"]


# --- what the cache makes of them ------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Return a list of the numbers of samples that pass through a trunk."""
    numbers, compute = [], Trunk._compute
    monkeypatch.setattr(
        Trunk, "_compute", lambda self, raw: numbers.append(len(raw)) or compute(self, raw)
    )
    return numbers


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["None", "partial", "normalize"])
def test_outputs_behind_transforms_of_packages_are_cached(computed, tmp_path, kind, store):
    store = "auto" if store == "memory" else tmp_path / "store"
    backbone = tiny_net()
    backbone[0].weight.data.mul_(1.5)  # an equal network of another test may be in memory
    model = estimator(backbone, preprocess=DIGESTIBLE[kind](), feature_store=store).fit(X, Y)
    again = estimator(backbone, preprocess=DIGESTIBLE[kind](), feature_store=store)
    again.set_params(alpha=1.0).fit(X, Y).predict(X)
    model.predict(X)
    assert sum(computed) == len(X)
    changed = functools.partial(torch.mul, other=3.0)
    estimator(backbone, preprocess=changed, feature_store=store).fit(X, Y)
    assert sum(computed) == 2 * len(X)


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled:UserWarning")
@pytest.mark.parametrize("transform", [double, Own(), nn.Sequential(Own()), lambda x: 2 * x])
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_outputs_behind_code_of_the_user_are_computed_anew(computed, tmp_path, transform, store):
    store = "auto" if store == "memory" else tmp_path / "store"
    model = estimator(preprocess=transform, feature_store=store).fit(X, Y)
    assert sum(computed) == len(X)  # once in a fit
    clone(model).fit(X, Y)
    assert sum(computed) == 2 * len(X)
    plain = estimator(preprocess=transform, feature_store=None).fit(X, Y)
    assert np.array_equal(model.coef_, plain.coef_)


@pytest.mark.parametrize("mark", [torch.Tensor.conj, torch._neg_view])
def test_tensor_that_is_only_marked(mark):
    tensor = torch.view_as_complex(torch.arange(4.0).reshape(2, 2))
    marked = mark(tensor)
    assert digest(marked) == digest(marked.resolve_conj().resolve_neg()) != digest(tensor)
