"""Image files as a lazy array: parameters, indexing, order, threads, memory, estimators."""

import os
import pickle
import random
import shutil
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import GridSearchCV, cross_val_predict, train_test_split
from sklearn.pipeline import Pipeline

from sklearn_gradfeat import ImageFiles, config_context
from sklearn_gradfeat.cache._runner import Trunk
from sklearn_gradfeat.data import BatchSize, _image_files
from sklearn_gradfeat.data._batches import Samples, is_lazy
from tests.data.images import BROKEN, COLORS, written
from tests.tiny import estimator

pytestmark = pytest.mark.filterwarnings("ignore:The images of X have values")


@pytest.fixture
def folder(tmp_path):
    """Twelve files of different sizes in two classes that are easy to tell apart."""
    rng = np.random.default_rng(0)
    for number in range(12):
        name, low = [("cat", 0), ("dog", 120)][number % 2]
        (tmp_path / name).mkdir(exist_ok=True)
        pixels = rng.integers(low, low + 120, (12 + number, 30 - number, 3), dtype=np.uint8)
        written(tmp_path / name / f"{number:02}.png", pixels)
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded, as they come."""
    paths = []

    def counting(path, color, size):
        paths.append(path)
        return decode(path, color, size)

    decode = _image_files.decode
    monkeypatch.setattr(_image_files, "decode", counting)
    return paths


def tiny_images(folder):
    return ImageFiles.from_folder(folder, size=8, color="grey", channels="first")


def test_without_size_all_files_must_have_one_size(tmp_path):
    same = [written(tmp_path / f"{i}.png", COLORS) for i in range(2)]
    X = ImageFiles([*same, written(tmp_path / "odd.png", COLORS[:4])])
    assert X.shape == (3, 6, 9, 3)
    with pytest.raises(ValueError, match=r"0\.png is 6 × 9 .*odd\.png is 4 × 9\. Pass .*size="):
        np.asarray(X)
    assert np.array_equal(X[:2], np.stack([COLORS, COLORS]))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (1, 6, 9, 3)),
        ({"color": "grey"}, (1, 6, 9)),
        ({"channels": "first"}, (1, 3, 6, 9)),
        ({"channels": "first", "color": "grey"}, (1, 1, 6, 9)),
    ],
)
def test_layout(tmp_path, options, shape):
    X = ImageFiles([written(tmp_path / "a.png", COLORS)], **options)
    grey = np.asarray(Image.fromarray(COLORS).convert("L"))
    expected = COLORS if "color" not in options else grey
    if "channels" in options:
        expected = expected.reshape(6, 9, -1).transpose(2, 0, 1)
    assert (X.shape, X.ndim, X.dtype, len(X)) == (shape, len(shape), np.uint8, 1)
    assert np.array_equal(np.asarray(X)[0], expected)


def test_skip_leaves_out_broken_files(tmp_path):
    good = [written(tmp_path / f"good{i}.png", COLORS) for i in range(2)]
    paths, y = [good[0]], ["a"]
    for name, (make, _, _) in BROKEN.items():
        make(tmp_path / name)
        paths.append(tmp_path / name)
        y.append("broken")
    paths.append(good[1])
    y = np.array([*y, "b"])
    with pytest.warns(UserWarning, match=r"7 of 9 files.*\n.*truncated\.jpg(.*\n)+  and 2 more"):
        X = ImageFiles(paths, on_error="skip")
    assert list(X.paths) == [str(path) for path in good]
    assert [os.path.basename(path) for path, _ in X.skipped] == list(BROKEN)
    assert all(os.path.basename(path) in reason for path, reason in X.skipped)
    assert y[X.kept].tolist() == ["a", "b"]
    assert y[X[1:].kept].tolist() == ["b"]
    assert np.array_equal(X, np.stack([COLORS, COLORS]))


def test_skip_of_all_files_raises(tmp_path):
    with pytest.raises(OSError, match=r"1 of 1 files cannot be read.*\n.*missing\.png"):
        ImageFiles([tmp_path / "missing.png"], size=8, on_error="skip")


def test_skip_without_broken_files(folder):
    X, y = ImageFiles.from_folder(folder, size=8, on_error="skip")
    assert (X.skipped, X.kept.tolist(), len(y)) == ([], list(range(12)), 12)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": 0}, ValueError, "size must be .*got 0"),
        ({"size": 2.5}, ValueError, r"size must be .*got 2\.5"),
        ({"size": (1, 2, 3)}, ValueError, r"size must be .*got \(1, 2, 3\)"),
        ({"color": "cmyk"}, ValueError, "color must be one of 'rgb', 'grey', got 'cmyk'"),
        ({"channels": 3}, ValueError, "channels must be one of"),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of 'raise', 'skip'"),
        ({"n_threads": 0}, ValueError, "n_threads must be None or a positive integer, got 0"),
        ({"paths": "a.png"}, TypeError, r"single path 'a\.png'.*from_folder"),
        ({"paths": []}, ValueError, "paths has no files.*Pass size="),
        ({"paths": [3]}, TypeError, "int"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        ImageFiles(**{"paths": ["a.png"], **options})


def test_folder(folder):
    (folder / "cat" / "more").mkdir()
    written(folder / "cat" / "more" / "a b ü.PNG", COLORS)
    written(folder / "cat" / ".hidden.png", COLORS)
    (folder / "cat" / "notes.txt").touch()
    (folder / ".cache").mkdir()
    written(folder / "stray.png", COLORS)
    X, y = ImageFiles.from_folder(str(folder), size=8)
    names = [os.path.relpath(path, folder).replace(os.sep, "/") for path in X.paths]
    assert names == [f"cat/{i:02}.png" for i in range(0, 12, 2)] + ["cat/more/a b ü.PNG"] + [
        f"dog/{i:02}.png" for i in range(1, 12, 2)
    ]
    assert y.tolist() == ["cat"] * 7 + ["dog"] * 6
    assert y.dtype.kind == "U"


@pytest.mark.parametrize("parts", [("train", "test"), ("Train", "val"), ("train",), ("pets",)])
def test_folder_above_that_of_the_classes(folder, parts):
    root = folder / "root"
    for part in parts:
        shutil.copytree(folder / "cat", root / part / "cat")
        shutil.copytree(folder / "dog", root / part / "dog")
    with pytest.warns(UserWarning, match=r"one level deeper, such as 'cat', pass .*from_folder"):
        ImageFiles.from_folder(root, size=8)
    ImageFiles.from_folder(root / parts[0], size=8)


@pytest.mark.parametrize("names", [("train", "bus"), ("train", "test")])
def test_classes_named_as_parts_of_a_data_set(folder, names):
    for old, new in zip(("cat", "dog"), names, strict=True):
        (folder / old).rename(folder / new)
    if "bus" in names:
        (folder / "train" / "red").mkdir()
        written(folder / "train" / "red" / "1.png", COLORS)
    _, y = ImageFiles.from_folder(folder, size=8)  # no warning
    assert set(y) == set(names)


def test_folder_with_broken_files(folder):
    (folder / "cat" / "05.png").write_text("text")
    with pytest.warns(UserWarning, match=r"1 of 13 files cannot be read:\n.*05\.png"):
        X, y = ImageFiles.from_folder(folder, size=8, on_error="skip")
    assert len(X) == len(y) == 12
    assert [os.path.basename(os.path.dirname(path)) for path in X.paths] == y.tolist()


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFiles.from_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no subfolders.*list of files"):
        ImageFiles.from_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"cat has no images \(\.jpg"):
        ImageFiles.from_folder(tmp_path)


def test_kinds_of_paths(tmp_path, monkeypatch):
    path = written(tmp_path / "ein Bild ü 猫.png", COLORS)
    monkeypatch.chdir(tmp_path)
    X = ImageFiles((p for p in [path, str(path), os.fsencode(path), path.name]), size=8)
    monkeypatch.chdir("/")  # relative paths are those of the time when they were given
    assert set(X.paths) == {str(path)}
    assert len(np.unique(np.asarray(X), axis=0)) == 1


@pytest.mark.parametrize(
    "rows",
    [
        slice(None), slice(2, 9, 3), slice(None, None, -1), slice(5, 5), [3, 1, 1], [],
        np.array([0, -1]), np.arange(12) % 3 == 0, [True, False] * 6, ...,
    ],
    ids=str,
)  # fmt: skip
def test_rows_are_chosen_without_decoding(folder, decoded, rows):
    X, _ = tiny_images(folder)
    part, again = X[rows], X[rows, ...]
    assert not decoded
    assert isinstance(part, ImageFiles)
    expected = np.asarray(X)[rows]
    assert part.shape == again.shape == expected.shape
    assert np.array_equal(part, expected)
    assert np.array_equal(part.kept, np.arange(12)[rows])
    assert list(again.paths) == list(part.paths)


@pytest.mark.parametrize("row", [0, -1, np.int64(3)])
def test_one_row_is_an_array(folder, row):
    X, _ = tiny_images(folder)
    assert isinstance(X[row], np.ndarray)
    assert np.array_equal(X[row], np.asarray(X)[row])


@pytest.mark.parametrize("rows", [12, -13, [12], [True], (0, 0), (slice(2), 0), None, "0", 1.0])
def test_bad_rows(folder, rows):
    with pytest.raises(IndexError):
        tiny_images(folder)[0][rows]


def test_conversion(folder):
    X, _ = tiny_images(folder)
    assert np.asarray(X).dtype == np.uint8
    assert np.asarray(X, dtype=np.float32).dtype == np.float32
    assert len(list(X)) == 12
    assert repr(X) == "<ImageFiles of shape (12, 1, 8, 8)>"
    with pytest.raises(ValueError, match="without a copy"):
        X.__array__(copy=False)


def test_pickle_holds_paths_only(folder):
    X, _ = tiny_images(folder)
    stored = pickle.dumps(X[2:7])
    assert len(stored) < 2000
    assert np.array_equal(pickle.loads(stored), X[2:7])


def test_order_does_not_depend_on_the_threads(folder, monkeypatch):
    X, _ = tiny_images(folder)
    expected = np.stack([X[row] for row in range(12)])
    decode = _image_files.decode

    def slow(*arguments):
        time.sleep(random.random() / 50)
        return decode(*arguments)

    monkeypatch.setattr(_image_files, "decode", slow)
    for n_threads in (1, 3, 12):
        X, _ = ImageFiles.from_folder(
            folder, size=8, color="grey", channels="first", n_threads=n_threads
        )
        assert np.array_equal(X, expected)


def test_the_first_broken_file_is_named(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("text")
    for _ in range(5):
        with pytest.raises(OSError, match=r"a\.png cannot be read"):
            np.asarray(ImageFiles([tmp_path / "a.png", tmp_path / "b.png"], size=8))


def test_fit_equals_fit_on_the_decoded_images(folder):
    X, y = tiny_images(folder)
    assert is_lazy(X)
    assert not is_lazy(np.asarray(X))
    lazy, plain = estimator().fit(X, y), estimator().fit(np.asarray(X), y)
    assert np.array_equal(lazy.coef_, plain.coef_)
    assert np.array_equal(lazy.predict_proba(X), plain.predict_proba(np.asarray(X)))
    assert lazy.score(X, y) == 1
    assert lazy.classes_.tolist() == ["cat", "dog"]


@pytest.mark.filterwarnings("ignore:The output of the frozen layers takes:UserWarning")
def test_a_fit_larger_than_memory_decodes_once(folder, decoded):
    X, y = tiny_images(folder)
    with config_context(memory_bytes=0):
        expected = estimator(batch_size=5).fit(np.asarray(X), y)
        decoded.clear()
        found = estimator(batch_size=5, feature_store=None).fit(X, y)
    assert set(decoded) == set(X.paths)
    assert len(decoded) <= len(X) + 2  # the first samples are examples, too
    assert np.array_equal(found.coef_, expected.coef_)
    assert np.array_equal(found.predict_proba(X), expected.predict_proba(np.asarray(X)))


def test_search_decodes_only_the_files_it_uses(folder, decoded):
    X, y = tiny_images(folder)
    X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)
    assert not decoded
    assert all(os.sep + label + os.sep in path for path, label in zip(X_test.paths, y_test))  # noqa: B905
    search = GridSearchCV(estimator(), {"alpha": [0.1, 1.0]}, cv=3, error_score="raise")
    search.fit(X_train, y_train)
    # 2 × 3 fits on 6 files and a final one on 9, each after an example of 2, and 6 scores of 3
    assert len(decoded) == 6 * (2 + 6) + (2 + 9) + 6 * 3
    decoded.clear()
    search.predict(X_test)
    assert sorted(decoded) == sorted(X_test.paths)


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pipelines_and_cross_validation(folder, n_jobs):
    X, y = tiny_images(folder)
    pipeline = Pipeline([("model", estimator())])
    expected = cross_val_predict(pipeline, np.asarray(X), y, cv=2)
    assert np.array_equal(cross_val_predict(pipeline, X, y, cv=2, n_jobs=n_jobs), expected)


def reading_threads():
    names = ("read-ahead", "decode")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def test_a_broken_file_ends_fit_and_threads(folder):
    X, y = tiny_images(folder)
    (folder / "dog" / "09.png").write_bytes(b"")
    with pytest.raises(OSError, match=r"09\.png cannot be read"):
        estimator(batch_size=2).fit(X, y)
    assert not reading_threads()


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled:UserWarning")
def test_no_thread_outlives_a_failing_network(folder):
    X, y = tiny_images(folder)
    n_batches = 0

    def preprocess(batch):
        nonlocal n_batches
        n_batches += 1
        if n_batches >= 3:
            raise RuntimeError("on purpose")
        return batch

    with pytest.raises(ValueError, match="on purpose"):
        estimator(batch_size=2, preprocess=preprocess).fit(X, y)
    assert not reading_threads()


def batches_of(X, batch_size):
    samples = Samples(X, None, torch.float32, torch.device("cpu"))
    trunk = Trunk(samples, lambda x: (x,), torch.float32, False, BatchSize(batch_size))
    return trunk.batches(verbose=False, keep=False)


def test_one_batch_is_decoded_ahead(folder, decoded):
    X, _ = tiny_images(folder)
    ready = []
    for rows, *_ in batches_of(X, 3):
        deadline = time.monotonic() + 10
        while len(decoded) < min(rows.stop + 3, 12) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # were it to go on, it would now
        ready.append(len(decoded))
    assert ready == [6, 9, 12, 12]


def test_memory_holds_a_few_batches(tmp_path):
    path = written(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    X = ImageFiles([path] * 200, n_threads=2)
    batch = 4 * 64 * 64 * 3
    tracemalloc.start()
    for _ in batches_of(X, 4):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * batch  # of 50
