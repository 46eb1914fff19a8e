"""DeepSpeed's C++ ops, loaded so that a killed rank cannot hang later starts, and its CPU Adam made exact across a resume.

    load_cpu_ops(say)                                   # before the process group; DeepSpeed then finds the ops loaded
    optimizer = exact(DeepSpeedCPUAdam(groups, ...))    # an update is a function of its arguments

torch builds an extension at its first use and guards the build with a plain file `lock` beside it. A process killed in
those seconds (a minute at the first start) leaves the file behind, and every later start waits for it without a word and
without end. Here one process of ours loads at a time, under a flock that the kernel releases with the process; a `lock`
that is there then and that no process has open is a dead one's. A living one of another program is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from pathlib import Path

OURS = "loading.flock"


@contextlib.contextmanager
def loading(folder: Path):
    """Hold the flock of an extension's build folder while its op is built and loaded; first remove a dead one's `lock`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / OURS, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock = folder / "lock"
        if lock.exists() and not _is_open(lock):
            text = f"WARNING: {lock} was left by a process that was killed while it built this op; removed"
            print(text, file=sys.stderr, flush=True)  # by the rank that came first, whichever it is
            lock.unlink(missing_ok=True)
        yield


def _is_open(path: Path) -> bool:
    """Whether a process of this machine (that we may look into) has the file open, as torch has while it builds."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samefile(descriptor, path):
                return True
    return False


def load_cpu_ops(say) -> None:
    """Build (about a minute, once) and load the CPU Adam and, without a GPU, DeepSpeed's shared-memory collectives.

    Puts this interpreter's folder first on the PATH: torch runs the first `ninja` there, and two versions of it (the
    system's in one shell, the environment's in another) rebuild each other's work at every change, a minute each time.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    say("ops: loading DeepSpeed's C++ ops (compiled at the first start on a machine: about a minute)")
    own = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([own, *(p for p in os.environ.get("PATH", "").split(os.pathsep) if p != own)])
    accelerator = get_accelerator()
    names = ["CPUAdamBuilder"] + (["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else [])
    for name in names:
        builder = accelerator.create_op_builder(name)
        flags = builder.cxx_args()  # asks for the processor's features: two seconds that need no lock
        builder.cxx_args = lambda flags=flags: list(flags)
        with loading(Path(_get_build_directory(builder.NAME, verbose=False))):
            builder.load(verbose=False)


class _UpdateFromArguments:
    """DeepSpeed's CPU Adam op without its memory.

    The op keeps beta^step as a running product in fp32, but takes pow(beta, step) in the first step after a resume. The two
    differ in their last bit at many steps (7 is one, for beta 0.9), and so do the weights from there on. Told of a step 0
    in between, the op takes pow every time.
    """

    def __init__(self, op):
        import torch

        self._op, self._nothing = op, [torch.zeros(1) for _ in range(4)]

    def __getattr__(self, name):
        return getattr(self._op, name)

    def adam_update(self, opt_id, step, lr, beta1, beta2, eps, weight_decay, bias_correction, *tensors) -> None:
        self._op.adam_update(opt_id, 0, 0.0, beta1, beta2, eps, 0.0, False, *self._nothing)
        self._op.adam_update(opt_id, step, lr, beta1, beta2, eps, weight_decay, bias_correction, *tensors)


def exact(optimizer):
    """The DeepSpeedCPUAdam given, whose updates now depend on their arguments alone; costs microseconds an update.

    Changed in place: ZeRO-3 compares the optimizer's type, a subclass would lose its offload path.
    """
    optimizer.ds_opt_adam = _UpdateFromArguments(optimizer.ds_opt_adam)
    return optimizer
