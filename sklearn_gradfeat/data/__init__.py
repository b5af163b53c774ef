"""User input: arrays, tensors, image files and texts, validated and read in batches."""

from sklearn_gradfeat.data._batch_size import (
    BatchSize,
    Result,
    free_bytes,
    is_out_of_memory,
    unless_out_of_memory,
)
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
from sklearn_gradfeat.data._ranks import (
    Ranks,
    alone,
    fit_together,
    gather_over_ranks,
    is_first_rank,
    n_ranks,
    number_of_first_rank,
    of_first_rank,
    on_all_ranks,
    rows_of_all_ranks,
    sum_over_ranks,
)
from sklearn_gradfeat.data._tabular import warn_of_tabular
from sklearn_gradfeat.data._targets import (
    encode_classes,
    normalized_weights,
    numeric_targets,
    plain_weights,
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
    "Ranks",
    "Result",
    "Rows",
    "Samples",
    "TextTokenizer",
    "accumulation_device",
    "alone",
    "compute_dtypes",
    "encode_classes",
    "fit_together",
    "free_bytes",
    "gather_over_ranks",
    "is_first_rank",
    "is_lazy",
    "is_out_of_memory",
    "n_ranks",
    "normalized_weights",
    "number_of_first_rank",
    "numeric_targets",
    "of_first_rank",
    "on_all_ranks",
    "plain_weights",
    "resolve_device",
    "restored_on_error",
    "row_blocks",
    "rows_of_all_ranks",
    "slices",
    "sum_over_ranks",
    "to_device",
    "unless_out_of_memory",
    "validate_new_samples",
    "validate_samples",
    "warn_of_tabular",
    "warn_unless_picklable",
    "weighted_mean",
    "weighted_median",
]
