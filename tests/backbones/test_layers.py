"""The choice of several activation layers, and the activation that they make up."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifierCV, load
from sklearn_gradfeat.backbones._frozen import FrozenBackbone, freeze
from sklearn_gradfeat.backbones._graph import (
    ActivationModule,
    CaptureError,
    Layer,
    main_output,
    watched,
)
from sklearn_gradfeat.backbones._split import extract
from tests.networks import Residual, ResidualBlock, Tokens
from tests.tiny import X, Y, estimator, tiny_net

IMAGES = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 2, 5, 5)))


def frozen(module, chosen, x=IMAGES):
    return FrozenBackbone(module.double().eval(), x[:2], torch.float64, chosen)


def paths(module, chosen, x=IMAGES):
    return [layer.path for layer in frozen(module, chosen, x).layers]


def outputs(module, x, names):
    """The outputs of submodules by plain hooks, as arrays."""
    found = {}

    def keep(name):
        return lambda _module, _inputs, output: found.update({name: output.numpy().copy()})

    for name in names:
        module.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        module(x)
    return [found[name] for name in names]


# --- which layers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (("3", "1"), ["1", "3"]),
        (("3", "?", "3"), ["0", "1", "2", "3", "4", "5"]),
        (("[13]",), ["1", "3"]),
        ("[13]", ["1", "3"]),
        (("", "1"), ["1", ""]),
        (1, ["2", ""]),
        (2, ["0", "2", ""]),
    ],
)
def test_names_patterns_and_blocks(chosen, expected):
    assert paths(tiny_net(), chosen, torch.from_numpy(X).double()) == expected


@pytest.mark.parametrize(
    ("network", "k", "expected"),
    [
        (Residual, 2, ["block.0", "block.1"]),  # the output is the mean of the last
        (Tokens, 1, ["encoder.layers.1"]),
        (lambda: nn.Sequential(Residual(), nn.Linear(4, 3)), 1, ["0.block.1", ""]),
        (lambda: nn.Linear(5, 3), 1, [""]),
    ],
)
def test_blocks_are_those_of_gradient_layers(network, k, expected):
    assert paths(network(), k) == expected


def test_gradient_layers_are_counted_as_without_activation_layers():
    def net():
        return nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)))

    rows = torch.rand(4, 5).double()
    plain, joined = frozen(net(), None, rows), frozen(net(), ("1", "2"), rows)
    assert (
        joined.choose(2) == plain.choose(2) == ["1.0.weight", "1.0.bias", "2.0.weight", "2.0.bias"]
    )


# --- the default -----------------------------------------------------------------------------


def chain(n, width=2):
    """A network of n residual blocks below an average."""
    blocks = [ResidualBlock(width) for _ in range(n)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def default(module, x=IMAGES, gradient_layers="last"):
    module = module.double().eval()
    return FrozenBackbone(module, x[:2], torch.float64, "auto", gradient_layers)


@pytest.mark.parametrize(
    ("n", "gradient_layers", "expected"),
    [
        (1, "last", None),
        (3, "last", ["0", "1", ""]),
        (6, "last", ["1", "2", "3", "4", ""]),
        (6, 2, ["0", "1", "2", "3", ""]),
        (6, ["3.*", "5.*"], ["0", "1", "2", ""]),
        (6, "all", None),
        (6, "no layer", None),
    ],
)
def test_default_is_the_blocks_below_the_gradient_layers(n, gradient_layers, expected):
    layers = default(chain(n), gradient_layers=gradient_layers).layers
    assert (layers and [layer.path for layer in layers]) == expected


class Stacked(nn.Module):
    """A residual connection of its own below a list of blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(2, 2, 1)
        self.layers = nn.ModuleList([ResidualBlock(2) for _ in range(3)])

    def forward(self, x):
        x = x + self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("gradient_layers", "expected"),
    [("last", ["0.layers.0", "0.layers.1", ""]), (["0.embed", "0.layers.2"], None)],
)
def test_default_where_a_block_is_around_others(gradient_layers, expected):
    network = nn.Sequential(Stacked(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = default(network, gradient_layers=gradient_layers)
    assert list(found.blocks()) == ["0", "0.layers.0", "0.layers.1", "0.layers.2"]
    paths = found.layers and [layer.path for layer in found.layers]
    assert paths == expected


def test_default_is_the_model_of_its_layers():
    chosen = estimator(activation_layer=["0", ""]).fit(X, Y)
    found = estimator().fit(X, Y)
    assert found.coef_.shape == (3, 10)
    np.testing.assert_allclose(found.predict_proba(X), chosen.predict_proba(X), rtol=1e-5)
    alone = estimator(features="activation").fit(X, Y)
    np.testing.assert_array_equal(alone.transform(X), found.transform(X))


def test_default_adds_nothing_to_the_head():
    """The blocks are part of the trunk, which every sample passes once."""
    names = ["2.weight", "2.bias"]
    x = torch.from_numpy(X).double()
    plain, wide = (FrozenBackbone(tiny_net().double(), x[:2], x.dtype, c) for c in (None, "auto"))
    head, other = (backbone.network(names).graph.graph for backbone in (plain, wide))
    calls = [[str(n.target) for n in g.nodes if n.op == "call_function"] for g in (head, other)]
    count = [sum("conv" in name for name in names) for names in calls]
    assert count == [1, 1]


@pytest.mark.parametrize("chosen", ["auto", 2])
def test_blocks_need_no_second_export(chosen, monkeypatch):
    calls = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: calls.append(0) or export(*a, **k))
    backbone = FrozenBackbone(Unknown(chain(3)).double(), IMAGES[:2], torch.float64, chosen)
    backbone.choose("last")
    assert not isinstance(backbone.computed, CaptureError)
    assert len(calls) == 1
    backbone = FrozenBackbone(Unknown(chain(3)).double(), IMAGES[:2], torch.float64, chosen)
    expected = backbone.module(IMAGES)
    graph = extract(backbone.computed, [backbone.computed.input], [backbone.computed.output])
    torch.testing.assert_close(graph(IMAGES)[0], expected)


class Unknown(nn.Module):
    """Code that belongs to no package, whose graph is not kept for other networks."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Scored(nn.Module):
    """A network with a classifier for 1,000 classes at its end."""

    def __init__(self, n_classes=1000, pooled=True, by_name=False):
        super().__init__()
        self.by_name = by_name
        self.body = nn.Sequential(ResidualBlock(2), ResidualBlock(2))
        self.pool = nn.AdaptiveAvgPool2d(1) if pooled else None
        self.fc = nn.Linear(2, n_classes)

    def forward(self, x):
        z = self.body(x)
        z = z.mean((2, 3), keepdim=True).square() if self.pool is None else self.pool(z)
        return self.fc(input=z.flatten(1)) if self.by_name else self.fc(z.flatten(1))


class Prompted(nn.Module):
    """Has a block that always returns two rows, and one with rows of its own samples."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.rand(2, 5))
        self.keys, self.below, self.above = Linears(5, 4), Linears(5, 4), nn.Linear(4, 4)

    def forward(self, x):
        keys = self.keys(self.prompt)
        return self.above(torch.softmax(self.below(x) @ keys.T, 1) @ keys)


def Linears(*widths):
    return nn.Sequential(*map(nn.Linear, widths, widths[1:]))


class Experts(nn.Module):
    """The first two samples have the same expert."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(5, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        z = self.below(x)
        index, out = (x[:, 0] > 0.8).long(), torch.zeros_like(z)
        for i, expert in enumerate(self.experts):
            if (index == i).any():
                out[index == i] = expert(z[index == i])
        return self.above(out)


class SamplesSecond(nn.Module):
    """A transformer on two tokens, with samples on the second axis."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(5, 8), nn.Linear(8, 4)
        layers = [nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0) for _ in range(3)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        z = self.below(x).reshape(-1, 2, 4).transpose(0, 1)
        for layer in self.layers:
            z = layer(z)
        return self.above(z.transpose(0, 1).flatten(1))


class Infinite(nn.Module):
    """Has a block that returns the weights of a softmax, some of them zero, as logarithms."""

    def __init__(self):
        super().__init__()
        self.below, self.logs, self.above = nn.Linear(5, 4), Logarithms(), nn.Linear(4, 4)

    def forward(self, x):
        return self.above(torch.softmax(self.logs(self.below(x)), 1))


class Logarithms(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.where(torch.arange(4, device=x.device) > 1, x + self.layer(x), -torch.inf)


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.above = torch.compile(Linears(5, 4, 4), backend="eager"), Linears(4, 4)

    def forward(self, x):
        return self.above(self.below(x))


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured as a graph")
@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Prompted, ["below.0", ""]),
        (Experts, ["below", ""]),
        (SamplesSecond, ["below", ""]),
        (Infinite, ["below", ""]),
        (Compiled, ["below", ""]),
    ],
)
def test_default_leaves_out_what_are_no_rows_of_all_samples(network, expected):
    torch.manual_seed(0)
    x = np.random.default_rng(0).random((12, 5)) + 0.3
    x[6:] -= 0.5
    model = estimator(network(), tol=0.1).fit(x, np.arange(12) % 2)
    layers = model._extractor.backbone.layers
    assert layers is None or set(expected).issuperset(layer.path for layer in layers)
    assert np.isfinite(model.predict_proba(x)).all()


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured as a graph")
def test_default_without_a_derivative():
    class OfNumpy(Unknown):
        def forward(self, x):
            return torch.from_numpy(np.tanh(super().forward(x).detach().numpy()))

    x = np.random.default_rng(0).normal(size=(12, 5))
    options = {"features": "activation", "device": "cpu"}
    model = estimator(OfNumpy(Linears(5, 4, 4)), **options).fit(x, np.arange(12) % 2)
    assert model.coef_.shape == (1, 4)


