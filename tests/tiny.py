"""Tiny real models on disk: a few layers at random, and a tokenizer of single characters."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


IMAGE_TOKENS = {"boi_token": "<image_starts>", "image_token": "<image_is>", "eoi_token": "<image_ends>"}


def tiny_tokenizer(*, template: str | None = None, **more: str) -> PreTrainedTokenizerFast:
    """Every printable ASCII character is a token; `more` are special ones by the names of their attributes."""
    special = ["<pad>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", *more.values()]
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    vocabulary = {token: number for number, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=512,
        extra_special_tokens=more,
    )
    fast.chat_template = template
    return fast


def save_tiny_llama(folder: Path, *, template: str | None = None, **sizes: Any) -> Path:
    """A causal language model of two layers and its tokenizer."""
    tokenizer = tiny_tokenizer(template=template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,  # of the size that trained weights have, so that a LoRA has something to turn
            **sizes,
        },
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_gemma(folder: Path, *, sees: bool = False, template: str | None = None) -> Path:
    """A Gemma 3 of two layers and its tokenizer.

    sees
        with a vision tower and a processor, as the larger ones; template: of its chats.
    """
    tokenizer = tiny_tokenizer(**IMAGE_TOKENS if sees else {})
    torch.manual_seed(0)
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    if sees:
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        pictures = {"vision_config": {**vision, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}
        marks = {f"{name}_index": tokenizer.convert_tokens_to_ids(token) for name, token in IMAGE_TOKENS.items()}
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, pad_token_id=tokenizer.pad_token_id, **pictures, **marks)
        )
        projection = next(one for name, one in model.named_parameters() if name.endswith("input_projection_weight"))
        torch.nn.init.normal_(projection)  # zeros as it is made: no image would come through
        model.save_pretrained(folder)
        eye = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
        Gemma3Processor(
            image_processor=eye, tokenizer=tokenizer, image_seq_length=4, chat_template=template
        ).save_pretrained(folder)
    else:
        Gemma3ForCausalLM(text).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def save_tiny_bert(folder: Path) -> Path:
    """An encoder of two layers and its tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=2, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
