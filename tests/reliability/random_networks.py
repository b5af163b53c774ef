"""Random small networks with what the estimators should find in them."""

import copy
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import nn
from torch.func import functional_call

SMOOTH = (nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.Mish, nn.Sigmoid)
PIECEWISE = (nn.ReLU, nn.LeakyReLU, nn.Hardswish, nn.ReLU6, nn.ELU, nn.PReLU)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear, nn.MultiheadAttention,
)  # fmt: skip


class Skip(nn.Module):
    """A residual block."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Branches(nn.Module):
    """Two paths whose results are joined."""

    def __init__(self, first, second, joined, axis):
        super().__init__()
        self.first, self.second, self.joined, self.axis = first, second, joined, axis

    def forward(self, x):
        first, second = self.first(x), self.second(x)
        if self.joined == "concatenated":
            return torch.cat([first, second], self.axis)
        return first + second if self.joined == "added" else first * torch.sigmoid(second)


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """Two layers with the same parameters."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.second(torch.sin(self.first(x)))


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = nn.MultiheadAttention(channels, heads, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x, need_weights=False)[0]


class Mean(nn.Module):
    """The mean over the places or the tokens."""

    def __init__(self, axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.mean(self.axes)


class Swapped(nn.Module):
    """Tokens with their channels on the second axis."""

    def forward(self, x):
        return x.mT


class Builder:
    """Draws the layers of a network, and keeps track of the shape of a sample."""

    def __init__(self, rng):
        self.rng = rng
        self.kind = str(rng.choice(["rows", "sequences", "images", "tokens", "ids"]))
        self.channels = int(rng.integers(1, 4)) if self.kind in ("sequences", "images") else 6
        length = {"sequences": (11,), "images": (9, 8), "tokens": (5,), "ids": (5,), "rows": ()}
        self.places = length[self.kind]
        if self.kind == "rows":
            self.channels = int(rng.integers(2, 9))
        self.sample_shape = {
            "tokens": (5, 6),
            "ids": (5,),
            "rows": (self.channels,),
        }.get(self.kind, (self.channels, *self.places))

    def chance(self, share):
        return bool(self.rng.random() < share)

    def network(self):
        """Return a chain of layers."""
        chain: list[nn.Module] = []
        if self.kind == "ids":
            padding = 0 if self.chance(0.3) else None
            chain.append(nn.Embedding(9, self.channels, padding_idx=padding))
        for _ in range(self.rng.integers(2, 5)):
            chain += self.stage()
        spatial = self.kind in ("sequences", "images")
        if spatial and self.chance(0.5):
            chain += self.pooled_to_rows()
        elif self.kind in ("tokens", "ids"):
            chain.append(Mean(1) if self.chance(0.6) else Swapped())
        if len(chain) < 3:
            chain.append(nn.Tanh())
        return nn.Sequential(*chain)

    def pooled_to_rows(self):
        layers = [Mean(tuple(range(2, 2 + len(self.places))))]
        if self.chance(0.5):
            pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[len(self.places) - 1]
            layers = [pool(1), nn.Flatten()]
        if self.chance(0.4):
            layers += [nn.Linear(self.channels, 5), self.activation()]
        return layers

    def stage(self):
        """Return one to four layers that follow each other."""
        if self.kind in ("tokens", "ids"):
            return self.token_stage()
        draw = self.rng.random()
        if draw < 0.2:
            return [Skip(nn.Sequential(*self.keeping()))]
        if draw < 0.35:
            joined = str(self.rng.choice(["added", "concatenated", "multiplied"]))
            paths = [nn.Sequential(*self.keeping()) for _ in range(2)]
            stage = Branches(*paths, joined, 1)
            self.channels *= 2 if joined == "concatenated" else 1
            return [stage]
        if draw < 0.43:
            return [Twice(self.same_size(True))]
        if draw < 0.5:
            layer = self.same_size(True)
            return [Tied(layer, copy.deepcopy(layer))]
        return self.moving()

    def token_stage(self):
        c, draw = self.channels, self.rng.random()
        if draw < 0.3:
            return [
                Skip(nn.Sequential(nn.LayerNorm(c), Attention(c, int(self.rng.choice([1, 2])))))
            ]
        if draw < 0.6:
            inner = nn.Linear(c, 7, bias=self.chance(0.7)), self.activation(), nn.Linear(7, c)
            return [Skip(nn.Sequential(nn.LayerNorm(c), *inner))]
        if draw < 0.7:
            return [
                nn.TransformerEncoderLayer(c, 2, 8, batch_first=True, norm_first=self.chance(0.5))
            ]
        if draw < 0.8:
            return [Tied(nn.Linear(c, c), nn.Linear(c, c))]
        self.channels = int(self.rng.choice([4, 6, 8]))
        return [nn.Linear(c, self.channels), self.activation()]

    def keeping(self):
        """Return layers with an output of the shape of their input."""
        layer = self.same_size(self.chance(0.6))
        layers = [layer, *self.norm(self.channels), self.activation()]
        return [*layers, self.same_size(True)] if self.chance(0.4) else layers

    def same_size(self, bias):
        """Return a layer that keeps the shape."""
        c = self.channels
        if self.kind == "rows":
            return nn.Linear(c, c, bias=bias)
        groups = c if self.chance(0.2) else 1
        dilation = int(self.rng.integers(1, 3))
        conv = nn.Conv1d if self.kind == "sequences" else nn.Conv2d
        return conv(
            c, c, 3, padding="same" if self.chance(0.3) else dilation, dilation=dilation,
            groups=groups, bias=bias, padding_mode=self.padding_mode(dilation),
        )  # fmt: skip

    def padding_mode(self, padding):
        modes = ["zeros", "zeros", "circular", "replicate", "reflect"]
        return str(self.rng.choice(modes if min(self.places) > padding else modes[:1]))

    def moving(self):
        """Return a layer that changes the shape, with a norm, an activation and a pooling."""
        c, bias = self.channels, self.chance(0.6)
        if self.kind == "rows":
            self.channels = int(self.rng.integers(3, 8))
            layers = [nn.Linear(c, self.channels, bias=bias)]
        else:
            layers = [self.convolution(c, bias)]
        layers += [*self.norm(self.channels), self.activation()]
        if self.kind != "rows" and min(self.places) >= 4 and self.chance(0.3):
            dims = len(self.places)
            pools = [(nn.MaxPool1d, nn.MaxPool2d), (nn.AvgPool1d, nn.AvgPool2d)]
            layers.append(pools[self.rng.integers(2)][dims - 1](2))
            self.places = tuple(size // 2 for size in self.places)
        return layers

    def convolution(self, c, bias):
        dims = len(self.places)
        groups = c if self.chance(0.2) else 1
        self.channels = groups * int(self.rng.integers(2, 5)) if groups == 1 else 2 * groups
        if self.chance(0.15) and max(self.places) < 12:
            conv = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
            layer = conv(c, self.channels, 2, stride=int(self.rng.integers(1, 3)), groups=groups)
        else:
            conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
            size = int(self.rng.integers(1, 4))
            if self.chance(0.1) and min(self.places) < 6:
                kernel, padding = self.places, 0  # as large as the input
                options = {}
            else:
                dilation = int(self.rng.integers(1, 3))
                padding = int(self.rng.integers(dilation * (size - 1) // 2, dilation * size))
                if min(self.places) + 2 * padding < dilation * (size - 1) + 1:
                    padding = dilation * (size - 1)
                kernel, stride = size, int(self.rng.integers(1, 3))
                mode = self.padding_mode(padding)
                options = {"stride": stride, "dilation": dilation, "padding_mode": mode}
            layer = conv(
                c, self.channels, kernel, padding=padding, groups=groups, bias=bias, **options
            )
        with torch.no_grad():
            self.places = tuple(layer(torch.zeros(1, c, *self.places)).shape[2:])
        return layer

    def norm(self, c):
        draw = self.rng.random()
        if draw < 0.35:
            norm = nn.BatchNorm2d if self.kind == "images" else nn.BatchNorm1d
            return [norm(c, affine=self.chance(0.8))]
        if draw < 0.45:
            return [nn.GroupNorm(c if self.chance(0.3) else 1, c)]
        if draw < 0.55 and self.kind == "rows":
            return [nn.LayerNorm(c)]
        return []

    def activation(self):
        kinds = SMOOTH if self.chance(0.6) else PIECEWISE
        return kinds[self.rng.integers(len(kinds))]()


def trained_looking(network, rng):
    """Draw statistics, scales and shifts as after training, from ``rng``."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    with torch.no_grad():
        for module in network.modules():
            for name, value in module.named_parameters(recurse=False):
                if isinstance(module, nn.PReLU):
                    value.uniform_(-0.5, 0.5, generator=generator)
                elif value.ndim > 1:
                    fan_in = value[0].numel()
                    value.normal_(0, 1.3 / fan_in**0.5, generator=generator)
                elif name == "weight":
                    value.uniform_(0.5, 2, generator=generator)
                    value.mul_(torch.randint(0, 2, value.shape, generator=generator) * 2 - 1)
                else:
                    value.normal_(0, 0.3, generator=generator)
            if isinstance(module, NORMS):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return network.eval()


def folds(network, kept=()):
    """Return the paths of layers and of the batch norms that are folded into them.

    ``kept`` are the paths of layers whose own output is needed.
    """
    found = {}
    for path, module in network.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        prefix = f"{path}." if path else ""
        for i in range(len(module) - 1):
            layer = prefix + str(i)
            foldable = isinstance(module[i], (nn.Conv1d, nn.Conv2d, nn.Linear))
            if foldable and isinstance(module[i + 1], NORMS) and layer not in kept:
                found[layer] = prefix + str(i + 1)
    return found


def available(network, used, folded):
    """Return the names of the parameters that can be chosen, below the paths ``used``."""
    norms, layers = set(folded.values()), {norm: layer for layer, norm in folded.items()}
    names = []
    for name, _ in network.named_parameters():
        path, _, last = name.rpartition(".")
        module = network.get_submodule(path)
        if isinstance(module, NORMS):
            own_bias = path in norms and network.get_submodule(layers[path]).bias is not None
            if path not in norms or last == "weight" or own_bias:
                continue
        names.append(name)
    for layer, norm in folded.items():
        if network.get_submodule(layer).bias is None and not network.get_submodule(norm).affine:
            names.append(f"{layer}.bias")
    return [name for name in names if name.split(".")[0] in used]


def covers(pattern, name):
    """Whether a pattern matches a parameter or a submodule around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def called(network, x, replaced=MappingProxyType({})):
    """Return the outputs of all submodules by path, in the order of their last calls.

    ``replaced`` holds parameters and buffers to use in place of those of the network.
    """
    seen = {}

    def see(path):
        def hook(_module, _arguments, output):
            seen.pop(path, None)
            seen[path] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [m.register_forward_hook(see(path)) for path, m in network.named_modules()]
    try:
        functional_call(network, dict(replaced), (x,))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def blocks(network, outputs, used):
    """Return the paths of the blocks below ``used``, by the order of the calls ``outputs``."""
    layers = []
    for path, output in outputs.items():
        module = network.get_submodule(path)
        if isinstance(module, LAYERS) and path.split(".")[0] in used:
            parent = path.rpartition(".")[0]
            # Layers are known by the names of their weights.
            tied = isinstance(network.get_submodule(parent), Tied)
            layers.append(
                (
                    f"{parent}.first" if tied else path,
                    isinstance(module, nn.Linear) and output.ndim == 2,
                )
            )
    above = [path for path, dense in layers if not dense] or [path for path, _ in layers]
    joined = {path for path in outputs if _joins(network.get_submodule(path))}
    kinds = {type(network.get_submodule(path)) for path in joined if path.split(".")[0] in used}
    found = {}
    for path in above:
        parts = path.split(".")
        around = [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]
        block = next((p for p in around if p in joined), None)
        alike = [p for p in reversed(around) if type(network.get_submodule(p)) in kinds]
        block = block or next(iter(alike), path)
        found.pop(block, None)
        found[block] = None
    return list(found)


def _joins(module):
    if isinstance(module, Branches):
        return module.joined != "multiplied"
    return isinstance(module, (Skip, nn.TransformerEncoderLayer))


def members(network, block, names, folded):
    """Return the parameters of a block, with the biases that batch norms left in its layers."""
    inside = [name for name in names if name.startswith(f"{block}.")]
    for layer, norm in folded.items():
        if f"{layer}.weight" in inside and f"{norm}.bias" in names:
            inside.append(f"{norm}.bias")
    return set(inside)
