"""Encoders of Hugging Face for images, texts and sounds, each with its own processor.

The encoder is the model of the package ``transformers`` without a task head: of an encoder with a
decoder, the encoder; of a model for images and texts, the part for images. Its activation is

- for texts, the pooling that a sentence transformer declares, with its normalisation; for any
  other model, the mean over the tokens. Projections after the pooling are left out.
- for images and sounds, the pooled output of the model. Without one, or without weights of it in
  the checkpoint, it is the class token; without a class token, the mean over all tokens.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms

from sklearn_gradfeat.backbones._images import ImagePreprocess
from sklearn_gradfeat.data import BoundedTokenizer, Preprocess

PREFIX = "hf/"
_LONGEST = 512  # tokens of a text
_IMAGES, _TEXTS, _SOUNDS = "pixel_values", "input_ids", ("input_values", "input_features")
_POOLINGS = ("cls", "lasttoken", "mean", "weightedmean")
_SHAPES = ((61, 83), (70, 50), (20, 90))  # of images to compare transforms
_SIDES = ("height", "width")
_CLASS_TOKENS = ("cls_token", "class_embedding")

Encoder = tuple[nn.Module, Preprocess | None, BoundedTokenizer | None]


def load_huggingface(name: str) -> Encoder:
    """Return an encoder, the transform of images or sounds, and the tokenizer of texts.

    Parameters
    ----------
    name : str
        ``"hf/"`` and the name of a model on the hub, or the path of a folder: absolute, or
        relative with a dot as its first character.

    Returns
    -------
    (nn.Module, callable or None, BoundedTokenizer or None)
        The same objects in every call, unless a folder has changed.

    Raises
    ------
    ImportError
        If ``transformers`` is not installed.
    OSError
        If the model cannot be loaded.
    ValueError
        If it is no such encoder.
    """
    source = name.removeprefix(PREFIX)
    folder = Path(source)
    if not folder.is_dir() and (source.startswith(".") or folder.is_absolute()):
        raise OSError(f"backbone={name!r}: there is no folder {source!r} with a model.")
    files = sorted([*folder.glob("*"), *folder.glob("*/config.json")]) if source else []
    return _load(name, source, tuple((path, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=4)
def _load(name: str, source: str, stamp: tuple[Any, ...]) -> Encoder:
    """Load an encoder; ``stamp`` changes with the files of a folder."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"backbone={name!r} needs transformers. Install it with pip install "
            "'sklearn-gradfeat[hf]'."
        ) from error
    with _explained(name):
        model, info = transformers.AutoModel.from_pretrained(
            source, trust_remote_code=False, output_loading_info=True
        )
    has_pooler = _replace_missing(name, model, info["missing_keys"])
    model.config.use_cache = False  # of keys and values, in the generation of texts
    argument = model.main_input_name
    if hasattr(model, "vision_model"):
        model, argument = model.vision_model, _IMAGES
    elif getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if argument == _TEXTS:
        return _text_encoder(name, source, model)
    module = _PooledEncoder(model, argument, has_pooler)
    if argument == _IMAGES:
        with _explained(name):
            processor = transformers.AutoImageProcessor.from_pretrained(
                source, trust_remote_code=False
            )
        return module, ImagePreprocess(image_transform(processor)), None
    if argument in _SOUNDS:
        with _explained(name):
            extractor = transformers.AutoFeatureExtractor.from_pretrained(
                source, trust_remote_code=False
            )
        return module, functools.partial(sound_features, extractor, argument), None
    raise ValueError(
        f"backbone={name!r} is a {type(model).__name__}, which takes {argument!r}. Name an encoder "
        "of images, texts or sounds, or pass a torch module."
    )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Load a part of a model without progress bars; an error has one line that says what to do."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # transformers may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"backbone={name!r} cannot be loaded from Hugging Face: {reason.rstrip('.')}. Check "
            "the name; for a private or gated model, log in with `hf auth login`; without a "
            "connection, pass a folder, as in 'hf//path'."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _replace_missing(name: str, model: nn.Module, missing: Any) -> bool:
    """Set weights that the checkpoint lacks to zero; return whether it has those of the pooler.

    ``transformers`` has drawn them at random. Tokens of masks serve for pretraining alone.
    """
    poolers = [key for key in missing if "pooler" in key.split(".")]
    needed = sorted(key for key in missing if key not in poolers and "mask" not in key)
    if needed:
        raise ValueError(
            f"backbone={name!r} lacks {len(needed)} of its weights, such as {needed[0]!r}. Name a "
            "model with all weights of its encoder."
        )
    tensors = model.state_dict()
    with torch.no_grad():
        for key in missing:
            tensors[key].zero_()
    return not poolers


