"""Trains, exports and evaluates the tiny Qwen2.5-VL model in ``vlprune/assets/tiny_video_vlm`` from random weights, on a CPU.

Two stages, each with a time budget that its learning rate is scheduled on:

1. ``tower``: the vision tower with its merger learns, for every visual token, which digit and colour it shows, whether that moves, and which way.
2. ``questions``: the Qwen2.5 decoder learns to answer questions about clips (`vlprune.evals.moving_scenes`) from the tower's features.

    python examples/train_tiny_video_vlm.py --stage tower --minutes 25
    python examples/train_tiny_video_vlm.py --stage questions --minutes 50
    python examples/train_tiny_video_vlm.py --export
    python examples/train_tiny_video_vlm.py --evaluate --n 1000 --json result.json

Checkpoints allow to stop and to start again with the same command. The optimiser, the packing of questions and the team of processes are those of
``train_tiny_vlm.py``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import train_tiny_vlm as single  # noqa: E402

from vlprune.embedded_video import pack_frames  # noqa: E402
from vlprune.evals import digits as D  # noqa: E402
from vlprune.evals import moving_scenes as S  # noqa: E402

ASSETS = Path(__file__).resolve().parents[1] / "vlprune" / "assets" / "tiny_video_vlm"
TOWER, HEADS, DEPTH = 96, 3, 8                                            # of the vision tower
WIDTH, LAYERS = 128, 8                                                    # of the decoder
PATCH, MERGE, TEMPORAL, WINDOW = 8, 2, 2, 64                              # pixels, patches, frames, pixels
WHOLE = (1, 3, 5, 7)                                                      # blocks that see a whole frame pair, the others windows
SIDE = D.SIZE // PATCH // MERGE                                           # visual tokens along a side
STEPS = S.FRAMES // TEMPORAL                                              # frame pairs
TOKENS = STEPS * SIDE**2
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL = len(WORDS)
PAD, START, END, _, VISION_START, VISION_END, IMAGE, VIDEO = range(SPECIAL)
VOCABULARY = [*WORDS, "user", "assistant", "system", *S.vocabulary()]
NUMBER = {word: number for number, word in enumerate(VOCABULARY)}
HEAD = (START, NUMBER["user"], VISION_START)                              # before the video
TAIL = (END, START, NUMBER["assistant"])                                  # behind the question
MOTIONS = ("nothing", "still", *S.WAYS)


# the model


def build_model():
    """A Qwen2.5-VL model with random weights: 8 tower blocks of width 96 and 8 decoder layers of width 128."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": DEPTH, "hidden_size": TOWER, "intermediate_size": 256, "num_heads": HEADS, "patch_size": PATCH, "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL, "window_size": WINDOW, "out_hidden_size": WIDTH, "fullatt_block_indexes": list(WHOLE),
        "tokens_per_second": S.FPS // TEMPORAL, "rope_parameters": {"rope_type": "axial", "rope_theta": 20.0},
    }  # fmt: skip
    # Frames are small and prompts short: a small base gives all three axes frequencies that tell neighbours apart.
    text = {
        "vocab_size": len(VOCABULARY), "hidden_size": WIDTH, "intermediate_size": 320, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
        "rope_parameters": {"rope_type": "default", "rope_theta": 4.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    init_tower(model.model.visual)
    with torch.no_grad():
        for name, p in model.model.language_model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.5 if "embed" in name else 0.06)
    return model


@torch.no_grad()
def init_tower(tower: nn.Module) -> None:
    """Random weights, but patches start by looking at themselves and their neighbours.

    Equal biases of queries and keys make attention fall with distance through the rotary embedding; a tower this small learns shapes sooner that way.
    """
    tower.patch_embed.proj.weight.normal_(0, 0.05)
    head = TOWER // HEADS
    for block in tower.blocks:
        for p in block.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.06)
        for number in range(HEADS):
            basis = torch.linalg.qr(torch.randn(TOWER, head))[0].T * 0.5
            near = torch.cat([torch.full((head // 2,), (1.0, 1.5, 2.0)[number % 3]), torch.zeros(head // 2)])
            for part in (0, 1):
                rows = slice(part * TOWER + number * head, part * TOWER + (number + 1) * head)
                block.attn.qkv.weight[rows] = basis + 0.03 * torch.randn(head, TOWER)
                block.attn.qkv.bias[rows] = near
    for linear in (tower.merger.mlp[0], tower.merger.mlp[2]):
        linear.weight.normal_(0, linear.weight.shape[1] ** -0.5)


class Tower(nn.Module):
    """The model's own tower on frame pairs of one size, as batches: the loops over windows cost more than the arithmetic here."""

    def __init__(self, visual: nn.Module, compiled: bool = False) -> None:
        super().__init__()
        from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

        self.visual = visual
        grid = torch.tensor([[1, SIDE * MERGE, SIDE * MERGE]])
        self.order, bounds = get_vision_window_index(grid, MERGE, WINDOW, PATCH)
        self.windows = len(bounds) - 1
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, MERGE))
        unit = MERGE**2
        self.cos, self.sin = (x.reshape(-1, unit, x.shape[-1])[self.order].reshape(-1, x.shape[-1]) for x in (cos, sin))
        self.run = torch.compile(self.block, dynamic=False) if compiled else self.block

    def block(self, block: nn.Module, x: torch.Tensor, windows: int) -> torch.Tensor:
        """One block on (pairs, patches, width)."""
        n, length, width = x.shape
        q, k, v = block.attn.qkv(block.norm1(x)).view(n, length, 3, HEADS, -1).unbind(2)

        def turned(y: torch.Tensor) -> torch.Tensor:
            one, two = y.chunk(2, -1)
            return y * self.cos[:, None] + torch.cat([-two, one], -1) * self.sin[:, None]

        q, k, v = (y.reshape(n * windows, length // windows, HEADS, -1).transpose(1, 2) for y in (turned(q), turned(k), v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + block.attn.proj(mixed)
        return x + block.mlp(block.norm2(x))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Packed patches (pairs, patches, values) to visual tokens (pairs, tokens, decoder width)."""
        visual, n, unit = self.visual, len(patches), MERGE**2
        x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
        x = x.view(n, -1, unit, TOWER)[:, self.order].reshape(n, -1, TOWER)
        for number, block in enumerate(visual.blocks):
            x = self.run(block, x, 1 if number in WHOLE else self.windows)
        merged = visual.merger(x).view(n, -1, WIDTH)
        return merged[:, self.order.argsort()]


def pairs_of(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 frames (N, F, H, W, 3) to the packed patches of each frame pair, (N * F / 2, patches, values)."""
    packed = [pack_frames(torch.as_tensor(clip), PATCH, MERGE, TEMPORAL)[0] for clip in frames]
    return torch.stack(packed).unflatten(1, (-1, (SIDE * MERGE) ** 2)).flatten(0, 1)


def optimisers(modules: list[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, heads, biases and norms."""
    matrices, others = [], []
    for module in modules:
        for name, p in module.named_parameters():
            if p.requires_grad:
                hidden = p.ndim == 2 and any(part in name for part in ("layers.", "blocks.", "merger."))
                (matrices if hidden else others).append(p)
    return [single.Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


# first stage


class TowerHeads(nn.Module):
    """Reads labels off the visual tokens; thrown away after the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 11 + 8 + len(MOTIONS) + 2)

    def loss(self, tokens: torch.Tensor, labels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and the predicted digit of every visual token."""
        digit, colour, motion, offset = self.out(self.norm(tokens)).split((11, 8, len(MOTIONS), 2), -1)
        flat = lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten())  # noqa: E731
        inside = (labels["digit"] < 10).float()
        loss = flat(digit, labels["digit"]) + 0.5 * flat(colour, labels["colour"]) + 0.5 * flat(motion, labels["motion"])
        return loss + 0.3 * (((offset - labels["offset"]) ** 2).sum(-1) * inside).sum() / inside.sum(), digit.argmax(-1)


def crowded(index: int, warp: float) -> tuple[np.ndarray, tuple, np.ndarray, tuple[str, ...]]:
    """A frame pair with as many digits as there is room for: one or two on their way, others beside them.

    Returns:
        Frames, actors, cover as in `MovingScene`, and for each actor a word of ``MOTIONS``.
    """
    rng = np.random.default_rng((6, index))
    canvas, _ = S._background(rng, "train", TEMPORAL)
    vertical, first = bool(rng.integers(2)), TEMPORAL * int(rng.integers(STEPS))
    cells = list(np.ndindex(3, 3))
    plan = []
    for line in rng.permutation(3)[: int(rng.integers(1, 3))]:
        end = int(rng.integers(2))
        path = [(step, int(line)) if vertical else (int(line), step) for step in ((2, 1, 0) if end else (0, 1, 2))]
        cells = [cell for cell in cells if cell not in path]
        plan.append((S.WAYS[2 * vertical + (not end)], [S._between(path[0], path[2], frame) for frame in range(first, first + TEMPORAL)]))
    few = index % 4 == 0
    chosen = [cells[k] for k in rng.permutation(len(cells))[: int(rng.integers(1, 4)) if few else len(cells)]]
    plan += [("still", [cell] * TEMPORAL) for cell in chosen]
    ink = np.zeros((len(plan), TEMPORAL, D.GRID, D.GRID), dtype=np.float32)
    actors = []
    for (motion, places), covered in zip(plan, ink, strict=True):
        digit, colour = int(rng.integers(10)), D.COLOUR_NAMES[rng.integers(7)]
        boxes = S.draw(rng, canvas, covered, "train", digit, colour, places, tuple(range(TEMPORAL)), warp)
        actors.append(S.Actor(motion, digit, colour, tuple(range(TEMPORAL)), ("", ""), boxes))
    canvas += 4.0 * rng.standard_normal((TEMPORAL, D.SIZE, D.SIZE, 1), dtype=np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), tuple(actors), S.owners(ink), tuple(motion for motion, _ in plan)


def token_owner(cover: np.ndarray) -> np.ndarray:
    """Which actor most patches of a visual token show, from (2, GRID, GRID) to (tokens,); -1 for none."""
    parts = cover.reshape(TEMPORAL, SIDE, MERGE, SIDE, MERGE).transpose(1, 3, 0, 2, 4).reshape(SIDE**2, -1)
    counts = np.stack([(parts == actor).sum(1) for actor in range(max(int(cover.max()) + 1, 1))])
    return np.where(counts.max(0) > 0, counts.argmax(0), -1)


def token_labels(actors: tuple, cover: np.ndarray, motions: tuple[str, ...], first: int) -> dict[str, np.ndarray]:
    """Labels of the visual tokens of the frame pair that begins with frame ``first``."""
    owner = token_owner(cover)
    centre = np.zeros((len(actors) + 1, 2), dtype=np.float32)
    for number, actor in enumerate(actors):
        boxes = np.array([box for frame, box in zip(actor.frames, actor.boxes, strict=True) if first <= frame < first + TEMPORAL])
        if len(boxes):
            centre[number] = (boxes[:, :2] + boxes[:, 2:]).mean(0) / 2
    at = (np.indices((SIDE, SIDE))[::-1].reshape(2, -1).T + 0.5) * PATCH * MERGE
    return {
        "digit": np.array([a.digit for a in actors] + [10])[owner],
        "colour": np.array([D.COLOUR_NAMES.index(a.colour) for a in actors] + [7])[owner],
        "motion": np.array([MOTIONS.index(m) for m in motions] + [0])[owner],
        "offset": ((centre[owner] - at) / (PATCH * MERGE)).astype(np.float32),
    }


def tower_batch(indices: range, warp: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Training pairs and their labels."""
    frames, rows = [], []
    for index in indices:
        pixels, actors, cover, motions = crowded(index, warp)
        frames.append(pixels)
        rows.append(token_labels(actors, cover, motions, 0))
    return pairs_of(np.stack(frames)), joined(rows)


def heldout_pairs(clips: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All frame pairs of some held-out clips and their labels."""
    frames, rows = [], []
    for index in range(clips):
        scene = S.clip("heldout", index, seed=5)
        frames.append(scene.frames)
        motions = tuple(scene.way if a.role == "moves" else "still" for a in scene.actors)
        rows += [token_labels(scene.actors, scene.cover[f : f + TEMPORAL], motions, f) for f in range(0, S.FRAMES, TEMPORAL)]
    return pairs_of(np.stack(frames)), joined(rows)


def joined(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Labels of several pairs as tensors."""
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}


def train_tower(team: single.Team, folder: Path, minutes: float, batch: int, lr: float) -> None:
    """First stage; writes ``tower.pt`` and ``tower.jsonl``."""
    torch.manual_seed(0)
    visual, heads = build_model().model.visual, TowerHeads()
    tower = Tower(visual, compiled=True)
    opts = optimisers([visual, heads], lr)
    step, spent, path = 0, 0.0, folder / "tower.pt"
    if path.exists():
        saved = torch.load(path, weights_only=False)
        visual.load_state_dict(saved["tower"])
        heads.load_state_dict(saved["heads"])
        for o, state in zip(opts, saved["opts"], strict=True):
            o.load_state_dict(state)
        step, spent = saved["step"], saved["spent"]
    parameters = [p for o in opts for g in o.param_groups for p in g["params"]]
    part = batch // team.size
    patches, truth = heldout_pairs(24)
    start, shown, losses, fraction = time.time() - spent, time.time(), [], 0.0

    def save() -> None:
        settings = {"minutes": minutes, "batch": batch, "lr": lr, "processes": team.size, "seed": 0}
        torch.save({"tower": visual.state_dict(), "heads": heads.state_dict(), "opts": [o.state_dict() for o in opts],
                        "step": step, "spent": time.time() - start, "settings": settings}, path)  # fmt: skip

    while fraction < 1.0:
        pixels, labels = tower_batch(team.share(step, batch), warp=1.6)
        loss, _ = heads.loss(tower(pixels), labels)
        loss.backward()
        mean_loss, fraction = team.average(parameters, [loss.item(), (time.time() - start) / (60 * minutes)])
        nn.utils.clip_grad_norm_(parameters, 2.0)
        for o in opts:
            o.param_groups[0]["lr"] = lr * single.schedule(fraction, step)
            o.step()
            o.zero_grad()
        losses.append(mean_loss)
        step += 1
        if team.rank == 0 and (time.time() - shown > 45 or step == 10):
            shown = time.time()
            with torch.no_grad():
                guess = torch.cat([heads.loss(tower(patches[i : i + part]), {k: v[i : i + part] for k, v in truth.items()})[1]
                                   for i in range(0, len(patches) - part + 1, part)])  # fmt: skip
            asked = truth["digit"][: len(guess)]
            right = (guess == asked)[asked < 10].float().mean().item()
            row = {"stage": "tower", "step": step, "minutes": round((time.time() - start) / 60, 2),
                       "loss": round(float(np.mean(losses)), 4), "heldout_token_digit": round(right, 4)}  # fmt: skip
            losses = []
            print(json.dumps(row), flush=True)
            with open(folder / "tower.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            save()
    if team.rank == 0:
        save()


# second stage


MOST = {"does": 3, "when": 3, "appears_when": 2, "order": 3, "colour_appears": 2, "place_appears": 2}  # questions of a kind about one clip, else 1
WEIGHT = {"count": 4.0, "count_appear": 2.0, "stays": 1.5, "first": 1.5, "last": 1.5, "moves": 1.5, "order": 1.5}  # in the loss


def packed_logits(model, features: torch.Tensor, ids: torch.Tensor, owner: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Logits for packed questions: each sees the video and itself only, as if it had been asked alone.

    Args:
        model: the whole model.
        features: visual tokens of each clip, (N, TOKENS, WIDTH).
        ids: token ids of the packed questions, (N, T).
        owner: question number of every token, (N, T), from 1; -1 for padding.
        kept: visual tokens to show, (N, K), ascending; None shows all. They stay at their positions.

    Returns:
        Logits of the T question positions.
    """
    n, t = ids.shape
    embed = model.model.language_model.embed_tokens
    where = torch.arange(TOKENS).expand(n, -1) if kept is None else kept
    if kept is not None:
        features = features.gather(1, kept[..., None].expand(-1, -1, WIDTH))
    before, after = (embed(torch.tensor([part])).expand(n, -1, -1) for part in (HEAD, (VISION_END,)))
    inputs = torch.cat([before, features, after, embed(ids)], 1)
    prefix = inputs.shape[1] - t
    group = torch.cat([torch.zeros(n, prefix, dtype=owner.dtype), owner], 1)
    order = torch.arange(prefix + t)
    seen = ((group[:, :, None] == group[:, None]) | (group[:, None] == 0)) & (order[:, None] >= order[None])
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    new = torch.ones_like(owner, dtype=torch.bool)
    new[:, 1:] = owner[:, 1:] != owner[:, :-1]
    here = torch.arange(t).expand(n, -1)
    begun = torch.where(new, here, 0).cummax(1).values
    base = len(HEAD)
    places = torch.stack([base + where // SIDE**2, base + where // SIDE % SIDE, base + where % SIDE])
    head = torch.arange(base).expand(3, n, -1)
    end = torch.full((3, n, 1), base + SIDE)
    text = (base + SIDE + 1 + here - begun).expand(3, n, -1)
    hidden = model.model.language_model(
        inputs_embeds=inputs, attention_mask={"full_attention": mask}, position_ids=torch.cat([head, places, end, text], 2), use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, prefix:])


def words_of(question) -> tuple[list[int], int]:
    """Ids of a question up to where its answer begins, and of the answer."""
    return [*(NUMBER[word] for word in question.text.split()), *TAIL], NUMBER[question.answer]


def choose_questions(found: list, rng: np.random.Generator) -> list:
    """Random order, each kind a few times; what is asked once a clip comes before what is asked often."""
    picked: list = []
    counts: dict[str, int] = {}
    for i in rng.permutation(len(found)):
        kind = found[i].kind
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= MOST.get(kind, 1):
            picked.append((rng.random() * 0.85 ** (counts[kind] - 1), found[i]))
    return [question for _, question in sorted(picked, key=lambda pair: -pair[0])]


def choose_tokens(cover: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Ascending indices of visual tokens: those with ink first, then random background."""
    ink = np.concatenate([token_owner(cover[f : f + TEMPORAL]) >= 0 for f in range(0, S.FRAMES, TEMPORAL)])
    order = np.argsort(-(ink + 0.9 * rng.random(ink.size)), kind="stable")
    return np.sort(order[:number])


class Batches:
    """Makes packed training batches: frames, and token ids, targets, owners, kept tokens and loss weights."""

    def __init__(self, room: int = 224, few: int = 112) -> None:
        self.room, self.few = room, few

    def __call__(self, indices: range, split: str = "train", warp: float = 1.2):
        frames, packed = [], []
        for index in indices:
            rng = np.random.default_rng((7, index))
            scene = S.clip(split, index, seed=0 if split == "train" else 6, warp=warp)
            frames.append(scene.frames)
            asked = choose_questions(S.questions(scene), rng)
            ids, targets, owner = single.pack([words_of(q) for q in asked], END, self.room)
            weights = np.array([0.0] + [WEIGHT.get(q.kind, 1.0) for q in asked])[np.maximum(owner, 0)]
            kinds = np.array([-1] + [S.KINDS.index(q.kind) for q in asked])[np.maximum(owner, 0)]
            packed.append((ids, targets, owner, choose_tokens(scene.cover, self.few, rng), weights.astype(np.float32), kinds))
        return pairs_of(np.stack(frames)), [torch.from_numpy(np.stack(x)) for x in zip(*packed, strict=True)]


def train_questions(team: single.Team, folder: Path, minutes: float, batch: int, lr: float, few_until: float) -> None:
    """Second stage; reads ``tower.pt``, writes ``questions.pt`` and ``questions.jsonl``."""
    torch.manual_seed(1)
    model, make = build_model(), Batches()
    visual = model.model.visual
    visual.load_state_dict(torch.load(folder / "tower.pt", weights_only=False)["tower"])
    visual.requires_grad_(False)
    tower = Tower(visual, compiled=True)
    part = batch // team.size
    scale_merger(visual, tower, make(range(part))[0])
    opts = optimisers([model.model.language_model, model.lm_head], lr)
    step, spent, path = 0, 0.0, folder / "questions.pt"
    if path.exists():
        saved = torch.load(path, weights_only=False)
        model.load_state_dict(saved["model"])
        for o, state in zip(opts, saved["opts"], strict=True):
            o.load_state_dict(state)
        step, spent = saved["step"], saved["spent"]
    parameters = [p for o in opts for g in o.param_groups for p in g["params"]]
    start, shown, losses, fraction = time.time() - spent, time.time(), [], 0.0

    def features_of(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return tower(pixels).view(-1, TOKENS, WIDTH)

    def save() -> None:
        settings = {"minutes": minutes, "batch": batch, "lr": lr, "processes": team.size, "seed": 1, "room": make.room, "few_until": few_until,
                        "few_tokens": make.few}  # fmt: skip
        torch.save({"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "step": step, "spent": time.time() - start,
                        "settings": settings}, path)  # fmt: skip

    while fraction < 1.0:
        pixels, (ids, targets, owner, kept, weights, _) = make(team.share(step, batch))
        # Fewer background tokens make the first part faster; the rest of the training shows every token.
        logits = packed_logits(model, features_of(pixels), ids, owner, kept if fraction < few_until else None).flatten(0, 1)
        losses_of = F.cross_entropy(logits, targets.flatten(), reduction="none")
        weights = weights.flatten() * (targets.flatten() != -100)
        loss = (losses_of * weights).sum() / weights.sum()
        loss.backward()
        mean_loss, fraction = team.average(parameters, [loss.item(), (time.time() - start) / (60 * minutes)])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for o in opts:
            o.param_groups[0]["lr"] = lr * single.schedule(fraction, step)
            o.step()
            o.zero_grad()
        losses.append(mean_loss)
        step += 1
        if team.rank == 0 and (time.time() - shown > 120 or step == 3):
            shown = time.time()
            kinds = quick_accuracy(model, make, features_of, part, few=fraction < few_until)
            row = {"stage": "questions", "step": step, "minutes": round((time.time() - start) / 60, 2), "loss": round(float(np.mean(losses)), 4),
                       "heldout_answers": round(float(np.mean(list(kinds.values()))), 4), "kinds": kinds}  # fmt: skip
            losses = []
            print(json.dumps(row), flush=True)
            with open(folder / "questions.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            save()
    if team.rank == 0:
        save()


@torch.no_grad()
def scale_merger(visual: nn.Module, tower: Tower, pixels: torch.Tensor) -> None:
    """Brings visual tokens to the size of word embeddings."""
    last, out = visual.merger.mlp[2], tower(pixels)
    last.bias -= out.mean((0, 1))
    factor = 0.5 / out.std()
    last.weight *= factor
    last.bias *= factor


@torch.no_grad()
def quick_accuracy(model, make: Batches, features_of, batch: int, few: bool, clips: int = 32) -> dict[str, float]:
    """Share of right first answer tokens by kind, on packed questions about held-out clips."""
    right: dict[str, list[bool]] = {}
    for first in range(0, clips, batch):
        pixels, (ids, targets, owner, kept, _, kinds) = make(range(first, first + batch), "heldout", 0.0)
        guess = packed_logits(model, features_of(pixels), ids, owner, kept if few else None).argmax(-1)
        answers = (targets != -100) & (targets != END)
        for kind, hit in zip(kinds[answers].tolist(), (guess == targets)[answers].tolist(), strict=True):
            right.setdefault(S.KINDS[kind], []).append(hit)
    return {kind: round(float(np.mean(right[kind])), 3) for kind in S.KINDS if kind in right}


# the exported model


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():
    """Word-level tokenizer with Qwen's special tokens and a chat template without a system message."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(NUMBER, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?.]"), "isolated")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", unk_token="<unk>", pad_token="<|endoftext|>",
        additional_special_tokens=[word for word in WORDS[1:] if word not in ("<unk>", "<|im_end|>")], padding_side="left", model_max_length=2048,
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def export(folder: Path, assets: Path) -> None:
    """Writes the trained model with tokenizer and image processor in Hugging Face's layout, with the training curve."""
    from transformers import GenerationConfig, Qwen2VLImageProcessorPil

    model = build_model()
    saved = torch.load(folder / "questions.pt", weights_only=False)
    model.load_state_dict(saved["model"])
    model.generation_config = GenerationConfig(bos_token_id=START, eos_token_id=END, pad_token_id=PAD, max_new_tokens=4, do_sample=False)
    model.save_pretrained(assets)
    build_tokenizer().save_pretrained(assets)
    area = {"shortest_edge": D.SIZE**2, "longest_edge": D.SIZE**2}
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TEMPORAL, size=area).save_pretrained(assets)
    for written in assets.iterdir():
        written.chmod(0o644)
    tower = torch.load(folder / "tower.pt", weights_only=False)
    versions = {name: importlib.metadata.version(name) for name in single.PACKAGES}
    settings = {"python": platform.python_version(), "versions": versions, "parameters": model.num_parameters()}
    for stage, part in (("tower", tower), ("questions", saved)):
        settings[stage] = dict(part["settings"], steps=part["step"], minutes_spent=round(part["spent"] / 60, 1))
    (assets / "SETTINGS.json").write_text(json.dumps(settings, indent=1) + "\n")
    rows = [json.loads(line) for f in ("tower.jsonl", "questions.jsonl") for line in open(folder / f)]
    (assets / "training_curve.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, assets / "training_curve.png")


def plot(rows: list[dict], path: Path) -> None:
    """Draws loss and held-out accuracy of both stages over the minutes of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, stage, key in zip(axes, ("tower", "questions"), ("heldout_token_digit", "heldout_answers"), strict=True):
        part = [r for r in rows if r["stage"] == stage]
        minutes = [r["minutes"] for r in part]
        axis.plot(minutes, [r["loss"] for r in part], color="tab:gray", label="training loss")
        axis.plot(minutes, [r[key] for r in part], color="tab:blue", label=key.replace("_", " "))
        axis.set(xlabel="minutes on a shared machine of 2 CPU cores", title=f"stage: {stage}", ylim=(0, 2))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


# measuring


def blank(frames: np.ndarray) -> np.ndarray:
    """Frames of the same mean colours and nothing else."""
    return np.broadcast_to(frames.mean(axis=(1, 2), keepdims=True).astype(np.uint8), frames.shape).copy()


def only(number: int):
    """Makes a clip that stands still: one of its frames, again and again."""
    return lambda frames: np.repeat(frames[number : number + 1], len(frames), axis=0)


def from_file(frames: np.ndarray) -> np.ndarray:
    """The clip written as a video file and read back."""
    with tempfile.TemporaryDirectory() as folder:
        path = S.write_video(Path(folder) / "clip.avi", list(frames), fps=S.FPS, quality=S.QUALITY)
        return np.stack([np.asarray(frame) for frame in S.read(path).frames])


VIEWS = {
    "dense": lambda frames: frames, "file": from_file, "blank": blank, "first frame": only(0), "middle frame": only(S.FRAMES // 2),
    "last frame": only(S.FRAMES - 1),
}  # fmt: skip


@torch.no_grad()
def answers(loaded, clips: list[np.ndarray], texts: list[str], batch: int = 20) -> list[str]:
    """Generated answers; "" where the model does not end after one word."""
    out, pad = [], loaded.processor.tokenizer.pad_token_id
    for first in range(0, len(texts), batch):
        rows = [loaded.inputs(text, list(clip)) for clip, text in zip(clips[first : first + batch], texts[first : first + batch], strict=True)]
        length = max(row["input_ids"].shape[1] for row in rows)
        filled = {"input_ids": pad, "attention_mask": 0, "mm_token_type_ids": 0}
        given = {key: torch.cat([F.pad(r[key], (length - r[key].shape[1], 0), value=value) for r in rows]) for key, value in filled.items()}
        given |= {key: torch.cat([row[key] for row in rows]) for key in rows[0] if key not in given}
        made = loaded.model.generate(**given, max_new_tokens=2, do_sample=False)[:, length:].tolist()
        out += [loaded.processor.tokenizer.decode(ids[0]) if ids[1:] == [END] else "" for ids in made]
    return out


def evaluate(n: int, seed: int = 0, views: tuple[str, ...] = tuple(VIEWS)) -> dict:
    """Accuracy of the exported model on held-out questions: with the clip, with its file, and with less than the clip."""
    from rich.console import Console
    from rich.table import Table

    from vlprune.embedded_video import load_embedded_video

    began, loaded = time.time(), load_embedded_video()
    pairs = S.heldout_questions(n, seed)
    result: dict = {"n": n, "seed": seed, "kinds": {}}
    right = {}
    for name in views:
        said = answers(loaded, [VIEWS[name](scene.frames) for scene, _ in pairs], [q.text for _, q in pairs])
        right[name] = np.array([a == q.answer for a, (_, q) in zip(said, pairs, strict=True)])
        result[name] = round(float(right[name].mean()), 4)
    table = Table("kind", "n", *views)
    for kind in S.KINDS:
        here = np.array([q.kind == kind for _, q in pairs])
        if here.any():
            row = {name: round(float(hits[here].mean()), 4) for name, hits in right.items()}
            result["kinds"][kind] = {**row, "n": int(here.sum())}
            table.add_row(kind, str(here.sum()), *(f"{row[name]:.3f}" for name in views))
    table.add_row("all", str(n), *(f"{result[name]:.3f}" for name in views))
    Console().print(table)
    result["seconds"] = round(time.time() - began, 1)
    return result


def run_stage(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One training process."""
    team = single.Team(rank, args.processes, meeting)
    if args.stage == "tower":
        train_tower(team, args.work, args.minutes, args.batch or 24, args.lr)
    else:
        train_questions(team, args.work, args.minutes, args.batch or 8, args.lr, args.few_until)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("tower", "questions"))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch", type=int, help="frame pairs (24) or clips (8) a step")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--processes", type=int, default=2, help="training processes of one thread each")
    parser.add_argument("--few-until", type=float, default=0.6, help="share of the time with fewer visual tokens")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_video_vlm"), help="folder for checkpoints")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder to export to")
    parser.add_argument("--export", action="store_true", help="export questions.pt to the assets")
    parser.add_argument("--evaluate", action="store_true", help="measure the model that ships with vlprune on held-out questions")
    parser.add_argument("--n", type=int, default=1000, help="number of held-out questions")
    parser.add_argument("--json", type=Path, help="write the result of --evaluate here")
    args = parser.parse_args()
    if args.stage:
        args.work.mkdir(parents=True, exist_ok=True)
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        torch.multiprocessing.spawn(run_stage, (args, str(meeting)), nprocs=args.processes)
    if args.export:
        export(args.work, args.assets)
    if args.evaluate:
        result = evaluate(args.n)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
