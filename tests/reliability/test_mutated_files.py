"""Mutated model files: `load` raises an error with a sentence, or gives a model that predicts.

The mutations are of three kinds: of the bytes, of the header, and of the contents with a digest
that is right again, as a stranger could write them.
"""

import contextlib
import copy
import functools
import gc
import json
import operator
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
    load,
)
from sklearn_gradfeat.backbones import _frozen
from sklearn_gradfeat.backbones._graph import CaptureError
from sklearn_gradfeat.io._archive import digest, read_archive
from tests.reliability.mutations import damaged
from tests.tiny import NET, X, Y, estimator, tiny_net

ROWS = X.reshape(len(X), -1)[:, :5].astype(np.float64)
# What loading takes for a file of no size: Python objects, and two samples in the network.
ROOM = 2**22


class Spectral(nn.Module):
    """A network with complex weights, and with buffers of other dtypes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1)
        self.filter = nn.Parameter(torch.randn(4, 8, 5, dtype=torch.cfloat))
        self.register_buffer("scale", torch.ones(4, 1, 1, dtype=torch.float16))
        self.register_buffer("count", torch.tensor([1, 2, 3, 4]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x):
        spectrum = torch.fft.rfft2(self.inner(x) * self.scale, norm="ortho") * self.filter
        z = torch.fft.irfft2(spectrum, s=(8, 8), norm="ortho") * self.mask[:, None, None]
        return self.outer(z.relu()).mean((2, 3)) / self.count.sum()


SEARCH = {"alphas": [0.5, 0.02], "gradient_alphas": [0.1], "cv": 2, "tol": 0.1}
TEXTS = np.array(["cat", "dog", "Größe"])[Y]
LABELS = np.stack([Y == 0, Y > 0, Y != 1], 1).astype(int)
FIXED = {"alpha": 0.1, "gradient_alpha": 0.1, "tol": 0.1}
# Model, samples, targets, and the network that `load` receives.
KINDS = {
    "classifier": (estimator, X, TEXTS, NET),
    "regressor": (lambda: GradientFeatureRegressor(NET, **FIXED), X, Y * 1.0, NET),
    "outputs": (lambda: GradientFeatureRegressor(NET, **FIXED), X, LABELS * 1.0, NET),
    "search": (lambda: GradientFeatureClassifierCV(NET, **SEARCH), X, Y, NET),
    "regressor search": (lambda: GradientFeatureRegressorCV(NET, **SEARCH), X, Y * 1.0, NET),
    "multilabel": (estimator, X, LABELS, NET),
    "linearisations": (lambda: estimator(n_linearizations=2), X, Y, NET),
    "layers": (lambda: estimator(activation_layer=["3", "1"]), X, Y, NET),
    "complex": (lambda: estimator(Spectral(), gradient_layers="outer"), X, Y, Spectral()),
    "half": (lambda: estimator(precision="bfloat16"), X, Y, NET),
    "factory": (lambda: estimator(tiny_net), X, Y > 0, tiny_net),
    "table": (lambda: estimator(nn.Linear(5, 4)), ROWS, Y, nn.Linear(5, 4)),
}


def without_graph(monkeypatch):
    """Leave the network as it is: the capture of a graph takes a third of a second."""

    def refuse(module, example, exported=None):
        raise CaptureError("it takes too long")

    monkeypatch.setattr(_frozen, "capture", refuse)


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Return the bytes of a file of each kind."""
    path, found = tmp_path_factory.mktemp("models") / "model", {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_graph(monkeypatch)
        for kind, (make, samples, targets, _) in KINDS.items():
            make().fit(samples, targets).save(path)
            found[kind] = path.read_bytes()
    return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# --- mutations --------------------------------------------------------------------------------


NUMBERS = ["-1", "0", "1e400", "-0", "NaN", "Infinity", "1.5", "9" * 5000, str(2**63), "true"]
PIECES = ["[" * 5000, '{"a":' * 5000, '"\\ud800"', '"\\u0000"', '"' + "é" * 500 + '"', "null", "{}"]


def other_header(content, rng):
    """Change the text of the header, or the entries in it."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.1:
        length = [0, 1, len(content), len(content) - 8, 2**31, 2**63, 2**64 - 1][rng.integers(7)]
        return struct.pack("<Q", length) + content[8:]
    text, body = content[8 : 8 + length].decode(), content[8 + length :]
    match rng.integers(5):
        case 0:  # a value in the text
            marks = [i for i, c in enumerate(text) if c in ":[,"]
            start = marks[rng.integers(len(marks))] + 1
            stop = start + int(rng.integers(6))
            pieces = NUMBERS + PIECES
            text = text[:start] + pieces[rng.integers(len(pieces))] + text[stop:]
        case 1:  # a key twice
            entries = list(json.loads(text).items())
            _, entry = entries[rng.integers(len(entries))]
            other, _ = entries[rng.integers(len(entries))]
            text = f"{text[:-1].rstrip().rstrip('}')}}}, {json.dumps({other: entry})[1:]}"
        case 2 | 3:  # values
            header = json.loads(text)
            replace(header, rng)
            text = json.dumps(header)
        case 4:  # more arrays, or more metadata
            header = json.loads(text)
            size = max(entry.get("data_offsets", [0, 0])[1] for entry in header.values())
            n = int(rng.integers(1, 100))
            entry = {"dtype": "U8", "shape": [0], "data_offsets": [size, size]}
            header |= {f"more{i}": entry for i in range(n)}
            header["__metadata__"] |= {"more": "x" * n}
            text = json.dumps(header)
    header = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(header)) + header + body


def places(value, path=()):
    """Yield the keys that lead to each value in a document."""
    yield path
    for key, item in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else ())
    ):
        yield from places(item, (*path, key))


JUNK = [None, True, -1, 2**70, 1e300, float("nan"), "", "x", [], {}, [[]], {"array": "probe"}]
JUNK += [{"tuple": []}, {"dict": []}, {"strings": [], "dtype": "O"}, {"device": "meta"}]
SIZES = [0, 1, -1, 2, 7, 255, 2**15, 2**31, 2**40, 2**63, 10**30, 0.5, "0", [0], "é\0\ud800"]


def replace(document, rng):
    """Change, remove or add one value or a few in a document."""
    for _ in range(rng.geometric(0.7)):
        found = [path for path in places(document) if path]
        if not found:
            return
        *parents, last = found[rng.integers(len(found))]
        parent = functools.reduce(operator.getitem, parents, document)
        values = [*JUNK, *SIZES]
        match rng.integers(5):
            case 0:
                del parent[last]
            case 1 if isinstance(parent[last], (int, float)):
                parent[last] += int(rng.integers(-2, 3))
            case 2 if isinstance(parent, dict):
                parent[["x", "", "coef_", "dict", "array"][rng.integers(5)]] = copy.deepcopy(
                    parent[last]
                )
            case _:
                parent[last] = copy.deepcopy(values[rng.integers(len(values))])


def forged(content, rng, path):
    """Change the document or the arrays, and sign them again."""
    path.write_bytes(content)
    document, arrays = read_archive(path)
    if rng.random() < 0.8:
        replace(document, rng)
    if rng.random() < 0.4:
        name, other = (list(arrays)[i] for i in rng.integers(len(arrays), size=2))
        array = arrays[name]
        with np.errstate(all="ignore"):
            arrays[name] = np.ascontiguousarray([
                lambda: np.zeros(3), lambda: np.zeros((0, 2**40)), lambda: array.astype("f2"),
                lambda: array * 1e300, lambda: array * np.nan, lambda: 0 - array, lambda: array[:0],
                lambda: array[..., None], lambda: arrays[other], lambda: array.astype("i8"),
                array.ravel, lambda: np.full_like(array, 1),
            ][rng.integers(12)]())  # fmt: skip
    if rng.random() < 0.05:
        del arrays[list(arrays)[rng.integers(len(arrays))]]
    return signed(document, arrays)


def signed(document, arrays):
    """Return the bytes of a file with a right digest."""
    text = json.dumps(document, ensure_ascii=False)
    if "\ud800" in text:  # safetensors refuses half a surrogate
        text = json.dumps(document)
    return save(arrays, {"sklearn_gradfeat": text, "digest": digest(arrays, text)})


# --- loading ----------------------------------------------------------------------------------


def outcome(path, kind):
    """Load a file and predict with the model; return how far it came."""
    _, samples, _, network = KINDS[kind]
    try:
        model = load(path, network)
    except (ValueError, OSError) as error:
        assert str(path) in str(error)
        return "refused"
    try:
        predicted = model.predict(samples)
        if hasattr(model, "classes_"):
            assert np.isfinite(model.predict_proba(samples)).all()
        assert len(predicted) == len(samples)
        assert predicted.dtype.kind not in "fc" or np.isfinite(predicted).all()
    except (ValueError, OSError) as error:
        assert len(str(error).split()) > 5
        return "no predictions"
    return "predicts"


def check(contents, path, seed, n_files, mutations, room=ROOM):
    """Load mutated files; return how many were accepted."""
    rng, counts = np.random.default_rng(seed), {}
    for i in range(n_files):
        kind = list(KINDS)[rng.integers(len(KINDS))]
        mutated = mutations[i % len(mutations)](contents[kind], rng)
        path.write_bytes(mutated)
        if i % 5 == 0:  # this makes Python slow
            tracemalloc.start()
        try:
            found = outcome(path, kind)
        except Exception as error:
            raise AssertionError(f"{seed=} {i=} {kind=}: {error!r}") from error
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(mutated) + room, (seed, i, kind, peak, len(mutated))
        counts[found] = counts.get(found, 0) + 1
    return counts


def mutations(path):
    return [damaged, other_header, lambda content, rng: forged(content, rng, path)]


@pytest.mark.filterwarnings("ignore")
def test_mutated_files(contents, path, monkeypatch):
    without_graph(monkeypatch)
    counts = check(contents, path, 0, 60, mutations(path))
    assert counts["refused"] > 30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_mutated_files(contents, path, monkeypatch, seed):
    without_graph(monkeypatch)
    counts = check(contents, path, seed, 4000, [damaged, other_header])
    assert counts["refused"] > 3000
    counts = check(contents, path, seed, 1000, mutations(path)[2:])
    assert min(counts["refused"], counts["predicts"]) > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["search", "layers"])
def test_every_field_has_every_value(contents, path, monkeypatch, kind):
    without_graph(monkeypatch)
    path.write_bytes(contents[kind])
    document, arrays = read_archive(path)
    for *parents, last in [found for found in places(document) if found]:
        for value in [*JUNK, *SIZES]:
            changed = copy.deepcopy(document)
            parent = functools.reduce(operator.getitem, parents, changed)
            parent[last] = value
            path.write_bytes(signed(changed, arrays))
            try:
                outcome(path, kind)
            except Exception as error:
                raise AssertionError((*parents, last, value)) from error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_with_a_graph(contents, path):
    # torch.export takes tens of megabytes of its own for the graph of any network.
    check(contents, path, 0, 200, mutations(path)[2:], room=2**27)


# --- cost -------------------------------------------------------------------------------------


def attribute(value):
    """Return the change of a document that gives it an attribute of a size."""

    def change(document, arrays, n):
        document["attributes"]["made_up_"] = value(n)

    return change


def part(*keys, value):
    """Return the change of a document that gives one of its parts a size."""

    def change(document, arrays, n):
        *parents, last = keys
        functools.reduce(operator.getitem, parents, document)[last] = value(n)

    return change


def many_gradients(document, arrays, n):
    arrays |= {f"g{i}": np.zeros(1, "f4") for i in range(n // 10)}
    pairs = [[f"p{i}", {"array": f"g{i}"}] for i in range(n // 10)]
    document["attributes"]["gradient_coef_"] = {"dict": pairs}


def many_classes(document, arrays, n):
    arrays["attributes.classes_"] = np.arange(n)
    for name in ("coef_", "omega_"):
        arrays[f"attributes.{name}"] = np.zeros((n, 6), "f4")
    arrays |= {"attributes.intercept_": np.zeros(n, "f4"), "probe": np.zeros((2, n), "f4")}
    document["attributes"]["classes_"] = {"array": "attributes.classes_"}


def names(n):
    return [f"name{i}" for i in range(n)]


def numbered(n):
    return {name: 1 for name in names(n)}


GROWING = {
    "bytes": lambda document, arrays, n: arrays.update(x=np.zeros(100 * n, "u1")),
    "arrays": lambda document, arrays, n: arrays.update({k: np.zeros(0) for k in names(n)}),
    "weights": lambda document, arrays, n: arrays.update(
        {f"backbone.{k}": np.zeros(0, "f4") for k in names(n)}
    ),
    "gradients": many_gradients,
    "classes": many_classes,
    "attributes": lambda document, arrays, n: document["attributes"].update(
        {f"{name}_": {"array": "attributes.coef_"} for name in names(n)}
    ),
    "strings": attribute(lambda n: {"strings": ["a"] * n, "dtype": "<U4"}),
    "objects": attribute(lambda n: {"strings": names(n), "dtype": "O"}),
    "long strings": attribute(lambda n: [{"strings": [""], "dtype": "<U5000"}] * (n // 400)),
    "short strings": attribute(lambda n: [{"strings": ["a"], "dtype": "<U1"}] * (n // 10)),
    "floats": attribute(lambda n: [0.5] * n),
    "lists": attribute(lambda n: [[]] * n),
    "digits": attribute(lambda n: [10**4000] * (n // 400)),
    "wide texts": attribute(lambda n: "é😀" * n),
    "one wide letter": attribute(lambda n: "😀" + "x" * 60 * n),
    "dictionary": attribute(lambda n: {"dict": [[i, 0] for i in range(n)]}),
    "equal hashes": attribute(lambda n: {"dict": [[i * (2**61 - 1), 0] for i in range(n)]}),
    "tuples": attribute(lambda n: {"dict": [[{"tuple": [i]}, 0] for i in range(n)]}),
    "devices": attribute(lambda n: [{"device": "cpu"}] * n),
    "splitters": part(
        "parameters", "random_state",
        value=lambda n: [{"splitter": "KFold", "arguments": {"dict": []}}] * (n // 10),
    ),
    "arguments": part(
        "parameters", "random_state",
        value=lambda n: {"splitter": "KFold", "arguments": {"dict": [[k, 1] for k in names(n)]}},
    ),
    "layers": part("extractor", "layers", value=names),
    "gradient layers": part("parameters", "gradient_layers", value=names),
    "activation layers": part("parameters", "activation_layer", value=names),
    "class weights": part(
        "parameters", "class_weight", value=lambda n: {"dict": [[i, 1.0] for i in range(n)]}
    ),
    "parameters": lambda document, arrays, n: document["parameters"].update(numbered(n)),
    "versions": part("versions", value=lambda n: dict.fromkeys(names(n), "1")),
}  # fmt: skip


def cost(path, content, grow, n, padding):
    """Return the seconds and the bytes that a file of a size takes, and its size.

    Bytes of no use make the file so large that its header is not refused as too large for it.
    """
    path.write_bytes(content)
    document, arrays = read_archive(path)
    grow(document, arrays, n)
    arrays["padding"] = np.zeros(padding, "u1")
    path.write_bytes(signed(document, arrays))
    del document, arrays
    gc.collect()
    seconds = []
    for traces in (False, False, True):
        if traces:
            tracemalloc.start()
        start = time.process_time()
        with contextlib.suppress(ValueError):
            load(path, NET)
        seconds.append(time.process_time() - start)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return min(seconds), peak, path.stat().st_size


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("kind", GROWING)
def test_cost_is_linear(contents, path, monkeypatch, kind, is_padded):
    without_graph(monkeypatch)
    found = [
        cost(path, contents["classifier"], GROWING[kind], n, 200 * n * is_padded)
        for n in (10_000, 40_000)
    ]
    for _, peak, size in found:
        assert peak < 4 * size + ROOM
    (before, _, _), (after, _, _) = found
    assert after < 8 * before + 0.05  # quadratic: 16 times


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_large_weights(path):
    width = 4000
    samples = np.random.default_rng(0).normal(size=(12, width)).astype(np.float32)
    network = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    estimator(network, features="activation").fit(samples, Y[:12]).save(path)

    def memory(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    load(path, network)
    assert memory("VmHWM") - before < 4 * path.stat().st_size + 2**25
