"""The tokenizer, the masked mean, and pipelines of both."""

import pickle
import sys

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils._param_validation import InvalidParameterError
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, MaskedMean, TextTokenizer
from sklearn_gradfeat.data import BoundedTokenizer
from tests.encoder import LABELS, NET, TEXTS, check_split, letters, masked_mean


def pipeline(net=NET, max_length=8, **parameters):
    defaults = {"alpha": 1e-2, "gradient_alpha": 1e-2}
    classifier = GradientFeatureClassifier(net, **{**defaults, **parameters})
    return Pipeline([("tokens", TextTokenizer(letters, max_length)), ("model", classifier)])


def tokens(texts, max_length=8):
    return TextTokenizer(letters, max_length).fit_transform(texts)


@pytest.fixture(scope="module")
def fitted():
    return pipeline().fit(TEXTS, LABELS)


# --- the tokenizer of a named network --------------------------------------------------------


def ragged(texts, truncation, max_length, return_attention_mask):
    """Return ids of the letters of each text, without padding."""
    assert truncation and return_attention_mask
    ids = [[1 + ord(c) % 20 for c in text[:max_length]] for text in texts]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


@pytest.mark.parametrize(
    ("longest", "limit", "expected"),
    [(5, 512, 32), (32, 512, 32), (33, 512, 64), (600, 512, 512), (5, 20, 20), (0, 512, 32)],
)
def test_length_is_that_of_the_longest_text(longest, limit, expected):
    X = BoundedTokenizer(ragged, limit, 9)(["a" * longest, "ab"])
    assert X.shape == (2, 2, expected)
    assert X[1, :, :4].tolist() == [[18, 19, 9, 9], [1, 1, 0, 0]]
    assert X[0, 1].sum() == max(1, min(longest, limit))


def test_length_can_be_given():
    tokenizer = BoundedTokenizer(ragged, 512, 0)
    assert np.array_equal(tokenizer(["abc", "a"], 2), tokenizer(["ab", "a"], 2))


def test_tokens_stay_as_they_are():
    X = np.ones((3, 2, 7), int)
    assert BoundedTokenizer(ragged, 512, 0)(X) is X


# --- the tokenizer ---------------------------------------------------------------------------


def test_tokens():
    X = tokens(["ab", "abcde"], 3)
    a = 1 + ord("a") % 20
    assert X.dtype == np.int64
    assert X.tolist() == [[[a, a + 1, 0], [1, 1, 0]], [[a, a + 1, a + 2], [1, 1, 1]]]


def test_empty_text_attends_to_one_token():
    assert tokens(["", "a"], 3)[0].tolist() == [[0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "convert",
    [tuple, np.array, lambda x: np.array(x, object), pd.Series, lambda x: pd.Series(x, dtype=str)],
    ids=["tuple", "array", "objects", "series", "string series"],
)
def test_sequences_of_texts(convert):
    assert np.array_equal(tokens(convert(TEXTS)), tokens(TEXTS))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ("a text", "X must be a sequence of texts, got a str"),
        (None, "X must be a sequence of texts, got a NoneType"),
        (3, "X must be a sequence of texts, got a int"),
        (np.array([["a"], ["b"]]), r"got a ndarray of shape \(2, 1\)"),
        (pd.DataFrame({"text": ["a", "b"]}), r"got a DataFrame of shape \(2, 1\)"),
        ([], "at least one text, got an empty list"),
        (["a", None], "text 1 is None, of type NoneType"),
        (["a", np.nan], "text 1 is nan, of type float"),
        (pd.Series(["a", None], dtype="string"), "text 1 is <NA>"),
        (["a", b"b"], "text 1 is b'b', of type bytes"),
        ([["a", "b"], ["c"]], r"text 0 is \['a', 'b'\], of type list"),
        (np.arange(3), r"text 0 is .*0.*, of type int64"),
    ],
)
def test_input_that_is_not_texts(bad, match):
    with pytest.raises(ValueError, match=match):
        TextTokenizer(letters).fit(bad)
    with pytest.raises(ValueError, match=match):
        TextTokenizer(letters).fit(["a"]).transform(bad)


@pytest.mark.parametrize("parameters", [{"tokenizer": 3}, {"max_length": 0}, {"max_length": 2.5}])
def test_bad_parameters(parameters):
    with pytest.raises(InvalidParameterError, match=f"The '{next(iter(parameters))}' parameter"):
        TextTokenizer(**{"tokenizer": letters, **parameters}).fit(["a"])


