"""Real processes that are stopped, killed, stuck or raising: all of them end in time, and the guilty one is named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import watchdog

RANK = Path(__file__).with_name("watched_rank.py")
# silence 2 s or phase limit 6 s (watched_rank.py), a look every 2 s, and the others' time to dump their stacks
IN_TIME_S = 6 + 2 * watchdog.BEAT_S + watchdog.ABORT_S + 2


def start(folder, *deeds):
    name = f"test-{len(list(folder.iterdir()))}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(folder), str(rank), str(len(deeds)), name, deed],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, deed in enumerate(deeds)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    time.sleep(0.2)  # into the phase that follows
    return processes


def end(processes, *, within_s=IN_TIME_S):
    """Exit codes and all that was said on stderr; every process must be gone in time."""
    started, said = time.monotonic(), ""
    try:
        for process in processes:
            said += process.communicate(timeout=max(0.1, within_s - (time.monotonic() - started)))[1]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [process.returncode for process in processes], said


def stacks(folder, rank):
    (file,) = folder.glob(f"hang-*-rank{rank}.txt")
    return file.read_text()


def test_a_run_without_faults_ends_as_it_should(tmp_path):
    codes, said = end(start(tmp_path, "go on", "go on"))
    assert (codes, said) == ([0, 0], "") and not list(tmp_path.glob("hang-*"))


def test_a_long_call_that_holds_the_interpreter_lock_is_no_hang(tmp_path):
    codes, said = end(start(tmp_path, "wait a little", "hold the lock for a while"))
    assert (codes, said) == ([0, 0], "")


def test_a_stopped_rank_ends_all_and_is_named(tmp_path):
    processes = start(tmp_path, "wait long", "wait long")
    os.kill(processes[0].pid, signal.SIGSTOP)
    codes, said = end(processes)
    assert codes[1] == watchdog.EXIT_CODE and codes[0] in (watchdog.EXIT_CODE, -signal.SIGKILL)
    assert f"rank 0 (process {processes[0].pid}" in said and "has been stopped for" in said
    assert "last phase: optimizer of step 2" in said and said.count("ERROR") == 1
    assert said.strip() in (tmp_path / "log.txt").read_text()
    for rank in (0, 1):
        assert "watched_rank.py" in stacks(tmp_path, rank)


def test_a_collective_that_breaks_while_the_run_ends_does_not_change_the_exit_code(tmp_path):
    processes = start(tmp_path, "wait long", "break with the others")
    os.kill(processes[0].pid, signal.SIGSTOP)
    codes, said = end(processes)
    assert codes[1] == watchdog.EXIT_CODE, said


def test_a_killed_rank_ends_the_others(tmp_path):
    processes = start(tmp_path, "wait long", "wait long", "wait long")
    os.kill(processes[1].pid, signal.SIGKILL)
    codes, said = end(processes, within_s=2 * watchdog.BEAT_S + watchdog.ABORT_S)
    assert codes == [watchdog.EXIT_CODE, -signal.SIGKILL, watchdog.EXIT_CODE]
    assert f"rank 1 (process {processes[1].pid}" in said and "is dead" in said and said.count("ERROR") == 1
    assert "last phase: optimizer of step 2" in said


def test_the_launchers_sigterm_after_a_death_is_answered_at_once(tmp_path):
    """The main thread sits in a call that no Python signal handler interrupts: the watchdog's thread must see it."""
    processes = start(tmp_path, "hang", "wait long")
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].wait()
    processes[0].send_signal(signal.SIGTERM)
    codes, _ = end(processes, within_s=watchdog.BEAT_S + 1)
    assert codes[0] == watchdog.EXIT_CODE


def test_a_rank_that_raises_is_named_with_what_it_raised(tmp_path):
    codes, said = end(start(tmp_path, "raise", "wait long"), within_s=IN_TIME_S + watchdog.FAILED_GRACE_S)
    assert codes == [1, watchdog.EXIT_CODE]
    assert "raised ValueError: the bfloat is gone; last phase: exit after an error of step 2" in said


def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(tmp_path):
    processes = start(tmp_path, "wait long", "hang")
    codes, said = end(processes)
    assert codes == [watchdog.EXIT_CODE] * 2
    assert f"rank 1 (process {processes[1].pid} on" in said and "hangs: the others have waited in" in said
    assert "last phase: backward of step 2, micro-step 0" in said
    assert "wait" in stacks(tmp_path, 1)


def test_a_rank_stuck_with_the_interpreter_lock_gives_its_stacks_and_ends(tmp_path):
    processes = start(tmp_path, "wait long", "hold the lock")
    codes, said = end(processes, within_s=IN_TIME_S + 4)
    assert codes[0] == watchdog.EXIT_CODE and codes[1] in (watchdog.EXIT_CODE, -signal.SIGKILL)
    assert "rank 1" in said and "last phase: backward of step 2" in said
    assert "watched_rank.py" in stacks(tmp_path, 1)


def test_limits_follow_the_planner():
    known = watchdog.derive_limits(micro_step_seconds=2200, checkpoint_bytes=600 * 10**9, hang_timeout_s=0)
    assert known.seconds("forward") == 22600 and known.seconds("forward", first=True) == 24400
    assert known.seconds("save") == 12600 and known.silence_s == 60
    assert known.collective_s > 2 * known.seconds("backward", first=True)  # the collectives' own timeout comes later
    unknown = watchdog.derive_limits(micro_step_seconds=None, checkpoint_bytes=0, hang_timeout_s=0)
    assert unknown.seconds("forward") == 1800
    given = watchdog.derive_limits(micro_step_seconds=2200, checkpoint_bytes=0, hang_timeout_s=12)
    assert (given.seconds("optimizer"), given.seconds("data", first=True), given.silence_s) == (12, 12, 12)


def test_a_heartbeat_has_one_size_whatever_it_says():
    beat = watchdog.Heartbeat(0, "host", 1, 2, 3, 4, "forward", 5, 6, 7.0, "failed", 'ö"\n' * 400)
    text = beat.to_bytes()
    assert len(text) == watchdog.RECORD_BYTES
    assert json.loads(text)["reason"].startswith('ö"')


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rank": 1}'])
def test_a_heartbeat_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "rank-0").write_text(content)
    assert watchdog.read_heartbeat(tmp_path / "rank-0") is None
