"""What the log writes: no secret in any file of a run, W&B's own included, and every number readable again."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECRET = "correct-horse-battery"
A_RUN = """
import sys
from run_log import RunLog

folder, secret = sys.argv[1:]
log = RunLog(folder, rank=0)
log.start_wandb(project="p-" + secret, name="name-" + secret, mode="offline", config={"option": secret})
log.line("a line with " + secret)
log.warn("a warning with " + secret)
log.metrics({"step": 1, "loss": float("inf"), "note": secret})
log.close()
assert sys.argv[2] == secret
"""


def test_no_file_of_a_run_holds_a_secret(tmp_path):
    """Given as an argument, as a name, in the options and in a metric; W&B's offline run is uploaded as it is."""
    script = tmp_path / "script.py"
    script.write_text(A_RUN)
    output = tmp_path / "output"
    output.mkdir()
    environment = {**os.environ, "SOME_API_TOKEN": SECRET, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(output), SECRET]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr and "a line with <SOME_API_TOKEN>" in done.stdout
    files = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert not [path for path, content in files.items() if SECRET.encode() in content]
    (wandb_run,) = [content for path, content in files.items() if path.suffix == ".wandb"]
    assert b"name-<SOME_API_TOKEN>" in wandb_run, "the run that was looked at is not the one that was named"
    record = json.loads((output / "metrics.jsonl").read_text())
    assert record["note"] == "<SOME_API_TOKEN>" and record["loss"] is None
