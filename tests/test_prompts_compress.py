"""compress: what it never touches, chats, batches, callables, and what it remembers."""

from __future__ import annotations

import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.prompt_tools import token_classifier, tokenizer
from vlprune.errors import OptionError, UnknownNameError, VlpruneError
from vlprune.prompts import PROMPT_METHODS, Compressed, FrugalPrompt, LLMLingua2, TokenScores, compress, compress_batch, compress_messages
from vlprune.prompts.protect import protected_spans, special_tokens
from vlprune.prompts.words import Word, gather_scores, join_kept, split_words


def by_length(text: str) -> list[float]:
    return [float(len(word.text)) for word in split_words(text)]


def lingua_by_length(text: str) -> TokenScores:
    words = split_words(text, "punctuation")
    return TokenScores([(word.start, word.end) for word in words], [min(len(word.text), 20) / 30 for word in words])


METHODS = {"frugalprompt": {"attribution": by_length}, "llmlingua2": {"classifier": lingua_by_length}}
QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    "What is the colour of the big car behind the 2 trees?<|im_end|>\n<|im_start|>assistant\n"
)
LLAVA = "USER: <image>\nIs the small dog to the left of the fence at 12:30? <video> And there? ASSISTANT:"
LLAMA = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nDescribe what can be seen in <|image|> please<|eot_id|>"
GEMMA = "<bos><start_of_turn>user\n<start_of_image><image_soft_token>What is shown in this picture here?<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("prompt", [QWEN, LLAVA, LLAMA, GEMMA])
def test_placeholders_frames_and_numbers_stay(method: str, keep: float, prompt: str) -> None:
    found = compress(prompt, method, keep, **METHODS[method])
    spans = protected_spans(prompt)
    wanted = [prompt[start:end] for start, end in spans]
    assert len(wanted) >= 4
    assert [found.text[start:end] for start, end in protected_spans(found.text)] == wanted
    assert re.findall(r"\d+", found.text) == re.findall(r"\d+", prompt)
    assert found.num_kept < found.num_words, "something left"
    assert found.restore() == prompt
    free = [piece for piece in re.split("|".join(map(re.escape, wanted)), found.text) if piece.strip()]
    assert free, "something stayed"


def test_where_what_stands() -> None:
    found = compress(LLAVA, "frugalprompt", 0.4, attribution=by_length)
    assert found.text == "USER: <image>\nthe small left fence 12:30? <video> there? ASSISTANT:"
    assert found.marked() == (
        "USER: <image>\n[-Is-] the small [-dog-] [-to-] [-the-] left [-of-] [-the-] fence [-at-] 12:30? <video> [-And-] there? ASSISTANT:"
    )
    bare = compress("see <image> and", "frugalprompt", 0.5, attribution=by_length)
    assert bare.text == "see <image>"
    assert compress("see <image> and <video> there", "frugalprompt", 0.5, attribution=by_length).text == "see <image> <video> there"
    assert compress("touching<image>placeholders are small", "frugalprompt", 0.5, attribution=by_length).text == "touching<image>placeholders"


def test_one_budget_over_the_whole_prompt() -> None:
    """Stretches between placeholders do not get a share each."""
    found = compress("a b c d <image> fourth fifth <image> sixth seventh", "frugalprompt", 0.5, attribution=by_length)
    assert found.text == "<image> fourth fifth <image> sixth seventh"
    assert [word.text for word in found.dropped] == ["a", "b", "c", "d"]


def test_the_classifier_does_not_see_placeholders() -> None:
    seen: list[str] = []

    def score(text: str) -> list[float]:
        seen.append(text)
        return by_length(text)

    compress(QWEN, "frugalprompt", 0.5, attribution=score)
    assert not any("<" in text or "im_start" in text for text in seen)


def test_special_tokens_of_the_processor_stay() -> None:
    tokens = tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": ["§picture§"]})
    assert "§picture§" in special_tokens(tokens)

    class Processor:
        tokenizer = tokens
        image_token = "@@img@@"

    assert special_tokens(Processor())[0] in ("§picture§", "@@img@@")
    text = "now look §picture§ at @@img@@ everything there"
    found = compress(text, "frugalprompt", 0.2, attribution=by_length, processor=Processor())
    assert found.text == "§picture§ @@img@@ everything"
    assert found.num_words == 5
    assert compress(text, "frugalprompt", 0.2, attribution=by_length).num_words == 7


