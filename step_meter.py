"""What a step took: seconds, tokens/s, MFU, memory peaks, the progress line, and how long the rest will take.

meter.start()
...one optimizer step...
record = meter.finish(step_plan, result, learning_rate)     # a line of metrics.jsonl
print(meter.text(record))                                   # step  2/9  T  65536  loss ...  ETA 51m35s
"""

from __future__ import annotations

import itertools
import time

import run_plan
from hardware import peak_flops
from model_shape import model_flops_per_step
from phase_profiler import PhasePeak
from run_log import human_count, human_time


class Meter:
    """Time, speed and memory of each step, and how long the rest takes at the speed in FLOP/s seen so far.

    `profiler`: the run's PhaseProfiler; `gpu`: the card's name, for MFU; `end`: the step after the last one.
    """

    def __init__(self, shape, trainable: str, schedule, profiler, device, world_size: int, end: int, gpu: str | None):
        self.shape, self.trainable, self.schedule = shape, trainable, schedule
        self.device, self.world_size, self.end = device, world_size, end
        self.peak = peak_flops(gpu) if device.type == "cuda" else None
        self.flops_per_second: float | None = None
        self.profiler = profiler
        self.stage: int | None = None
        self.stage_peaks: dict[str, PhasePeak] = {}

    def flops_of(self, step: int) -> float:
        """Model FLOPs of an optimizer step: forward and backward, no recompute."""
        plan = self.schedule.step(step)
        terms = model_flops_per_step(self.shape, plan.seq_length, plan.sequences, trainable=self.trainable)
        return sum(terms.values())

    def remaining_flops(self, next_step: int) -> float:
        starts = [stage.start_step for stage in self.schedule.stages] + [self.end]
        total = 0.0
        for first, last in itertools.pairwise(starts):
            steps = min(last, self.end) - max(first, next_step)
            if steps > 0:
                total += steps * self.flops_of(first)
        return total

    def start(self) -> None:
        self.profiler.peaks.clear()
        self.started = time.perf_counter()

    def finish(self, step_plan, result, learning_rate: float) -> dict:
        seconds = time.perf_counter() - self.started
        flops = self.flops_of(step_plan.step)
        phases = self.profiler.peaks
        if self.stage != step_plan.stage_index:
            self.stage, self.stage_peaks = step_plan.stage_index, {}
        for name, peak in phases.items():
            highest = self.stage_peaks.setdefault(name, PhasePeak())
            for key in ("gpu_allocated", "gpu_reserved", "pinned", "process"):
                setattr(highest, key, max(getattr(highest, key), getattr(peak, key)))
        # The first steps hold compilation and warm-up: forget them quickly
        now = flops / seconds
        self.flops_per_second = now if self.flops_per_second is None else 0.5 * self.flops_per_second + 0.5 * now
        return {
            "step": step_plan.step + 1,
            "stage": step_plan.stage_index,
            "seq_length": step_plan.seq_length,
            "sequences": step_plan.sequences,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "skipped": bool(result.skipped),
            "skip_reason": result.skipped,
            "start_token": step_plan.start_token,
            "learning_rate": learning_rate,
            "seconds": seconds,
            "tokens_per_second": step_plan.tokens / seconds,
            "mfu": flops / seconds / (self.peak * self.world_size) if self.peak else None,
            "peak_gib": max(p.gpu_reserved if self.peak_is_gpu else p.process for p in phases.values()) / 2**30,
            "process_gib": max(p.process for p in phases.values()) / 2**30,
            "pinned_gib": max(p.pinned for p in phases.values()) / 2**30,
            **{f"{name}_seconds": peak.seconds for name, peak in phases.items()},
            "eta_seconds": self.remaining_flops(step_plan.step + 1) / self.flops_per_second,
        }

    @property
    def peak_is_gpu(self) -> bool:
        """The line's peak: on a GPU the allocator's reserve at its highest, on a CPU the process's resident set."""
        return self.device.type == "cuda"

    def predicted_beside_measured(self, plan) -> str:
        """What the plan said of the stage now ending, and what its steps took."""
        seq_length = self.schedule.stages[self.stage].seq_length
        return run_plan.compare_text(plan, seq_length, self.stage_peaks)

    def text(self, record: dict) -> str:
        mfu = f"{100 * record['mfu']:4.1f}%" if record["mfu"] is not None else " n/a"
        return (
            f"step {record['step']:>6}/{self.end}  T {record['seq_length']:>7}  loss {record['loss']:8.4f}  "
            f"norm {record['grad_norm']:8.3f}  lr {record['learning_rate']:.2e}  "
            f"{human_count(record['tokens_per_second']):>7} tok/s  MFU {mfu}  peak {record['peak_gib']:6.2f} GiB  "
            f"ETA {human_time(record['eta_seconds'])}"
        )