@pytest.mark.parametrize("k", [2, np.int64(2)])
def test_numbers_of_blocks_of_numpy(k):
    assert estimator(gradient_layers=k).fit(X, Y).coef_.shape == (3, 6)


@pytest.mark.filterwarnings("error:The backbone ends in")
def test_default_leaves_class_scores_out():
    assert [layer.path for layer in default(Scored()).layers] == ["body.0", "pool"]
    assert [layer.path for layer in default(Scored(by_name=True)).layers] == ["body.0", "pool"]
    assert [layer.path for layer in default(Scored(10)).layers] == ["body.0", ""]
    model = estimator(Scored()).fit(IMAGES[[0, 1, 2, 3] * 3].numpy(), np.arange(12) % 2)
    assert model.coef_.shape == (1, 4)


@pytest.mark.parametrize(
    ("gradient_layers", "expected"), [("fc", None), (["fc", "body.1.*"], ["body.0", ""])]
)
def test_default_keeps_scores_of_gradient_layers(gradient_layers, expected):
    found = default(Scored(), gradient_layers=gradient_layers)
    assert (found.layers and [layer.path for layer in found.layers]) == expected
    assert "fc.weight" in found.choose(gradient_layers)


def test_scores_that_cannot_be_left_out_have_a_warning():
    with pytest.warns(UserWarning, match="The backbone ends in the layer 'fc'"):
        estimator(Scored(pooled=False)).fit(IMAGES.numpy(), [0, 1, 0, 1])


