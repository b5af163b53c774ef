"""Tiny models of Hugging Face with random weights, in folders as on the hub."""

import numpy as np
import tokenizers
import torch
import transformers

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 4, **SIZES}
SQUARE = {"height": 16, "width": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "the", "a", "was"]


def tokenizer(**special):
    words = {word: i for i, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    special = special or {"pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", **special
    )


def bert(**settings):
    config = transformers.BertConfig(vocab_size=10, max_position_embeddings=48, **SIZES, **settings)
    return transformers.BertModel(config), tokenizer()


def roberta():
    config = transformers.RobertaConfig(
        vocab_size=10, max_position_embeddings=30, pad_token_id=1, bos_token_id=2, eos_token_id=3,
        **SIZES,
    )  # fmt: skip
    return transformers.RobertaModel(config), tokenizer(pad_token="[UNK]")


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=10, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    return transformers.GPT2Model(config), tokenizer(additional_special_tokens=[])


def t5():
    config = transformers.T5Config(
        vocab_size=10, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    )
    return transformers.T5Model(config), tokenizer()


def vit():
    config = transformers.ViTConfig(**IMAGE)
    return transformers.ViTModel(config), transformers.ViTImageProcessor(size=SQUARE)


def vit_with_classifier():
    config = transformers.ViTConfig(**IMAGE)
    processor = transformers.ViTImageProcessor(size=SQUARE)
    return transformers.ViTForImageClassification(config), processor


def dinov2():
    config = transformers.Dinov2Config(**IMAGE)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 20}, crop_size=SQUARE)
    return transformers.Dinov2Model(config), processor


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 32})
    return transformers.ResNetModel(config), processor


def clip():
    words = {"vocab_size": 10, "max_position_embeddings": 10, "eos_token_id": 3, "bos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={**words, **SIZES}, vision_config=IMAGE, projection_dim=8
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE)
    return transformers.CLIPModel(config), processor


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SIZES,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config), transformers.Wav2Vec2FeatureExtractor()


def ast():
    lengths = {"max_length": 64, "num_mel_bins": 32}
    config = transformers.ASTConfig(
        patch_size=8, frequency_stride=8, time_stride=8, **lengths, **SIZES
    )
    return transformers.ASTModel(config), transformers.ASTFeatureExtractor(**lengths)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=10, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return transformers.WhisperModel(config), extractor


def saved(folder, build):
    """Save a model and its processor to a folder, and return the name of the backbone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = build()
    for part in parts:
        part.save_pretrained(folder)
    return f"hf/{folder}"


LABELS = np.arange(24) % 2


def images():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 24, 3)).astype(np.uint8)
    pixels[LABELS == 1, :10] //= 2
    return pixels


def sounds():
    noise = np.random.default_rng(0).normal(size=(24, 400)) / 40
    tones = np.sin(np.arange(400) * np.where(LABELS, 0.05, 0.8)[:, None]) / 4
    return (noise + tones).astype(np.float32)


def texts():
    rng = np.random.default_rng(0)
    return [
        " ".join(rng.choice(WORDS[4:], rng.integers(1, 9))) + (" good", " bad")[label]
        for label in LABELS
    ]
