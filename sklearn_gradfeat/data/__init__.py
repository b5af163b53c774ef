"""User input: arrays, tensors, image files and texts, validated and read in batches."""

from sklearn_gradfeat.data._batch_size import BatchSize, Result, free_bytes
from sklearn_gradfeat.data._batches import (
    MIN_ROWS,
    Preprocess,
    Rows,
    Samples,
    accumulation_device,
    compute_dtypes,
    is_lazy,
    resolve_device,
    row_blocks,
    slices,
    to_device,
    warn_unless_picklable,
)
from sklearn_gradfeat.data._image_files import (
    ImageFiles,
)
from sklearn_gradfeat.data._tabular import warn_of_tabular
from sklearn_gradfeat.data._targets import (
    encode_classes,
    normalized_weights,
    numeric_targets,
    weighted_mean,
    weighted_median,
)
from sklearn_gradfeat.data._texts import (
    BoundedTokenizer,
    MaskedMean,
    TextTokenizer,
)
from sklearn_gradfeat.data._validation import (
    restored_on_error,
    validate_new_samples,
    validate_samples,
)

__all__ = [
    "MIN_ROWS",
    "BatchSize",
    "BoundedTokenizer",
    "ImageFiles",
    "MaskedMean",
    "Preprocess",
    "Result",
    "Rows",
    "Samples",
    "TextTokenizer",
    "accumulation_device",
    "compute_dtypes",
    "encode_classes",
    "free_bytes",
    "is_lazy",
    "normalized_weights",
    "numeric_targets",
    "resolve_device",
    "restored_on_error",
    "row_blocks",
    "slices",
    "to_device",
    "validate_new_samples",
    "validate_samples",
    "warn_of_tabular",
    "warn_unless_picklable",
    "weighted_mean",
    "weighted_median",
]
