"""DeepSpeed's checkpoint shards: written in the background while their SHA-256 is taken, read without running pickles.

    engine.checkpoint_engine = shards = ShardFiles()     # DeepSpeed's own place for such a thing
    engine.save_checkpoint(...)                          # collects what is to be written, copies nothing large
    shards.start()                                       # a thread writes it
    records = shards.join()                              # {path: {"bytes": ..., "chunks_sha256": ...}}, all on disk

Nothing is copied: the tensors (partitions of the fp32 master weights and moments) change in the optimizer's step only,
so `join` must come before it. Files are torch's zip format without its CRC (ours is the SHA-256), written by hashed_files.py
and never read again.

A .pt file is a pickle, and unpickling runs whatever it names. `check_pickles` refuses every file that names something
outside ALLOWED, without unpickling it; DeepSpeed's engine then loads through torch's weights-only unpickler.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from pathlib import Path

import torch

from config import UserError
from hashed_files import HashedFile

# What DeepSpeed's own state names beside tensors and plain values (module, class)
ALLOWED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
)


class ShardFiles:
    """DeepSpeed's checkpoint engine (its CheckpointEngine's methods) with a thread that writes. One save at a time."""

    name = "ShardFiles"

    def __init__(self):
        self._files: list[tuple[Path, object]] = []
        self._thread: threading.Thread | None = None
        self._records: dict[Path, dict] = {}
        self._error: BaseException | None = None

    # --- what DeepSpeed calls

    def makedirs(self, path, exist_ok=False):
        os.makedirs(path, exist_ok=exist_ok)

    def create(self, info):
        pass

    def save(self, state_dict, path):
        """Remember what is to be written. Buffers are copied (kilobytes), everything else is referred to."""
        if isinstance(state_dict.get("module"), dict):
            copies = {k: v.clone() if torch.is_tensor(v) else v for k, v in state_dict["module"].items()}
            state_dict = {**state_dict, "module": type(state_dict["module"])(copies)}
        self._files.append((Path(path), state_dict))

    def load(self, path, map_location=None):
        with torch.serialization.safe_globals(_allowed_objects()):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info):
        return True

    def is_data_parallel_writer(self, dp_rank):
        return dp_rank == 0

    def is_decoupled(self):
        return False

    def set_commit_info(self, info):
        pass

    def get_commit_info(self):
        return None

    def cleanup(self):
        pass

    def preserves_storage_sharing(self):
        return True

    # --- what the trainer calls

    def add(self, path: Path, content: bytes) -> None:
        """Write these bytes, too."""
        self._files.append((path, content))

    def start(self) -> None:
        """Begin to write what was collected since the last save."""
        assert self._thread is None, "the last save was not joined"
        files, self._files = self._files, []
        self._records, self._error = {}, None
        self._thread = threading.Thread(target=self._write_all, args=(files, _gpu_ready()), name="save", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> dict[Path, dict]:
        """Wait until all is on disk; bytes and SHA-256 of each file. Raises what the writing raised (OSError)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
        return self._records

    def _write_all(self, files: list, gpu) -> None:
        crc = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # half of the processor time of a save; the SHA-256 says more
        try:
            with _beside_compute(gpu):
                for path, content in files:
                    self._records[path] = write_hashed(path, content)
        except BaseException as error:  # raised again by join, in the thread that can say it
            self._error = error
        finally:
            torch.serialization.set_crc32_options(crc)


def _gpu_ready():
    """An event after which the state on the GPU (if there is one in use) can be read."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event()
    event.record()
    return torch.cuda.current_device(), event


@contextlib.contextmanager
def _beside_compute(gpu):
    """Copies of this thread on a stream of their own: on the default one they would wait for a step of hours."""
    if gpu is None:
        yield
        return
    device, event = gpu
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_event(event)
        yield


def write_hashed(path: Path, content) -> dict:
    """Write bytes, or what torch.save takes, and fsync. Returns {"bytes", "chunks_sha256"}. Raises OSError."""
    with HashedFile(path) as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.save(content, file)
        return file.finish()


# ---------------------------------------------------------------------------------------------- reading


def _allowed_objects() -> list:
    import importlib

    found = []
    for module, name in ALLOWED:
        with contextlib.suppress(ImportError, AttributeError):
            found.append(getattr(importlib.import_module(module), name))
    return found


def check_pickles(folder: Path, *, key: str) -> None:
    """Refuse a checkpoint whose .pt files name anything but tensors, plain values and ALLOWED; nothing is unpickled.

    `key` is what the error names (an option). Raises UserError with the file and the global's name.
    """
    with torch.serialization.safe_globals(_allowed_objects()):
        for file in sorted(folder.rglob("*.pt")):
            try:
                names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
            except (OSError, ValueError, RuntimeError, EOFError, AssertionError, pickle.UnpicklingError) as error:
                first = (str(error).splitlines() or [""])[0]
                raise UserError(f"{key}: {file} is no file of torch.save that can be checked ({first})") from None
            if names:
                raise UserError(
                    f"{key}: {file} would run {', '.join(sorted(names))} when loaded, which no checkpoint of this trainer "
                    "names; it was changed or comes from elsewhere: do not load it"
                )
