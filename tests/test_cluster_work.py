"""Many machines on one folder: job-array tasks that finish each other's work, a Ray cluster that loses a node."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizer_samples import real_texts, save_kimi_tokenizer

import tokenize_dataset
from cluster_work import Claims
from config import UserError
from data_loader import MANIFEST
from text_sources import Unit

ROOT = Path(tokenize_dataset.__file__).parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(words of a command without --output_dir, the bytes of an uninterrupted run)."""
    folder = tmp_path_factory.mktemp("inputs")
    kimi = save_kimi_tokenizer(folder / "kimi")
    data = folder / "d.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in real_texts(150)))
    words = [
        "--dataset_name",
        data,
        "--tokenizer",
        kimi,
        "--encoder",
        "reference",
        "--num_workers",
        1,
        "--shard_tokens",
        20_000,
    ]
    words = [str(word) for word in words]
    assert tokenize_dataset.main([*words, "--output_dir", str(folder / "whole")]) == 0
    return words, content(folder / "whole")


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_tasks_of_a_job_array_share_a_folder(inputs, tmp_path):
    words, whole = inputs
    tasks = [
        subprocess.Popen(
            [
                sys.executable,
                "tokenize_dataset.py",
                *words,
                "--output_dir",
                tmp_path / "o",
                "--num_tasks",
                "3",
                "--task_index",
                str(i),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(3)
    ]
    said = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    assert sum("written to" in text for text in said) >= 1
    assert content(tmp_path / "o") == whole


def test_one_task_finishes_what_a_lost_one_left(inputs, tmp_path, monkeypatch, capsys):
    words, whole = inputs
    words = [*words, "--output_dir", str(tmp_path / "o"), "--num_tasks", "2"]
    # a lost task: its claims lie there and nobody touches them
    monkeypatch.setattr(tokenize_dataset, "tokenize_units", lambda *a: None)
    assert tokenize_dataset.main([*words, "--task_index", "0"]) == 0
    monkeypatch.undo()
    for unit in (0, 2):
        (tmp_path / "o" / f"unit_{unit:05d}.claim").touch()
    capsys.readouterr()
    assert tokenize_dataset.main([*words, "--task_index", "1"]) == 0
    assert "other tasks are doing 2 units" in capsys.readouterr().out
    assert not (tmp_path / "o" / MANIFEST).exists()
    with pytest.raises(UserError, match=r"finalize: 2 of \d+ units are not done \(the first is unit 0\)"):
        tokenize_dataset.main([*words, "--task_index", "1", "--finalize"])
    for unit in (0, 2):
        os.utime(tmp_path / "o" / f"unit_{unit:05d}.claim", (time.time() - 1000, time.time() - 1000))
    assert tokenize_dataset.main([*words, "--task_index", "1"]) == 0
    assert content(tmp_path / "o") == whole


def test_finalize_writes_the_manifest_of_a_finished_folder(inputs, tmp_path):
    words, whole = inputs
    words = [*words, "--output_dir", str(tmp_path / "o")]
    tokenize = tokenize_dataset.build_manifest
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize_dataset, "build_manifest", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        tokenize_dataset.main(words)
    assert tokenize_dataset.build_manifest is tokenize and not (tmp_path / "o" / MANIFEST).exists()
    assert tokenize_dataset.main([*words, "--finalize"]) == 0
    assert content(tmp_path / "o") == whole


def test_a_launcher_and_a_task_keep_apart(inputs, tmp_path):
    words, _ = inputs
    (tmp_path / "o").mkdir()
    words = [*words, "--output_dir", str(tmp_path / "o")]
    with tokenize_dataset.only_launcher(tmp_path / "o"), pytest.raises(UserError, match="another .* is working in"):
        tokenize_dataset.main([*words, "--num_tasks", "2", "--task_index", "0"])
    with (
        tokenize_dataset.only_launcher(tmp_path / "o", shared=True),
        pytest.raises(UserError, match="another .* is working in"),
    ):
        tokenize_dataset.main(words)


def test_options_of_tasks_are_checked(inputs, tmp_path):
    words = [*inputs[0], "--output_dir", str(tmp_path / "o")]
    for more, message in (
        (["--num_tasks", "2"], "num_tasks, task_index: give both or neither"),
        (["--num_tasks", "2", "--task_index", "2"], "task_index: 2 must be from 0 to num_tasks - 1 = 1"),
        (["--num_tasks", "2", "--task_index", "1", "--ray"], "ray, num_tasks: Ray spreads the units itself"),
    ):
        with pytest.raises(UserError, match=message):
            tokenize_dataset.main([*words, *more])


def test_claims(tmp_path):
    units = [Unit(i, "jsonl", 0, i, i + 1, 1) for i in range(6)]
    one, two = (Claims(tmp_path, num_tasks=2, task_index=i, stale_s=100) for i in range(2))
    assert [unit.index for unit in two.order(units)] == [1, 3, 5, 0, 2, 4]
    assert one.take(units[0]) and not two.take(units[0]) and two.take(units[1])
    os.utime(tmp_path / "unit_00000.claim", (time.time() - 101, time.time() - 101))
    assert two.take(units[0])
    assert not one.take(units[0])  # two has touched it
    two.release(units[0])
    assert one.take(units[0])


RAY_DRIVER = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
import tokenize_dataset

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
out = Path(sys.argv[sys.argv.index("--output_dir") + 1])

def lose_a_node():
    while len(list(out.glob("unit_*.json"))) < 3:
        time.sleep(0.02)
    cluster.remove_node(second, allow_graceful=False)
    print("LOST a node with", len(list(out.glob("unit_*.json"))), "units done", flush=True)

threading.Thread(target=lose_a_node, daemon=True).start()
code = tokenize_dataset.main([*sys.argv[1:], "--ray", cluster.address])
cluster.shutdown()
sys.exit(code)
"""


def test_ray_cluster_that_loses_a_node(inputs, tmp_path):
    pytest.importorskip("ray", reason="ray is optional: pip install ray==2.60.0")
    words, whole = inputs
    command = [sys.executable, "-c", RAY_DRIVER, *words, "--output_dir", str(tmp_path / "o")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "LOST a node with" in answer.stdout
    assert content(tmp_path / "o") == whole
