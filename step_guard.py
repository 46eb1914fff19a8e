"""Which optimizer steps are dropped before they change anything: not finite, or far outside what the run has seen.

    guard = StepGuard(norm_factor=10, loss_factor=2, losses=[...], norms=[...])   # the last accepted steps, of a resume
    guard.install(engine.optimizer)              # asked inside DeepSpeed's step, between the norm and the update
    guard.loss = loss                            # mean of the step, equal on all ranks
    engine.step()
    guard.reason, guard.norm                     # None, or why the step was dropped

The rule: a step is dropped when its gradient norm is more than `norm_factor` times the median gradient norm of the last
WINDOW accepted steps, or its loss more than `loss_factor` times their median loss, once there are MINIMUM of them. It sees
values that all ranks have reduced, so all ranks decide alike, and depends on nothing but them and the history, which a
checkpoint holds: a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 64
MINIMUM = 16


class StepGuard:
    """History of accepted steps and the verdict on the present one. Factor 0 turns a rule off."""

    def __init__(self, *, norm_factor: float, loss_factor: float, losses=(), norms=()):
        self.norm_factor, self.loss_factor = norm_factor, loss_factor
        self.losses, self.norms = deque(losses, WINDOW), deque(norms, WINDOW)
        self.loss, self.norm, self.reason = math.nan, math.nan, None

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step with these values is to be dropped, or None. Does not change the history."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return "non-finite loss or gradient"
        if len(self.norms) < MINIMUM:
            return None
        for what, value, factor, seen in (
            ("gradient norm", norm, self.norm_factor, self.norms),
            ("loss", loss, self.loss_factor, self.losses),
        ):
            median = statistics.median(seen)
            if factor > 0 and value > factor * median:
                return (
                    f"{what} {value:.4g} is more than {factor:g} times {median:.4g}, the median of the last {len(seen)}"
                )
        return None

    def accept(self) -> None:
        """The present step was done: it counts for the next ones."""
        self.losses.append(self.loss)
        self.norms.append(self.norm)

    def install(self, zero_optimizer) -> None:
        """Ask `judge` in every step of a DeepSpeed ZeRO-3 optimizer (this instance), after the global norm is known and
        before anything is updated. DeepSpeed drops a step whose norm is invalid, on all ranks: a spike is made to look so.
        """
        import torch
        from deepspeed.runtime.utils import combine_grad_norm_groups

        group_norms = zero_optimizer._get_norm_groups

        def judged():
            norms = group_norms()
            self.norm = float(combine_grad_norm_groups(norms)) / zero_optimizer.loss_scale
            self.reason = self.judge(self.loss, self.norm)
            return norms if self.reason is None else [torch.full_like(torch.as_tensor(norm), -1.0) for norm in norms]

        zero_optimizer._get_norm_groups = judged
