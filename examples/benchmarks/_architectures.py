"""Networks of torchvision, timm and transformers with random weights, by name.

Every entry of ``NETWORKS`` returns a network without its classifier and a batch of samples. The
inputs are as small as the network allows.
"""

from __future__ import annotations

import functools

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_gradfeat import MaskedMean
from sklearn_gradfeat.backbones._sources import without_classifier

N_SAMPLES = 6

# The side of the images, where it is not 64.
_SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_16": 224, "vit_b_32": 224}
# Left out, since smaller ones have the same code: they have more than 2 GB of weights in float64.
_HUGE = ("regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32")


def images(side, n=N_SAMPLES):
    """Return random images that differ in brightness and texture, (n, 3, side, side)."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(n, 3, 8, 8, generator=generator)
    fine = torch.randn(n, 3, side, side, generator=generator)
    return nn.functional.interpolate(coarse, side) + fine


def tokens(n=N_SAMPLES, length=6, n_words=20):
    """Return token ids and an attention mask, (n, 2, length)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, n_words, (n, length), generator=generator)
    mask = (torch.arange(length) < torch.arange(n)[:, None] % 4 + 3).long()
    return torch.stack([ids * mask + (1 - mask), mask], 1)


def randomize(network, x):
    """Give a network random weights with which every parameter changes the activation.

    Constant parameters, such as the scales of normalisations and residual branches, become random.
    Batch norms get the statistics of the batch ``x``, changed at random.
    """
    generator = torch.Generator().manual_seed(2)

    def uniform(shape):
        return torch.empty(shape).uniform_(0.7, 1.3, generator=generator)

    with torch.no_grad():
        for name, value in network.named_parameters():
            if not value.is_floating_point() or float(value.max() - value.min()) > 0:
                continue
            level = float(value.flatten()[0])
            if level > 1e-2 or (value.ndim == 1 and not name.endswith(("bias", "token"))):
                value.copy_(uniform(value.shape) * (level if level > 1e-2 else 1.0))
            else:
                value.normal_(0, 0.1, generator=generator)
        norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
        if not norms:
            return
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.momentum = 1.0
        network.train()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_mean.add_(0.1 * uniform(norm.running_mean.shape) - 0.1)
            norm.running_var.mul_(uniform(norm.running_var.shape)).add_(1e-3)