class _PooledEncoder(nn.Module):
    """A model for images or sounds, with one vector per sample."""

    def __init__(self, model: nn.Module, argument: str, has_pooler: bool) -> None:
        super().__init__()
        self.model, self.argument, self.has_pooler = model, argument, has_pooler
        names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        self.has_class_token = not names.isdisjoint(_CLASS_TOKENS)

    def forward(self, batch: Tensor) -> Tensor:
        """Return the pooled vectors, or maps whose places the caller averages."""
        output = self.model(**{self.argument: batch})
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is not None and self.has_pooler:
            return pooled
        vectors: Tensor = output.last_hidden_state
        if vectors.ndim != 3:
            return vectors
        return vectors[:, 0] if self.has_class_token else vectors.mean(1)


class _TextEncoder(nn.Module):
    """A model for texts, with one vector per text from those of its tokens."""

    def __init__(self, model: nn.Module, pooling: str, normalized: bool) -> None:
        super().__init__()
        self.model, self.pooling, self.normalized = model, pooling, normalized

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the vectors of texts, from ids and mask of shape (n_samples, 2, length)."""
        ids, mask = tokens.unbind(1)
        vectors: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = vectors[:, 0] if self.pooling == "cls" else self._mean(vectors, mask)
        return nn.functional.normalize(pooled) if self.normalized else pooled

    def _mean(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of the tokens with the weights of the pooling, from their mask."""
        if self.pooling == "lasttoken":
            weights = weights * (1 - nn.functional.pad(weights[:, 1:], (0, 1)))
        elif self.pooling == "weightedmean":
            weights = weights * torch.arange(1, weights.shape[1] + 1, device=weights.device)
        weights = weights[:, :, None].to(vectors.dtype)
        return (vectors * weights).sum(1) / weights.sum(1)


def _text_encoder(name: str, source: str, model: Any) -> Encoder:
    """Return a model for texts with its tokenizer."""
    from transformers import AutoTokenizer

    pooling: dict[str, Any] = {}
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        parts = _read_json(source, "modules.json") or []
        kinds = [part["type"].rpartition(".")[2] for part in parts]
        if "Pooling" in kinds:
            path = parts[kinds.index("Pooling")]["path"]
            pooling = _read_json(source, f"{path}/config.json") or {}
        longest = (_read_json(source, "sentence_bert_config.json") or {}).get("max_seq_length")
    module = _TextEncoder(model, _pooling(name, pooling), "Normalize" in kinds)
    lengths = [_LONGEST, longest, tokenizer.model_max_length, _n_positions(model)]
    limit = min(length for length in lengths if length)
    return module, None, BoundedTokenizer(tokenizer, limit, tokenizer.pad_token_id or 0)


def _read_json(source: str, file: str) -> Any:
    """Return the contents of a file of a model, None if there is no such file."""
    from transformers.utils.hub import cached_file

    path = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text("utf-8"))


def _pooling(name: str, config: dict[str, Any]) -> str:
    """Return the pooling of a sentence transformer, the mean for any other model."""
    flags = [key for key in config if key.startswith("pooling_mode_") and config[key] is True]
    modes = [re.sub("^pooling_mode_|_tokens?$", "", flag) for flag in flags]
    modes = modes or [config.get("pooling_mode", "mean")]
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise ValueError(
            f"backbone={name!r} pools its tokens by {' and '.join(map(str, modes))}, but this "
            f"package knows only one of {', '.join(_POOLINGS)}. Pass a torch module that pools "
            "them, behind a TextTokenizer."
        )
    return str(modes[0])