def test_protect() -> None:
    text = "do not go there as nothing is here"
    found = compress(text, "frugalprompt", 0.2, attribution=by_length, protect=["not", re.compile(r"is\b")])
    assert found.text == "not nothing is"
    assert [text[start:end] for start, end in found.protected] == ["not", "is"], "nothing has no not of its own"
    without = compress("keep <image> off", "frugalprompt", 0.4, attribution=by_length, placeholders=False)
    assert without.text == "<image>", "told so, it is a word like others"
    for wrong in ("not", [""], [3]):
        with pytest.raises(OptionError, match="protect"):
            compress(text, "frugalprompt", 0.5, attribution=by_length, protect=wrong)


def test_messages() -> None:
    messages = [
        {"role": "system", "content": "You are a very helpful assistant."},
        {"role": "user", "content": [{"type": "image", "url": "a.jpg"}, {"type": "text", "text": "what is in this photograph <image>"}, {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a photograph of a cat"}]},
        {"role": "user", "content": "and what is behind that?", "name": "me"},
    ]
    before = copy.deepcopy(messages)
    done = compress_messages(messages, "frugalprompt", 0.4, attribution=by_length)
    assert messages == before, "nothing is written into what was given"
    assert done.messages[0] == messages[0]
    assert done.messages[2] == messages[2]
    assert done.messages[1]["content"] == [{"type": "image", "url": "a.jpg"}, {"type": "text", "text": "what photograph <image>"}, {"type": "video"}]
    assert done.messages[3] == {"role": "user", "content": "behind that?", "name": "me"}
    assert set(done.parts) == {(1, 1), (3, None)}
    assert done.parts[1, 1].restore() == "what is in this photograph <image>"
    system = compress_messages(messages, "frugalprompt", 0.4, attribution=by_length, roles=("system", "assistant"))
    assert system.messages[1] == messages[1]
    assert system.messages[0]["content"] != messages[0]["content"]
    with pytest.raises(OptionError, match="turn 0"):
        compress_messages(["hello"], "frugalprompt", 0.4, attribution=by_length)


def test_batches() -> None:
    texts = ["one of these words", "<image> another one here"]
    found = compress_batch(texts, "frugalprompt", 0.5, attribution=by_length, progress=True, protect=["one"])
    assert [one.text for one in found] == [compress(text, "frugalprompt", 0.5, attribution=by_length, protect=["one"]).text for text in texts]
    with pytest.raises(OptionError, match="use compress"):
        compress_batch("text", "frugalprompt", 0.5, attribution=by_length)


def test_callables() -> None:
    def first_words(text: str, keep: float) -> str:
        words = text.split()
        return " ".join(words[: max(1, round(keep * len(words)))])

    found = compress("<image>\none two three four <video> five six", first_words, 0.5)
    assert found.text == "<image>\none two <video> five"
    assert (found.method, found.kept, found.num_words) == ("first_words", (), 6)
    with pytest.raises(VlpruneError, match=r"lost the numbers 4"):
        compress("one two 3 4", first_words, 0.75)
    assert compress("one two 3 4", first_words, 0.75, protect_numbers=False).text == "one two 3"
    with pytest.raises(OptionError, match="gave a int"):
        compress("one two", lambda text, keep: 3, 0.5)
    with pytest.raises(OptionError, match="attribution: options go with a method's name"):
        compress("one two", first_words, 0.5, attribution=by_length)
    built = FrugalPrompt(by_length)
    assert compress("one three", built, 0.5) == compress("one three", "frugalprompt", 0.5, attribution=by_length)


def test_what_it_remembers() -> None:
    found = compress("one <image> three 5 words", "frugalprompt", 0.5, attribution=by_length, count=len)
    assert isinstance(found, Compressed)
    assert str(found) == found.text == "<image> three 5"
    assert (found.num_words, found.num_kept, found.reached, found.asked) == (4, 2, 0.5, 0.5)
    assert found.forced == (False, False, True, False)
    assert found.dropped == (Word("one", 0, 3), Word("words", 20, 25))
    assert found.tokens == (25, len(found.text))
    assert found.report() == f"frugalprompt: 4 -> 2 words, asked 0.5, reached 0.5; 25 -> {len(found.text)} tokens"
    assert compress("a b", "frugalprompt", 0.5, attribution=by_length).reached_tokens is None
    counted = compress("one two", "frugalprompt", 0.5, attribution=by_length, count=tokenizer())
    assert counted.tokens == (4, 2)


@pytest.mark.parametrize("method", METHODS)
def test_all_of_it_is_the_text_itself(method: str) -> None:
    text = "  odd   spacing \n\n<image> stays\t12 "
    assert compress(text, method, 1.0, **METHODS[method]).text == text
    assert compress("<image>", method, 0.5, **METHODS[method]).text == "<image>"
    assert compress("", method, 0.5, **METHODS[method]).text == ""


PIECES = ["<image>", "<|im_start|>user\n", "word", "longer", "a", "3.5", "(x)", "\n", "don't", "42%", "<video>", ". ", "漢字"]


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=25),
    keep=st.floats(0.05, 1.0), method=st.sampled_from(sorted(METHODS)),
)  # fmt: skip
def test_laws_on_any_prompt(pieces: list[str], keep: float, method: str) -> None:
    """Protected spans and numbers in order; what is left is a subsequence of the words; share and flags agree with the text."""
    prompt = " ".join(pieces)
    found = compress(prompt, method, keep, **METHODS[method])
    frame = [prompt[start:end] for start, end in protected_spans(prompt)]
    assert [found.text[start:end] for start, end in protected_spans(found.text)] == frame
    way = "space" if method == "frugalprompt" else "punctuation"
    left = [word.text for word in split_words(found.text, way, protected_spans(found.text))]
    assert left == [word.text for word, stays in zip(found.words, found.kept, strict=True) if stays]
    assert all(stays for stays, must in zip(found.kept, found.forced, strict=True) if must)
    assert [word.text for word in found.words if word.has_digit] == [text for text in left if any(map(str.isdigit, text))]
    assert found.marked("", "") == prompt
    if method == "frugalprompt" and found.words and keep < 1:
        assert found.num_kept == max(sum(found.forced), 1, round(len(found.words) * round(100 * keep, 9) / 100))


def test_words() -> None:
    def cut(text: str) -> list[str]:
        return [word.text for word in split_words(text, "punctuation")]

    assert cut("Step 1: add $40, then (f(x)) or -3.5.") == ["Step", "1", ":", "add", "$40", ",", "then", "(", "f(x)", ")", "or", "-3.5", "."]
    assert cut(r"\frac{1}{2} 5! wow! .5 'tis “so” ...") == [r"\frac{1}{2}", "5!", "wow", "!", ".5", "'", "tis", "“", "so", "”", ".", ".", "."]
    assert cut("漢字、12です") == ["漢", "字", "、", "12", "で", "す"]
    assert [word.text for word in split_words("a, b")] == ["a,", "b"]
    words = split_words("Well, (yes)\nno", "punctuation")
    assert join_kept("Well, (yes)\nno", words, [True] * 6) == "Well, (yes) no"
    assert join_kept("Well, (yes)\nno", words, [True, False, False, True, True, True], newlines=True) == "Well yes)\nno"
    assert gather_scores([Word("ab", 1, 3), Word("cd", 4, 6)], TokenScores([(0, 2), (2, 3), (3, 5), (5, 6), (6, 9)], [1, 2, 3, 4, 5])) == [[1, 2], [3, 4]]


def test_cards() -> None:
    assert list(PROMPT_METHODS) == ["llmlingua2", "frugalprompt", "tokenskip"]
    for card in PROMPT_METHODS.values():
        assert all((card.summary, card.needs, card.code.startswith("https://"), re.fullmatch(r"arXiv:\d{4}\.\d{5}", card.paper)))
    with pytest.raises(UnknownNameError, match="Did you mean 'llmlingua2'"):
        compress("a", "llmlingua", 0.5)
    with pytest.raises(OptionError, match=r"does not shorten a prompt at inference; see vlprune\.prompts\.tokenskip"):
        compress("a", "tokenskip", 0.5)


def test_errors() -> None:
    for keep in (0, 1.5, True, "half", -1):
        with pytest.raises(OptionError, match="keep="):
            compress("a b", "frugalprompt", keep, attribution=by_length)
    with pytest.raises(OptionError, match="compress_messages for chats"):
        compress([{"role": "user", "content": "a"}], "frugalprompt", 0.5, attribution=by_length)
    with pytest.raises(OptionError, match="method=3"):
        compress("a b", 3, 0.5)
    with pytest.raises(OptionError, match="words='letters'"):
        split_words("a", "letters")


def test_a_real_classifier_behind_a_chat() -> None:
    """Placeholders in the middle, sub-words, a processor: everything at once."""
    tokens = tokenizer()
    transform = LLMLingua2(token_classifier(tokens), tokens)
    found = compress(QWEN, transform, 0.5, processor=tokens)
    assert found.text.startswith("<|im_start|>system\n")
    assert "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>" in found.text
    assert found.text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert 0.3 < found.reached < 0.7
