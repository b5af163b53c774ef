"""The pretext tasks of examples/pretraining, on a few images of noise."""

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sklearn_gradfeat.backbones._builtin import ConvNet, load_convnet

SCRIPTS = Path(__file__).parents[2] / "examples" / "pretraining"
TASKS = {
    "vae": ["vae"],
    "rotation": ["rotation"],
    "bigan": ["bigan"],
    "wasserstein": ["bigan", "--wasserstein"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder of 16 images, of two classes and two sizes."""
    root = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 40, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = root / "train" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 40 if i == 5 else 32
        Image.fromarray(image[:side, :side]).save(path, quality=95)
    return root


@pytest.fixture
def train(scripts, data):
    """Return a function that runs a script for two epochs of two batches."""

    def run(task, output, *options):
        script, *flags = TASKS[task]
        common = ["--data", data, "--output", output, "--epochs", 2, "--batch-size", 8]
        arguments = [*common, "--device", "cpu", *flags, *options]
        scripts(script).main([str(argument) for argument in arguments])
        return torch.load(output / "checkpoint.pt", weights_only=True)

    return run


def log_of(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("task", TASKS)
def test_resumed_run_equals_the_straight_one(task, train, scripts, monkeypatch, tmp_path):
    straight = train(task, tmp_path / "straight")
    common = scripts("_common")
    first_epoch = common._epoch

    def interrupted(task, pixels, epoch, arguments):
        if epoch == 1:
            raise KeyboardInterrupt
        return first_epoch(task, pixels, epoch, arguments)

    monkeypatch.setattr(common, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "resumed")
    assert len(log_of(tmp_path / "resumed")) == 1
    monkeypatch.setattr(common, "_epoch", first_epoch)
    resumed = train(task, tmp_path / "resumed")
    torch.testing.assert_close(resumed["task"], straight["task"], rtol=0, atol=0)
    assert log_of(tmp_path / "resumed") == log_of(tmp_path / "straight")


@pytest.mark.parametrize("task", ["vae", "wasserstein"])
def test_export_loads_into_the_convnet(task, train, scripts, capsys, tmp_path):
    file = tmp_path / "weights" / "encoder.safetensors"
    state = train(task, tmp_path / "run", "--export", file)["task"]
    assert "SHA-256" in capsys.readouterr().out
    negative_slope = 0.2 if task == "wasserstein" else 0.01
    encoder = scripts("_networks").Encoder(negative_slope).eval()
    prefix = "encoder."
    found = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    encoder.load_state_dict(found)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    convnet, _ = load_convnet(file)
    with torch.no_grad():
        torch.testing.assert_close(encoder.folded()(images), encoder(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(convnet(images), encoder(images), rtol=5e-3, atol=5e-3)


def test_zip_file_and_folder_hold_the_same_images(scripts, data, tmp_path):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(data.rglob("*.jpg"), reverse=True):
            file.write(path, path.relative_to(data))
    load_images = scripts("_images").load_images
    (pixels, classes), (zipped, zipped_classes) = load_images(data), load_images(archive)
    assert pixels.shape == (16, 3, 32, 32)
    torch.testing.assert_close(pixels, zipped)
    assert list(classes) == list(zipped_classes) == ["a"] * 8 + ["b"] * 8


def test_torchvision_folder(scripts, monkeypatch, tmp_path):
    images = scripts("_images")
    dataset = SimpleNamespace(
        data=np.zeros((2, 32, 32, 3), np.uint8), targets=[1, 0], classes=["cat", "dog"]
    )

    class Stub:
        base_folder = "cifar-10-batches-py"

        def __new__(cls, root, train):
            return dataset

    monkeypatch.setattr(images, "CIFAR10", Stub)
    (tmp_path / Stub.base_folder).mkdir()
    pixels, classes = images.load_images(tmp_path)
    assert pixels.shape == (2, 3, 32, 32)
    assert list(classes) == ["dog", "cat"]


def test_folder_without_images_says_what_is_expected(scripts, tmp_path):
    with pytest.raises(SystemExit, match="holds no train/<class>"):
        scripts("_images").load_images(tmp_path)


def test_augmentation_moves_and_flips(scripts):
    torch.manual_seed(0)
    ramp = torch.arange(32.0).expand(64, 3, 32, 32)  # every pixel knows its column
    moved = scripts("_images").augment(ramp)
    steps = moved[:, 0, 0, 5:27].diff(dim=1)
    assert set(steps.unique().tolist()) == {-1.0, 1.0}
    assert 20 < (steps[:, 0] < 0).sum() < 44
    assert set((moved[steps[:, 0] > 0, 0, 0, 16] - 16).tolist()) == set(range(-4, 5))
    unmoved = scripts("_images").augment(ramp, margin=0)
    flips = [bool((image == image.flip(2)).all()) for image in (unmoved + unmoved.flip(3))]
    assert all(flips)


def test_rotation_labels_are_quarter_turns(scripts):
    images = torch.rand(8, 3, 32, 32)
    rotated, turns = scripts("rotation").rotate(images)
    originals = torch.cat([images[k::4] for k in range(4)])
    for image, turn, original in zip(rotated, turns, originals, strict=True):
        torch.testing.assert_close(image.rot90(-int(turn), dims=(1, 2)), original)


def test_convnet_averages_larger_images():
    convnet = ConvNet()
    assert sum(p.numel() for p in convnet.parameters()) == 2_788_672
    assert convnet(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert convnet(torch.zeros(2, 3, 64, 48)).shape == (2, 512)


def test_probe_scores_an_exported_encoder(train, scripts, data, capsys, tmp_path):
    file = tmp_path / "encoder.safetensors"
    train("rotation", tmp_path / "run", "--export", file)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / split).symlink_to(data / "train")
    scripts("probe").main([str(file), "--data", str(tmp_path / "data")])
    assert capsys.readouterr().out.endswith("linear probe: 1.0000\n")
