"""Capture, folding, partition and forward mode for torchvision's classification networks."""

import pathlib

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import convnext, densenet, mobilenetv3, resnet, swin_transformer, vgg

from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from sklearn_gradfeat.backbones._sources import without_classifier
from sklearn_gradfeat.linearized._jacobian import LinearizedHead

# What the default gradient_layers="last" means, for one network of every family.
LAST = {
    "alexnet": "features.10",
    "convnext_tiny": "features.7.2",
    "densenet121": "features.denseblock4.denselayer16",
    "efficientnet_b0": "features.8",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "maxvit_t": "blocks.3.layers.1.layers.grid_attention",
    "mnasnet0_5": "layers.14",
    "mobilenet_v2": "features.18",
    "mobilenet_v3_small": "features.12",
    "regnet_y_400mf": "trunk_output.block4.block4-5",
    "resnet18": "layer4.1",
    "resnet50": "layer4.2",
    "resnext50_32x4d": "layer4.2",
    "shufflenet_v2_x0_5": "conv5",
    "squeezenet1_0": "features.12",
    "swin_t": "features.7.1",
    "swin_v2_t": "features.7.1",
    "vgg11_bn": "features.25",
    "vit_b_16": "encoder.layers.encoder_layer_11",
    "wide_resnet50_2": "layer4.2",
}
SIZE = {"vit_l_16": 224, "vit_b_16": 224, "vit_b_32": 224, "vit_l_32": 224, "maxvit_t": 224,
        "inception_v3": 96, "vit_h_14": 224}  # fmt: skip


def prepared(make, size):
    """Return a network without its classifier, and three images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.8, 1.2)
        x = torch.randn(3, 3, size, size)
    return without_classifier(network).eval(), x


def build(name):
    options = {"aux_logits": False} if name == "googlenet" else {}
    options |= {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return prepared(
        lambda: torchvision.models.get_model(name, weights=None, **options), SIZE.get(name, 64)
    )


def check(module, x):
    backbone = FrozenBackbone(module, x[:2], torch.float32, None)
    names = backbone.choose("last")
    network = backbone.network(names)
    assert network.trunk is not None, "no split"
    with torch.no_grad():
        boundary = network.trunk(x)
        expected = module(x)
    expected = expected.flatten(2).mean(2) if expected.ndim > 2 else expected
    head = LinearizedHead(network.head, network.parameters, "ntk")
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        head.activation(boundary) / scale, expected / scale, atol=2e-5, rtol=0
    )
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(head.size, generator=generator)
    g = torch.randn(expected.shape, generator=generator)
    forward = head.jvp(boundary, u)
    assert head._forward_mode, "no forward mode"
    assert float((forward * g).sum()) == pytest.approx(
        float(head.vjp(boundary, g) @ u), rel=1e-2, abs=1e-3 * float(forward.norm() * g.norm())
    )
    numbers = sum(z[0].numel() for z in boundary)
    return names, numbers, x[0].numel()


# --- small networks of the families ----------------------------------------------------------


def small_vgg():
    features = vgg.make_layers([8, "M", 16, "M", 16, "M"], batch_norm=True)
    with torch.device("meta"):  # a classifier of 120 million weights
        network = vgg.VGG(features, init_weights=False)
    for i, sizes in {0: (16 * 49, 32), 3: (32, 32), 6: (32, 10)}.items():
        network.classifier[i] = nn.Linear(*sizes)
    return network


def small_mobilenet():
    rows = [(16, 3, 16, 16, True, "RE", 2, 1), (16, 5, 64, 24, True, "HS", 2, 1)]
    return mobilenetv3.MobileNetV3(
        [mobilenetv3.InvertedResidualConfig(*row, width_mult=1.0) for row in rows], 32
    )


def small_convnext():
    return convnext.ConvNeXt(
        [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 2)]
    )


SMALL = {
    "resnet": (lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 2]), "layer4.1"),
    "vgg": (small_vgg, "features.8"),
    "mobilenet": (small_mobilenet, "features.3"),
    "convnext": (small_convnext, "features.3.1"),
    "densenet": (lambda: densenet.DenseNet(8, (2, 2), 16), "features.denseblock2.denselayer2"),
    "swin": (
        lambda: swin_transformer.SwinTransformer([4, 4], 16, [1, 2], [2, 2], [4, 4]),
        "features.3.1",
    ),
}


@pytest.mark.parametrize("family", SMALL)
def test_family(family):
    make, last = SMALL[family]
    names, numbers, _ = check(*prepared(make, 64))
    assert names and numbers
    assert all(n.startswith(last + ".") for n in names)


# --- the networks themselves -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_architecture(name):
    if name == "vit_h_14" or name.startswith("regnet_y_128gf"):
        pytest.skip("2.5 GB of random weights: the same code as its smaller siblings")
    names, _, _ = check(*build(name))
    if name in LAST and name not in ("mnasnet0_5", "shufflenet_v2_x0_5"):
        assert all(n.startswith(LAST[name] + ".") for n in names)


def write_table(path):
    """Write the table of docs/architectures.md: python -m tests.backbones.test_architectures."""
    lines = [
        '| network | `gradient_layers="last"` | parameters | numbers stored per sample |',
        "|---|---|---|---|",
    ]
    for name, where in LAST.items():
        names, numbers, _ = check(*build(name))
        lines.append(f"| {name} | `{where}` | {len(names)} | {numbers:,} |")
        print(lines[-1], flush=True)
    pathlib.Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_table("architectures_table.md")
