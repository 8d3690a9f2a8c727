"""Some patches run through the MLP of a vision block, the others keep their residual; what is added to every token comes on top.

The norm in front of the MLP gets CLS, registers and the patches that run, and what comes out behind the MLP is put among zeros at full length. The
residual is added outside of these modules, so nobody's forward has to be replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters._block_parts import mlp_parts
from vlprune.adapters._middle import MiddleEngine
from vlprune.adapters._vision_engine import VisionSession
from vlprune.hooks import HookSet
from vlprune.method import PatchBypass
from vlprune.protocols import ScoreInputs, gather_tokens
from vlprune.pruner import nan_error
from vlprune.trace import PointRecord


class BypassEngine(MiddleEngine):
    """A vision engine in which patches may also skip MLPs."""

    @property
    def bypasses(self) -> list[PatchBypass]:
        """Those of the method that let anything skip."""
        return [bypass for bypass in self.pruner.method.patch_bypasses if bypass.budget is None or not bypass.budget.is_everything]

    @property
    def acts(self) -> bool:
        """Whether there is anything to do in this tower."""
        return super().acts or bool(self.bypasses)

    def attach(self, hooks: HookSet) -> None:
        """Also around the MLPs."""
        super().attach(hooks)
        for bypass in self.bypasses:
            parts = mlp_parts(self.blocks[bypass.layer])
            assert parts is not None                                     # checked before anything was attached
            hooks.before(parts[0], self._before_norm(bypass))
            hooks.after(parts[1], self._after_mlp(bypass), first=True)

    def _before_norm(self, bypass: PatchBypass) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            session = self.session
            if session is None:
                return None
            states = args[0].transpose(0, 1) if self.sequence_first else args[0]
            with torch.no_grad(), self.pruner.timed():
                runs = self._choose(session, bypass, states[:, session.prefix :])
            session.memo["bypass", bypass.layer] = (runs, states)
            short = gather_tokens(states, runs) if runs.dim() == 2 else states.flatten(0, 1)[runs][None]
            return ((short.transpose(0, 1).contiguous() if self.sequence_first else short, *args[1:]), kwargs)

        return hook

    def _choose(self, session: VisionSession, bypass: PatchBypass, patches: Tensor) -> Tensor:
        """(B, prefix + K) places of the rows that run; (M,) places in the flattened batch where their number is the scorer's business."""
        rows, count = patches.shape[:2]
        num_keep = count if bypass.budget is None else min(count, bypass.budget.num_keep(session.num_original))
        inputs = ScoreInputs(tokens=patches, num_keep=num_keep, original=session.original, num_original=session.num_original)
        scores = bypass.scorer(inputs).float()
        flag = scores.isnan().any()
        if flag.device.type != "cpu":
            session.nan_flags.append((bypass.label, flag))
        elif bool(flag):
            raise nan_error(self.pruner.method.name, bypass.label)
        record = PointRecord(bypass.label, self.pruner.method.name, rows * count, num_rows=rows)
        record.items, record.roles = list(session.layout.items), [None] * rows
        if bypass.budget is None:
            wanted = scores > 0
            flat = wanted.flatten().nonzero().flatten()                  # the one host read of an adaptive block
            counts = torch.bincount(flat // count, minlength=rows).tolist()
            record.kept = list(session.original.flatten()[flat].split(counts))
            front = torch.ones(rows, session.prefix, dtype=torch.bool, device=patches.device)
            runs = torch.cat([front, wanted], dim=1).flatten().nonzero().flatten()
            skipped = rows * count - flat.numel()
        else:
            kept = scores.topk(num_keep, dim=-1).indices.sort(dim=-1).values
            record.kept = list(torch.gather(session.original, 1, kept).unbind(0))
            front = torch.arange(session.prefix, device=patches.device).expand(rows, -1)
            runs, skipped = torch.cat([front, kept + session.prefix], dim=1), rows * (count - num_keep)
        session.trace.points.append(record)
        session.trace.mlp_skipped[bypass.layer] = session.trace.mlp_skipped.get(bypass.layer, 0) + skipped
        for part, tokens in ((bypass.scorer, inputs), (bypass.always, patches.shape[0] * (session.prefix + count))):
            flops = getattr(part, "flops", None)
            session.trace.scorer_flops += 0.0 if flops is None else flops(tokens)
        return runs

    def _after_mlp(self, bypass: PatchBypass) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
            session = self.session
            found = None if session is None else session.memo.pop(("bypass", bypass.layer), None)
            if found is None:
                return None
            runs, states = found
            short = output.transpose(0, 1) if self.sequence_first else output
            zeros = short.new_zeros(states.shape)
            if runs.dim() == 2:
                full = zeros.scatter(1, runs[..., None].expand_as(short), short)
            else:
                full = zeros.flatten(0, 1).index_put((runs,), short[0]).view_as(zeros)
            if bypass.always is not None:
                full = full + bypass.always(states).to(full.dtype)
            return full.transpose(0, 1).contiguous() if self.sequence_first else full

        return hook
