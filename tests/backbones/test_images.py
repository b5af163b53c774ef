"""Image batches of any common layout."""

import pytest
import torch
import torchvision

from sklearn_gradfeat.backbones._sources import ImagePreprocess, timm_transform
from tests.backbones.test_sources import CONFIG


@pytest.fixture(params=["plain", "torchvision", "timm"])
def preprocess(request):
    if request.param == "plain":
        return ImagePreprocess(
            lambda images: images / 255 if images.dtype == torch.uint8 else images
        )
    if request.param == "torchvision":
        return ImagePreprocess(torchvision.models.ResNet18_Weights.DEFAULT.transforms())
    return ImagePreprocess(timm_transform(CONFIG))


def smooth_images(channels=3):
    rows, columns = torch.meshgrid(torch.arange(36.0), torch.arange(40.0), indexing="ij")
    planes = [
        torch.stack(
            [127 + 120 * torch.sin(rows / (7 + n) + columns / 9 + c) for c in range(channels)]
        )
        for n in range(2)
    ]
    return torch.stack(planes).to(torch.uint8)


def test_images_uint8_or_float(preprocess):
    images = smooth_images()
    # Resizing rounds uint8 to whole grey levels; 0.224 is the smallest standard deviation.
    tolerance = 2.5 / 255 / 0.224
    expected = preprocess(images)
    assert expected.dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        floats = preprocess(images.to(dtype) / 255)
        assert floats.dtype == torch.float32
        torch.testing.assert_close(floats, expected, atol=tolerance, rtol=0)


def test_images_channels_last(preprocess):
    images = smooth_images()
    assert torch.equal(preprocess(images.permute(0, 2, 3, 1).contiguous()), preprocess(images))


def test_images_grey(preprocess):
    grey = smooth_images(1)
    expected = preprocess(grey.repeat(1, 3, 1, 1))
    assert torch.equal(preprocess(grey), expected)
    assert torch.equal(preprocess(grey[:, 0]), expected)
    assert torch.equal(preprocess(grey.permute(0, 2, 3, 1)), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ((2, 3, 8, 3), torch.uint8, "channels first or last.*preprocess"),
        ((2, 1, 8, 3), torch.uint8, "channels first or last"),
        ((2, 4, 8, 8), torch.uint8, "neither 1 nor 3 channels"),
        ((2, 8, 8, 2), torch.uint8, "neither 1 nor 3 channels"),
        ((2, 8), torch.uint8, r"takes images.*have shape \(8,\)"),
        ((2, 3, 8, 8, 8), torch.uint8, r"takes images.*have shape \(3, 8, 8, 8\)"),
        ((2, 3, 8, 8), torch.int64, r"uint8, or floating point in \[0, 1\].*torch.int64"),
        ((2, 3, 8, 8), torch.bool, r"uint8, or floating point in \[0, 1\].*torch.bool"),
    ],
)
def test_images_that_cannot_be_used(preprocess, shape, dtype, match):
    with pytest.raises(ValueError, match=match):
        preprocess(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0), (0.0, 1.01)])
def test_images_out_of_range(preprocess, low, high):
    images = torch.linspace(low, high, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    with pytest.raises(
        ValueError, match=rf"lie in \[0, 1\], X has values from {low:g} to {high:g}"
    ):
        preprocess(images)
