"""Scenes, questions and the trained tiny model."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

try:
    from vlprune.evals import digits as D
except ImportError:
    from evals import digits as D

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "vlprune" / "assets" / "tiny_vlm"
WEIGHTS = ASSETS / "model.safetensors"
needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason="the tiny model has not been exported")


def load_example():
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location("train_tiny_vlm", ROOT / "examples" / "train_tiny_vlm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenes():
    return [D.scene(split, i) for split in D.SPLITS for i in range(60)]


def test_same_arguments_same_pixels():
    a, b = D.scene("heldout", 7, seed=3), D.scene("heldout", 7, seed=3)
    assert np.array_equal(a.image, b.image)
    assert a.objects == b.objects
    assert not np.array_equal(a.image, D.scene("heldout", 7, seed=4).image)
    assert not np.array_equal(a.image, D.scene("heldout", 8, seed=3).image)
    assert D.questions(a) == D.questions(b)


def test_splits_share_nothing(scenes):
    pools = [{i for part in D.digit_pool(split).values() for i in part} for split in D.SPLITS]
    assert not pools[0] & pools[1]
    assert len(pools[0] | pools[1]) == 1797
    assert not set(D.BACKGROUNDS["train"]) & set(D.BACKGROUNDS["heldout"])
    for s in scenes:
        assert s.background in D.BACKGROUNDS[s.split]
        assert {o.source for o in s.objects} <= pools[D.SPLITS.index(s.split)]


def test_digits_cover_ten_to_thirty_percent_of_the_patches(scenes):
    assert 0.10 < np.mean([(s.patch_object >= 0).mean() for s in scenes]) < 0.30


def test_patch_labels_agree_with_objects(scenes):
    for s in scenes:
        assert s.image.shape == (D.SIZE, D.SIZE, 3)
        assert s.image.dtype == np.uint8
        assert 2 <= len(s.objects) <= 6
        for k, o in enumerate(s.objects):
            rows, cols = np.nonzero(s.patch_object == k)
            assert len(rows) >= 2
            x0, y0, x1, y1 = o.box
            assert 0 <= x0 < x1 <= D.SIZE
            assert 0 <= y0 < y1 <= D.SIZE
            assert rows.min() >= (y0 - 2) // D.PATCH
            assert rows.max() <= (y1 + 2) // D.PATCH
            assert cols.min() >= (x0 - 2) // D.PATCH
            assert cols.max() <= (x1 + 2) // D.PATCH
            assert set(s.patch_digit[rows, cols]) == {o.digit}
            assert set(s.patch_colour[rows, cols]) == {D.COLOUR_NAMES.index(o.colour)}
            # the named place is where the box really is
            third = D.SIZE / 3
            assert divmod(D.PLACES.index(o.place), 3) == (int((y0 + y1) / 2 // third), int((x0 + x1) / 2 // third))
        assert (s.patch_digit[s.patch_object < 0] == -1).all()


def expected(text: str, s: D.Scene) -> str:
    """The answer worked out anew from boxes and labels, with none of the generator's code."""
    words = text.removesuffix(" ?").split()
    row = lambda o: int((o.box[1] + o.box[3]) / 2 * 3 // D.SIZE)
    col = lambda o: int((o.box[0] + o.box[2]) / 2 * 3 // D.SIZE)

    def only(*names: str) -> D.SceneObject:
        fit = [o for o in s.objects if all(n in (str(o.digit), o.colour, o.place) for n in names if n != "digit")]
        assert len(fit) == 1, text
        return fit[0]

    if text.startswith("how many"):
        return str(sum(words[2] in ("digits", o.colour) for o in s.objects))
    if text.startswith("is there"):
        return "yes" if any(words[3] in (str(o.digit), o.colour) for o in s.objects) else "no"
    if "sum" in words:
        return str(only(words[6]).digit + only(words[9]).digit)
    if "largest" in words:
        first, second = sorted((o.size for o in s.objects), reverse=True)[:2]
        assert first >= 1.25 * second
        return str(next(o.digit for o in s.objects if o.size == first))
    if text.startswith("what colour is the digit at"):
        return only(words[-1]).colour
    if text.startswith("what colour"):
        return only(words[-1]).colour
    if text.startswith("where"):
        return only(*words[3:]).place
    if text.startswith("which digit is at the"):
        return str(only(words[-1]).digit)
    if len(words) == 4:
        return str(only(words[-1]).digit)
    anchor = only(*words[words.index("the") + 1 :])
    same_row = [o for o in s.objects if o is not anchor and row(o) == row(anchor)]
    same_col = [o for o in s.objects if o is not anchor and col(o) == col(anchor)]
    side = {
        "left": [o for o in same_row if col(o) < col(anchor)],
        "right": [o for o in same_row if col(o) > col(anchor)],
        "above": [o for o in same_col if row(o) < row(anchor)],
        "below": [o for o in same_col if row(o) > row(anchor)],
    }[words[3]]
    return str(min(side, key=lambda o: abs(row(o) - row(anchor)) + abs(col(o) - col(anchor))).digit)


def test_answers_derived_independently(scenes):
    kinds = Counter()
    for s in scenes:
        asked = D.questions(s)
        assert len({q.text for q in asked}) == len(asked)
        for q in asked:
            kinds[q.kind] += 1
            assert q.answer == expected(q.text, s), (q, s.objects)
    assert set(kinds) == set(D.KINDS)


def test_heldout_questions_are_balanced():
    pairs = D.heldout_questions(240, seed=1)
    assert len(pairs) == 240
    assert all(s.split == "heldout" for s, _ in pairs)
    assert pairs[5][1] == D.heldout_questions(6, seed=1)[5][1]
    for kind in D.KINDS:
        answers = Counter(q.answer for _, q in pairs if q.kind == kind)
        assert sum(answers.values()) == 20
        assert max(answers.values()) <= (12 if kind == "exists" else 8), (kind, answers)


def test_vocabulary_holds_every_word(scenes):
    words = set(D.vocabulary())
    for s in scenes:
        for q in D.questions(s):
            assert set(q.text.split()) <= words
            assert q.answer in words


def test_packed_questions_equal_single_questions():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    T = load_example()
    torch.manual_seed(0)
    processor = T.build_processor()
    model = T.new_model(processor).eval()
    make = T.QuestionBatches(processor.tokenizer)
    images, (ids, targets, owner, kept, weights) = make(range(1))
    s = make.scene(10_000_000)
    assert np.array_equal(images[0].numpy(), s.image)
    with torch.no_grad():
        features = T.tower_features(model.model.vision_tower, T.to_pixels(images))
        packed = T.packed_logits(model, features, ids, owner)[0]
        for number in (1, 4, 9):
            here = owner[0] == number
            text = processor.tokenizer.decode(ids[0][here])
            alone = processor(images=s.pil(), text=f"USER: <image> {text}", return_tensors="pt")
            logits = model(**alone).logits[0, T.PREFIX :]
            assert torch.allclose(logits, packed[here], atol=1e-4)
            asked = targets[0][here]
            assert (asked[:-2] == -100).all()
            assert asked[-1] == processor.tokenizer.eos_token_id
            assert asked[-2] == ids[0][here][-1]
        every = torch.arange(D.GRID**2)[None]
        assert torch.allclose(T.packed_logits(model, features, ids, owner, every)[0], packed, atol=1e-5)
    assert ((weights > 0) == (owner > 0)).all()
    assert kept.shape == (1, make.patches)
    assert set(np.flatnonzero(s.patch_object >= 0)) <= set(kept[0].tolist())


@needs_weights
def test_weights_are_small_and_tokenizer_knows_every_word():
    pytest.importorskip("transformers")
    from transformers import AutoProcessor

    assert WEIGHTS.stat().st_size <= 16 * 2**20
    tokenizer = AutoProcessor.from_pretrained(ASSETS).tokenizer
    for word in [*D.vocabulary(), "USER:", "ASSISTANT:", "Top-Left", "7?"]:
        assert tokenizer.unk_token_id not in tokenizer(word)["input_ids"], word
    for word in D.vocabulary():
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


@needs_weights
def test_trained_model_reads_heldout_pictures():
    pytest.importorskip("transformers")
    result = load_example().evaluate(ASSETS, n=60, seed=2)
    assert result["dense"] > 0.6 > 0.45 > result["blank"]
