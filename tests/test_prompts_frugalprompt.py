"""FrugalPrompt and GlobEnc: hand-worked choices, the decomposition against the model itself."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from tests.prompt_tools import sequence_classifier, tokenizer
from vlprune.errors import NotFiniteError, OptionError, UnsupportedModelError
from vlprune.prompts import FrugalPrompt, GlobEnc, TokenScores, compress
from vlprune.prompts.frugalprompt import best, split_sentences
from vlprune.prompts.globenc import encoder_layers, norms, parts_of, through_norm, watched

TEXT = "The film is great. It has 3 heroes and no plot! Would I see it again? Yes, gladly."


def by_length(text: str) -> list[float]:
    return [float(len(word)) for word in text.split()]


def test_the_best_words_stay_in_order() -> None:
    found = compress("a bbb cc dddd eee", "frugalprompt", 0.6, attribution=by_length)
    assert found.text == "bbb dddd eee"
    assert found.reached == 0.6
    assert found.scores == (1, 3, 2, 4, 3)
    assert compress("a bbb cc dddd eee", "frugalprompt", 0.6, attribution=by_length, select="bottom").text == "a bbb cc"


@pytest.mark.parametrize(("words", "percent", "wanted"), [(10, 80, 8), (7, 60, 4), (5, 50, 2), (7, 50, 4), (9, 57, 5), (3, 50, 2)])
def test_the_number_is_rounded_as_in_python(words: int, percent: int, wanted: int) -> None:
    """round(n * p / 100), halves to even."""
    assert sum(best([0.0] * words, [False] * words, percent / 100)) == wanted == round(words * percent / 100)
    assert best([0.0], [False], 0.5) == [True], "at least one stays"


def test_sub_words_are_added_up() -> None:
    def attribution(text: str) -> TokenScores:
        return TokenScores([(0, 0), (0, 2), (2, 5), (6, 10), (11, 16)], [9.0, 0.3, 0.3, 0.5, 0.4])

    found = compress("alpha beta gamma", "frugalprompt", 1 / 3, attribution=attribution)
    assert found.scores == pytest.approx((0.6, 0.5, 0.4))
    assert found.text == "alpha"


def test_sentences_are_scored_one_by_one() -> None:
    seen: list[str] = []

    def attribution(text: str) -> list[float]:
        seen.append(text.strip())
        return by_length(text)

    whole = compress(TEXT, "frugalprompt", 0.5, attribution=attribution)
    assert seen == ["The film is great.", "It has 3 heroes and no plot!", "Would I see it again?", "Yes, gladly."]
    assert whole.num_kept == round(18 * 0.5)
    each = compress(TEXT, "frugalprompt", 0.5, attribution=by_length, per="sentence")
    assert each.text == "film great. has 3 heroes plot! Would again? gladly."
    given = compress(TEXT, "frugalprompt", 0.5, attribution=by_length, sentences=lambda text: [text[start:end].strip() for start, end in split_sentences(text)])
    assert given.kept == whole.kept
    assert [TEXT[start:end] for start, end in split_sentences("e.g. this is one. that too")] == [TEXT[0:26]]


def test_random_is_seeded() -> None:
    def once(seed: int) -> tuple[bool, ...]:
        return compress(TEXT, "frugalprompt", 0.5, select="random", seed=seed).kept

    assert once(0) == once(0)
    assert once(0) != once(1)
    assert sum(once(0)) == 9


def test_numbers_stay_unless_told() -> None:
    found = compress(TEXT, "frugalprompt", 0.2, attribution=by_length)
    assert "3" in found.text.split()
    assert found.num_kept == round(18 * 0.2)
    assert "3" not in compress(TEXT, "frugalprompt", 0.2, attribution=by_length, protect_numbers=False).text.split()
    many = compress("1 2 3 4 word", "frugalprompt", 0.2, attribution=by_length)
    assert many.text == "1 2 3 4"
    assert (many.asked, many.reached) == (0.2, 0.8), "what has to stay goes beyond the share, and it says so"


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_parts_sum_to_the_whole(backend: str) -> None:
    """In front of both norms and behind the first, but for the biases that belong to no token."""
    tokens = tokenizer()
    model = sequence_classifier(tokens)
    model.config._attn_implementation = backend
    inputs = dict(tokens(TEXT, return_tensors="pt"))
    after: list[torch.Tensor] = []
    taken = [layer.attention.output.register_forward_hook(lambda module, args, out: after.append(out[0].detach())) for layer in encoder_layers(model)]
    with torch.no_grad():
        pairs = list(watched(model, inputs))
        for hook in taken:
            hook.remove()
        assert len(pairs) == len(after) == 3
        for (layer, seen), behind in zip(pairs, after, strict=True):
            out = layer.attention.output
            parts = parts_of(layer, seen, slice(0, 7))                                   # (7, N, D)
            torch.testing.assert_close(parts.sum(dim=1) + out.dense.bias, seen.before_first_norm[:7], atol=2e-5, rtol=1e-4)
            whole = seen.before_first_norm[:7]
            alone = through_norm((whole - parts.sum(dim=1))[:, None], out.LayerNorm, whole)[:, 0]
            normed = through_norm(parts, out.LayerNorm, whole).sum(dim=1)
            torch.testing.assert_close(normed + alone + out.LayerNorm.bias, behind[:7], atol=2e-5, rtol=1e-4)


def test_a_layer_by_loops() -> None:
    """Token by token and head by head."""
    tokens = tokenizer()
    model = sequence_classifier(tokens)
    inputs = dict(tokens("one two three", return_tensors="pt"))
    with torch.no_grad():
        layer, seen = list(watched(model, inputs))[1]
        got = norms(layer, seen)
        own, dense = layer.attention.self, layer.attention.output.dense
        x = seen.inputs
        for i in range(x.shape[0]):
            weights = []
            for head in range(4):
                piece = slice(8 * head, 8 * head + 8)
                logits = torch.stack([own.query(x[i])[piece] @ own.key(x[j])[piece] / 8**0.5 for j in range(x.shape[0])])
                weights.append(logits.softmax(0))
            for j in range(x.shape[0]):
                part = sum(weights[head][j] * dense.weight[:, 8 * head : 8 * head + 8] @ own.value(x[j])[8 * head : 8 * head + 8] for head in range(4))
                part = part + x[i] if i == j else part
                for norm, whole in ((layer.attention.output.LayerNorm, seen.before_first_norm[i]), (layer.output.LayerNorm, seen.before_second_norm[i])):
                    part = (part - part.mean()) / (whole.var(unbiased=False) + norm.eps) ** 0.5 * norm.weight
                assert got[i, j] == pytest.approx(float(part.norm()), rel=1e-4)


def test_globenc_scores() -> None:
    tokens = tokenizer()
    model = sequence_classifier(tokens)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    plain = GlobEnc(model, tokens)("One two three.")
    assert max(plain.scores) == 1
    assert min(plain.scores) > 0
    assert plain.offsets[0] == (0, 0)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    inputs = dict(tokens("One two three.", return_tensors="pt"))
    with torch.no_grad():
        matrices = [norms(layer, seen) for layer, seen in watched(model, inputs)]
    rolled = matrices[2] @ matrices[1] @ matrices[0]
    raw = GlobEnc(model, tokens, normalise=False)("One two three.").scores
    assert raw == pytest.approx((rolled[0] / rolled[0].max()).tolist(), rel=1e-4)
    assert raw != pytest.approx(plain.scores, rel=1e-2)


def test_a_token_that_nobody_looks_at_has_no_score() -> None:
    """One layer in which attention moves nothing: only CLS reaches CLS."""
    tokens = tokenizer()
    model = sequence_classifier(tokens, num_hidden_layers=1)
    nn.init.zeros_(encoder_layers(model)[0].attention.output.dense.weight)
    assert GlobEnc(model, tokens)("one two").scores == pytest.approx([1.0] + [0.0] * 5, abs=1e-5)


def test_frugal_with_globenc() -> None:
    tokens = tokenizer(48)
    model = sequence_classifier(tokens)
    found = compress(TEXT, "frugalprompt", 0.6, attribution=GlobEnc(model, tokens))
    assert found.num_kept == round(18 * 0.6)
    long = compress("so " * 200, "frugalprompt", 0.5, attribution=GlobEnc(model, tokens))
    assert (long.num_kept, min(long.scores) > 0) == (100, True), "a sentence longer than the model takes is scored in pieces"


def test_roberta_counts_places_from_its_filler() -> None:
    tokens = tokenizer(40)
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "max_position_embeddings": 40, "pad_token_id": 1}
    model = RobertaModel(RobertaConfig(vocab_size=len(tokens), **settings)).eval()
    assert len(GlobEnc(model, tokens)("so " * 100).scores) > 100


def test_errors() -> None:
    for options, wanted in (
        ({}, "attribution=None"),
        ({"attribution": by_length, "select": "best"}, "select='best'"),
        ({"attribution": by_length, "per": "line"}, "per='line'"),
        ({"attribution": lambda text: [1.0]}, "gave 1 numbers for a text of 3 words"),
        ({"attribution": by_length, "sentences": lambda text: ["elsewhere"]}, "does not stand in the text"),
    ):
        with pytest.raises(OptionError, match=wanted):
            compress("one two three", "frugalprompt", 0.5, **options)
    with pytest.raises(NotFiniteError, match="not finite"):
        compress("one two three", "frugalprompt", 0.5, attribution=lambda text: [float("nan")] * 3)
    with pytest.raises(UnsupportedModelError, match="no layers like BERT's"):
        GlobEnc(DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=8)), tokenizer())
    with pytest.raises(OptionError, match="fast tokenizer"):
        GlobEnc(sequence_classifier(tokenizer()), object())


def test_it_is_a_plain_transform() -> None:
    transform = FrugalPrompt(by_length)
    text = " ".join("x" * random.Random(0).randint(1, 9) for _ in range(20))
    assert len(transform(text, 0.5).split()) == 10
    assert transform(text, 1.0) == text
