"""A tokenizer with sub-words and tiny random encoders for the tests of prompts."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(longest: int = 512) -> PreTrainedTokenizerFast:
    """WordPiece of pairs of letters and single characters."""
    letters = string.ascii_lowercase
    pieces = [a + b for a in letters for b in letters] + list(letters + string.digits + string.punctuation)
    vocabulary = [*SPECIAL, *pieces, *(f"##{piece}" for piece in pieces)]
    inner = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(vocabulary)}, unk_token="[UNK]", max_input_chars_per_word=4000))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=longest, **names)


def config(tokens: Any, **changes: Any) -> BertConfig:
    given = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": tokens.model_max_length}
    return BertConfig(vocab_size=len(tokens), num_labels=2, **{**given, **changes})


def token_classifier(tokens: Any) -> BertForTokenClassification:
    torch.manual_seed(0)
    model = BertForTokenClassification(config(tokens)).eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


def sequence_classifier(tokens: Any, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(tokens, **changes)).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("LayerNorm.weight" in name), std=0.3)
    return model
