"""One rank of a pretended run under the watchdog, without torch: goes through phases, then does what it is told.

python watched_rank.py OUTPUT_DIR RANK WORLD_SIZE NAME DEED
"""

import ctypes
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from watchdog import Limits, Watchdog

output_dir, rank, world_size, name, deed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
signal.signal(signal.SIGTERM, lambda number, frame: None)  # as the trainer, which only remembers it
limits = Limits(start_s=20, micro_step_s=6, first_step_s=6, save_s=20, silence_s=2)
with Watchdog(output_dir, rank=rank, world_size=world_size, name=name, limits=limits) as watch:
    for step in range(3):
        watch.enter("forward", step=step, micro_step=0)
        watch.enter("backward", step=step, micro_step=0)
        time.sleep(0.1)
    print("ready", flush=True)
    if deed == "raise":
        raise ValueError("the bfloat is gone")
    if deed == "hang":  # what a deadlock looks like from outside
        threading.Lock().acquire() and threading.Event().wait()
    if deed == "hold the lock":  # a C call that keeps the interpreter lock: no Python thread of this process runs
        ctypes.PyDLL(None).sleep(3600)
    if deed == "hold the lock for a while":
        ctypes.PyDLL(None).sleep(4)
    watch.enter("optimizer", step=2)
    if deed == "wait a little":
        time.sleep(5)
    if deed == "break with the others":  # as a collective does when the watchdog ends the rank at its other end
        while not (watch.folder / "abort").exists():
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")
    if deed == "wait long":
        time.sleep(3600)
print("done", flush=True)