@pytest.mark.parametrize("gradient_layers", ["last", "all"])
def test_default_is_saved(gradient_layers, tmp_path):
    model = estimator(gradient_layers=gradient_layers).fit(X, Y)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", tiny_net())
    assert loaded.activation_layer == "auto"
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(again.predict_proba(X), model.predict_proba(X), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured as a graph")
def test_default_without_a_graph():
    class Bounded(Unknown):
        def forward(self, x):
            return super().forward(x if float(x.detach().abs().max()) < 1e9 else x.clamp(-1, 1))

    layers = default(Bounded(chain(3))).layers
    assert [layer.path for layer in layers] == ["inner.0", "inner.1", ""]


def test_calls_in_threads():
    """The outputs that a call joins are its own."""
    entered, left = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x):
            if len(x) == 3:
                entered.set()
                left.wait(0.5)
            return x + 1

    module = ActivationModule(nn.Sequential(nn.Identity(), Slow()), (Layer("0", 1, 2),))
    x = torch.arange(10.0).reshape(5, 2)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(module, x[:3])
        entered.wait(5)
        quick = pool.submit(module, x)
        quick.add_done_callback(lambda _: left.set())
        torch.testing.assert_close(slow.result(), x[:3])
        torch.testing.assert_close(quick.result(), x)


