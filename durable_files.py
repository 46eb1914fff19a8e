"""Files that survive a kill and a power cut: written under another name, fsynced, renamed, the folder fsynced.

    write_file_durably(path, content)     # whole or not there
    fsync_path(path)                      # a file's content; a folder's renames and deletions

One place for the data's files, the manifests and the checkpoints.
"""

from __future__ import annotations

import os
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file_durably(path: Path, content: bytes) -> None:
    """Write under a temporary name, fsync, rename, fsync the folder: `path` is whole or not there. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
