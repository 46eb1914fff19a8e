"""DeepSpeed's C++ ops, loaded so that a rank killed while it does so cannot hang every later start on its machine.

    load_cpu_ops(say)       # before the process group; DeepSpeed then finds the ops loaded

torch builds an extension at its first use and guards the build with a plain file `lock` beside it. A process killed in
those seconds (a minute at the first start, two seconds at the others) leaves the file behind, and every later start waits
for it without a word and without end. Here each process that loads holds a shared flock on a file of ours, which the kernel
releases with the process: whoever can have it exclusively knows that nobody is loading, and that a `lock` is a dead one's.

Does not help against a program that builds the same ops without this file; it may find its lock taken away.
"""

from __future__ import annotations

import contextlib
import fcntl
from pathlib import Path

OURS = "loading.flock"


@contextlib.contextmanager
def loading(folder: Path, say):
    """Hold the flock of an extension's build folder while its op is built and loaded; first remove a dead one's `lock`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / OURS, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # others are at it, and torch's own lock is alive
        else:
            lock = folder / "lock"
            if lock.exists():
                say(f"WARNING: {lock} was left by a process that was killed while it built this op; removed")
                lock.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def load_cpu_ops(say) -> None:
    """Build (about a minute, once) and load the CPU Adam and, without a GPU, DeepSpeed's shared-memory collectives."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    accelerator = get_accelerator()
    say("ops: loading DeepSpeed's C++ ops (compiled at the first start on a machine: about a minute)")
    names = ["CPUAdamBuilder"] + (["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else [])
    for name in names:
        builder = accelerator.create_op_builder(name)
        with loading(Path(_get_build_directory(builder.NAME, verbose=False)), say):
            builder.load(verbose=False)
