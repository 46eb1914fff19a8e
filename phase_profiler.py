"""What a run really used: peaks of GPU, pinned and process memory per phase.

    profiler = PhaseProfiler()
    with profiler.phase("forward"):
        ...
    print(profiler.table())
    profiler.peaks["forward"].gpu_reserved      # bytes, the highest over all entries into the phase

torch is never imported here: where nothing has used CUDA, the GPU columns stay 0. Linux only (/proc).
"""

from __future__ import annotations

import re
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass
class PhasePeak:
    """Highest values seen in one phase, in bytes. `gpu_*` and `pinned` are 0 without a GPU."""

    gpu_allocated: int = 0
    gpu_reserved: int = 0
    pinned: int = 0
    process: int = 0
    seconds: float = 0.0
    entered: int = 0


class PhaseProfiler:
    """Peaks of GPU, pinned and process memory per phase of a run.

        profiler = PhaseProfiler()
        with profiler.phase("forward"):
            ...
        profiler.peaks["forward"].gpu_reserved      # bytes, the highest over all entries into the phase

    Phases must not be nested (there is one high-water mark). Process memory is the kernel's own mark (VmHWM, reset on
    entry), or a thread sampling every 5 ms where the kernel refuses the reset. Process memory counts this process only:
    a host's use is the sum over its ranks.
    """

    def __init__(self, *, proc: Path = Path("/proc/self"), sample_s: float = 0.005):
        self.peaks: dict[str, PhasePeak] = {}
        self._proc = proc
        self._sample_s = sample_s
        self._open: str | None = None
        self.process_source = "VmHWM" if self._reset_high_water_mark() else f"sampled every {sample_s * 1e3:g} ms"

    @contextmanager
    def phase(self, name: str):
        if self._open is not None:
            raise RuntimeError(f"phase {name!r} entered inside phase {self._open!r}; phases must not be nested")
        self._open = name
        cuda = _initialised_cuda()
        if cuda:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
            cuda.reset_peak_host_memory_stats()
        sampler = None if self._reset_high_water_mark() else _RssSampler(self._proc, self._sample_s)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._open = None
            cuda = _initialised_cuda()
            if cuda:
                cuda.synchronize()
            peak = self.peaks.setdefault(name, PhasePeak())
            peak.seconds += time.perf_counter() - start
            peak.entered += 1
            if cuda:
                peak.gpu_allocated = max(peak.gpu_allocated, cuda.max_memory_allocated())
                peak.gpu_reserved = max(peak.gpu_reserved, cuda.max_memory_reserved())
                peak.pinned = max(peak.pinned, cuda.host_memory_stats().get("allocated_bytes.peak", 0))
            peak.process = max(peak.process, sampler.stop() if sampler else _status_bytes(self._proc, "VmHWM"))

    def _reset_high_water_mark(self) -> bool:
        """Set VmHWM back to the present size (Linux: write 5 to clear_refs); False where that is not allowed."""
        try:
            (self._proc / "clear_refs").write_text("5")
        except OSError:
            return False
        # some sandboxes accept the write and do nothing, which would report an earlier phase's peak as this one's
        now = _status_bytes(self._proc, "VmRSS")
        return _status_bytes(self._proc, "VmHWM") <= now + 64 * 2**20

    def table(self) -> str:
        """One aligned line per phase."""
        lines = [
            f"{'phase':<12}{'GPU alloc':>11}{'GPU resv':>11}{'pinned':>11}{'process':>11}  GiB, peaks ({self.process_source})"
        ]
        for name, p in self.peaks.items():
            sizes = (p.gpu_allocated, p.gpu_reserved, p.pinned, p.process)
            lines.append(f"{name:<12}" + "".join(f"{size / GIB:>11.3f}" for size in sizes) + f"  {p.seconds:.1f} s")
        return "\n".join(lines)


class _RssSampler:
    """The highest VmRSS a thread saw between construction and stop()."""

    def __init__(self, proc: Path, sample_s: float):
        self._proc, self._sample_s = proc, sample_s
        self._highest = _status_bytes(proc, "VmRSS")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rss-sampler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(self._sample_s):
            self._highest = max(self._highest, _status_bytes(self._proc, "VmRSS"))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._highest, _status_bytes(self._proc, "VmRSS"))


def _status_bytes(proc: Path, key: str) -> int:
    """A 'VmRSS: 123 kB' line of /proc/PID/status in bytes; 0 where there is none."""
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", (proc / "status").read_text(), re.M)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def _initialised_cuda():
    """torch.cuda once something has used it, else None: a profiler must not be what creates the CUDA context."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_available() and torch.cuda.is_initialized() else None
