"""Trains, exports and evaluates the tiny LLaVA model in ``vlprune/assets/tiny_vlm`` from random weights, on a CPU.

Two stages, each with a time budget that its learning rate is scheduled on:

1. ``tower``: the CLIP tower learns, for every patch, which digit, colour and place it belongs to.
2. ``questions``: the projector and the Llama decoder learn to answer questions about the tower's features.

    python examples/train_tiny_vlm.py --stage tower --minutes 30
    python examples/train_tiny_vlm.py --stage questions --minutes 60
    python examples/train_tiny_vlm.py --evaluate --json result.json

Checkpoints allow to stop and to start again with the same command.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    from vlprune.evals import digits as D
except ImportError:
    from evals import digits as D

ASSETS = Path(__file__).resolve().parents[1] / "vlprune" / "assets" / "tiny_vlm"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "scikit-learn", "scikit-image")
WIDTH, LAYERS = 96, 10
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def build_model(vocabulary_size: int, image_token: int, pad: int, bos: int, eos: int):
    """A LLaVA model of width 96 with random weights: 11 tower layers (10 of them used) and 10 decoder layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=LAYERS + 1, num_attention_heads=3,
        image_size=D.SIZE, patch_size=D.PATCH, hidden_act="gelu", projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary_size, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=1024, pad_token_id=pad,
        bos_token_id=bos, eos_token_id=eos, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", image_seq_length=D.GRID**2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    init_tower(model.model.vision_tower)
    return model


