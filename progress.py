"""One line of progress: redrawn on a terminal, printed now and then elsewhere.

bar = ProgressLine("tokenizing", total=bytes_in_all)
bar.add(documents=12, tokens=3456); bar.done = bytes_so_far; bar.draw_if_due()
bar.close()
"""

from __future__ import annotations

import sys
import time

from run_log import human_count, human_time


class ProgressLine:
    """Share done, documents, tokens, tokens/s and time left. `first` is what was done before this process began."""

    def __init__(self, label: str, *, total: float, first: float = 0, out=None):
        self.label, self.total, self.first, self.done = label, max(total, 1e-9), first, first
        self.documents = self.tokens = 0
        self._out = out or sys.stderr
        self._terminal = self._out.isatty()
        self._every_s = 0.2 if self._terminal else 10
        self._begin = time.monotonic()
        self._next = self._begin + self._every_s

    def add(self, *, documents: int, tokens: int) -> None:
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens

    def draw_if_due(self) -> None:
        if time.monotonic() >= self._next:
            self.draw()

    def draw(self) -> None:
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        now = self.done - self.first
        left = elapsed * (self.total - self.done) / now if now > 0 else float("inf")
        line = (
            f"{self.label} {100 * self.done / self.total:5.1f}% | {self.documents:,} documents | {human_count(self.tokens)} "
            f"tokens | {human_count(self.tokens / elapsed)} tokens/s | {human_time(left)} left"
        )
        print(
            f"\r{line:<100}" if self._terminal else line, end="" if self._terminal else "\n", file=self._out, flush=True
        )
        self._next = time.monotonic() + self._every_s

    def warn(self, text: str) -> None:
        print(f"{chr(10) * self._terminal}WARNING: {text}", file=self._out, flush=True)

    def close(self) -> None:
        """The last state, and the end of the line."""
        self.draw()
        if self._terminal:
            print(file=self._out)