class Nested(nn.Module):
    """Calls a layer twice, and returns more than tensors."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)
        self.lstm = nn.LSTM(5, 3, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.sizes, self.counts, self.turned = Call(lambda h: {}), Call(torch.argmax), Call(flip)

    def forward(self, x):
        h = self.layer(self.layer(x))
        self.sizes(h), self.counts(h), self.turned(h)
        h = self.attention(h, h, h)[0]
        return self.lstm(h)[0].mean(1)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def flip(h):
    return h.transpose(0, 1)


SEQUENCES = torch.rand(4, 7, 5).double()


def test_last_call_and_first_item_of_a_tuple():
    names = ("layer", "attention", "lstm")
    network = Nested().double().eval()
    found = frozen(network, names, SEQUENCES)
    assert [layer.axis for layer in found.layers] == [-1, -1, -1]
    with torch.no_grad():
        h = network.layer(network.layer(SEQUENCES))
        attended = network.attention(h, h, h)[0]
        parts = h, attended, network.lstm(attended)[0]
        expected = torch.cat([part.mean(1) for part in parts], 1)
        torch.testing.assert_close(found.module(SEQUENCES), expected)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (("layer", "unused"), r"activation_layer='unused' is not called.* Name a submodule"),
        (("unuse?",), r"activation_layer='unuse\?' is not called"),
        (("sizes",), r"='sizes' chooses the submodule 'sizes', which returns dict. Choose sub"),
        (("c*",), r"='c\*' chooses the submodule 'counts', which returns torch.int64"),
        (("turned",), r"which returns shape \(7, 2, 5\) for 2 samples"),
        ("Auto", r"nearest names are 'auto'"),
        (("lay*", "lzyer"), r"activation_layer='lzyer' is not a sub.*nearest names are 'layer'"),
        (("x*",), r"activation_layer='x\*' is not a submodule"),
        (9, r"activation_layer=9 asks for more blocks than the backbone has: \d\. Pass a smaller"),
    ],
)
def test_errors_name_parameter_and_layer(chosen, message):
    with pytest.raises(ValueError, match=message):
        frozen(Nested(), chosen, SEQUENCES)


@pytest.mark.parametrize("chosen", [[], [3], ["3", None], ()])
def test_lists_that_do_not_hold_names(chosen):
    with pytest.raises(ValueError, match=r"activation_layer=.* must list one or more strings"):
        estimator(activation_layer=chosen).fit(X, Y)


def test_pattern_leaves_out_what_is_not_called():
    network = nn.Sequential(nn.ModuleDict({"a": nn.Linear(5, 4)})["a"], nn.Tanh())
    network[0].spare = nn.Linear(1, 1)
    assert paths(network, ("*",), torch.rand(2, 5).double()) == ["0", "1"]


def test_output_of_a_network_for_tokens_is_a_layer_of_its_own():
    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return self.mix(self.table(ids)).mean(1)

    found = frozen(Texts(), 1, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert [(layer.path, layer.axis) for layer in found.layers] == [("mix", -1), ("", 1)]


# --- the activation --------------------------------------------------------------------------


class Permuted(nn.Module):
    """Keeps the channels of an image last, with as many as it has rows in one layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 1)
        self.norm, self.mix = nn.LayerNorm(5), nn.Linear(5, 7)
        self.back = Call(lambda h: h.permute(0, 3, 1, 2))
        self.gate = nn.Linear(7, 7)
        self.gated = Call(lambda h: h * self.gate(h.mean((2, 3)))[..., None, None])

    def forward(self, x):
        h = self.mix(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return self.gated(self.back(h)).mean((2, 3))


class AsManyAsColumns(nn.Module):
    """Keeps the channels of an image last for a while, with as many as it has columns."""

    def __init__(self, back):
        super().__init__()
        self.embed = nn.Conv2d(2, 5, 1)
        self.front = Call(lambda h: h.movedim(1, -1))
        self.mix = nn.Linear(5, 5)
        self.back = Call(back)
        self.block = Call(lambda h: h)

    def forward(self, x):
        h = self.embed(x)
        return self.block(h + self.back(self.mix(self.front(h)))).mean((2, 3))


class OtherWidths(nn.Module):
    """Layers for tokens with other numbers of channels than the operation before them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(2, 5, 1)
        self.tokens = Call(lambda h: h.flatten(2)[..., :5].mT)
        self.wide = nn.Linear(5, 12)
        self.gated = Call(nn.functional.glu)
        self.kernel = nn.Parameter(torch.randn(6, 9))
        self.product = Call(lambda h: torch.tanh(h @ self.kernel))
        self.queries = nn.Linear(9, 27)
        self.attention = Call(self.attend)

    def attend(self, h):
        q, k, v = self.queries(h).unflatten(-1, (3, 3, 3)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        tokens = self.tokens(self.embed(x))
        return self.attention(self.product(self.gated(self.wide(tokens)))).mean(1)


@pytest.mark.parametrize(
    ("network", "axes"),
    [
        (Residual, {"stem": 1, "block.0.bn1": 1, "block.0": 1, "block.1": 1}),
        (Tokens, {"embed": -1, "encoder.layers.0.self_attn": -1, "encoder.layers.1": -1}),
        (Permuted, {"conv": 1, "norm": -1, "mix": -1, "back": 1, "gate": 1, "gated": 1}),
        (
            partial(AsManyAsColumns, lambda h: h.permute(0, 3, 1, 2)),
            {"embed": 1, "front": -1, "mix": -1, "back": 1, "block": 1},
        ),
        (
            partial(AsManyAsColumns, lambda h: h.swapaxes(1, 2).transpose(-1, 1)),
            {"embed": 1, "front": -1, "mix": -1, "back": 1, "block": 1},
        ),
        (
            OtherWidths,
            {"embed": 1, "tokens": -1, "wide": -1, "gated": -1, "product": -1, "attention": -1},
        ),
    ],
)
def test_outputs_are_averaged_over_positions(network, axes):
    torch.manual_seed(0)
    module = network().double().eval()
    found = frozen(module, tuple(axes))
    assert {layer.path: layer.axis for layer in found.layers} == axes
    graph = found.network(())
    assert graph.graph is not None
    with torch.no_grad():
        activation = graph.head((), graph.boundary(IMAGES))
    names = [name for name in axes if name != "encoder.layers.0.self_attn"]
    parts = activation.split([layer.width for layer in found.layers], 1)
    by_name = {layer.path: part for layer, part in zip(found.layers, parts, strict=True)}
    for name, output in zip(names, outputs(module, IMAGES, names), strict=True):
        channels_last = np.moveaxis(output, axes[name], -1)
        rows = channels_last.reshape(len(output), -1, channels_last.shape[-1]).mean(1)
        np.testing.assert_allclose(by_name[name], rows, atol=1e-12)


def test_layer_before_an_operator_that_works_in_place():
    def net(inplace):
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 3, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(27, 4)
        return nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 4), nn.ReLU(inplace))

    found, plain = (frozen(net(inplace), ("0", "5", "6")) for inplace in (True, False))
    torch.testing.assert_close(found.module(IMAGES), plain.module(IMAGES))
    captured = found.network(())
    torch.testing.assert_close(captured.head((), captured.boundary(IMAGES)), plain.module(IMAGES))


def test_batch_norms_fold_except_after_a_layer_that_is_read():
    network = Residual().double().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    found = frozen(network, ("block.0", "block.1.conv1", "block.1"))
    names = found.choose("all")
    assert {"block.0.bn1.bias", "block.1.conv1.weight", "block.1.bn2.bias"} <= set(names)
    assert "block.1.bn1.bias" not in names  # this batch norm stays
    split = found.network(found.choose("block.1"))
    with torch.no_grad():
        activation = split.head(tuple(split.parameters.values()), split.boundary(IMAGES))
        torch.testing.assert_close(activation, found.module(IMAGES))


class Texts(nn.Module):
    """A transformer for token ids, of which zeros are padding."""

    def __init__(self, plain=False):
        super().__init__()
        self.table, self.plain = nn.Embedding(9, 8), plain
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mix = nn.Conv1d(8, 5, 1)
        self.reader = Reader()

    def forward(self, ids):
        if self.plain:
            return self.reader(self.table(ids), (ids != 0).long()).mean(1)
        tokens = self.encoder(self.table(ids), src_key_padding_mask=ids == 0)
        return self.mix(tokens.mT)[:, :, 0]


class Reader(nn.Module):
    """A layer that takes a mask as the models of transformers do."""

    def forward(self, tokens, attention_mask):
        return tokens * 2


@pytest.mark.parametrize(
    ("plain", "chosen"),
    [(False, ("table", "encoder.layers.*", "mix")), (False, "encoder"), (True, ("reader",))],
)
def test_activation_of_a_text_does_not_depend_on_longer_ones(plain, chosen):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Texts(plain)
    short = torch.tensor([[1, 2, 3], [4, 5, 0]])
    padded = torch.cat([torch.nn.functional.pad(short, (0, 2)), torch.arange(1, 6)[None]])
    network = network.double().eval()
    alone, together = (freeze(network, x[:2], torch.float64, chosen) for x in (short, padded))
    expected, found = alone.module(short), together.module(padded)[:2]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    graph = extract(together.computed, [together.computed.input], [together.computed.output])
    torch.testing.assert_close(graph(padded)[0][:2], expected, rtol=1e-10, atol=1e-12)


class Loose(nn.Module):
    """A layer that takes any number of arguments before the mask."""

    def forward(self, tokens, *others, attention_mask=None):
        return tokens * 2


class Masked(nn.Module):
    """Layers that are given masks by a function."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run, self.layers = run, nn.ModuleDict(layers)

    def forward(self, ids):
        tokens = nn.functional.embedding(ids, torch.eye(9, 8).to(torch.float64))
        return self.run(self.layers, tokens, ids).mean(1)


def attention():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.MultiheadAttention(8, 2, batch_first=True)


def in_two_towers(layers, tokens, ids):
    first = layers["reader"](tokens, ids != 0)
    return first + layers["other"](tokens.flip(1), ids.flip(1) != 0)


def across(layers, tokens, ids):
    queries = layers["reader"](tokens, None)
    return layers["attention"](queries, tokens, tokens, ids == 0)[0]


def with_bias(layers, tokens, ids):
    bias = -0.1 * torch.arange(5.0).to(tokens)
    return layers["attention"](tokens, tokens, tokens, torch.where(ids == 0, -torch.inf, bias))[0]


def one_for_all(layers, tokens, ids):
    return layers["reader"](tokens, torch.arange(5)[None] < 2)


def transposed(layers, tokens, ids):
    return layers["reader"](tokens, (ids != 0).T)


def another_argument(layers, tokens, ids):
    return layers["loose"](tokens, ids, ids == 0)


@pytest.mark.parametrize(
    ("run", "layers", "kept"),
    [
        (in_two_towers, {"reader": Reader(), "other": Reader()}, [3, 2, 5]),
        (across, {"reader": Reader(), "attention": attention()}, [5, 5, 5]),
        (with_bias, {"attention": attention()}, [3, 2, 5]),
        (one_for_all, {"reader": Reader()}, [2, 2, 2]),
        (transposed, {"reader": Reader()}, [5, 5, 5]),
        (another_argument, {"loose": Loose()}, [5, 5, 5]),
    ],
    ids=lambda value: getattr(value, "__name__", "-"),
)
def test_padding_is_that_of_the_own_positions(run, layers, kept):
    """The first layer is averaged over the tokens that are kept, alone or with others."""
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [5, 4, 3, 2, 1]])
    network = Masked(run, **layers).double().eval()
    paths = [f"layers.{name}" for name in layers]
    seen = []
    with watched(network, paths[:1], lambda _, output: seen.append(main_output(output))):
        network(ids)
    expected = torch.stack([rows[:n].mean(0) for rows, n in zip(seen[0], kept, strict=True)])
    found = freeze(network, ids[:2], torch.float64, paths)
    torch.testing.assert_close(found.module(ids)[:, :8], expected)
    torch.testing.assert_close(found.module(ids[:1])[:, :8], expected[:1])
    if run is transposed:
        graph = extract(found.computed, [found.computed.input], [found.computed.output])
        torch.testing.assert_close(graph(ids)[0], expected)


