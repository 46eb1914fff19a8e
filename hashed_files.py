"""Large files at the disk's own speed: written past the page cache, hashed while they are written, checked in parallel.

    with HashedFile(path) as file:
        torch.save(state, file)
        record = file.finish()           # {"bytes": ..., "chunks_sha256": ...}; all of it is on the disk
    chunks_sha256(path)                  # the same digest of a file that is there

`chunks_sha256` is the SHA-256 of the SHA-256 digests of the file's chunks of 16 MiB in their order; the last may be shorter.
One core hashes 1.8 GiB/s, less than a good disk writes, so THREADS chunks are hashed and written at once.

Past the page cache (O_DIRECT): a checkpoint is larger than what memory a training run leaves free, so each page would be
allocated, copied to and thrown away (measured: 0.4 to 1.3 GiB/s and 0.6 to 2.1 processor seconds a GiB, against 2.2 GiB/s and
0.03). Where a file system refuses O_DIRECT, at the opening or at a write, it gets ordinary writes, started towards the disk as
they come.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

CHUNK_BYTES = 16 * 2**20
THREADS = 4
BLOCK_BYTES = 4096  # O_DIRECT wants offsets, lengths and addresses in multiples of the disk's block
ALLOCATED_AHEAD = 16 * CHUNK_BYTES
SYNC_FILE_RANGE_WRITE = 2


class HashedFile:
    """A file that is only appended to. `write` copies and returns; `finish` waits for the disk and raises what went wrong.

    Errors wait for `finish`, since torch.save calls `write` through C++ frames that an exception must not cross.
    Memory: THREADS + 1 chunks.
    """

    def __init__(self, path: Path):
        self._path = path
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(THREADS + 1):  # a map begins on a page; its memory is taken when it is first filled
            self._free.put(np.frombuffer(mmap.mmap(-1, CHUNK_BYTES), np.uint8))
        self._buffer, self._filled, self._bytes, self._allocated = self._free.get(), 0, 0, 0
        self._digests: list[Future] = []
        self._error: OSError | None = None
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor, self._direct = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor, self._direct = os.open(path, flags, 0o644), False
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="write")

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown()  # before the descriptor's number can be another file's
        os.close(self._descriptor)

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view) and self._error is None:
            count = min(CHUNK_BYTES - self._filled, len(view) - at)
            # numpy copies without the interpreter's lock
            self._buffer[self._filled : self._filled + count] = np.frombuffer(view[at : at + count], np.uint8)
            self._filled += count
            at += count
            if self._filled == CHUNK_BYTES:
                self._submit()
        return len(view)

    def flush(self) -> None:
        pass

    def finish(self) -> dict:
        """Wait until all is on the disk. Returns {"bytes", "chunks_sha256"}. Raises OSError with the file's name."""
        if self._filled:
            self._submit()
        try:
            digests = [digest.result() for digest in self._digests]
            if self._error is not None:
                raise self._error
            os.ftruncate(self._descriptor, self._bytes)  # room was made ahead, and the last block written whole
            os.fsync(self._descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        return {"bytes": self._bytes, "chunks_sha256": _of_digests(digests)}

    def _submit(self) -> None:
        buffer, length = self._buffer, self._filled
        if length == CHUNK_BYTES and self._bytes >= self._allocated:
            # Writes that extend a file wait for each other, those inside one do not (ext4: 0.80 of the disk became 0.93)
            _allocate(self._descriptor, self._bytes, ALLOCATED_AHEAD)
            self._allocated = self._bytes + ALLOCATED_AHEAD
        try:
            self._digests.append(self._pool.submit(self._hash_and_write, self._bytes, buffer, length))
        except RuntimeError as error:  # no thread to be had, or the process is ending
            self._error = OSError(errno.EAGAIN, str(error))
            self._free.put(buffer)
        self._bytes += length
        self._buffer, self._filled = self._free.get(), 0

    def _hash_and_write(self, start: int, buffer: np.ndarray, length: int) -> bytes:
        try:
            digest = hashlib.sha256(buffer[:length]).digest()
            if self._error is None:
                self._write_at(start, buffer, length)
            return digest
        except OSError as error:
            self._error = error
            raise
        finally:
            self._free.put(buffer)

    def _write_at(self, start: int, buffer: np.ndarray, length: int) -> None:
        direct, end = self._direct, length
        if direct:
            end = -(-length // BLOCK_BYTES) * BLOCK_BYTES
            buffer[length:end] = 0
        at = 0
        while at < length:
            try:
                written = os.pwrite(self._descriptor, memoryview(buffer)[at:end], start + at)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                written = 0
            if not direct:
                _start_writeback(self._descriptor, start + at, written)
            # refused, or full inside a block: an ordinary write goes on or has the reason
            elif written == 0 or written % BLOCK_BYTES:
                direct, end = False, length
                self._leave_direct()
            at += written

    def _leave_direct(self) -> None:
        """Go on through the page cache; what was written past it stays."""
        self._direct = False
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def chunks_sha256(path: Path) -> str:
    """The digest of a file that is there, by THREADS threads. Raises OSError if it cannot be read."""
    buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(THREADS):
        buffers.put(memoryview(mmap.mmap(-1, CHUNK_BYTES)))

    def digest(start: int) -> bytes:
        buffer, length = buffers.get(), 0
        try:
            while count := os.preadv(descriptor, [buffer[length:]], start + length):
                length += count
            return hashlib.sha256(buffer[:length]).digest()
        finally:
            buffers.put(buffer)

    with open(path, "rb") as file, ThreadPoolExecutor(THREADS) as pool:
        descriptor = file.fileno()
        return _of_digests(pool.map(digest, range(0, os.fstat(descriptor).st_size, CHUNK_BYTES)))


def _of_digests(digests) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


_LIBC = ctypes.CDLL(None)


def _allocate(descriptor: int, start: int, length: int) -> None:
    """Make room in a file (Linux). Where there is none, or the file system cannot, the writes that follow say so or do it."""
    if hasattr(_LIBC, "fallocate"):  # not posix_fallocate, which would write zeros where the file system cannot
        _LIBC.fallocate(descriptor, 0, ctypes.c_int64(start), ctypes.c_int64(length))


def _start_writeback(descriptor: int, start: int, length: int) -> None:
    """Ask the kernel to begin writing this range now (Linux), so that the fsync at the end has little left to wait for."""
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(length), SYNC_FILE_RANGE_WRITE)
