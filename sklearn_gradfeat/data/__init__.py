"""User input: arrays, tensors, image files and texts, validated and read in batches."""

from sklearn_gradfeat.data._batches import (
    MIN_ROWS,
    Preprocess,
    Result,
    Rows,
    Samples,
    accumulation_device,
    compute_dtypes,
    free_bytes,
    in_smaller_batches,
    is_lazy,
    resolve_device,
    slices,
    to_device,
)
from sklearn_gradfeat.data._image_files import ImageFiles
from sklearn_gradfeat.data._texts import MaskedMean, TextTokenizer
from sklearn_gradfeat.data._validation import (
    restored_on_error,
    validate_new_samples,
    validate_samples,
)

__all__ = [
    "MIN_ROWS",
    "ImageFiles",
    "MaskedMean",
    "Preprocess",
    "Result",
    "Rows",
    "Samples",
    "TextTokenizer",
    "accumulation_device",
    "compute_dtypes",
    "free_bytes",
    "in_smaller_batches",
    "is_lazy",
    "resolve_device",
    "restored_on_error",
    "slices",
    "to_device",
    "validate_new_samples",
    "validate_samples",
]