# --- one name --------------------------------------------------------------------------------


def test_one_layer_of_a_transformer_is_averaged_over_tokens():
    network = Tokens().double().eval()
    found = freeze(network, IMAGES[:2], torch.float64, "encoder.layers.0")
    ((path, axis, width),) = found.layers
    assert (path, axis, width) == ("encoder.layers.0", -1, 8)
    (output,) = outputs(network, IMAGES, [path])
    np.testing.assert_allclose(found.module(IMAGES), output.mean(1), atol=1e-12)


def test_one_layer_of_files_of_earlier_versions_has_its_channels_second():
    network = Tokens().double().eval()
    found = FrozenBackbone(network, IMAGES[:2], torch.float64, "embed", channels_second=True)
    (output,) = outputs(network, IMAGES, ["embed"])
    np.testing.assert_allclose(found.module(IMAGES), output.mean(2), atol=1e-12)


def test_one_layer_of_a_convolutional_network_is_as_it_was():
    network = Residual().double().eval()
    found = freeze(network, IMAGES[:2], torch.float64, "block.0")
    assert found.layers is None
    (output,) = outputs(network, IMAGES, ["block.0"])
    expected = torch.from_numpy(output).flatten(2).mean(2)
    assert torch.equal(found.module(IMAGES), expected)