@torch.no_grad()
def init_tower(tower: nn.Module) -> None:
    """Random weights, but patches start by looking at themselves and their neighbours.

    Position embeddings begin as 2-D sines and query and key projections begin equal, so that attention is local at
    first; a tower this small learns shapes much sooner that way.
    """
    axis = torch.arange(D.GRID).float()
    frequency = torch.logspace(math.log10(1.5), math.log10(0.1), WIDTH // 4)
    wave = torch.cat([(axis[:, None] * frequency).sin(), (axis[:, None] * frequency).cos()], 1)
    rows, cols = wave[:, None].expand(-1, D.GRID, -1), wave[None].expand(D.GRID, -1, -1)
    position = torch.cat([rows, cols], -1).reshape(D.GRID**2, WIDTH)
    tower.embeddings.position_embedding.weight[1:] = 0.5 * position
    tower.embeddings.patch_embedding.weight.normal_(0, 0.05)
    for layer in tower.encoder.layers:
        for head in range(3):
            basis = torch.linalg.qr(torch.randn(WIDTH, 32))[0].T * 0.8
            rows_of_head = slice(32 * head, 32 * head + 32)
            layer.self_attn.q_proj.weight[rows_of_head] = basis + 0.03 * torch.randn(32, WIDTH)
            layer.self_attn.k_proj.weight[rows_of_head] = basis + 0.03 * torch.randn(32, WIDTH)


def tower_features(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What ``hidden_states[-2]`` of the tower holds, without running its unused last layer."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:LAYERS]:
        hidden = layer(hidden, None)
    return hidden


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures (N, H, W, 3) to normalised pixel values, as the processor computes them."""
    scaled = (images.float() / 255.0 - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled.permute(0, 3, 1, 2).contiguous()


class Muon(torch.optim.Optimizer):
    """Muon in float32 (``torch.optim.Muon`` orthogonalises in bfloat16, which is slow on older processors)."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple, list] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, members in shapes.items():
                updates = []
                for p in members:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                update = orthogonalise(torch.stack(updates)) * (0.2 * max(shape) ** 0.5)
                for p, u in zip(members, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-group["lr"])


def orthogonalise(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest orthogonal matrices of a stack, by the quintic Newton-Schulz iteration of Muon."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def optimisers(modules: list[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, heads, biases and norms."""
    matrices, others = [], []
    for module in modules:
        for name, p in module.named_parameters():
            if p.requires_grad:
                hidden = p.ndim == 2 and "layers." in name
                (matrices if hidden else others).append(p)
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def schedule(fraction: float, step: int, warm: int = 60, decay_from: float = 0.75) -> float:
    """Learning-rate factor: short rise, constant, then straight down to nearly zero at the end of the time budget."""
    return min(1.0, (step + 1) / warm, max(0.02, (1 - fraction) / (1 - decay_from)))


class TowerHeads(nn.Module):
    """Reads labels off the tower's features; thrown away after the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cls_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.patch = nn.Linear(WIDTH, 11 + 8 + 10 + 1)
        self.cls = nn.Linear(WIDTH, 10 + 7)

    def loss(self, hidden: torch.Tensor, labels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and the predicted digit of every patch."""
        digit, colour, place, size = self.patch(self.norm(hidden[:, 1:])).split((11, 8, 10, 1), -1)
        flat = lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten())  # noqa: E731
        inside = (labels["digit"] < 10).float()
        loss = flat(digit, labels["digit"]) + 0.5 * flat(colour, labels["colour"]) + 0.2 * flat(place, labels["place"])
        loss = loss + 0.5 * ((size[..., 0] - labels["size"]) ** 2 * inside).sum() / inside.sum()
        present = self.cls(self.cls_norm(hidden[:, 0]))
        return loss + 0.2 * F.binary_cross_entropy_with_logits(present, labels["present"]), digit.argmax(-1)


def tower_batch(split: str, indices: range, warp: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures and patch labels; most training pictures are crowded, since more digits teach more per picture."""
    images, columns = [], {key: [] for key in ("digit", "colour", "place", "size", "present")}
    for i in indices:
        crowded = split == "train" and i % 4 != 0
        s = D.scene(split, i, digits=(7, 9) if crowded else None, warp=warp)
        images.append(s.image)
        owner = s.patch_object.reshape(-1).astype(np.int64)
        columns["digit"].append(np.where(owner < 0, 10, s.patch_digit.reshape(-1)))
        columns["colour"].append(np.where(owner < 0, 7, s.patch_colour.reshape(-1)))
        columns["place"].append(np.array([D.PLACES.index(o.place) for o in s.objects] + [9])[owner])
        columns["size"].append(np.array([(o.size - 36) / 6 for o in s.objects] + [0], dtype=np.float32)[owner])
        present = np.zeros(17, dtype=np.float32)
        for o in s.objects:
            present[o.digit] = present[10 + D.COLOUR_NAMES.index(o.colour)] = 1
        columns["present"].append(present)
    labels = {k: torch.from_numpy(np.stack(v)) for k, v in columns.items()}
    for k in ("digit", "colour", "place"):
        labels[k] = labels[k].long()
    return torch.from_numpy(np.stack(images)), labels


class Team:
    """Processes of one thread each that train one model together by averaging gradients once a step.

    On a busy machine this loses far less time than one process with several threads, which meet in every operation.
    """

    def __init__(self, rank: int, size: int, meeting: str) -> None:
        self.rank, self.size = rank, size
        torch.set_num_threads(1)
        if size > 1:
            torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)

    def average(self, parameters: list[nn.Parameter], extra: list[float]) -> list[float]:
        """Averages the gradients in place, and a few more numbers, over the processes."""
        grads = [p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in grads] + [torch.tensor(extra)])
        if self.size > 1:
            torch.distributed.all_reduce(flat)
            flat /= self.size
        at = 0
        for g in grads:
            g.copy_(flat[at : at + g.numel()].view_as(g))
            at += g.numel()
        return flat[at:].tolist()

    def share(self, step: int, batch: int) -> range:
        """Numbers of the pictures that this process takes in a step."""
        part = batch // self.size
        first = step * batch + self.rank * part
        return range(first, first + part)


def train_tower(team: Team, folder: Path, minutes: float, batch: int, lr: float) -> None:
    """First stage; writes ``tower.pt`` and ``tower.jsonl``."""
    torch.manual_seed(0)
    model = build_model(64, 4, 0, 1, 2)
    tower, heads = model.model.vision_tower, TowerHeads()
    for unused in (tower.encoder.layers[LAYERS], tower.post_layernorm):
        unused.requires_grad_(False)
    opts = optimisers([tower, heads], lr)
    step, spent, path = 0, 0.0, folder / "tower.pt"
    if path.exists():
        saved = torch.load(path, weights_only=False)
        tower.load_state_dict(saved["tower"])
        heads.load_state_dict(saved["heads"])
        for o, state in zip(opts, saved["opts"], strict=True):
            o.load_state_dict(state)
        step, spent = saved["step"], saved["spent"]
    test_images, test_labels = tower_batch("heldout", range(96), warp=0.0)
    parameters = [p for o in opts for g in o.param_groups for p in g["params"]]
    start, shown, losses, fraction = time.time() - spent, time.time(), [], 0.0

    def save() -> None:
        settings = {"minutes": minutes, "batch": batch, "lr": lr, "processes": team.size, "seed": 0}
        torch.save({"tower": tower.state_dict(), "heads": heads.state_dict(), "opts": [o.state_dict() for o in opts],
                        "step": step, "spent": time.time() - start, "settings": settings}, path)  # fmt: skip

    while fraction < 1.0:
        images, labels = tower_batch("train", team.share(step, batch), warp=1.6)
        loss, _ = heads.loss(tower_features(tower, to_pixels(images)), labels)
        loss.backward()
        mean_loss, fraction = team.average(parameters, [loss.item(), (time.time() - start) / (60 * minutes)])
        nn.utils.clip_grad_norm_(parameters, 2.0)
        for o in opts:
            o.param_groups[0]["lr"] = lr * schedule(fraction, step)
            o.step()
            o.zero_grad()
        losses.append(mean_loss)
        step += 1
        if team.rank == 0 and (time.time() - shown > 45 or step == 10):
            shown = time.time()
            with torch.no_grad():
                guess = heads.loss(tower_features(tower, to_pixels(test_images)), test_labels)[1]
            inside = test_labels["digit"] < 10
            right = (guess == test_labels["digit"])[inside].float().mean().item()
            row = {"stage": "tower", "step": step, "minutes": round((time.time() - start) / 60, 2),
                       "loss": round(float(np.mean(losses)), 4), "heldout_patch_digit": round(right, 4)}  # fmt: skip
            losses = []
            print(json.dumps(row), flush=True)
            with open(folder / "tower.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            save()
    if team.rank == 0:
        save()


def build_processor():
    """Word-level tokenizer and CLIP image processor, joined in a LLaVA processor."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    try:  # the torchvision version of the image processor would need a package that nothing else here needs
        from transformers import CLIPImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import CLIPImageProcessor as ImageProcessor

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = [*special, "user:", "assistant:", *D.vocabulary()]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?.]"), "isolated")]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"], padding_side="left", model_max_length=1024,
    )  # fmt: skip
    images = ImageProcessor(size={"shortest_edge": D.SIZE}, crop_size={"height": D.SIZE, "width": D.SIZE})
    return LlavaProcessor(
        images, tokenizer, patch_size=D.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def prompt(question: str) -> str:
    """The text that the model is trained on and asked with."""
    return f"USER: <image> {question} ASSISTANT:"


def new_model(processor):
    """A fresh model for a processor's vocabulary, with word and picture embeddings at a similar scale."""
    tok = processor.tokenizer
    model = build_model(len(tok), processor.image_token_id, tok.pad_token_id, tok.bos_token_id, tok.eos_token_id)
    with torch.no_grad():
        for name, p in model.model.language_model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.5 if "embed" in name else 0.06)
    return model