def build(name):
    """Return a network in evaluation mode, in float64, and a batch of samples."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = NETWORKS[name]()
    randomize(network, x)
    return network.double().eval(), x


# --- torchvision -------------------------------------------------------------------------------


def _torchvision(name):
    side, options = _SIDES.get(name, 64), {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    network = torchvision.models.get_model(name, weights=None, **options)
    return without_classifier(network), images(side)


# --- timm --------------------------------------------------------------------------------------

# The smallest members, with the side of the images and options. None is the default size.
_TIMM = {
    "beit_base_patch16_224": (32, {"depth": 2, "img_size": 32, "embed_dim": 64, "num_heads": 2}),
    "cait_xxs24_224": (32, {"depth": 2, "img_size": 32}),
    "coat_tiny": (64, {"img_size": 64}),
    "coatnet_nano_rw_224": (64, {"img_size": 64}),
    "convit_tiny": (64, {"img_size": 64, "depth": 4, "local_up_to_layer": 3}),
    "convmixer_768_32": (64, {}),
    "convnext_atto": (48, {}),
    "crossvit_tiny_240": (240, {}),
    "cs3darknet_m": (48, {}),
    "davit_tiny": (48, {}),
    "deit_tiny_distilled_patch16_224": (32, {"depth": 2, "img_size": 32}),
    "dla34": (64, {}),
    "dpn48b": (48, {}),
    "edgenext_xx_small": (48, {}),
    "efficientformerv2_s0": (64, {"img_size": 64}),
    "efficientnet_lite0": (48, {}),
    "efficientvit_b0": (48, {}),
    "efficientvit_m0": (224, {}),
    "eva02_tiny_patch14_224": (28, {"depth": 2, "img_size": 28}),
    "fastvit_t8": (48, {}),
    "focalnet_tiny_srf": (48, {}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "ghostnet_050": (48, {}),
    "gmixer_12_224": (32, {"img_size": 32}),
    "gmlp_ti16_224": (32, {"img_size": 32}),
    "haloregnetz_b": (224, {}),
    "hgnetv2_b0": (48, {}),
    "hiera_tiny_224": (64, {"img_size": 64}),
    "hrnet_w18_small": (64, {}),
    "inception_next_atto": (48, {}),
    "inception_v3": (96, {}),
    "lambda_resnet26t": (48, {}),
    "levit_128s": (64, {"img_size": 64}),
    "maxvit_pico_rw_256": (64, {"img_size": 64}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "mobilenetv4_hybrid_medium": (48, {}),
    "mobileone_s0": (48, {}),
    "mobilevit_xxs": (48, {}),
    "mobilevitv2_050": (48, {}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "nest_tiny": (64, {"img_size": 64}),
    "nextvit_small": (48, {}),
    "nf_regnet_b0": (48, {}),
    "nfnet_f0": (48, {}),
    "pit_ti_224": (64, {"img_size": 64}),
    "poolformer_s12": (48, {}),
    "pvt_v2_b0": (48, {}),
    "regnety_002": (48, {}),
    "regnetz_b16": (48, {}),
    "repghostnet_050": (48, {}),
    "repvgg_a0": (48, {}),
    "res2net50_14w_8s": (48, {}),
    "resmlp_12_224": (32, {"img_size": 32}),
    "resnest14d": (48, {}),
    "resnetv2_50": (48, {}),
    "rexnet_100": (48, {}),
    "selecsls42": (48, {}),
    "sequencer2d_s": (64, {"img_size": 64}),
    "skresnet18": (48, {}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64}),
    "tiny_vit_5m_224": (64, {}),
    "tresnet_m": (48, {}),
    "twins_svt_small": (64, {"img_size": 64}),
    "visformer_tiny": (64, {"img_size": 64}),
    "vit_little_patch16_reg1_gap_256": (64, {"depth": 2, "img_size": 64}),
    "vit_relpos_small_patch16_224": (64, {"depth": 2, "img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64}),
    "vovnet39a": (48, {}),
    "xception41": (96, {}),
    "xcit_nano_12_p16_224": (32, {"depth": 2, "img_size": 32}),
}


def _timm(name, side, options):
    import timm

    return timm.create_model(name, num_classes=0, **options), images(side)


# --- transformers ------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
_TEXT = {"vocab_size": 20, "max_position_embeddings": 32, "pad_token_id": 1, **_SIZES}
_IMAGE = {"image_size": 16, "patch_size": 4, **_SIZES}
_DECODER = {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3, **_TEXT}
_SOUND = {
    "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, **_SIZES,
}  # fmt: skip
_STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

# The classes without "Model" and "Config", and the settings.
_TEXTS = {
    "albert": ("Albert", {"embedding_size": 8, **_TEXT}),
    "bert": ("Bert", _TEXT),
    "convbert": ("ConvBert", {"embedding_size": 16, "head_ratio": 1, **_TEXT}),
    "deberta": ("Deberta", _TEXT),
    "deberta-v2": (
        "DebertaV2",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            **_TEXT,
        },
    ),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    ),
    "electra": ("Electra", {"embedding_size": 8, **_TEXT}),
    "gpt-neox": ("GPTNeoX", _TEXT),
    "gpt2": ("GPT2", {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("Llama", _DECODER),
    "mobilebert": (
        "MobileBert",
        {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8, **_TEXT},
    ),
    "modernbert": (
        "ModernBert",
        {"cls_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "bos_token_id": 2, **_TEXT},
    ),
    "mpnet": ("MPNet", _TEXT),
    "opt": (
        "OPT",
        {
            "vocab_size": 20,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "ffn_dim": 24,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 32,
        },
    ),
    "qwen2": ("Qwen2", _DECODER),
    "qwen3": ("Qwen3", _DECODER),
    "roberta": ("Roberta", _TEXT),
    "roformer": ("RoFormer", {"embedding_size": 8, **_TEXT}),
    "squeezebert": ("SqueezeBert", {"embedding_size": 16, **_TEXT}),
    "t5-encoder": (
        "T5Encoder",
        {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    "xlnet": ("XLNet", {"vocab_size": 20, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
    "clip-text": ("CLIPText", {"eos_token_id": 3, "bos_token_id": 2, **_TEXT}),
    "siglip-text": ("SiglipText", {"eos_token_id": 3, "bos_token_id": 2, **_TEXT}),
}
_IMAGES = {
    "beit": ("Beit", {"use_relative_position_bias": True, **_IMAGE}),
    "bit": (
        "Bit",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4},
    ),
    "clip-vision": ("CLIPVision", _IMAGE),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "convnextv2": ("ConvNextV2", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "data2vec-vision": ("Data2VecVision", {"use_relative_position_bias": True, **_IMAGE}),
    "deit": ("DeiT", _IMAGE),
    "dinov2": ("Dinov2", _IMAGE),
    "dinov2-with-registers": ("Dinov2WithRegisters", {"num_register_tokens": 2, **_IMAGE}),
    "dinov3-vit": ("DINOv3ViT", {"num_register_tokens": 2, **_IMAGE}),
    "poolformer": (
        "PoolFormer",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
    ),
    "pvt": (
        "Pvt",
        {
            "image_size": 32,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "num_attention_heads": [1, 2],
            "sequence_reduction_ratios": [2, 1],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "segformer": (
        "Segformer",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    "siglip-vision": ("SiglipVision", _IMAGE),
    "swin": ("Swin", {"image_size": 32, "patch_size": 4, **_STAGES}),
    "swinv2": ("Swinv2", {"image_size": 32, "patch_size": 4, **_STAGES}),
    "vit": ("ViT", _IMAGE),
    "vit-mae": ("ViTMAE", _IMAGE),
}
_SOUNDS = {
    "data2vec-audio": ("Data2VecAudio", {**_SOUND, "conv_pos_kernel_size": 3}),
    "hubert": ("Hubert", _SOUND),
    "wav2vec2": ("Wav2Vec2", _SOUND),
    "wav2vec2-stable-layer-norm": (
        "Wav2Vec2",
        {**_SOUND, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    ),
    "wavlm": ("WavLM", {**_SOUND, "num_buckets": 8, "max_bucket_distance": 20}),
}


class Mean(nn.Module):
    """The mean over tokens or positions of an encoder for images or sounds."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        """Return one row for every sample."""
        state = self.model(x).last_hidden_state
        return state.mean(1) if state.ndim == 3 else state.mean((2, 3))


def _transformer(kind, settings):
    import transformers

    config = getattr(transformers, f"{kind.removesuffix('Encoder')}Config")
    return getattr(transformers, f"{kind}Model")(config(**settings))


def _text(kind, settings):
    return MaskedMean(_transformer(kind, settings)), tokens()


def _image(kind, settings):
    return Mean(_transformer(kind, settings)), images(settings.get("image_size", 32))


def _sound(kind, settings):
    generator = torch.Generator().manual_seed(1)
    return Mean(_transformer(kind, settings)), torch.randn(N_SAMPLES, 400, generator=generator)


_TORCHVISION = [
    name for name in torchvision.models.list_models(module=torchvision.models) if name not in _HUGE
]
NETWORKS = {
    **{f"torchvision/{name}": functools.partial(_torchvision, name) for name in _TORCHVISION},
    **{f"timm/{name}": functools.partial(_timm, name, *rest) for name, rest in _TIMM.items()},
    **{f"transformers/{name}": functools.partial(_text, *rest) for name, rest in _TEXTS.items()},
    **{f"transformers/{name}": functools.partial(_image, *rest) for name, rest in _IMAGES.items()},
    **{f"transformers/{name}": functools.partial(_sound, *rest) for name, rest in _SOUNDS.items()},
}
