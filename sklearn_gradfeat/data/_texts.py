"""Texts: token ids with an attention mask, and the mean over the tokens of a text."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from sklearn_gradfeat.data._containers import to_numpy

Tokenizer: TypeAlias = Callable[..., Mapping[str, Any]]

_KEYS = ("input_ids", "attention_mask")
_TOKEN_AXES = 3  # samples; ids and mask; tokens
_STEP = 32  # lengths are multiples of this
_LOCK = threading.Lock()  # the tokenizers of transformers change their state in a call


class TextTokenizer(TransformerMixin, BaseEstimator):
    """Convert texts to token ids and an attention mask.

    This transformer is the first step of a pipeline. The second step is an estimator with a
    :class:`MaskedMean` as its backbone.

    Parameters
    ----------
    tokenizer : str, path-like or callable
        A string is the name or the folder of a tokenizer of the package ``transformers``, a path
        is its folder. A callable is a tokenizer of that package, or any function that is called as
        ``tokenizer(texts, padding="max_length", truncation=True, max_length=max_length)`` and
        returns a mapping with the keys ``"input_ids"`` and ``"attention_mask"``, each with
        integers of shape (n_samples, max_length).
    max_length : int, default=128
        Number of tokens per text. Longer texts are truncated, shorter texts are padded. Time and
        memory are proportional to it, so choose it no longer than the texts need.

    Attributes
    ----------
    tokenizer_ : callable
        The tokenizer, loaded if ``tokenizer`` is a string or a path.

    See Also
    --------
    MaskedMean : The backbone that takes the output of this transformer.

    Examples
    --------
    >>> from sklearn_gradfeat import TextTokenizer
    >>> def letters(texts, padding, truncation, max_length):
    ...     cut = [[ord(c) for c in text[:max_length]] for text in texts]
    ...     return {
    ...         "input_ids": [ids + [0] * (max_length - len(ids)) for ids in cut],
    ...         "attention_mask": [[1] * len(ids) + [0] * (max_length - len(ids)) for ids in cut],
    ...     }
    >>> TextTokenizer(letters, max_length=3).fit_transform(["ab", "abcd"])
    array([[[97, 98,  0],
            [ 1,  1,  0]],
    <BLANKLINE>
           [[97, 98, 99],
            [ 1,  1,  1]]])
    """

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012
        "tokenizer": [str, os.PathLike, callable],
        "max_length": [Interval(Integral, 1, None, closed="left")],
    }

    def __init__(
        self, tokenizer: str | os.PathLike[str] | Tokenizer, max_length: int = 128
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Iterable[str], y: object = None) -> TextTokenizer:
        """Validate the texts and load the tokenizer; it learns nothing from the texts.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,)
            Texts.
        y : object, default=None
            Ignored.

        Returns
        -------
        self : TextTokenizer
            The fitted transformer.

        Raises
        ------
        ValueError
            If ``X`` is not a sequence of strings, or is empty.
        ImportError
            If ``tokenizer`` is a string or a path, and ``transformers`` is not installed.
        FileNotFoundError
            If ``tokenizer`` is a path, and there is no such folder.
        """
        _validate_texts(X)
        tokenizer = self.tokenizer
        self.tokenizer_: Tokenizer = (
            _load_tokenizer(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else tokenizer
        )
        return self

    def transform(self, X: Iterable[str]) -> npt.NDArray[np.int64]:
        """Tokenize the texts.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,)
            Texts.

        Returns
        -------
        tokens : ndarray of int64 of shape (n_samples, 2, max_length)
            ``tokens[:, 0]`` has the token ids. ``tokens[:, 1]`` has the attention mask, 1 for
            tokens and 0 for padding. A text without tokens has a mask of 1 at its first
            position, so that its mean and its attention are defined.

        Raises
        ------
        ValueError
            If ``X`` is not a sequence of strings, or is empty; or if the tokenizer does not return
            ``max_length`` numbers per text.
        """
        check_is_fitted(self)
        texts, length = _validate_texts(X), self.max_length
        encoded = self.tokenizer_(texts, padding="max_length", truncation=True, max_length=length)
        for key in _KEYS:
            lengths = {len(row) for row in encoded[key]}
            if len(encoded[key]) != len(texts) or lengths != {length}:
                raise ValueError(
                    f"tokenizer must return max_length={length} numbers for each of {len(texts)} "
                    f"texts, but its {key!r} has {len(encoded[key])} rows of length "
                    f"{', '.join(map(str, sorted(lengths)))}. Pass a tokenizer that pads and "
                    "truncates to max_length."
                )
        return _with_first_token(
            np.stack([np.asarray(encoded[key], np.int64) for key in _KEYS], axis=1)
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


class MaskedMean(nn.Module):
    """Average the token vectors of a language model over the tokens of each text.

    Pass it as ``backbone`` to an estimator, after a :class:`TextTokenizer`. Padding is left out
    of the mean, so the result does not depend on ``max_length`` unless a text is truncated.

    Parameters
    ----------
    model : torch.nn.Module
        A language model such as the encoders of the package ``transformers``. It is called as
        ``model(ids, attention_mask=mask)``, with two integer tensors of shape (n_samples,
        length). It returns one vector per token, as a floating tensor of shape (n_samples, length,
        n_features), or an object with this tensor as its attribute ``last_hidden_state``.

    See Also
    --------
    TextTokenizer : The transformer that makes the input of this module.

    Examples
    --------
    >>> import torch
    >>> from sklearn_gradfeat import MaskedMean
    >>> class OneHot(torch.nn.Module):
    ...     def forward(self, ids, attention_mask):
    ...         return torch.nn.functional.one_hot(ids, 3).float()
    >>> tokens = torch.tensor([[[2, 1, 0], [1, 1, 0]]])  # ids and mask of one text
    >>> MaskedMean(OneHot())(tokens)
    tensor([[0.0000, 0.5000, 0.5000]])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean token vector of each text.

        Parameters
        ----------
        tokens : tensor of int64 of shape (n_samples, 2, length)
            The token ids and the attention mask, as returned by :meth:`TextTokenizer.transform`.

        Returns
        -------
        tensor of shape (n_samples, n_features)
            The means, in the dtype of the token vectors.

        Raises
        ------
        TypeError
            If ``model`` does not return token vectors.
        """
        ids, mask = tokens.unbind(1)
        output = self.model(ids, attention_mask=mask)
        vectors = getattr(output, "last_hidden_state", output)
        if not isinstance(vectors, Tensor) or vectors.ndim != 3:
            raise TypeError(
                "The model of MaskedMean must return a tensor of shape (n_samples, length, "
                "n_features), or an object with this tensor as `last_hidden_state`, but it "
                f"returned {type(output).__name__}. Pass a model that returns token vectors."
            )
        weights = mask[:, :, None].to(vectors.dtype)
        return (vectors * weights).sum(1) / weights.sum(1)


@dataclass(frozen=True)
class BoundedTokenizer:
    """Convert texts to token ids and an attention mask, for a network that takes both.

    Parameters
    ----------
    tokenizer : callable
        A tokenizer of the package ``transformers``.
    limit : int
        The largest number of tokens per text.
    padding : int
        The token id after the end of a text.
    """

    tokenizer: Tokenizer
    limit: int
    padding: int

    def __call__(self, X: Any, length: int | None = None) -> Any:
        """Tokenize texts.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or tokens
            Texts. Tokens of shape (n_samples, 2, length) are returned unchanged.
        length : int, default=None
            Number of tokens per text. None takes the number in the longest text, up to ``limit``,
            rounded up so that it is the same for most subsets of the texts.

        Returns
        -------
        tokens : ndarray of int64 of shape (n_samples, 2, length)
            As returned by :meth:`TextTokenizer.transform`.

        Raises
        ------
        ValueError
            If ``X`` is not a sequence of strings, or is empty.
        """
        X = to_numpy(X)
        if len(getattr(X, "shape", ())) == _TOKEN_AXES:
            return X
        with _LOCK:
            encoded = self.tokenizer(
                _validate_texts(X),
                truncation=True,
                max_length=length or self.limit,
                return_attention_mask=True,
            )
        if length is None:
            longest = max(map(len, encoded["input_ids"]))
            length = min(self.limit, _STEP * max(1, math.ceil(longest / _STEP)))
        tokens = np.zeros((len(encoded["input_ids"]), 2, length), np.int64)
        tokens[:, 0] = self.padding
        for row, *parts in zip(tokens, *(encoded[key] for key in _KEYS), strict=True):
            for values, part in zip(row, parts, strict=True):
                values[: len(part)] = part
        return _with_first_token(tokens)


def _with_first_token(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Set the mask of a text without tokens to 1 at its first position."""
    tokens[~tokens[:, 1].any(1), 1, 0] = 1
    return tokens