# How readily a kind is asked, early and late (late begins at 0.8 of the phase with few picture tokens): first the
# kinds that need only one digit to be found, which the others build on, then mostly the kinds that are hard.
EASY = ("digit_at", "digit_of_colour", "colour_at", "colour_of_digit", "place_of_digit", "place_of_colour", "exists")
SHARE = (
    {"sum": 0.5, "count": 0.6, "neighbour": 0.7, "exists": 0.5, "largest": 0.7, "digit_at": 1.5, "colour_at": 1.5},
    {"sum": 2.0, "count": 9.0, "count_colour": 5.0, "largest": 3.0, **dict.fromkeys(EASY, 0.3)},
)
MOST = {"sum": 9}  # questions of a kind for one picture, 4 for the kinds not named
WEIGHT = {"count": 4.0, "count_colour": 2.0}  # in the loss, for kinds that a picture can be asked only a few times
HEAD = (1, 5)  # ids of <s> and USER:
PREFIX = len(HEAD) + D.GRID**2


def pack(asked: list[tuple[list[int], int]], eos: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lays the questions of one picture after each other.

    Args:
        asked: For each question the token ids of its words, the one of "ASSISTANT:" included, and of its answer.
        eos: Id of the end token, which follows every answer.
        length: Room for tokens; questions that no longer fit are left out, free room becomes padding.

    Returns:
        Token ids, the target of every position (-100 for none), and the question every position belongs to, from 1.
    """
    ids, targets, owner = [], [], []
    for number, (words, answer) in enumerate(asked, 1):
        if len(ids) + len(words) + 1 > length:
            continue
        ids += [*words, answer]
        targets += [-100] * (len(words) - 1) + [answer, eos]
        owner += [number] * (len(words) + 1)
    rest = length - len(ids)
    fill = [0] * rest
    return np.array(ids + fill), np.array(targets + [-100] * rest), np.array(owner + [-1] * rest)


def packed_logits(
    model, features: torch.Tensor, ids: torch.Tensor, owner: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits for packed questions: each sees the picture and itself only, as if it had been asked alone.

    Args:
        model: The LLaVA model.
        features: Output of ``tower_features``, class token included.
        ids: Token ids of the packed questions, (N, T).
        owner: Question number of every token, (N, T); -1 for padding.
        kept: Picture tokens to show, (N, K), ascending; None shows all. They stay at their positions.

    Returns:
        Logits of the T question positions.
    """
    n, t = ids.shape
    embed = model.model.language_model.embed_tokens
    picture = features[:, 1:]
    where = torch.arange(D.GRID**2).expand(n, -1) if kept is None else kept
    if kept is not None:
        picture = picture.gather(1, kept[..., None].expand(-1, -1, picture.shape[-1]))
    picture = model.model.multi_modal_projector(picture)
    inputs = torch.cat([embed(torch.tensor([HEAD])).expand(n, -1, -1), picture, embed(ids)], 1)
    prefix = inputs.shape[1] - t
    group = torch.cat([torch.zeros(n, prefix, dtype=owner.dtype), owner], 1)
    order = torch.arange(prefix + t)
    causal = order[:, None] >= order[None]
    same = group[:, :, None] == group[:, None]
    mask = torch.where((same | (group[:, None] == 0)) & causal, 0.0, torch.finfo(torch.float32).min)[:, None]
    new = torch.ones_like(owner, dtype=torch.bool)
    new[:, 1:] = owner[:, 1:] != owner[:, :-1]
    here = torch.arange(t).expand(n, -1)
    start = torch.where(new, here, 0).cummax(1).values
    head = torch.arange(len(HEAD)).expand(n, -1)
    position = torch.cat([head, len(HEAD) + where, PREFIX + here - start], 1)
    hidden = model.model.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, prefix:])