def _n_positions(model: Any) -> int | None:
    """Return the number of tokens that a model has positions for, None for any number."""
    length: int | None = getattr(model.config, "max_position_embeddings", None)
    for layer in model.modules():
        if isinstance(layer, nn.Embedding) and layer.num_embeddings == length:
            # With a position for padding, those of tokens follow it.
            return length if layer.padding_idx is None else length - layer.padding_idx - 1
    return length


def image_transform(processor: Any) -> Callable[[Tensor], Tensor]:
    """Return the transform of an image processor for batches of tensors.

    It resizes, crops and normalises with torchvision, so that it can be exported. A processor that
    does anything else to synthetic images is called itself.
    """
    try:
        composed = _composed(processor.to_dict())
        same = all(
            torch.allclose(composed(image), _processed(processor, image), rtol=0, atol=1e-3)
            for image in map(_synthetic, _SHAPES)
        )
    except (KeyError, TypeError, ValueError, RuntimeError):
        same = False
    return composed if same else functools.partial(_processed, processor)


def _synthetic(shape: tuple[int, int]) -> Tensor:
    """Return a batch of one image of that height and width."""
    wave = torch.arange(3 * shape[0] * shape[1], dtype=torch.float64).div(30).sin()
    return (127.5 + 127 * wave).to(torch.uint8).view(1, 3, *shape)


def _composed(known: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the steps that most image processors have."""
    steps: list[Callable[[Tensor], Tensor]] = []
    if known["do_resize"]:
        mode = transforms.InterpolationMode[Image.Resampling(known["resample"]).name]
        resize = functools.partial(transforms.Resize, interpolation=mode, antialias=True)
        side, share = known["size"].get("shortest_edge"), known.get("crop_pct")
        if side is None:
            steps.append(resize([known["size"]["height"], known["size"]["width"]]))
        elif share is None:
            steps.append(resize(side))
        elif side < 384:  # as ConvNextImageProcessor does
            steps += [resize(int(side / share)), functools.partial(_center_crop, [side, side])]
        else:
            steps.append(resize([side, side]))
    if known.get("do_center_crop"):
        sides = [known["crop_size"][key] for key in _SIDES]
        steps.append(functools.partial(_center_crop, sides))
    steps.append(transforms.ToDtype(torch.float32, scale=True))
    steps.append(transforms.Normalize(known["image_mean"], known["image_std"]))
    composed: Callable[[Tensor], Tensor] = transforms.Compose(steps)
    return composed


def _center_crop(sides: list[int], images: Tensor) -> Tensor:
    """Return the centre of images; where it lies between two pixels, other than torchvision."""
    top, left = ((n - side) // 2 for n, side in zip(images.shape[-2:], sides, strict=True))
    return images[..., top : top + sides[0], left : left + sides[1]]


def _processed(processor: Any, images: Tensor) -> Tensor:
    """Return the output of an image processor."""
    if images.is_floating_point():
        images = (255 * images).round().to(torch.uint8)
    output: Tensor = processor(
        list(images.cpu()), return_tensors="pt", input_data_format="channels_first"
    )[_IMAGES]
    return output


def sound_features(extractor: Any, argument: str, sounds: Tensor) -> Tensor:
    """Return the output of a feature extractor for sounds of shape (n_samples, n_times)."""
    if sounds.ndim != 2:
        raise ValueError(
            "This backbone takes sounds, X of shape (n_samples, n_times) at "
            f"{extractor.sampling_rate} Hz; the samples of X have shape {tuple(sounds.shape[1:])}. "
            "Reshape X, or set preprocess=None to pass the features of sounds."
        )
    if sounds.dtype in (torch.int16, torch.int32):
        sounds = sounds / (torch.iinfo(sounds.dtype).max + 1)
    if not sounds.is_floating_point():
        raise ValueError(
            "Sounds must be floating point in [-1, 1], or int16 or int32 of the whole range; X has "
            f"dtype {sounds.dtype}. Convert X, or set preprocess."
        )
    waves = list(sounds.float().cpu().numpy())
    rate = extractor.sampling_rate
    output: Tensor = extractor(waves, sampling_rate=rate, return_tensors="pt")[argument]
    return output
