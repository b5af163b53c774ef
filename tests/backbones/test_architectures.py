"""Capture, folding, partition and forward mode for torchvision's classification networks."""

import pathlib

import pytest
import torch
import torchvision

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
FAST = ["resnet18", "vgg11_bn", "mobilenet_v3_small", "convnext_tiny", "densenet121", "swin_t"]
SIZE = {"vit_l_16": 224, "vit_b_16": 224, "vit_b_32": 224, "vit_l_32": 224, "maxvit_t": 224,
        "inception_v3": 96, "vit_h_14": 224}  # fmt: skip


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"aux_logits": False} if name == "googlenet" else {}
        options |= {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        network = torchvision.models.get_model(name, weights=None, **options)
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.8, 1.2)
        x = torch.randn(3, 3, SIZE.get(name, 64), SIZE.get(name, 64))
    return without_classifier(network).eval(), x


def check(name):
    module, x = build(name)
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


@pytest.mark.parametrize("name", FAST)
def test_family(name):
    names, numbers, _ = check(name)
    assert names and numbers
    assert all(n.startswith(LAST[name] + ".") for n in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_architecture(name):
    if name == "vit_h_14" or name.startswith("regnet_y_128gf"):
        pytest.skip("2.5 GB of random weights: the same code as its smaller siblings")
    names, _, _ = check(name)
    if name in LAST and name not in ("mnasnet0_5", "shufflenet_v2_x0_5"):
        assert all(n.startswith(LAST[name] + ".") for n in names)


def write_table(path):
    """Write the table of docs/architectures.md: python -m tests.backbones.test_architectures."""
    lines = [
        '| network | `gradient_layers="last"` | parameters | numbers stored per sample |',
        "|---|---|---|---|",
    ]
    for name, where in LAST.items():
        names, numbers, _ = check(name)
        lines.append(f"| {name} | `{where}` | {len(names)} | {numbers:,} |")
        print(lines[-1], flush=True)
    pathlib.Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_table("architectures_table.md")
