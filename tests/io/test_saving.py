"""Fitted estimators come back from their files as they were."""

import os
import stat

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.model_selection import KFold, StratifiedKFold
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressorCV,
    MaskedMean,
    load,
)
from tests.networks import Tokens
from tests.tiny import NET, X, Y, data, estimator, tiny_net

LABELS = np.stack([Y == 0, Y > 0, Y != 1], 1).astype(int)
ROWS = X.reshape(len(X), -1)[:, :5].astype(np.float64)
SEARCH = {"alphas": [0.5, 0.02], "gradient_alphas": [0.1], "cv": 2}


def double(batch):
    return 2 * batch


def triple(batch):
    return 3 * batch


def random_net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def lazy_net():
    return nn.Sequential(nn.LazyConv2d(3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def same(model, loaded, X=X):
    return np.array_equal(model.predict_proba(X), loaded.predict_proba(X))


class Encoder(nn.Module):
    """A language model that averages nothing where the mask is empty."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(200, 6), nn.Linear(6, 6)

    def forward(self, ids, attention_mask):
        return self.mix(self.table(ids)).tanh()


class Logarithm(nn.Module):
    """A network that is not defined for the samples that a file is checked with."""

    def forward(self, x):
        return (x - 5).log()


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation_layer", [["3", "1"], ("?",), "[13]", 1])
def test_scales_of_activation_layers(activation_layer, path):
    model = estimator(activation_layer=activation_layer).fit(X, Y)
    model.save(path)
    loaded = load(path, tiny_net)
    assert same(model, loaded)
    assert loaded.activation_layer == activation_layer
    assert loaded._extractor.scales == model._extractor.scales
    assert np.array_equal(loaded.transform(X), model.transform(X))


def test_one_layer_of_a_transformer(path):
    module = Tokens()
    images = np.random.default_rng(0).normal(size=(24, 2, 5, 5)).astype(np.float32)
    model = estimator(module, activation_layer="encoder.layers.0").fit(images, Y)
    model.save(path)
    assert same(model, load(path, Tokens), images)


@pytest.mark.parametrize("features", ["full", "activation", "gradient"])
def test_predictions_are_the_same_to_the_last_bit(features, path):
    model = estimator(features=features).fit(X, Y)
    model.save(path)
    loaded = load(path, tiny_net)
    assert same(model, loaded)
    assert np.array_equal(loaded.predict(X), model.predict(X))
    for name, value in vars(model).items():
        if name.endswith("_") and not isinstance(value, dict):
            assert np.array_equal(getattr(loaded, name), value), name
            assert type(getattr(loaded, name)) is type(value), name
    assert list(loaded.gradient_coef_) == list(model.gradient_coef_)


@pytest.mark.parametrize(
    "y",
    [
        Y,
        Y.astype(np.int8),
        Y.astype(np.uint16),
        Y > 0,
        2.0 * Y,
        np.array(["cat", "dog", "Größe"])[Y],
        np.array(["cat", "dog", "Größe"], dtype=object)[Y],
        pd.Series(np.array(["cat", "dog", "eel"])[Y], dtype="string"),
        pd.Series(np.array(["cat", "dog", "eel"])[Y], dtype="category"),
        LABELS,
    ],
    ids=lambda y: f"{getattr(y, 'dtype', '')}-{np.ndim(y)}",
)
def test_every_kind_of_label(y, path):
    network = nn.Sequential(nn.Flatten())
    model = estimator(network, features="activation").fit(X, y)
    model.save(path)
    loaded = load(path, network)
    assert loaded.classes_.dtype == model.classes_.dtype
    assert np.array_equal(loaded.predict(X), model.predict(X))
    assert same(model, loaded)


def test_random_network_needs_nothing(path):
    frame = pd.DataFrame(ROWS, columns=list("abcde"))
    model = GradientFeatureClassifier(
        alpha=0.1, tol=1e-2, class_weight={0: 2, 1: 1, 2: 1.5}, gradient_alpha=0.1
    )
    model.fit(frame, Y).save(path)
    loaded = load(path)
    assert same(model, loaded, frame)
    assert list(loaded.feature_names_in_) == list("abcde")
    assert loaded.n_features_in_ == 5
    assert loaded.get_params() == model.get_params()


def test_weights_of_a_named_network_are_not_stored(path, monkeypatch):
    network = tiny_net()
    monkeypatch.setattr(
        "sklearn_gradfeat.backbones._sources.load_named", lambda name: (network, double)
    )
    model = estimator("torchvision/tiny").fit(X, Y)
    model.save(path)
    assert not any(name.startswith("backbone") for name in load_file(path))
    loaded = load(path)
    assert loaded.backbone == "torchvision/tiny"
    assert same(model, loaded)
    assert same(model, load(path, NET, preprocess=double))
    with pytest.raises(ValueError, match=r"fitted with the transform .*double.*`preprocess`"):
        load(path, NET)
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(
        ValueError, match="its weights differ from those that the model was fitted on"
    ):
        load(path)


@pytest.mark.parametrize("backbone", [tiny_net, lazy_net])
def test_factory(backbone, path):
    model = estimator(backbone).fit(X, Y)
    model.save(path)
    loaded = load(path, backbone)
    assert loaded.backbone is backbone
    assert same(model, loaded)


def test_module_that_is_not_captured(path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, x):
            return self.net(x) if x.sum() > -1e9 else self.net(-x)

    with pytest.warns(UserWarning, match="cannot be captured"):
        model = estimator(Branching()).fit(X, Y)
    model.save(path)
    assert same(model, load(path, Branching()))


def test_own_transform(path):
    model = estimator(preprocess=double).fit(X, Y)
    model.save(path)
    with pytest.raises(ValueError, match=r"tests.io.test_saving.double.*pass it as `preprocess`"):
        load(path, NET)
    loaded = load(path, NET, preprocess=double)
    assert loaded.preprocess is double
    assert same(model, loaded)
    with pytest.raises(
        ValueError, match=r"`preprocess` does not fit .*differ from those of tests.*double in"
    ):
        load(path, NET, preprocess=triple)


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_precision(precision, path):
    model = estimator(precision=precision).fit(X, Y)
    model.save(path)
    assert same(model, load(path, tiny_net))


def test_token_ids(path):
    tokens = np.random.default_rng(0).integers(0, 7, (24, 5))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 6), nn.Tanh())
    model = estimator(network).fit(tokens, Y)
    model.save(path)
    assert same(model, load(path, network), tokens)


def test_masked_tokens(path):
    tokens = np.ones((12, 2, 8), int)
    tokens[:, 0] = np.arange(96).reshape(12, 8)
    model = GradientFeatureClassifier(MaskedMean(Encoder()), alpha=0.1, gradient_alpha=0.1).fit(
        tokens, [0, 1] * 6
    )
    model.save(path)
    assert same(model, load(path, MaskedMean(Encoder())), tokens)


def test_network_of_a_restricted_domain(path):
    rows = ROWS - ROWS.min() + 6
    model = estimator(Logarithm(), features="activation").fit(rows, Y)
    model.save(path)
    assert same(model, load(path, Logarithm()), rows)


def test_path_of_a_store(path, tmp_path):
    model = estimator(feature_store=tmp_path / "store").fit(X, Y)
    model.save(path)
    assert load(path, NET).feature_store == "auto"
    assert load(path, NET, feature_store=tmp_path / "store").feature_store == tmp_path / "store"


def test_refit_of_a_factory_has_the_weights_that_were_passed(path):
    options = {"alpha": 1e-3, "gradient_alpha": 1e-3, "random_state": 0}
    model = GradientFeatureClassifier(random_net, **options).fit(X, Y)
    model.save(path)
    again = clone(load(path, random_net())).fit(X, Y)
    assert same(model, again)


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled:UserWarning")
def test_layout_of_the_input_is_kept(path):
    def last(batch):
        return batch.permute(0, 3, 1, 2)

    images = np.ascontiguousarray(X.repeat(2, 1).transpose(0, 2, 3, 1))
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = estimator(network, preprocess=last).fit(images, Y)
    model.save(path)
    assert same(model, load(path, network, preprocess=last), images)


def test_parameters_come_back_in_their_types(path):
    model = estimator(
        gradient_layers=("2", "0*"), alpha=np.float64(0.25), max_iter=np.int64(7), random_state=3,
        batch_size=5, class_weight={0: 1.5}, tol=0.5,
    )  # fmt: skip
    model.fit(X, Y).save(path)
    loaded = load(path, NET).get_params()
    for name, value in model.get_params().items():
        if name != "backbone":
            assert loaded[name] == value


# --- searches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GradientFeatureClassifierCV, GradientFeatureRegressorCV])
def test_file_of_a_search(kind, path):
    model = kind(NET, **SEARCH).fit(X, Y)
    model.save(path)
    loaded = load(path, tiny_net)
    assert type(loaded) is kind
    assert np.array_equal(loaded.predict(X), model.predict(X))
    for name in ("scores_", "alphas_", "gradient_alphas_", "alpha_", "gradient_alpha_"):
        assert np.array_equal(getattr(loaded, name), getattr(model, name)), name
    assert loaded.best_score_ == model.best_score_
    assert np.array_equal(loaded.fit(X, Y).scores_, model.scores_)


@pytest.mark.parametrize(
    "cv",
    [
        KFold(3, shuffle=True, random_state=4),
        StratifiedKFold(2),
        [(np.arange(12), np.arange(12, 24))],
    ],
    ids=["shuffled", "stratified", "list"],
)
def test_file_holds_the_folds(cv, path):
    model = GradientFeatureClassifierCV(NET, **{**SEARCH, "cv": cv}).fit(X, Y)
    model.save(path)
    loaded = load(path, tiny_net)
    assert np.array_equal(loaded.fit(X, Y).scores_, model.scores_)


def test_file_of_a_search_for_activations(path):
    model = GradientFeatureClassifierCV(NET, features="activation", **SEARCH).fit(X, Y)
    model.save(path)
    assert load(path, tiny_net).gradient_alpha_ == np.inf


# --- estimators that cannot be saved ----------------------------------------------------------


def test_unfitted(path):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        estimator().save(path)
    assert not path.exists()


def test_parameter_that_only_pickle_can_hold(path, fitted):
    model = clone(fitted).set_params(random_state=np.random.RandomState(0)).fit(X, Y)
    with pytest.raises(
        ValueError, match=r"pickle only: parameters.random_state is Random.*set_params"
    ):
        model.save(path)
    model.set_params(random_state=None).save(path)
    assert same(model, load(path, NET))


def test_scorer_that_only_pickle_can_hold(path):
    scoring = make_scorer(accuracy_score)
    model = GradientFeatureClassifierCV(NET, scoring=scoring, **SEARCH).fit(X, Y)
    with pytest.raises(ValueError, match=r"pickle only: parameters.scoring is make_scorer"):
        model.save(path)


def test_subclass(path):
    class Mine(GradientFeatureClassifier):
        pass

    with pytest.raises(TypeError, match=r"Mine is not one of them\. Use joblib or pickle"):
        Mine(NET, alpha=0.1, tol=0.1).fit(X, Y).save(path)


def test_files_hold_nothing_of_the_samples(path):
    sizes = []
    for n in (24, 96):
        estimator().fit(*data(n)).save(path)
        sizes.append(path.stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 500


# --- how a file is written --------------------------------------------------------------------


def test_failure_leaves_the_former_file(saved, fitted, monkeypatch):
    before = saved.read_bytes()

    def fail(_descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        fitted.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_folder_that_does_not_exist(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"create it first.*nowhere.model.safetensors"):
        fitted.save(tmp_path / "nowhere" / "model.safetensors")


def test_file_is_replaced(saved):
    other = estimator(alpha=1.0).fit(X, Y)
    other.save(str(saved))
    assert list(saved.parent.iterdir()) == [saved]
    assert same(other, load(str(saved), NET))


def test_permissions_are_those_of_any_new_file(saved):
    plain = saved.with_name("plain")
    plain.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_files_that_a_kill_left_are_removed_a_day_later(saved, fitted):
    old, new, other = (saved.with_name(f".{name}.unfinished") for name in ("a" * 32, "b" * 32, "c"))
    for file in (old, new, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (0, 0))
    fitted.save(saved)
    assert set(saved.parent.iterdir()) == {saved, new, other}


def test_no_file_where_memory_runs_out(path, monkeypatch):
    """The probe of a network without memory would be that of one without valid samples."""

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model = estimator().fit(X, Y)
    model.save(path)
    with monkeypatch.context() as patch:
        patch.setattr("sklearn_gradfeat.io._saving.predict_logits", full)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            model.save(path)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            load(path, NET)
    assert np.array_equal(load(path, NET).predict_proba(X), model.predict_proba(X))
