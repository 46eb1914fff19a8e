"""What counts as a checkpoint, which one is taken, and what a resume refuses. The saves themselves run in test_train."""

import dataclasses
import hashlib
import json

import pytest

import checkpointing
from config import TrainConfig, UserError


class Log:
    def __init__(self):
        self.lines = []

    def line(self, text=""):
        self.lines.append(text)

    def warn(self, text):
        self.lines.append(f"WARNING: {text}")


STATE = checkpointing.TrainerState(
    step=5,
    tokens_seen=10,
    stage=1,
    skipped_in_a_row=0,
    skipped_total=0,
    world_size=2,
    manifest_hash="m" * 64,
    model_fingerprint="f" * 64,
    model="somewhere",
    tokenizer="words",
    options=checkpointing.options_of(TrainConfig(), [512] * 5),
    versions={},
)


def write_checkpoint(folder, step):
    path = folder / f"checkpoint-step{step}"
    (path / "zero").mkdir(parents=True)
    (path / "zero" / "rank0.pt").write_bytes(bytes(range(256)) * step)
    (path / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(STATE, step=step))))
    records = {
        name: {
            "bytes": (path / name).stat().st_size,
            "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest(),
        }
        for name in ("zero/rank0.pt", "trainer_state.json")
    }
    (path / "files.json").write_text(json.dumps(records))
    return path


def test_latest_takes_the_newest_complete_one_and_says_what_it_skips(tmp_path):
    for step in (5, 90, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-step100" / "files.json").unlink()
    log = Log()
    found = checkpointing.find_checkpoint("latest", tmp_path, say=log.line)
    assert found.name == "checkpoint-step90" and checkpointing.read_state(found).step == 90
    assert "checkpoint-step100" in log.lines[0] and "cut off" in log.lines[0]


def test_latest_without_any_checkpoint_starts_anew(tmp_path):
    assert checkpointing.find_checkpoint("latest", tmp_path, say=Log().line) is None


def test_damage_is_named(tmp_path):
    path = write_checkpoint(tmp_path, 5)
    assert checkpointing.incomplete_reason(path, checksums=True) is None
    file = path / "zero" / "rank0.pt"
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)
    assert checkpointing.incomplete_reason(path) is None  # sizes alone cannot see it
    assert "zero/rank0.pt does not match its checksum" in checkpointing.incomplete_reason(path, checksums=True)
    file.write_bytes(content[:-1])
    assert "1279 bytes, files.json says 1280" in checkpointing.incomplete_reason(path)
    file.unlink()
    assert "zero/rank0.pt is missing" in checkpointing.incomplete_reason(path)
    with pytest.raises(UserError, match="is incomplete: zero/rank0.pt is missing"):
        checkpointing.find_checkpoint(str(path), tmp_path, say=Log().line)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpointing.find_checkpoint("latest", tmp_path, say=Log().line)


def test_missing_folder_names_what_there_is(tmp_path):
    write_checkpoint(tmp_path, 5)
    with pytest.raises(UserError, match="does not exist; in .* there are: checkpoint-step5"):
        checkpointing.find_checkpoint(str(tmp_path / "checkpoint-step6"), tmp_path, say=Log().line)


def test_retention_keeps_the_newest_complete_ones(tmp_path):
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-step10" / "files.json").unlink()
    checkpointing._retain(tmp_path, 2, Log())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-step{s}" for s in (10, 2, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "g" * 64}, "of another model"),
        ({"manifest_hash": "n" * 64}, "another data set .*give the --data_dir"),
        ({"options": {**STATE.options, "learning_rate": 1.0}}, "learning_rate: the checkpoint has 1.0, this run 1e-05"),
        ({"options": {**STATE.options, "sequences_per_step": [8] * 5}}, "sequences_per_step: the checkpoint has .8, 8"),
    ],
)
def test_resume_refuses_what_would_change_the_mathematics(change, message):
    arguments = {
        "options": checkpointing.options_of(TrainConfig(), [512] * 5),
        "manifest_hash": STATE.manifest_hash,
        "fingerprint": STATE.model_fingerprint,
    }
    checkpointing.check_resume(STATE, **arguments)
    with pytest.raises(UserError, match=message):
        checkpointing.check_resume(dataclasses.replace(STATE, **change), **arguments)


def test_state_that_is_not_ours_is_a_sentence(tmp_path):
    path = write_checkpoint(tmp_path, 5)
    for text in ("{", "{}", "[]", '{"step": 1}'):
        (path / "trainer_state.json").write_text(text)
        with pytest.raises(UserError, match="trainer_state.json cannot be read"):
            checkpointing.read_state(path)


def test_a_disk_too_full_is_a_sentence(tmp_path):
    assert checkpointing.expected_bytes(10, 5) == 12 * 10 + 2 * 5
    missing = tmp_path / "not" / "there"
    assert checkpointing.space_problem(str(missing), 1) is None
    text = checkpointing.space_problem(str(missing), 2**60)
    assert f"takes about {2**30:.1f} GiB but {tmp_path} has" in text and not missing.exists()
