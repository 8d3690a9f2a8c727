"""Train the routers of VideoLLM-MoD on the embedded video model, and ask held-out questions with them and with random choices at the same budget.

    python examples/train_videollm_mod.py --work out/videollm_mod --guide 3

Clips and questions are those of `vlprune.evals.moving_scenes`. In some decoder layers only a share of each frame's tokens runs, chosen by a linear router,
and the others pass by: the upper half of the layers, since this model stays as it is (``--layers interleaved`` are the paper's, whose model trains along;
what came of either: ``evals/results/videollm_mod``). Two steps:

1. For ``--guide`` minutes the routers learn which tokens the untouched model's answer depends on: the size of the derivative of the right answer's logit
   by the weight of what the block adds to a token, and by the token's weight as a key in that layer, as shares of each frame. The paper has no such step.
2. For ``--minutes`` they learn from the loss of the answers, as in the paper, through the weight of what a block adds (``weigh="through"``), with Gumbel
   noise on the choice. That is for a model that trains along (``--model-lr``); with one that stays as it is it makes the routers worse, so there is none by
   default. The rival is the same training of the model alone under random choices, ``--stage rival`` (only with ``--model-lr``).

Stopped, the same command goes on from the last checkpoint. Written to ``--work``: ``routers.safetensors``, ready for
``vlprune.apply(model, "videollm_mod", router=...)``, the model if it was trained (``model.safetensors``), and ``results.json`` and ``results.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import train_tiny_video_vlm as base  # noqa: E402

import vlprune  # noqa: E402
from vlprune.embedded_video import QwenVideo, load_embedded_video  # noqa: E402
from vlprune.evals import moving_scenes as S  # noqa: E402
from vlprune.hooks import HookSet  # noqa: E402
from vlprune.methods.videollm_mod import routed_layers  # noqa: E402
from vlprune.scorers.layer_routers import LayerRouters  # noqa: E402


def batch_of(loaded: QwenVideo, indices: range, seed: int = 11) -> dict[str, Tensor]:
    """Model inputs with labels: one question about each training clip, kinds in turn where the clip has one; padded on the left."""
    rows = []
    for index in indices:
        rng = np.random.default_rng((11, index))
        scene = S.clip("train", index, seed=seed)
        asked = [q for q in S.questions(scene) if q.kind == S.KINDS[index % len(S.KINDS)]] or S.questions(scene)
        question = asked[rng.integers(len(asked))]
        row = loaded.inputs(question.text, list(scene.frames))
        row["answer"] = torch.tensor([[base.NUMBER[question.answer], base.END]])
        rows.append(row)
    length = max(row["input_ids"].shape[1] for row in rows) + 2
    filled: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "mm_token_type_ids": [], "labels": []}
    for row in rows:
        ids, answer = row["input_ids"], row["answer"]
        before = length - ids.shape[1] - 2
        values = {"input_ids": (torch.cat([ids, answer], 1), base.PAD), "attention_mask": (torch.ones(1, ids.shape[1] + 2, dtype=torch.long), 0)}
        values["mm_token_type_ids"] = (F.pad(row["mm_token_type_ids"], (0, 2)), 0)
        values["labels"] = (torch.cat([torch.full_like(ids, -100), answer], 1), -100)
        for name, (value, filler) in values.items():
            filled[name].append(F.pad(value, (before, 0), value=filler))
    given = {name: torch.cat(parts) for name, parts in filled.items()}
    return given | {key: torch.cat([row[key] for row in rows]) for key in rows[0] if key not in given and key != "answer"}


def dependence(loaded: QwenVideo, given: dict[str, Tensor], layers: tuple[int, ...]) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
    """Of the untouched model, by layer: states (B, L, D) at its input, and how much the right answer depends on each token there; and which are visual."""
    decoder, hooks = loaded.model.model.language_model, HookSet()
    states: dict[int, Tensor] = {}
    batch, length = given["input_ids"].shape
    order, real = torch.arange(length), given["attention_mask"].bool()
    seen = torch.zeros(batch, 1, length, length).masked_fill(~((order[:, None] >= order) & real[:, None, None]), torch.finfo(torch.float32).min)
    added, looked = ({layer: torch.zeros(batch, length, requires_grad=True) for layer in layers} for _ in range(2))

    def before(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            states[layer] = args[0] if args else kwargs["hidden_states"]
            return args, {**kwargs, "attention_mask": seen + looked[layer][:, None, None]}

        return hook

    def after(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            out = output[0] if isinstance(output, tuple) else output
            out = out + added[layer][..., None] * (out - states[layer])
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook

    try:
        for layer in layers:
            hooks.before(decoder.layers[layer], before(layer))
            hooks.after(decoder.layers[layer], after(layer))
        inputs = {name: value for name, value in given.items() if name != "labels"}
        logits = loaded.model(**inputs, use_cache=False).logits[:, -3].log_softmax(-1)    # behind the last token of the question
        answers = logits.gather(1, given["labels"][:, -2:-1])
        margin = answers[:, 0] - (logits.exp().scatter(1, given["labels"][:, -2:-1], 0.0)).sum(1).log()      # does not fade where the answer is sure
        grads = torch.autograd.grad(margin.sum(), [*added.values(), *looked.values()])
    finally:
        hooks.remove()
    sizes = {layer: one.abs() + two.abs() for layer, one, two in zip(layers, grads[: len(layers)], grads[len(layers) :], strict=True)}
    return {layer: value.detach() for layer, value in states.items()}, sizes, given["input_ids"] == base.VIDEO


def done(step: int, start: float, minutes: float, steps: int) -> float:
    """Share of a stage that is over: of its steps, if their number is given, else of its time."""
    return step / steps if steps else (time.time() - start) / (60 * minutes or 1e-9)


def guide(loaded: QwenVideo, routers: LayerRouters, args: argparse.Namespace) -> list[dict[str, float]]:
    """Step 1: routers learn each frame's shares of what the answer depends on; goes on from its checkpoint."""
    optimizer, path, curve, step, spent = torch.optim.Adam(routers.parameters(), lr=args.guide_lr), args.work / "guide.pt", [], 0, 0.0
    loaded.model.requires_grad_(False)
    torch.nn.init.zeros_(routers.weight)                                  # all alike, so that no large logits have to be unlearned first
    if path.exists():
        saved = torch.load(path, weights_only=True)
        routers.load_state_dict(saved["routers"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent, curve = saved["step"], saved["spent"], saved["curve"]
    start, recent = time.time() - spent, []
    while (share := done(step, start, args.guide, args.steps)) < 1.0:
        states, sizes, visual = dependence(loaded, batch_of(loaded, range(step * args.batch, (step + 1) * args.batch), seed=12), routers.layers)
        loss = torch.zeros(())
        for layer in routers.layers:
            wanted, logits = (part[visual].view(-1, base.SIDE**2) for part in (sizes[layer], routers(states[layer], layer)))     # frame by frame
            wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=1e-9)
            loss = loss + F.kl_div(logits.log_softmax(1), wanted, reduction="batchmean") / len(routers.layers)
        loss.backward()
        optimizer.param_groups[0]["lr"] = args.guide_lr * max(0.05, 1.0 - share)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        step += 1
        if step % 10 == 0:
            curve.append({"step": step, "minutes": round((time.time() - start) / 60, 2), "divergence": round(float(np.mean(recent)), 4)})
            recent = []
            print("guide", curve[-1], flush=True)
        if step % 10 == 0 or step == args.steps:
            torch.save({"routers": routers.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": time.time() - start, "curve": curve}, path)
    return curve


def train(loaded: QwenVideo, routers: LayerRouters | None, layers: tuple[int, ...], args: argparse.Namespace, stage: str) -> list[dict[str, float]]:
    """Train routers, model or both for ``--minutes``; goes on from the checkpoint of the stage."""
    model, curve, step, spent = loaded.model, [], 0, 0.0
    model.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    if routers is not None:
        groups.append({"params": list(routers.parameters()), "lr": args.lr})
    if args.model_lr:
        groups.append({"params": list(model.model.language_model.requires_grad_(True).parameters()), "lr": args.model_lr})
    trained: dict[str, nn.Module] = ({} if routers is None else {"routers": routers}) | ({"model": model} if args.model_lr else {})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    rates = [group["lr"] for group in groups]
    path = args.work / f"{stage}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for name, module in trained.items():
            module.load_state_dict(saved[name])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent, curve = saved["step"], saved["spent"], saved["curve"]

    def keep_checkpoint() -> None:
        state = {name: module.state_dict() for name, module in trained.items()}
        torch.save({**state, "optimizer": optimizer.state_dict(), "step": step, "spent": time.time() - start, "curve": curve}, path)

    start, shown, losses = time.time() - spent, time.time(), []
    if routers is not None:
        routers.train()
        routers.noise = args.noise
    while (share := done(step, start, args.minutes, args.steps)) < 1.0:
        router: Any = "random" if routers is None else routers
        given = batch_of(loaded, range(step * args.batch, (step + 1) * args.batch))
        # the random choice is drawn anew for every batch, so that the model cannot get used to one
        with vlprune.apply(model, "videollm_mod", keep=args.keep, router=router, layers=layers, **({"seed": 100 * step} if routers is None else {})):
            loss = model(**given, use_cache=False).loss
        loss.backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 20) * max(0.05, 1.0 - share)
        nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        step += 1
        if step % 25 == 0:
            curve.append({"step": step, "minutes": round((time.time() - start) / 60, 2), "loss": round(float(np.mean(losses)), 4)})
            losses = []
            print(stage, curve[-1], flush=True)
        if time.time() - shown > 60:
            shown = time.time()
            keep_checkpoint()
    keep_checkpoint()
    if routers is not None:
        routers.eval()
    return curve


def measure(loaded: QwenVideo, pairs: list[Any], label: str, keep: float, rows: list[dict[str, Any]], **options: Any) -> None:
    """Accuracy on held-out questions."""
    clips, texts = [scene.frames for scene, _ in pairs], [question.text for _, question in pairs]
    method = "dense" if keep == 1.0 else "videollm_mod"
    with vlprune.apply(loaded.model, method, keep=keep, **({} if keep == 1.0 else options)) as handle:
        said = base.answers(loaded, clips, texts)
        report = handle.report()
    right = [answer == question.answer for answer, (_, question) in zip(said, pairs, strict=True)]
    cost = {"decoder_flops": 1.0, "kv": 1.0}
    if report.flops_dense:
        cost = {"decoder_flops": report.parts["decoder"] / report.parts["decoder_dense"], "kv": report.kv_bytes_pruned / report.kv_bytes_dense}
    rows.append({"model": label.partition(":")[0], "choice": label.partition(":")[2], "keep": keep, "accuracy": float(np.mean(right)), "n": len(right), **cost})
    print(rows[-1], flush=True)


def evaluate(args: argparse.Namespace, layers: tuple[int, ...]) -> None:
    """Dense first, random at the same budget next, then the trained routers; each on its own model, too, where one was trained."""
    pairs, rows = S.heldout_questions(args.n), []
    trained = args.work / "routers.safetensors"
    for name, weights in (("untouched", None), ("trained along", args.work / "model.safetensors"), ("rival", args.work / "rival.safetensors")):
        if weights is not None and not weights.exists():
            continue
        loaded = load_embedded_video()
        if weights is not None:
            loaded.model.load_state_dict(load_file(weights), strict=False)
        measure(loaded, pairs, f"{name}:dense", 1.0, rows)
        for keep in args.keeps:
            for seed in range(args.seeds):
                measure(loaded, pairs, f"{name}:random, seed {seed}", keep, rows, router="random", seed=1000 * seed, layers=layers)
            if name == "untouched":
                measure(loaded, pairs, f"{name}:untrained routers", keep, rows, router=LayerRouters(base.WIDTH, layers))
            if (args.work / "guided.safetensors").exists() and name == "untouched":
                measure(loaded, pairs, f"{name}:guided routers", keep, rows, router=args.work / "guided.safetensors")
            if trained.exists() and name != "rival":
                measure(loaded, pairs, f"{name}:trained routers", keep, rows, router=trained)
    (args.work / "results.json").write_text(json.dumps({"n": args.n, "rows": rows}, indent=1) + "\n")
    lines = ["| model | choice | keep | accuracy | decoder FLOPs | KV |", "|---|---|---:|---:|---:|---:|"]
    lines += [f"| {r['model']} | {r['choice']} | {r['keep']:g} | {r['accuracy']:.3f} | {r['decoder_flops']:.2f} | {r['kv']:.2f} |" for r in rows]
    (args.work / "results.md").write_text("\n".join([f"{args.n} held-out questions, one a clip.", "", *lines, ""]))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", "routers", "rival", "evaluate"), default="all")
    parser.add_argument("--work", type=Path, default=Path("out/videollm_mod"), help="folder for checkpoints, routers and results")
    parser.add_argument("--layers", default="deep", help="which layers have a router: interleaved, all or deep")
    parser.add_argument("--guide", type=float, default=3, help="minutes of step 1")
    parser.add_argument("--guide-lr", type=float, default=3e-3, help="of the routers in step 1")
    parser.add_argument("--minutes", type=float, default=0, help="of step 2, and of the rival's training")
    parser.add_argument("--steps", type=int, default=0, help="of each stage, instead of minutes: where stages are compared on a busy machine")
    parser.add_argument("--batch", type=int, default=8, help="clips a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the routers in step 2")
    parser.add_argument("--model-lr", type=float, default=0.0, help="of the decoder, if it trains along")
    parser.add_argument("--noise", type=float, default=0.5, help="scale of the Gumbel noise on the choice")
    parser.add_argument("--keep", type=float, default=0.2, help="share of a frame's tokens while training")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.2], help="shares to measure")
    parser.add_argument("--seeds", type=int, default=2, help="of the random choice, to measure")
    parser.add_argument("--n", type=int, default=400, help="number of held-out questions")
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    layers = routed_layers(base.LAYERS, args.layers)
    if args.stage in ("all", "routers"):
        loaded, routers = load_embedded_video(), LayerRouters(base.WIDTH, layers)
        guide(loaded, routers, args)
        routers.save(args.work / "guided.safetensors", keep=args.keep)
        curve = train(loaded, routers, layers, args, "routers")
        routers.save(args.work / "routers.safetensors", keep=args.keep, steps=curve[-1]["step"] if curve else 0)
        if args.model_lr:
            save_file({name: value.contiguous() for name, value in loaded.model.state_dict().items()}, args.work / "model.safetensors")
    if args.stage == "rival" or (args.stage == "all" and args.model_lr):
        loaded = load_embedded_video()
        train(loaded, None, layers, args, "rival")
        save_file({name: value.contiguous() for name, value in loaded.model.state_dict().items()}, args.work / "rival.safetensors")
    if args.stage in ("all", "evaluate"):
        evaluate(args, layers)


if __name__ == "__main__":
    main()
