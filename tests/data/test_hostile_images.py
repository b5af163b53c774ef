"""Folders with links, equal files, files that are no files, and huge images."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from sklearn_gradfeat import ImageFiles

links = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")


@pytest.fixture
def root(tmp_path):
    """Return a folder with two classes of one image each."""
    for value, name in enumerate(("cat", "dog")):
        (tmp_path / "root" / name).mkdir(parents=True)
        image = Image.fromarray(np.full((6, 9, 3), value, np.uint8))
        image.save(tmp_path / "root" / name / "1.png")
    return tmp_path / "root"


def paths(root):
    X, y = ImageFiles.from_folder(root)
    assert [os.path.relpath(path, root).partition(os.sep)[0] for path in X.paths] == y.tolist()
    return [os.path.relpath(path, root).replace(os.sep, "/") for path in X.paths]


# --- links ------------------------------------------------------------------------------------


@links
@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("cat/all", "."),
        ("cat/more", ".."),
        ("cat/above", "../.."),
        ("cat/other", "../dog"),
        ("cat/again.png", "1.png"),
        ("cat/0.png", "1.png"),
    ],
)
def test_links_inside_of_the_folder_add_no_samples(root, link, target):
    (root / link).symlink_to(target)
    assert paths(root) == ["cat/1.png", "dog/1.png"]


@links
def test_many_cycles_take_no_time(root):
    for i in range(10):
        for name in ("cat", "dog"):
            (root / name / f"up{i}").symlink_to("../..")
            (root / name / f"here{i}").symlink_to(".")
    assert paths(root) == ["cat/1.png", "dog/1.png"]


@links
def test_folders_outside_are_read_once(root, tmp_path):
    shutil.copytree(root / "cat", tmp_path / "outside" / "part")
    (tmp_path / "outside" / "cycle").symlink_to("..")
    (tmp_path / "outside" / "back").symlink_to(root / "dog")
    (root / "cat" / "a").symlink_to(tmp_path / "outside")
    (root / "cat" / "b").symlink_to(tmp_path / "outside")
    (root / "cat" / "c").symlink_to(tmp_path / "outside" / "part")
    assert paths(root) == ["cat/1.png", "cat/c/1.png", "dog/1.png"]


@links
def test_classes_that_are_links(root, tmp_path):
    (root / "cat").rename(tmp_path / "elsewhere")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    assert paths(root) == ["cat/1.png", "dog/1.png"]
    (root / "eel").symlink_to("dog")
    with pytest.raises(FileNotFoundError, match=r"eel has no images"):
        ImageFiles.from_folder(root)


@links
def test_file_in_two_classes_warns(root):
    (root / "cat" / "2.png").symlink_to("../dog/1.png")
    with pytest.warns(UserWarning, match=r"Links place 1 files in two classes, .*cat/2\.png"):
        assert paths(root) == ["cat/1.png", "dog/1.png"]
    (root / "eel").mkdir()
    (root / "eel" / "1.png").symlink_to("../dog/1.png")
    with (
        pytest.warns(UserWarning, match="Links place 2 files"),
        pytest.raises(FileNotFoundError, match=r"eel has no images .* also are in another class"),
    ):
        ImageFiles.from_folder(root)


@links
def test_hard_links_are_one_file(root):
    os.link(root / "cat" / "1.png", root / "cat" / "2.png")
    assert paths(root) == ["cat/1.png", "dog/1.png"]
    os.link(root / "cat" / "1.png", root / "dog" / "2.png")
    with pytest.warns(UserWarning, match=r"Links place 1 files in two classes, .*dog/2\.png"):
        assert paths(root) == ["cat/1.png", "dog/1.png"]


# --- equal files ------------------------------------------------------------------------------


def test_duplicates_are_groups(root):
    for name in ("cat/2.png", "cat/deep/1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "dog" / "1.png", root / name)
    X, _ = ImageFiles.from_folder(root)
    assert X.duplicates().tolist() == [0, 1, 1, 1]
    assert X[::-1].duplicates().tolist() == [0, 0, 0, 3]
    assert X[[0, 3, 0]].duplicates().tolist() == [0, 1, 0]
    (root / "cat" / "1.png").unlink()
    (root / "cat" / "2.png").unlink()
    assert X.duplicates().tolist() == [0, 1, 2, 2]
    assert X[:0].duplicates().tolist() == []


# --- files ------------------------------------------------------------------------------------


@links
def test_pipes_and_devices_are_not_opened(root):
    pipe = root / "cat" / "0.png"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        with pytest.raises(OSError, match=r"cannot be read as an image: it is not a regular file"):
            ImageFiles([path])
    with pytest.warns(UserWarning, match="1 of 3 files cannot be read"):
        X, _ = ImageFiles.from_folder(root, on_error="skip")
    assert len(X) == 2
    assert ImageFiles([pipe, pipe], size=8).duplicates().tolist() == [0, 0]


def test_programs_that_draw_are_not_run(root, monkeypatch):
    Image.new("RGB", (6, 9)).save(root / "drawing.png", "EPS")

    def fail(*_arguments, **_options):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", fail)
    with pytest.raises(OSError, match=r"drawing\.png cannot be read .*EPS is a program.*as PNG"):
        ImageFiles([root / "drawing.png"])


@pytest.mark.parametrize("shape", [(1, 10**6), (10**6, 1)])
def test_thin_image_is_refused_before_it_is_decoded(tmp_path, shape, monkeypatch):
    Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "thin.png")
    assert ImageFiles([tmp_path / "thin.png"], color="grey").shape == (1, *shape)

    def fail(self):
        raise AssertionError("the image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(OSError, match=r"it needs \d+ × \d+ pixels, more than"):
        ImageFiles([tmp_path / "thin.png"], size=224)[0]


def test_first_file_that_has_changed(root):
    X, _ = ImageFiles.from_folder(root)
    Image.new("RGB", (3, 4)).save(root / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"1\.png has changed: it was 6 × 9 .*is 4 × 3 now"):
        X[0]