@pytest.mark.parametrize(
    ("tokenizer", "match"),
    [
        (lambda texts, **_: letters(texts, "max_length", True, 4), "has 2 rows of length 4"),
        (lambda texts, **_: letters(texts[1:], "max_length", True, 8), "has 1 rows of length 8"),
        (lambda *_, **__: {"input_ids": [[1], [1, 2]]}, "'input_ids' has 2 rows of length 1, 2"),
    ],
)
def test_tokenizer_that_does_not_pad(tokenizer, match):
    with pytest.raises(ValueError, match=match):
        TextTokenizer(tokenizer, 8).fit_transform(["a", "bc"])


def test_not_fitted():
    with pytest.raises(NotFittedError):
        TextTokenizer(letters).transform(["a"])


def test_name_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'sklearn-gradfeat\[text\]'"):
        TextTokenizer("some/name").fit(["a"])


def test_tokenizer_in_a_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    model = TextTokenizer(folder, max_length=3).fit(["a"])
    expected = TextTokenizer(str(folder), max_length=3).fit_transform(["a b", "c"])
    assert expected[:, 0].tolist() == [[2, 3, 0], [1, 0, 0]]
    for equal in (model, clone(model).fit(["a"]), pickle.loads(pickle.dumps(model))):
        assert equal.get_params() == {"tokenizer": folder, "max_length": 3}
        assert np.array_equal(equal.transform(["a b", "c"]), expected)
    with pytest.raises(FileNotFoundError, match=r"tokenizer='.*absent' is a path.*no such folder"):
        model.set_params(tokenizer=tmp_path / "absent").fit(["a"])


# --- the network -----------------------------------------------------------------------------


def test_mean_leaves_out_padding():
    short, long = (torch.from_numpy(tokens(TEXTS, length)) for length in (8, 13))
    net = masked_mean().double()
    torch.testing.assert_close(net(short), net(long))
    other = short.clone()
    other[:, 0][other[:, 1] == 0] = 7
    torch.testing.assert_close(net(short), net(other))


def test_mean_of_the_tokens():
    net, ids = masked_mean().double(), tokens(["badcab"], 6)
    vectors = net.model(torch.from_numpy(ids[:, 0]), torch.ones(1, 6)).last_hidden_state
    torch.testing.assert_close(net(torch.from_numpy(ids)), vectors.mean(1))


@pytest.mark.parametrize(
    "change", [lambda x: (x,), lambda x: x.mean(1), lambda x: {"last_hidden_state": x}]
)
def test_model_without_token_vectors(change):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(21, 8)

        def forward(self, ids, attention_mask):
            return change(self.words(ids))

    with pytest.raises(TypeError, match=r"must return a tensor of shape \(n_samples, length"):
        pipeline(MaskedMean(Wrong())).fit(TEXTS, LABELS)


def test_split():
    check_split(NET, tokens(TEXTS), "model.layer.1.", 8)


# --- pipelines -------------------------------------------------------------------------------


def test_pipeline(fitted):
    assert fitted["model"].sample_shape_ == (2, 8)
    assert fitted.score(TEXTS, LABELS) > 0.9
    assert fitted.predict(["", "ba"]).tolist() == ["mid", "first"]


def test_padding_does_not_change_the_model():
    settings = {"precision": "float64", "tol": 1e-12}
    texts, labels = TEXTS[:10], LABELS[:10]
    short, long = (pipeline(max_length=n, **settings).fit(texts, labels) for n in (8, 13))
    np.testing.assert_allclose(
        short.predict_proba(texts), long.predict_proba(texts), rtol=1e-5, atol=1e-8
    )


def test_clone_and_pickle(fitted):
    expected = fitted.predict_proba(TEXTS)
    again = clone(fitted)
    assert again["model"].backbone is NET
    assert np.array_equal(again.fit(TEXTS, LABELS).predict_proba(TEXTS), expected)
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(TEXTS), expected)


def test_grid_search():
    model, grid = pipeline(features="activation"), {"tokens__max_length": [3, 8]}
    search = GridSearchCV(model, grid, cv=2).fit(pd.Series(TEXTS), LABELS)
    alone = model.set_params(**search.best_params_).fit(TEXTS, LABELS)
    assert np.array_equal(search.predict_proba(TEXTS), alone.predict_proba(TEXTS))


@pytest.mark.slow
def test_grid_search_in_processes():
    model, grid = pipeline(features="activation"), {"tokens__max_length": [3, 8]}
    alone, parallel = (
        GridSearchCV(model, grid, cv=2, n_jobs=n).fit(pd.Series(TEXTS), LABELS) for n in (1, 2)
    )
    assert alone.best_params_ == parallel.best_params_
    assert np.array_equal(
        alone.cv_results_["mean_test_score"], parallel.cv_results_["mean_test_score"]
    )
    assert np.array_equal(alone.predict_proba(TEXTS), parallel.predict_proba(TEXTS))


def test_global_output_setting(fitted):
    with sklearn.config_context(transform_output="pandas"):
        assert isinstance(clone(fitted[0]).fit_transform(TEXTS), np.ndarray)
