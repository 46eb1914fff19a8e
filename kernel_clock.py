"""The seconds that a step's big kernels take by themselves, so that every log shows what its steps are made of."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch

from kernels import Kernels
from run_log import say


class KernelClock:
    """Seconds that the big kernels themselves take in a step, by CUDA events around each call; nothing on the CPU.

    The rest of a step is projections, norms, copies that nothing hides, and the CPU. `finish` says the sums the first time
    a length is run, so that every log holds the proof of what its steps are made of.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._events: dict[str, list] = {}
        self._said: set[int] = set()

    def watch(self, kernels: Kernels) -> Kernels:
        """The same kernels, timed."""
        if self.device.type != "cuda":
            return kernels
        return dataclasses.replace(
            kernels,
            kda=self._timed_kda(kernels.kda),
            attention=_TimedAttention(kernels.attention, self),
            grouped_matmul=self.timed("grouped matmuls", kernels.grouped_matmul),
            grouped_weight_grad=self.timed("grouped matmuls", kernels.grouped_weight_grad),
        )

    def start(self, tokens: int) -> None:
        self._events, self._tokens, self._began = {}, tokens, time.perf_counter()

    @contextmanager
    def region(self, name: str):
        if self.device.type != "cuda":
            yield
            return
        begin, end = self._pair(name)
        begin.record()
        yield
        end.record()

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            with self.region(name):
                return function(*arguments, **options)

        return call

    def _timed_kda(self, kda: Callable) -> Callable:
        def call(q, *others):
            with self.region("KDA forward"):
                out, state = kda(q, *others)
            if out.requires_grad and q.requires_grad:  # autograd calls the kernel's backward between these two hooks
                begin, end = self._pair("KDA backward")
                out.register_hook(lambda grad: begin.record())
                q.register_hook(lambda grad: end.record())
            return out, state

        return call

    def _pair(self, name: str):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._events.setdefault(name, []).append(pair)
        return pair

    def seconds(self) -> dict[str, float]:
        """Sums since `start`; waits for the GPU."""
        torch.cuda.synchronize(self.device)
        return {name: sum(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in self._events.items()}

    def finish(self, pinned_bytes: int) -> None:
        """At the end of a backward."""
        if self._tokens in self._said or self.device.type != "cuda":
            return
        self._said.add(self._tokens)
        seconds = self.seconds()
        whole = time.perf_counter() - self._began
        own = sum(seconds.values())
        parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        say(
            f"engine: forward and backward {whole:.2f} s; kernels' own seconds: {parts}; sum {own:.2f}, ratio "
            f"{whole / own:.3f}; GPU peak {torch.cuda.max_memory_reserved(self.device) / 2**30:.1f} GiB reserved, "
            f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} allocated; host {pinned_bytes / 2**30:.1f} GiB pinned "
            "(first step of this length: compiling and pinning are in it)"
        )


class _TimedAttention:
    def __init__(self, attention, clock: KernelClock):
        self.name = attention.name
        self.forward = clock.timed("attention forward", attention.forward)
        self.backward = clock.timed("attention backward", attention.backward)
