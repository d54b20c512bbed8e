"""Tiny text encoders of each family, randomly initialised, with a tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "purple", "apple", "heart", "of", "gold"]
#: Longest text of the tiny encoders, width of their states.
LONGEST, WIDTH = 8, 16
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LONGEST,
    **_IDS,
}


def _clip() -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    return CLIPModel(CLIPConfig(text_config=_SIZES, vision_config=vision.to_dict()))


#: Each family, and the marks around its texts.
FAMILIES = {
    "clip_text": (lambda: CLIPTextModel(CLIPTextConfig(**_SIZES)), "<s> $A </s>"),
    "clip": (_clip, "<s> $A </s>"),
    "t5": (
        lambda: T5EncoderModel(
            T5Config(
                vocab_size=len(WORDS), d_model=WIDTH, d_ff=32, d_kv=8, num_layers=2, num_heads=2
            )
        ),
        "$A </s>",
    ),
    "qwen": (lambda: Qwen2Model(Qwen2Config(**_SIZES, num_key_value_heads=1)), "$A"),
    "bert": (lambda: BertModel(BertConfig(**_SIZES)), "<s> $A </s>"),
}


def save_encoder(folder: Path, family: str, seed: int = 0) -> Path:
    """Save an encoder and its tokenizer; another seed makes other weights."""
    torch.manual_seed(seed)
    make, template = FAMILIES[family]
    network: PreTrainedModel = make()
    network.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LONGEST,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder
