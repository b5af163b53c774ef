"""Graphs without the tokens that nobody reads, against the whole graphs."""

import inspect
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from sklearn_gradfeat import GradientFeatureClassifier, load
from sklearn_gradfeat.backbones import _frozen
from sklearn_gradfeat.backbones._blocks import after_attention
from sklearn_gradfeat.backbones._capture import capture
from sklearn_gradfeat.backbones._fingerprint import fingerprint
from sklearn_gradfeat.backbones._folding import fold_batch_norms
from sklearn_gradfeat.backbones._graph import ActivationModule
from sklearn_gradfeat.backbones._huggingface import _TextEncoder
from sklearn_gradfeat.backbones._split import extract
from sklearn_gradfeat.backbones._unread_tokens import without_unread_tokens
from sklearn_gradfeat.linearized._jacobian import LinearizedHead
from tests.networks import build


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def trained(module):
    """Return a module in float64 with parameters of about unit size."""
    module = module.double().eval()
    for i, parameter in enumerate(module.parameters()):
        scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.5
        parameter.data = scale * normal(*parameter.shape, seed=i)
    return module


def graphs(module, x):
    """Return the graph of a module, and the one without unread tokens."""
    captured = capture(ActivationModule(module, None), x[:2])
    fold_batch_norms(captured)
    return captured, without_unread_tokens(captured)


def products(captured, x):
    """Return the activation, ``J u`` and ``Jᵀ g`` in all parameters."""
    nodes = captured.parameters
    head = extract(captured, [captured.input], [captured.output], nodes.values())
    values = {name: captured.tensors[node] for name, node in nodes.items()}
    linear = LinearizedHead(lambda own, given: head(*own, *given)[0], values, "ntk")
    activation = linear.activation((x,))
    u, g = normal(linear.size, seed=1), normal(*activation.shape, seed=2)
    return activation, linear.jvp((x,), u), linear.vjp((x,), g)


def check(module, x):
    """Compare both graphs of a module, and return them."""
    old, new = graphs(module, x)
    for expected, found in zip(products(old, x), products(new, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    assert [*new.parameters] == [*old.parameters]
    return old, new


def n_rows(captured, name):
    """Return the number of rows of a sample that the layer of a weight multiplies."""
    batch = captured.input.meta["val"].shape[0].node.expr
    (layer,) = captured.parameters[name].users
    *sizes, _ = layer.meta["val"].shape
    return math.prod(n if isinstance(n, int) else int(n.node.expr.subs(batch, 1)) for n in sizes)


# --- random graphs -----------------------------------------------------------------------------

N_TOKENS, WIDTH = 5, 4
SIDE = (WIDTH // 2, 2)
POSITIONS, MASK = normal(N_TOKENS, WIDTH), normal(N_TOKENS, N_TOKENS) > 1


def heads(x):
    return x.unflatten(2, SIDE).transpose(1, 2)


def fused_attention(x, w):
    q, k, v = (x @ torch.cat([w, w.cos(), w.sin()], 1)).chunk(3, -1)
    return scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)


def explicit_attention(x, w):
    q, k, v = (
        (x @ torch.cat([w, w.cos(), w.sin()], 1)).unflatten(2, (3, *SIDE)).permute(2, 0, 3, 1, 4)
    )
    scores = (q @ k.transpose(-2, -1)).masked_fill(MASK, -9.0)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def causal_attention(x, w):
    return scaled_dot_product_attention(x @ w, x, x, is_causal=True)


def rotated(x, w):
    first, rest = x[:, :1], x[:, 1:]
    return torch.cat([first, torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).flatten(2)], 1)


OPERATORS = {
    "linear": lambda x, w: torch.tanh(x @ w),
    "rows": lambda x, w: nn.functional.linear(x.reshape(-1, WIDTH), w).view(x.shape),
    "token-major": lambda x, w: (
        torch.addmm(w[0], x.transpose(0, 1).reshape(-1, WIDTH), w)
        .view(N_TOKENS, -1, WIDTH).transpose(0, 1)
    ),
    "einsum": lambda x, w: torch.einsum("nti,io->nto", x, w),
    "positions": lambda x, w: x + POSITIONS,
    "norm": lambda x, w: nn.functional.layer_norm(x, (WIDTH,), w[0], w[1]),
    "rms": lambda x, w: rms_norm(x, (WIDTH,), w[0]),
    "centred": lambda x, w: (x - x.mean(-1, True)) * (x.var(-1) + 1).rsqrt()[..., None],
    "scale": lambda x, w: x + w[0] * nn.functional.gelu(x),
    "gate": lambda x, w: nn.functional.glu(torch.cat([x, x @ w], -1)),
    "over features": lambda x, w: x.softmax(-1) - x.cumsum(2),
    "over tokens": lambda x, w: x.cumsum(1) / x.norm(dim=1, keepdim=True),
    "mix": lambda x, w: torch.roll(x, 1, 1) * w[0],
    "halves": lambda x, w: torch.cat([x[:, :2] @ w, x[:, 2:].sin()], 1),
    "pool": lambda x, w: x + x.mean(1, keepdim=True).expand(-1, N_TOKENS, -1) * w[0],
    "split": lambda x, w: torch.stack([*reversed(x.unbind(1))], 1),
    "fused": fused_attention,
    "explicit": explicit_attention,
    "causal": causal_attention,
    "rotated": rotated,
    "same type": lambda x, w: (x * w[0]).type_as(x),
}  # fmt: skip
READERS = {
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "slice": lambda x: x[:, 1:3].flatten(1),
    "step": lambda x: x[:, ::3].mean(1),
    "index": lambda x: x[:, [3, 0, 3]].flatten(1),
    "features": lambda x: x[:, 1, :2],
    "mean": lambda x: x.mean(1),
    "two": lambda x: torch.cat([x[:, 0], x[:, 1:].mean(1)], 1),
}


class Random(nn.Module):
    """Branches of random operators with skip connections, each with a reader."""

    def __init__(self, branches):
        super().__init__()
        self.branches = branches
        n = max(len(operators) for operators, _ in branches)
        self.weights = nn.ParameterList(torch.empty(WIDTH, WIDTH) for _ in range(n))

    def forward(self, x):
        outputs = []
        for operators, reader in self.branches:
            values = [x * self.weights[0][0]]
            for weight, (name, skip) in zip(self.weights, operators, strict=False):
                value = OPERATORS[name](values[-1], weight)
                values.append(value + values[-1 - skip % len(values)] if skip else value)
            outputs.append(READERS[reader](values[-1]))
        return torch.cat(outputs, 1)


steps = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATORS)), st.integers(0, 3)), min_size=1, max_size=6
)
branches = st.lists(st.tuples(steps, st.sampled_from(sorted(READERS))), min_size=2, max_size=2)