# --- without a graph -------------------------------------------------------------------------


class Refused(nn.Module):
    """A network that torch.export refuses, since it branches on the data."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) * 2 if x.abs().sum() > 1e9 else self.net(x)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
@pytest.mark.parametrize(
    ("chosen", "plain"), [(2, 2), (["net.stem", "net.block.?"], ["stem", "block.?"])]
)
def test_network_without_a_graph(chosen, plain):
    torch.manual_seed(0)
    module = Residual()
    images = IMAGES.numpy().repeat(6, 0) + np.random.default_rng(0).normal(size=(24, 2, 5, 5))
    options = {"precision": "float64", "tol": 1e-10, "max_iter": 200}
    # Batch norms are not folded without a graph, so θ₂ has none after it.
    names = {True: "net.stem.weight", False: "stem.weight"}
    eager = estimator(
        Refused(module), activation_layer=chosen, gradient_layers=names[True], **options
    ).fit(images, Y)
    expected = estimator(
        module, activation_layer=plain, gradient_layers=names[False], **options
    ).fit(images, Y)
    assert eager._extractor.network(()).graph is None
    np.testing.assert_allclose(eager._extractor.scales, expected._extractor.scales)
    np.testing.assert_allclose(
        eager.predict_proba(images), expected.predict_proba(images), atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
def test_folds_in_threads_without_a_graph():
    def scores(n_jobs):
        options = {"alphas": [0.1, 1.0], "gradient_alphas": [0.1], "cv": 6, "n_jobs": n_jobs}
        return (
            GradientFeatureClassifierCV(
                Refused(tiny_net()), activation_layer=["net.1", "net.3"], refit=False, **options
            )
            .fit(X, Y)
            .scores_
        )

    assert np.array_equal(scores(4), scores(1))
