"""Capture, folding, partition and forward mode for small networks of torchvision's families."""

import pytest
import torch
from torch import nn
from torchvision.models import convnext, densenet, mobilenetv3, resnet, swin_transformer, vgg

from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from sklearn_gradfeat.backbones._sources import without_classifier
from sklearn_gradfeat.linearized._jacobian import LinearizedHead


def prepared(make, side=64):
    """Return a network without its classifier, and three images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.8, 1.2)
        x = torch.randn(3, 3, side, side)
    return without_classifier(network).eval(), x


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
    names, numbers, _ = check(*prepared(make))
    assert names and numbers
    assert all(n.startswith(last + ".") for n in names)
