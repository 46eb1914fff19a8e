"""A lock file that a killed process left must not stop the next start; a living process's lock must stay."""

import subprocess
import sys
from pathlib import Path

import compiled_ops

HOLD = """
import sys; sys.path.insert(0, sys.argv[1])
import compiled_ops, pathlib
folder = pathlib.Path(sys.argv[2])
with compiled_ops.loading(folder, print):
    (folder / "lock").touch()
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_only_a_dead_processs_lock_is_removed(tmp_path):
    root = Path(compiled_ops.__file__).parent
    words = [sys.executable, "-c", HOLD, str(root), str(tmp_path)]
    said = []
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        with compiled_ops.loading(tmp_path, said.append):  # the other ranks of a run load at the same time
            assert (tmp_path / "lock").exists() and not said
        process.kill()
    assert (tmp_path / "lock").exists()
    with compiled_ops.loading(tmp_path, said.append):
        assert not (tmp_path / "lock").exists()
    assert "was left by a process that was killed" in said[0]