def _validate_texts(X: Any) -> list[str]:
    """Return the texts as a list of strings, and raise an error for other input."""
    advice = "Pass a list, an array or a column of strings."
    if isinstance(X, str) or getattr(X, "ndim", 1) != 1 or not isinstance(X, Iterable):
        shape = f" of shape {X.shape}" if hasattr(X, "shape") else ""
        raise ValueError(
            f"X must be a sequence of texts, got a {type(X).__name__}{shape}. {advice}"
        )
    texts = list(X)
    if not texts:
        raise ValueError(f"X must hold at least one text, got an empty {type(X).__name__}.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"X must hold strings, but text {i} is {text!r}, of type {type(text).__name__}. "
                'Replace missing texts with "", or leave these samples out.'
            )
    return list(map(str, texts))  # numpy.str_ to str


def _load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer of the package transformers."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"tokenizer={os.fspath(name)!r} needs the package transformers. Install it with pip "
            "install 'sklearn-gradfeat[text]', or pass a callable."
        ) from error
    if isinstance(name, os.PathLike) and not os.path.isdir(name):
        raise FileNotFoundError(
            f"tokenizer={os.fspath(name)!r} is a path, but there is no such folder. Pass the "
            "folder of a tokenizer, or its name as a string."
        )
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(os.fspath(name))
    return tokenizer
