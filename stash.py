"""Where the engine's long tensors live: [tokens, width] buffers on the GPU or in pinned host memory.

    transfer = Transfer(device)
    stash = transfer.stash(tokens, width, dtype, on_gpu=False)
    for (start, end), (tile,) in read_ahead([stash], spans(tokens, 65536)):
        stash.write(start, end, work(tile))                     # reads and writes overlap with `work`

Copies run on two streams of their own, one each way (54.6 GB/s each, 90 GB/s together on an H100). What is ordered by what:
a read waits for the last write of its stash and, because its tile's memory may be in use until then, for all work queued
before it; a write waits for the work before it; a reused buffer's first write comes after its former owner's copies because it
is queued behind them. On the CPU every copy is done at once.

Within a sweep each read hides behind the work on the piece before. A sweep's first piece hides behind what runs before the
sweep, if its read is queued before that work: `prefetch` queues it, and the stash keeps the tile until the sweep asks for it.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from config import UserError
from engine_plan import COPIES_UNDER_WAY


class HostPool:
    """Pinned host buffers, kept and reused across layers and steps: pinning 10 GB costs seconds.

    torch's own pinned allocator rounds each buffer up to a power of two (9.7 GB would take 16), so the memory is mapped
    here and registered with CUDA.
    """

    def __init__(self):
        self._free: list[torch.Tensor] = []
        self._all: dict[int, torch.Tensor] = {}  # by address; holding them keeps the mapping until it is unregistered

    @property
    def total_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._all.values())

    def take(self, nbytes: int) -> torch.Tensor:
        """A free buffer of at least this size, the smallest there is; pinned anew if there is none."""
        fitting = [buffer for buffer in self._free if buffer.numel() >= nbytes]
        if fitting:
            chosen = min(fitting, key=torch.Tensor.numel)
            self._free = [buffer for buffer in self._free if buffer is not chosen]
            return chosen
        size = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        error = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
        if error != 0:
            raise UserError(
                f"host memory: pinning {size / 2**30:.1f} GiB failed (CUDA error {error}) after "
                f"{self.total_bytes / 2**30:.1f} GiB; raise the memory limit (ulimit -l) or take --attention_outputs recompute"
            )
        self._all[buffer.data_ptr()] = buffer
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)

    def release_free(self) -> None:
        """Unpin every free buffer."""
        for buffer in self._free:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
            del self._all[buffer.data_ptr()]
        self._free = []

    def __del__(self):
        # an address that was unmapped but is still registered makes a later, unrelated allocation fail
        for address in self._all:
            torch.cuda.cudart().cudaHostUnregister(address)


class Transfer:
    """The copy streams of one device and the copies under way. On the CPU every copy is done at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.pool = HostPool() if self.cuda else None
        if self.cuda:
            self.up = torch.cuda.Stream(device)
            self.down = torch.cuda.Stream(device)
            self._pending: deque = deque()
            self._pending_bytes = 0

    def stash(self, tokens: int, width: int, dtype: torch.dtype, *, on_gpu: bool) -> Stash:
        return Stash(self, tokens, width, dtype, on_gpu=on_gpu)

    def to_host(self, host: torch.Tensor, tile: torch.Tensor):
        """Start copying; returns the event to wait for. The tile is kept alive until the copy is done."""
        while self._pending and self._pending[0][0].query():  # let go of what has arrived
            self._finish_oldest()
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            host.copy_(tile, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((event, tile))
        self._pending_bytes += tile.nbytes
        # without a bound the CPU would run ahead and fill the GPU with tiles that wait for their copy
        while self._pending_bytes > COPIES_UNDER_WAY:
            self._finish_oldest()
        return event

    def from_host(self, host: torch.Tensor, after):
        """Start copying into a new GPU tile; returns (tile, event)."""
        tile = torch.empty_like(host, device=self.device)
        self.up.wait_stream(torch.cuda.current_stream(self.device))
        if after is not None:
            self.up.wait_event(after)
        with torch.cuda.stream(self.up):
            tile.copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return tile, event

    def _finish_oldest(self) -> None:
        event, tile = self._pending.popleft()
        event.synchronize()
        self._pending_bytes -= tile.nbytes

    def drain(self) -> None:
        while self.cuda and self._pending:
            self._finish_oldest()


class Stash:
    """A [tokens, width] buffer on the compute device or in pinned host memory, read and written by spans of tokens.

    On the device a read is a view. On the host it is a copy that is started early (`start_read`) and waited for late.
    """

    def __init__(self, transfer: Transfer, tokens: int, width: int, dtype: torch.dtype, *, on_gpu: bool):
        self.transfer, self.on_gpu = transfer, on_gpu or not transfer.cuda
        self._copies = not on_gpu  # on the CPU a "host" stash hands out copies too, so that tests see no aliasing
        self._buffer = self._written = None
        self._ahead: dict[tuple[int, int], tuple] = {}  # by span: reads that were started and not yet asked for
        if self.on_gpu:
            self.data = torch.empty(tokens, width, dtype=dtype, device=transfer.device)
        else:
            nbytes = tokens * width * dtype.itemsize
            self._buffer = transfer.pool.take(nbytes)
            self.data = self._buffer[:nbytes].view(dtype).view(tokens, width)

    def prefetch(self, start: int, end: int) -> None:
        """Start a read now, before long work is queued; the next `start_read` of this span hands it out.

        Its tile takes GPU memory from here on. What is on the GPU already needs nothing.
        """
        if self._copies:
            self._ahead[start, end] = self.start_read(start, end)

    def start_read(self, start: int, end: int):
        if (start, end) in self._ahead:
            return self._ahead.pop((start, end))
        if self.on_gpu:
            view = self.data[start:end]
            return (view.clone() if self._copies else view), None
        return self.transfer.from_host(self.data[start:end], self._written)

    def finish_read(self, started) -> torch.Tensor:
        tile, event = started
        if event is not None:
            torch.cuda.current_stream(self.transfer.device).wait_event(event)
        return tile

    def read(self, start: int, end: int) -> torch.Tensor:
        return self.finish_read(self.start_read(start, end))

    def write(self, start: int, end: int, tile: torch.Tensor, *, read_next: bool = False) -> None:
        """`read_next`: this span is read soon, so a copy stays on the GPU that spares it the way to the host and back."""
        self._drop(start, end)
        if self.on_gpu:
            self.data[start:end].copy_(tile)
        else:
            self._written = self.transfer.to_host(self.data[start:end], tile.contiguous())
        if read_next and self._copies:
            self._ahead[start, end] = tile.clone(), None

    def _drop(self, start: int, end: int) -> None:
        """Forget reads that overlap this span. Work queued later may get their tiles' memory, so it waits for the copies."""
        for span in [span for span in self._ahead if span[0] < end and start < span[1]]:
            self.finish_read(self._ahead.pop(span))

    def free(self) -> None:
        """Give the memory back. Copies into it may still be under way: the next owner's come after them on their stream."""
        self._drop(0, self.data.shape[0])
        if self._buffer is not None:
            self.transfer.pool.give(self._buffer)
        self.data = self._buffer = None

    def __del__(self):  # a forward whose backward never came (a skipped step) must not lose its pinned memory
        if self._buffer is not None:
            self.free()


def spans(tokens: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def read_ahead(
    stashes: Iterable[Stash], pieces: list[tuple[int, int]], then: Iterable[tuple[Stash, int, int]] = ()
) -> Iterator[tuple[tuple[int, int], list]]:
    """Go through spans of several stashes at once; the next span's copies run while the caller works on this one.

    `then`: (stash, start, end) of what the next sweep reads first; these copies run behind the work on the last span.
    """
    stashes = list(stashes)
    started = [stash.start_read(*pieces[0]) for stash in stashes]
    for number, piece in enumerate(pieces):
        if number + 1 < len(pieces):
            ahead = [stash.start_read(*pieces[number + 1]) for stash in stashes]
        else:
            ahead = []
            for stash, start, end in then:
                stash.prefetch(start, end)
        yield piece, [stash.finish_read(read) for stash, read in zip(stashes, started, strict=True)]
        started = ahead