@settings(max_examples=2, deadline=None)
@given(branches)
def test_random_graphs_have_the_same_value_and_derivatives(branches):
    check(trained(Random(branches)), normal(3, N_TOKENS, WIDTH))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(branches)
def test_many_random_graphs_have_the_same_value_and_derivatives(branches):
    check(trained(Random(branches)), normal(3, N_TOKENS, WIDTH))


# --- architectures -----------------------------------------------------------------------------


class First(nn.Module):
    """A model of transformers with its first token, or with its pooled output."""

    def __init__(self, model, pooled=False):
        super().__init__()
        self.model, self.pooled = model, pooled

    def forward(self, x):
        output = self.model(x)
        return output.pooler_output if self.pooled else output.last_hidden_state[:, 0]


def torchvision_vit():
    return torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 12, num_classes=3)


def timm_vit(**options):
    common = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return timm.models.VisionTransformer(**common, num_classes=0, mlp_ratio=1.5, **options)


def distilled_deit():
    return timm.models.deit.VisionTransformerDistilled(
        img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, mlp_ratio=1.5, num_classes=3
    )


def eva(fused):
    return timm.models.Eva(
        16, 8, embed_dim=8, depth=1, num_heads=2, num_classes=0, mlp_ratio=1.5, qkv_fused=fused,
        swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, global_pool="token",
    )  # fmt: skip


def hf(kind, pooled=False, **options):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 20,
             "intermediate_size": 12, "mlp_ratio": 2, "image_size": 16, "patch_size": 8,
             "dim": 8, "n_heads": 2, "n_layers": 1, "hidden_dim": 12}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")
    known = inspect.signature(config).parameters
    config = config(**{name: size for name, size in sizes.items() if name in known}, **options)
    return First(getattr(transformers, f"{kind}Model")(config), pooled)


def text_encoder():
    """The first token of a text with a mask, as a named sentence transformer with that pooling."""
    return _TextEncoder(hf("Bert").model, "cls", normalized=True)


