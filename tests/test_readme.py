"""The README's shell examples for machines that are taken away, run as they stand under bash with the real trainer."""

import json
import os
import re
import shlex
import signal
import subprocess
import time

import launched
import pytest
import tiny

STEPS = 24


def example(first_words: str) -> str:
    """The part of a README's code block that begins with these words and ends at an empty line or the block's end."""
    (found,) = re.findall(
        rf"^{re.escape(first_words)}.*?(?=\n\n|\n```)", (launched.ROOT / "README.md").read_text(), re.M | re.S
    )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("readme")
    tiny.write_tokens(path / "tokens")
    (path / "model.json").write_text(json.dumps(tiny.CONFIG))
    launched.train(*options(path, "whole"))
    return path


def options(folder, output: str) -> tuple[str, ...]:
    return (
        *(
            "--data_dir",
            str(folder / "tokens"),
            "--output_dir",
            str(folder / output),
            "--model_config",
            str(folder / "model.json"),
        ),
        *(
            "--deepspeed",
            launched.DEEPSPEED,
            "--curriculum",
            "0:512",
            "--num_train_steps",
            str(STEPS),
            "--warmup_steps",
            "2",
        ),
        *("--gradient_accumulation_steps", "1", "--save_steps", "3"),
    )


def start(text: str, folder, output: str, **environment: str) -> subprocess.Popen:
    """The example as a bash script, with a real command in the place of `accelerate launch ...`."""
    assert text.count("accelerate launch ...") == 1
    command = launched.command("train_continual_2m.py", *options(folder, output), ranks=2)
    script = folder / f"{output}.sh"
    script.write_text("#!/bin/bash\n" + text.replace("accelerate launch ...", shlex.join(command)))
    with open(folder / f"{output}.log", "a") as log:
        return subprocess.Popen(
            ["bash", str(script)],
            cwd=launched.ROOT,
            env={**launched.environment(), **environment},
            stdout=log,
            stderr=log,
        )


def wait_for_step(folder, output: str, step: int, process: subprocess.Popen) -> None:
    metrics = folder / output / "metrics.jsonl"
    ends = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None and time.monotonic() < ends, (folder / f"{output}.log").read_text()[-3000:]
        time.sleep(0.01)


def test_the_shell_loop_goes_on_after_a_kill(folder):
    process = start(example("for attempt in").replace("sleep 60", "sleep 1"), folder, "loop")
    wait_for_step(folder, "loop", 5, process)
    launched.signal_rank(folder / "loop", 1, signal.SIGKILL)
    assert process.wait(180) == 0
    log = (folder / "loop.log").read_text()
    assert "resumed from" in log and log.count(f"done: {STEPS} of {STEPS} steps") == 1
    assert launched.losses(folder / "loop") == launched.losses(folder / "whole")


def test_slurm_requeues_after_its_warning(folder):
    """Slurm itself is a stand-in: it sends SIGTERM to the batch shell alone, and `scontrol` writes down what it is told."""
    told = folder / "told"
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/bash\necho "$@" >> {shlex.quote(str(told))}\n')
    scontrol.chmod(0o755)
    environment = {"PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    process = start(example("#SBATCH"), folder, "slurm", **environment)
    wait_for_step(folder, "slurm", 4, process)
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    log = (folder / "slurm.log").read_text()
    assert "stopped by SIGTERM after step" in log, log[-3000:]
    assert told.read_text() == "requeue 4711\n"
    stopped_at = len(launched.metrics(folder / "slurm"))
    assert (folder / "slurm" / "latest").read_text() == f"checkpoint-step{stopped_at}\n"
    assert start(example("#SBATCH"), folder, "slurm", **environment).wait(180) == 0
    assert told.read_text() == "requeue 4711\n", "a run that is done is not queued again"
    assert launched.losses(folder / "slurm") == launched.losses(folder / "whole")
