"""Texts: token ids with an attention mask, and the mean over the tokens of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

Tokenizer: TypeAlias = Callable[..., Mapping[str, Any]]

_KEYS = ("input_ids", "attention_mask")


class TextTokenizer(TransformerMixin, BaseEstimator):
    """Turn texts into the token ids and the attention mask that a network reads.

    The first step of a pipeline whose network is a :class:`MaskedMean`.

    Parameters
    ----------
    tokenizer : str or callable
        A tokenizer of the package ``transformers``, its name, or the folder it is in; or any
        callable that is called as ``tokenizer(texts, padding="max_length",
        truncation=True, max_length=max_length)`` and returns a mapping with ``"input_ids"``
        and ``"attention_mask"``, each of shape (n_samples, max_length).
    max_length : int, default=128
        Number of tokens of every text: longer ones are cut, shorter ones padded. Time and
        memory are proportional to it, so make it no longer than the texts need.

    Attributes
    ----------
    tokenizer_ : callable
        The tokenizer, loaded where a name was given.

    See Also
    --------
    MaskedMean : Takes what this transformer returns.

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
        "tokenizer": [str, callable],
        "max_length": [Interval(Integral, 1, None, closed="left")],
    }

    def __init__(self, tokenizer, max_length=128):
        self.tokenizer = tokenizer
        self.max_length = max_length

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Load the tokenizer; nothing is learnt.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
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
            If ``X`` holds anything but strings.
        ImportError
            If a tokenizer is loaded by name and ``transformers`` is not installed.
        """
        _strings(X)
        named = isinstance(self.tokenizer, str)
        self.tokenizer_ = _load(self.tokenizer) if named else self.tokenizer
        return self

    def transform(self, X):
        """Return the tokens.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            Texts.

        Returns
        -------
        ndarray of shape (n_samples, 2, max_length)
            For every text its token ids, and a mask that is one where there is a token.
        """
        check_is_fitted(self)
        texts, length = _strings(X), self.max_length
        encoded = self.tokenizer_(texts, padding="max_length", truncation=True, max_length=length)
        for key in _KEYS:
            lengths = {len(row) for row in encoded[key]}
            if len(encoded[key]) != len(texts) or lengths != {length}:
                raise ValueError(
                    f"The tokenizer must return max_length={length} numbers for each of "
                    f"{len(texts)} texts; its {key!r} has {len(encoded[key])} rows of length "
                    f"{', '.join(map(str, sorted(lengths)))}."
                )
        tokens = np.stack([np.asarray(encoded[key], np.int64) for key in _KEYS], axis=1)
        # The mean over no token is not defined, nor is attention to none.
        tokens[~tokens[:, 1].any(1), 1, 0] = 1
        return tokens

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


class MaskedMean(nn.Module):
    """The mean of a language model's token vectors over the tokens of each text.

    It takes the tokens of a :class:`TextTokenizer`. Padding is left out, so the
    result does not depend on ``max_length`` where no text is cut.

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(ids, attention_mask=mask)``; returns the vectors of the tokens, of
        shape (n_samples, length, n_features), or an object that has them as
        ``last_hidden_state``, such as the encoders of the package ``transformers`` do.

    See Also
    --------
    TextTokenizer : Makes the input.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the means.

        Parameters
        ----------
        tokens : tensor of shape (n_samples, 2, length)
            Token ids and mask.

        Returns
        -------
        tensor of shape (n_samples, n_features)
            The activations.
        """
        ids, mask = tokens.unbind(1)
        output = self.model(ids, attention_mask=mask)
        vectors = getattr(output, "last_hidden_state", output)
        if not isinstance(vectors, Tensor) or vectors.ndim != 3:
            raise TypeError(
                "The model of MaskedMean must return a tensor of shape (n_samples, length, "
                "n_features), or an object with such a `last_hidden_state`; it returned "
                f"{type(output).__name__}."
            )
        weights = mask[:, :, None].to(vectors.dtype)
        return (vectors * weights).sum(1) / weights.sum(1)


def _strings(X: Iterable[Any]) -> list[str]:
    """Return texts as a list of strings; raise an error for anything else."""
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
                'Fill what is missing with "", or leave these samples out.'
            )
    return list(map(str, texts))  # numpy's own strings too


def _load(name: str) -> Tokenizer:
    """Load a tokenizer of the package transformers."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"tokenizer={name!r} needs transformers. Install it with pip install "
            "'sklearn-gradfeat[text]', or pass a callable."
        ) from error
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(name)
    return tokenizer