IMAGES, TEXTS = normal(3, 3, 16, 16), torch.arange(18).view(3, 6) % 20
MASKED = torch.stack([TEXTS, (torch.arange(6) < torch.tensor([[6], [4], [2]])).long()], 1)
ARCHITECTURES = {
    "torchvision": (torchvision_vit, IMAGES, 1),
    "timm": (lambda: timm_vit(init_values=0.5, qk_norm=True), IMAGES, 1),
    "registers": (lambda: timm_vit(reg_tokens=3, no_embed_class=True), IMAGES, 1),
    "distilled": (distilled_deit, IMAGES, 2),
    "eva": (lambda: eva(fused=False), IMAGES, 1),
    "eva, fused": (lambda: eva(fused=True), IMAGES, 1),
    "BERT": (lambda: hf("Bert"), TEXTS, 1),
    "BERT, explicit": (lambda: hf("Bert", attn_implementation="eager"), TEXTS, 1),
    "BERT with a mask": (text_encoder, MASKED, 1),
    "DistilBERT": (lambda: hf("DistilBert"), TEXTS, 1),
    "ViT": (lambda: hf("ViT"), IMAGES, 1),
    "DINOv2": (lambda: hf("Dinov2"), IMAGES, 1),
    "CLIP": (lambda: hf("CLIPVision", pooled=True), IMAGES, 1),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_last_block_computes_the_tokens_that_are_read(kind):
    factory, x, n_tokens = ARCHITECTURES[kind]
    old, new = check(trained(factory()), x)
    names = [name for name in after_attention(old) if old.tensors[old.parameters[name]].ndim > 1]
    assert [n_rows(new, name) for name in names] == [n_tokens] * len(names)
    assert min(n_rows(old, name) for name in names) > n_tokens
    assert fingerprint(old) != fingerprint(new)


class HeadMajor(nn.Module):
    """Queries, keys and values of a head are side by side, so that those of all heads are not."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).view(-1, 5, 2, 3, 4).transpose(1, 2).unbind(3)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]


@pytest.mark.parametrize(
    ("factory", "x", "name"),
    [
        (torchvision_vit, IMAGES, "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"),
        (HeadMajor, normal(3, 5, 8), "qkv.weight"),
    ],
)
def test_queries_are_computed_apart_from_keys_and_values(factory, x, name):
    _, new = check(trained(factory()), x)
    layers = [layer for part in new.parameters[name].users for layer in part.users]
    shapes = [[n for n in layer.meta["val"].shape if isinstance(n, int)] for layer in layers]
    assert sorted([n for n in shape if n > 1] for shape in shapes) == [[5, 16], [8]]


class Readers(nn.Module):
    """Two readers of some rows of a layer."""

    def __init__(self, *rows):
        super().__init__()
        self.layer, self.rows = nn.Linear(4, 4), rows

    def forward(self, x):
        x = torch.tanh(self.layer(x))
        return torch.cat([x[:, rows].sum(1) for rows in self.rows], 1)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((slice(1), slice(1, 4)), 4),
        (([0, 6], [3]), 3),
        ((slice(1), slice(None)), 12),
        ((slice(10), slice(1)), 12),
    ],
    ids=["common rows", "indices", "all rows", "most rows"],
)
def test_a_layer_computes_the_rows_of_all_readers(rows, expected):
    _, new = check(trained(Readers(*rows)), normal(3, 12, 4))
    assert n_rows(new, "layer.weight") == expected


@pytest.mark.parametrize("kind", ["grouped", "residual", "transformer"])
def test_networks_that_read_everything_keep_their_graph(kind):
    old, new = graphs(build(kind)[0], normal(2, 2, 5, 5))
    assert new is old


class Odd(nn.Module):
    """Reads the first token through an operator that depends on more than the rows."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)
        self.register_buffer("index", torch.tensor([0.0]))

    def forward(self, x):
        h = self.layer(x)
        if self.kind == "float index":
            return h[:, self.index.long()].flatten(1)
        if self.kind == "bytes":
            return h.view(torch.int32).view(h.dtype)[:, 0]
        joined = torch.cat([h[:, :1].float(), h], 1)
        return (joined if self.kind == "cat" else torch.stack([h.float(), h], 1)[:, 0])[:, 1]


@pytest.mark.parametrize("kind", ["float index", "bytes", "cat", "stack"])
def test_operators_that_see_more_than_rows(kind):
    module, x = trained(Odd(kind)), normal(3, 5, 4)
    _, new = graphs(module, x)
    found = extract(new, [new.input], [new.output])(x)[0]
    expected = module(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_mean_pooling_of_tokens_keeps_the_graph():
    old, new = graphs(trained(timm_vit(global_pool="avg")), IMAGES)
    assert new is old


# --- estimators --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_models_predict_as_with_the_whole_graph(monkeypatch, tmp_path):
    X = normal(12, 3, 16, 16).numpy()
    model = GradientFeatureClassifier(
        trained(timm_vit()),
        precision="float64",
        alpha=0.1,
        gradient_alpha=0.1,
        max_iter=5,
        activation_layer=None,
    ).fit(X, np.arange(12) % 3)
    expected = model.predict_proba(X)
    found = model.to_torch()(torch.from_numpy(X)).detach()
    np.testing.assert_allclose(found, expected, atol=1e-10)
    model.save(tmp_path / "model")
    monkeypatch.setattr(_frozen, "without_unread_tokens", lambda captured: captured)
    whole = load(tmp_path / "model", timm_vit)
    np.testing.assert_allclose(whole.predict_proba(X), expected, atol=1e-10)
