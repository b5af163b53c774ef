"""The file of a checkpoint: what it holds, what it refuses to replace, and failures to write."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from sklearn_gradfeat import config_context, load
from sklearn_gradfeat.io import Checkpoint, Described, _checkpoint
from sklearn_gradfeat.io._archive import read_archive, write_archive
from sklearn_gradfeat.training import Entry
from tests.tiny import X, Y, estimator

LIKE = torch.empty(0, dtype=torch.float64)
HEADER = {"alpha": Described("aa", "0.1"), "X": Described("bb")}


@pytest.fixture(autouse=True)
def always_due():
    with config_context(checkpoint_seconds=0):
        yield


def opened(path, header=HEADER):
    """Return a checkpoint and its journal."""
    checkpoint = Checkpoint(path)
    checkpoint.check(header)
    return checkpoint, checkpoint.journals(LIKE)[0]


def written(path, *values):
    """Write a checkpoint with some numbers, and return it."""
    checkpoint, journal = opened(path)
    for i, value in enumerate(values):
        journal.number(f"number {i}", lambda value=value: value)
    return checkpoint


def unexpected():
    raise AssertionError


def test_entries_are_restored(tmp_path):
    x, y = torch.arange(3.0, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    entries = [
        Entry("losses", np.array([0.1, np.inf])),
        Entry("a run", np.array([]), {"x": [x], "pairs": [x, y], "at": []}),
        Entry("another", np.array([2.0]), {"x": [x]}),
    ]
    texts, arrays = _checkpoint._encoded([entries[:1], [], entries[1:]])
    assert sum(name.startswith("vectors") for name in arrays) == 2  # x is there once
    first, empty, others = _checkpoint._decoded(texts, arrays, LIKE)
    assert not empty
    found = first + others
    assert [entry.name for entry in found] == [entry.name for entry in entries]
    for entry, expected in zip(found, entries, strict=True):
        np.testing.assert_array_equal(entry.numbers, expected.numbers)
        for name, vectors in entry.vectors.items():
            torch.testing.assert_close(list(vectors), expected.vectors[name])
    assert found[1].vectors["x"][0] is found[2].vectors["x"][0]
    assert _checkpoint._decoded(["", ""], {}, LIKE) == [[], []]


def test_numbers_are_not_computed_again(tmp_path):
    path = tmp_path / "checkpoint"
    written(path, 1.5, -0.0)
    journal = opened(path)[1]
    assert journal.number("number 0", unexpected) == 1.5
    assert str(journal.number("number 1", unexpected)) == "-0.0"
    assert journal.number("number 2", lambda: 7) == 7
    with pytest.raises(ValueError, match="goes on with 'number 0' where this fit has 'other'"):
        opened(path)[1].number("other", unexpected)


def test_the_file_is_written_at_intervals_and_removed(tmp_path):
    path = tmp_path / "checkpoint"
    with config_context(checkpoint_seconds=1000):
        written(path, 1.0).remove()
    assert not path.exists()
    checkpoint = written(path, 1.0)
    assert path.exists()
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_loses_one_interval(monkeypatch, tmp_path):
    path, seconds = tmp_path / "checkpoint", 0
    monkeypatch.setattr(_checkpoint.time, "monotonic", lambda: seconds)
    with config_context(checkpoint_seconds=60):
        journal = opened(path)[1]
        for number in range(20):
            seconds += 7
            journal.number(str(number), lambda number=number: number)
            saved = opened(path)[1].contents()
            assert len(saved) == (number + 1) // 9 * 9  # 9 numbers take 63 seconds


def test_checkpoints_with_another_header_are_refused(tmp_path):
    path = tmp_path / "checkpoint"
    written(path, 1.0)
    for header, message in (
        ({"alpha": Described("cc", "0.2")}, r"differ in alpha \(0.2 here, 0.1 there\)\. Pass"),
        ({"X": Described("cc")}, r"differ in X\. Pass"),
        ({"tol": Described("cc", "1")}, r"differ in tol \(1 here, nothing there\)"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(path, header)


@pytest.mark.parametrize("content", [b"", b"notes of a user", b"\x10" + bytes(40)])
def test_files_of_users_are_not_replaced(content, tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was not written as a checkpoint, or is damaged"):
        estimator(checkpoint=path).fit(X, Y)
    assert path.read_bytes() == content


def test_models_are_not_replaced(tmp_path):
    path = tmp_path / "model"
    model = estimator(features="activation").fit(X, Y)
    model.save(path)
    with pytest.raises(ValueError, match=r"is the file of a saved model\. Pass another path"):
        model.set_params(checkpoint=path).fit(X, Y)
    assert np.array_equal(load(path, model.backbone).coef_, model.coef_)


def test_a_checkpoint_is_not_a_model(tmp_path):
    path = tmp_path / "checkpoint"
    written(path, 1.0)
    with pytest.raises(ValueError, match="holds the checkpoint of a fit"):
        load(path)


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "checkpoint"
    written(path, 1.0)
    content = path.read_bytes()
    for damaged in (content[:-3], content[:100], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"or is damaged: .* Delete the file"):
            Checkpoint(path)
    document, arrays = {"checkpoint": {}, "entries": ["a run\tx\tvectors.7"]}, {}
    write_archive(path, document, arrays)
    with pytest.raises(ValueError, match=r"is damaged: KeyError.* Delete the file"):
        Checkpoint(path).journals(LIKE)


def test_paths_without_a_file(tmp_path):
    with pytest.raises(ValueError, match="checkpoint is an empty path"):
        Checkpoint("")
    with pytest.raises(ValueError, match="is not a regular file"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="create the folder of this file first"):
        Checkpoint(tmp_path / "missing" / "checkpoint")


def test_a_full_disk_warns_once(monkeypatch, tmp_path):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_checkpoint, "write_archive", full)
    with pytest.warns(UserWarning, match="cannot be written: .*No space left") as caught:
        checkpoint = written(tmp_path / "checkpoint", 1.0, 2.0)
    assert len(caught) == 1
    checkpoint.remove()


def test_files_that_appear_during_a_fit_are_not_replaced(tmp_path):
    path = tmp_path / "checkpoint"
    checkpoint, journal = opened(path)
    path.write_bytes(b"notes")
    with pytest.warns(UserWarning, match="another program has written this file"):
        journal.number("number", lambda: 1.0)
    checkpoint.remove()
    assert path.read_bytes() == b"notes"


@pytest.mark.parametrize("after", [True, False])
def test_a_kill_in_the_rename_leaves_a_whole_file(after, monkeypatch, tmp_path):
    path, replace = tmp_path / "checkpoint", Path.replace
    written(path, 1.0)

    def killed(self, target):
        if after:
            replace(self, target)
        raise KeyboardInterrupt

    journal = opened(path)[1]
    assert journal.number("number 0", unexpected) == 1.0
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        journal.number("number 1", lambda: 2.0)
    assert read_archive(path)[0]["entries"][0].count("number") == 1 + after