def choose_patches(ink: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Ascending indices of patches: those with ink first, then random background."""
    order = np.argsort(-(ink.reshape(-1) + 0.9 * rng.random(ink.size)), kind="stable")
    return np.sort(order[:number])


def choose_questions(found: list, rng: np.random.Generator, share: dict[str, float]) -> list:
    """Random order that mixes kinds: zero counts and "no" not more often than the others."""
    by_kind: dict[str, list] = {}
    for i in rng.permutation(len(found)):
        by_kind.setdefault(found[i].kind, []).append(found[i])
    picked = []
    for kind, members in by_kind.items():
        if kind == "exists":
            members = [next((q for q in members if q.answer == a), members[0]) for a in ("yes", "no")]
        elif kind == "count_colour":
            some = [q for q in members if q.answer != "0"]
            members = sorted(some, key=lambda q: -int(q.answer))[:2] + [q for q in members if q.answer == "0"][:1]
        for place, q in enumerate(members[: MOST.get(kind, 4)]):
            picked.append((rng.random() * 0.9**place * share.get(kind, 1.0), q))
    return [q for _, q in sorted(picked, key=lambda pair: -pair[0])]


class QuestionBatches:
    """Makes packed training batches: pictures, and token ids, targets, owners, kept patches and loss weights."""

    def __init__(self, tokenizer, room: int = 224, patches: int = 88) -> None:
        self.room, self.patches, self.eos, self.late = room, patches, tokenizer.eos_token_id, False
        self.table = tokenizer.get_vocab()

    def words(self, question) -> tuple[list[int], int]:
        return [self.table[w] for w in [*question.text.split(), "assistant:"]], self.table[question.answer]

    def scene(self, i: int):
        """Later, half of the pictures have many different colours, since only those can be asked for many sums."""
        if not (self.late and i % 2):
            return D.scene("train", i, digits=(2, 6) if i % 3 == 0 else None, warp=1.2)
        for attempt in range(5):
            s = D.scene("train", i, seed=attempt, digits=(4, 6), warp=1.2)
            if sum(q.kind == "sum" for q in D.questions(s)) >= 6:
                break
        return s

    def __call__(self, indices: range):
        images, packed = [], []
        for i in indices:
            rng = np.random.default_rng((5, i))
            s = self.scene(10_000_000 + i)
            images.append(s.image)
            asked = choose_questions(D.questions(s), rng, SHARE[self.late])
            ids, targets, owner = pack([self.words(q) for q in asked], self.eos, self.room)
            weights = np.array([0.0] + [WEIGHT.get(q.kind, 1.0) for q in asked])[np.maximum(owner, 0)]
            patches = choose_patches(s.patch_object >= 0, self.patches, rng)
            packed.append((ids, targets, owner, patches, weights))
        ids, targets, owner, patches, weights = (torch.from_numpy(np.stack(x)) for x in zip(*packed, strict=True))
        return torch.from_numpy(np.stack(images)), (ids, targets, owner, patches, weights.float())


def train_questions(team: Team, folder: Path, minutes: float, batch: int, lr: float, few_until: float) -> None:
    """Second stage; reads ``tower.pt``, writes ``questions.pt`` and ``questions.jsonl``."""
    torch.manual_seed(1)
    processor = build_processor()
    model = new_model(processor)
    make = QuestionBatches(processor.tokenizer)
    tower = model.model.vision_tower
    step, spent, path = 0, 0.0, folder / "questions.pt"
    tower.load_state_dict(torch.load(folder / "tower.pt", weights_only=False)["tower"])
    tower.requires_grad_(False)
    scale_projector(model, make(range(8))[0])
    trained = [model.model.language_model, model.model.multi_modal_projector, model.lm_head]
    opts = optimisers(trained, lr)
    if path.exists():
        saved = torch.load(path, weights_only=False)
        model.load_state_dict(saved["model"])
        for o, state in zip(opts, saved["opts"], strict=True):
            o.load_state_dict(state)
        step, spent = saved["step"], saved["spent"]
    for layer in model.model.language_model.layers:
        layer.compile()
    parameters = [p for o in opts for g in o.param_groups for p in g["params"]]
    test = D.heldout_questions(60, seed=123)
    start, shown, losses, fraction = time.time() - spent, time.time(), [], 0.0

    def save() -> None:
        settings = {
            "minutes": minutes,
            "batch": batch,
            "lr": lr,
            "processes": team.size,
            "seed": 1,
            "room": make.room,
            "few_until": few_until,
            "few_tokens": make.patches,
        }
        torch.save({"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "step": step,
                        "spent": time.time() - start, "settings": settings}, path)  # fmt: skip

    while fraction < 1.0:
        make.late = fraction >= 0.8 * few_until
        images, (ids, targets, owner, kept, weights) = make(team.share(step, batch))
        with torch.no_grad():
            features = tower_features(tower, to_pixels(images))
        # Fewer background tokens make the first part faster; the rest of the training shows every token.
        kept = kept if fraction < few_until else None
        logits = packed_logits(model, features, ids, owner, kept).flatten(0, 1)
        losses_of = F.cross_entropy(logits, targets.flatten(), reduction="none")
        weights = weights.flatten() * (targets.flatten() != -100)
        loss = (losses_of * weights).sum() / weights.sum()
        loss.backward()
        mean_loss, fraction = team.average(parameters, [loss.item(), (time.time() - start) / (60 * minutes)])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for o in opts:
            o.param_groups[0]["lr"] = lr * schedule(fraction, step)
            o.step()
            o.zero_grad()
        losses.append(mean_loss)
        step += 1
        if team.rank == 0 and (time.time() - shown > 180 or step == 3):
            shown = time.time()
            kinds = quick_accuracy(model, make, test)
            row = {"stage": "questions", "step": step, "minutes": round((time.time() - start) / 60, 2),
                       "loss": round(float(np.mean(losses)), 4),
                       "heldout_answers": round(float(np.mean(list(kinds.values()))), 4), "kinds": kinds}  # fmt: skip
            losses = []
            print(json.dumps(row), flush=True)
            with open(folder / "questions.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            save()
    if team.rank == 0:
        save()


@torch.no_grad()
def scale_projector(model, images: torch.Tensor) -> None:
    """Chooses the projector's random weights so that picture tokens come out about as large as word embeddings."""
    features = tower_features(model.model.vision_tower, to_pixels(images))[:, 1:]
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(0, WIDTH**-0.5)
        linear.weight /= linear(features).std()
        features = F.gelu(linear(features))


@torch.no_grad()
def quick_accuracy(model, make: QuestionBatches, test: list, batch: int = 30) -> dict[str, float]:
    """Share of right first answer tokens by kind."""
    right: dict[str, list[bool]] = {}
    for i in range(0, len(test), batch):
        part = test[i : i + batch]
        packed = [pack([make.words(q)], make.eos, 16) for _, q in part]
        ids, targets, owner = [torch.from_numpy(np.stack(x)).long() for x in zip(*packed, strict=True)]
        images = torch.from_numpy(np.stack([s.image for s, _ in part]))
        features = tower_features(model.model.vision_tower, to_pixels(images))
        guess = packed_logits(model, features, ids, owner).argmax(-1)
        first = (targets != -100).long().argmax(1)
        for k, (_, q) in enumerate(part):
            right.setdefault(q.kind, []).append(bool(guess[k, first[k]] == targets[k, first[k]]))
    return {kind: round(float(np.mean(values)), 3) for kind, values in right.items()}


def export(folder: Path, assets: Path) -> None:
    """Writes the trained model and its processor in Hugging Face's layout, with the training curve."""
    from transformers import GenerationConfig

    processor = build_processor()
    tok = processor.tokenizer
    model = new_model(processor)
    saved = torch.load(folder / "questions.pt", weights_only=False)
    model.load_state_dict(saved["model"])
    model.generation_config = GenerationConfig(
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
        max_new_tokens=4, do_sample=False,
    )  # fmt: skip
    model.save_pretrained(assets)
    processor.save_pretrained(assets)
    for written in assets.iterdir():
        written.chmod(0o644)
    tower = torch.load(folder / "tower.pt", weights_only=False)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
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
    for axis, stage, key in zip(axes, ("tower", "questions"), ("heldout_patch_digit", "heldout_answers"), strict=True):
        part = [r for r in rows if r["stage"] == stage]
        minutes = [r["minutes"] for r in part]
        axis.plot(minutes, [r["loss"] for r in part], color="tab:gray", label="training loss")
        axis.plot(minutes, [r[key] for r in part], color="tab:blue", label=key.replace("_", " "))
        axis.set(xlabel="minutes on 2 CPU cores", title=f"stage: {stage}", ylim=(0, 2))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def blank(image: np.ndarray) -> np.ndarray:
    """A picture of the same mean colour and nothing else."""
    return np.broadcast_to(image.mean(axis=(0, 1)).astype(np.uint8), image.shape).copy()


@torch.no_grad()
def answers(model, processor, images: list[np.ndarray], texts: list[str], batch: int = 30) -> list[str]:
    """Generated answers; "" where the model does not end after one word."""
    from PIL import Image

    tok, out = processor.tokenizer, []
    for i in range(0, len(texts), batch):
        inputs = processor(
            images=[Image.fromarray(x) for x in images[i : i + batch]], text=[prompt(t) for t in texts[i : i + batch]],
            padding=True, return_tensors="pt",
        )  # fmt: skip
        made = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
        out += [tok.decode(ids[0]) if ids[1:] == [tok.eos_token_id] else "" for ids in made]
    return out


def evaluate(assets: Path, n: int, seed: int = 0) -> dict:
    """Accuracy of the exported model on held-out questions, with the picture and with a blank one."""
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    began = time.time()
    processor = AutoProcessor.from_pretrained(assets)
    model = LlavaForConditionalGeneration.from_pretrained(assets, dtype=torch.float32).eval()
    pairs = D.heldout_questions(n, seed)
    texts, truth = [q.text for _, q in pairs], [q.answer for _, q in pairs]
    result: dict = {"dense": 0.0, "blank": 0.0, "n": n, "seed": seed, "kinds": {}}
    right = {}
    for name, change in (("dense", lambda x: x), ("blank", blank)):
        said = answers(model, processor, [change(s.image) for s, _ in pairs], texts)
        right[name] = np.array([a == b for a, b in zip(said, truth, strict=True)])
        result[name] = round(float(right[name].mean()), 4)
    table = Table("kind", "n", "dense", "blank")
    for kind in D.KINDS:
        here = np.array([q.kind == kind for _, q in pairs])
        if here.any():
            row = {name: round(float(hits[here].mean()), 4) for name, hits in right.items()}
            result["kinds"][kind] = {**row, "n": int(here.sum())}
            table.add_row(kind, str(here.sum()), f"{row['dense']:.3f}", f"{row['blank']:.3f}")
    table.add_row("all", str(n), f"{result['dense']:.3f}", f"{result['blank']:.3f}")
    Console().print(table)
    result["seconds"] = round(time.time() - began, 1)
    return result


def run_stage(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One training process."""
    team = Team(rank, args.processes, meeting)
    if args.stage == "tower":
        train_tower(team, args.work, args.minutes, args.batch or 24, args.lr)
    else:
        train_questions(team, args.work, args.minutes, args.batch or 6, args.lr, args.few_until)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("tower", "questions"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, help="pictures a step; 24 for the tower, 6 for the questions")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--processes", type=int, default=2, help="training processes of one thread each")
    parser.add_argument("--few-until", type=float, default=0.6, help="share of the time with fewer picture tokens")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_vlm"), help="folder for checkpoints")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of the exported model")
    parser.add_argument("--export", action="store_true", help="export questions.pt to the assets")
    parser.add_argument("--evaluate", action="store_true", help="measure the exported model on held-out questions")
    parser.add_argument("--n", type=int, default=1200, help="number of held-out questions")
    parser.add_argument("--json", type=Path, help="write the result of --evaluate here")
    args = parser.parse_args()
    if args.stage:
        args.work.mkdir(parents=True, exist_ok=True)
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        torch.multiprocessing.spawn(run_stage, (args, str(meeting)), nprocs=args.processes)
    if args.export:
        export(args.work, args.assets)
    if args.evaluate:
        result = evaluate(args.assets, args.n)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
