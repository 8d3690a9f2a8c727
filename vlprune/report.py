"""What the last prefill did, as a table and as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlprune.flops import TowerShape, stack_flops, stack_kv_bytes
from vlprune.trace import HeadRecord, PointRecord, Trace


@dataclass(frozen=True)
class Report:
    """Tokens, FLOPs and cache bytes of one prefill, for the whole batch.

    Attributes:
        method, keep: what was applied.
        points: a record for each pruning point (`vlprune.trace.PointRecord`): ``.point``, ``.method``, ``.visual_before``,
            ``.visual_kept``, ``.keep_indices``.
        flops_dense, flops_pruned: prefill FLOPs, vision tower + scorer + decoder (conventions in `vlprune.flops`).
        kv_bytes_dense, kv_bytes_pruned: bytes of the key-value cache after prefill.
        parts: the same FLOPs split into ``vision_dense``, ``vision``, ``scorer``, ``decoder_dense``, ``decoder``.
            Every vision block counts as if each token saw its whole picture, windows included.
        bypasses: records of rows that ran through a part of a layer while the others kept their residual; point ``"llm:3.attn"`` or so.
        decoding: of the steps after the prompt, as far as a method acts in them: ``steps``, and the shares of attention and MLP calls that were
            skipped, ``attn_skipped`` and ``mlp_skipped``; ``keys_seen``: the share of the keys that heads looked at, in layers where they choose.
        experts: where a method chooses among experts: the shares of the pairs of token and expert that ran, ``prefill`` and, if anything followed,
            ``decode``.
        heads: records of layers in which each head attends among some of the prompt's tokens; point ``"llm:3.heads"`` or so.
    """

    method: str
    keep: Any
    points: list[PointRecord]
    flops_dense: float
    flops_pruned: float
    kv_bytes_dense: int
    kv_bytes_pruned: int
    parts: dict[str, float]
    bypasses: list[PointRecord] = field(default_factory=list)
    decoding: dict[str, float] = field(default_factory=dict)
    experts: dict[str, float] = field(default_factory=dict)
    heads: list[HeadRecord] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        return {
            "method": self.method,
            "keep": self.keep,
            "points": [
                {
                    "point": record.point,
                    "method": record.method,
                    "tokens": record.tokens,
                    "visual_before": record.visual_before,
                    "visual_kept": record.visual_kept,
                    "keep_indices": [indices.tolist() for indices in record.keep_indices],
                }
                for record in self.points
            ],
            "flops_dense": self.flops_dense,
            "flops_pruned": self.flops_pruned,
            "kv_bytes_dense": self.kv_bytes_dense,
            "kv_bytes_pruned": self.kv_bytes_pruned,
            "parts": self.parts,
            "bypasses": [
                {"point": record.point, "tokens": record.tokens, "before": record.visual_before, "run": record.visual_kept} for record in self.bypasses
            ],
            "decoding": self.decoding,
            "experts": self.experts,
            "heads": [{"point": record.point, "tokens": record.tokens, "before": record.before, "run": record.kept} for record in self.heads],
        }

    def __str__(self) -> str:
        keep = f", keep={self.keep:.4g}" if isinstance(self.keep, float) else f", keep={self.keep}" if self.keep is not None else ""
        lines = [f"vlprune report: {self.method}{keep}"]
        if not (self.points or self.bypasses or self.decoding or self.experts or self.heads):
            lines.append("  no pruning point was passed (no visual tokens in the last call, or nothing to prune)")
            return "\n".join(lines)
        several = any(record.tokens != "visual" for record in self.points)   # then say which tokens each line counts
        if self.points:
            lines.append(f"  {'point':<12}{'method':<12}{'tokens  ' if several else ''}{'before':>8}{'kept':>8}{'share':>8}")
        for record in self.points:
            share = record.visual_kept / max(record.visual_before, 1)
            tokens = f"{record.tokens:<8}" if several else ""
            lines.append(f"  {record.point:<12}{record.method:<12}{tokens}{record.visual_before:>8}{record.visual_kept:>8}{share:>8.1%}")
        if self.bypasses:
            lines.append(f"  {'part':<12}{'method':<12}{'tokens':<8}{'there':>8}{'run':>8}{'share':>8}")
        for record in self.bypasses:
            share = record.visual_kept / max(record.visual_before, 1)
            lines.append(f"  {record.point:<12}{record.method:<12}{record.tokens:<8}{record.visual_before:>8}{record.visual_kept:>8}{share:>8.1%}")
        if self.heads:
            lines.append(f"  {'heads':<12}{'method':<24}{'tokens':<8}{'there':>8}{'each':>8}{'share':>8}")
        for head in self.heads:
            share = head.kept / max(head.before, 1)
            lines.append(f"  {head.point:<12}{head.method:<24}{head.tokens:<8}{head.before:>8}{head.kept:>8}{share:>8.1%}")
        if "keys_seen" in self.decoding:
            lines.append(f"  while decoding, heads that choose looked at {self.decoding['keys_seen']:.1%} of the keys")
        if "steps" in self.decoding:
            attn, mlp = self.decoding["attn_skipped"], self.decoding["mlp_skipped"]
            lines.append(f"  {self.decoding['steps']:.0f} decoding steps skipped {attn:.1%} of attention and {mlp:.1%} of MLP calls")
        if self.experts:
            shares = ", ".join(f"{share:.1%} in {'the prompt' if phase == 'prefill' else 'decoding'}" for phase, share in self.experts.items())
            lines.append(f"  experts that ran, of those that the router chose: {shares}")
        if self.flops_dense:
            lines.append(f"  prefill FLOPs  {_si(self.flops_dense)} -> {_si(self.flops_pruned)}  ({self.flops_pruned / self.flops_dense:.1%} of dense)")
        if self.kv_bytes_dense:
            ratio = self.kv_bytes_pruned / self.kv_bytes_dense
            lines.append(f"  KV cache       {_si(self.kv_bytes_dense, 'B')} -> {_si(self.kv_bytes_pruned, 'B')}  ({ratio:.1%} of dense)")
        return "\n".join(lines)

    __repr__ = __str__


def make_report(trace: Trace | None, method: str, keep: Any) -> Report:
    """Read a trace. Counts are 0 where the adapter does not know the shapes."""
    if trace is None:
        return Report(method, keep, [], 0.0, 0.0, 0, 0, {})
    decoder, vision = trace.shapes.get("decoder"), trace.shapes.get("vision")
    seen = seen_dense = 0.0
    if isinstance(vision, TowerShape) and trace.vision_tokens:
        sequences = max(trace.vision_sequences, 1)
        seen = sum(sequences * vision.layer_flops(tokens // sequences) for tokens in trace.vision_tokens)
        seen -= sum(vision.mlp_flops(tokens) for tokens in trace.mlp_skipped.values())
        full_tokens = [trace.vision_dense or tokens for tokens in trace.vision_tokens]
        seen_dense = sum(sequences * vision.layer_flops(tokens // sequences) for tokens in full_tokens)
    flops_dense, flops_pruned = seen_dense, seen + trace.scorer_flops
    kv_dense = kv_pruned = 0
    parts = {"vision_dense": seen_dense, "vision": seen, "scorer": trace.scorer_flops}
    if isinstance(decoder, TowerShape) and trace.layout is not None and trace.decoder_lengths:
        full = [[trace.layout.length] * trace.layout.num_rows] * decoder.layers
        head = 2.0 * decoder.width * decoder.vocabulary * trace.layout.num_rows
        parts["decoder_dense"] = stack_flops(decoder, full, trace.past_length) + head
        parts["decoder"] = _decoder_flops(decoder, trace) + head
        flops_dense += parts["decoder_dense"]
        flops_pruned += parts["decoder"]
        kv_dense = stack_kv_bytes(decoder, full, trace.kv_element_bytes, trace.past_length)
        stored = [[max(lengths)] * len(lengths) for lengths in trace.decoder_lengths]    # short rows are filled up
        stored = [trace.keys.get(layer, lengths) for layer, lengths in enumerate(stored)]
        own = [lengths for layer, lengths in enumerate(stored) if layer not in trace.shared_kv]
        kv_pruned = stack_kv_bytes(decoder, own, trace.kv_element_bytes, trace.past_length)
    decoding = {} if decoder is None else _decoding(trace, decoder)
    counts = (flops_dense, flops_pruned, kv_dense, kv_pruned, parts)
    return Report(method, keep, list(trace.points), *counts, list(trace.bypasses), decoding, _experts(trace), list(trace.heads))


def _experts(trace: Trace) -> dict[str, float]:
    """Shares of the chosen experts that ran."""
    found = {}
    if trace.experts:
        found["prefill"] = sum(ran for ran, _, _ in trace.experts.values()) / max(sum(routed for _, routed, _ in trace.experts.values()), 1)
    if trace.decode_experts[1]:
        found["decode"] = trace.decode_experts[0] / trace.decode_experts[1]
    return found


def _decoding(trace: Trace, shape: Any) -> dict[str, float]:
    """What the decoding steps after the prompt skipped: shares of all attention and MLP calls."""
    keys = {"keys_seen": trace.decode_keys[0] / trace.decode_keys[1]} if trace.decode_keys[1] else {}
    if not trace.decode_steps or not isinstance(shape, TowerShape):
        return keys
    skipped = {part: sum(count for (_, name), count in trace.decode_skipped.items() if name == part) for part in ("attn", "mlp")}
    return {"steps": float(trace.decode_steps), **{f"{part}_skipped": count / (trace.decode_steps * shape.layers) for part, count in skipped.items()}, **keys}


def _decoder_flops(shape: TowerShape, trace: Trace) -> float:
    """Of the prompt; layers in which some rows skip a part are counted by what ran."""
    total = 0.0
    for layer, lengths in enumerate(trace.decoder_lengths):
        if layer in trace.experts:
            ran, routed, each = trace.experts[layer]
            total -= (routed - ran) * each
        if layer in trace.shared_kv:                                     # no projections of keys and values
            total -= sum(4.0 * keys * shape.width * shape.kv_heads * shape.head_dim for keys in trace.keys.get(layer, lengths))
        if layer not in trace.queries and layer not in trace.mlp_rows:
            total += stack_flops(shape, [lengths], trace.past_length)
            continue
        queries, mlp = trace.queries.get(layer, lengths), trace.mlp_rows.get(layer, lengths)
        keys = trace.keys.get(layer, lengths)
        total += sum(shape.partial_flops(q, k, m, trace.past_length) for q, k, m in zip(queries, keys, mlp, strict=True))
    for layer, chosen in trace.pairs.items():                            # heads that chose
        lengths = trace.decoder_lengths[layer]
        dense = [tokens * (tokens + 1) / 2 + tokens * trace.past_length for tokens in lengths]
        total -= sum(4.0 * (all_ - own) * shape.heads * shape.head_dim for all_, own in zip(dense, chosen, strict=True))
    return total


def _si(value: float, unit: str = "FLOP") -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
