"""What counts as a checkpoint, which one is taken, and what a resume refuses. The saves themselves run in test_train."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pickle
import random
import resource
import signal
import stat
import sys

import pytest
import torch

import checkpointing
import hashed_files
import shard_files
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


SHARD = "zero/rank0_optim_states.pt"
CHUNK = hashed_files.CHUNK_BYTES


def write_checkpoint(folder, step, /, **changes):
    """A checkpoint as a save leaves it; its shards are bytes that nobody loads here."""
    path = folder / f"checkpoint-step{step}"
    (path / "zero").mkdir(parents=True)
    (path / SHARD).write_bytes(bytes(range(256)) * step)
    (path / "zero" / "rank1_optim_states.pt").write_bytes(b"x")
    (path / "config.json").write_text("{}")
    (path / "fp32.safetensors").write_bytes(b"y")
    state = {**dataclasses.asdict(dataclasses.replace(STATE, step=step)), **changes}
    (path / "trainer_state.json").write_text(json.dumps(state))
    write_records(path)
    return path


def digest_of(content: bytes) -> str:
    """chunks_sha256 by its definition."""
    chunks = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]
    return hashlib.sha256(b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)).hexdigest()


def write_records(path):
    """files.json that fits what is there: whoever changes a file by hand can do that, too."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "files.json"]
    records = {
        str(file.relative_to(path)): {
            "bytes": file.stat().st_size,
            "chunks_sha256": hashed_files.chunks_sha256(file),
        }
        for file in files
    }
    (path / "files.json").write_text(json.dumps(records))
    return records


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
    file = path / SHARD
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)
    assert checkpointing.incomplete_reason(path, checksums=False) is None  # sizes alone cannot see it
    for checksums in (True, "small"):
        assert f"{SHARD} does not match its checksum" in checkpointing.incomplete_reason(path, checksums=checksums)
    file.write_bytes(content[:-1])
    assert "1279 bytes, files.json says 1280" in checkpointing.incomplete_reason(path)
    file.unlink()
    assert f"{SHARD} is missing" in checkpointing.incomplete_reason(path)
    with pytest.raises(UserError, match=f"is incomplete: {SHARD} is missing"):
        checkpointing.find_checkpoint(str(path), tmp_path, say=Log().line)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpointing.find_checkpoint("latest", tmp_path, say=Log().line)


def test_the_command_checks_one_checkpoint_in_full(tmp_path, monkeypatch, capsys):
    path = write_checkpoint(tmp_path, 5)
    monkeypatch.setattr(sys, "argv", ["checkpointing.py", "--verify_checkpoint", str(path)])
    assert checkpointing.main() == 0
    assert f"{path}: complete, every file matches its checksum (step 5)" in capsys.readouterr().out
    content = bytearray((path / SHARD).read_bytes())
    content[700] ^= 1
    (path / SHARD).write_bytes(content)
    with pytest.raises(UserError, match=f"verify_checkpoint: .*: {SHARD} does not match its checksum"):
        checkpointing.main()


def test_missing_folder_names_what_there_is(tmp_path):
    write_checkpoint(tmp_path, 5)
    with pytest.raises(UserError, match="does not exist; in .* there are: checkpoint-step5"):
        checkpointing.find_checkpoint(str(tmp_path / "checkpoint-step6"), tmp_path, say=Log().line)


def test_retention_keeps_the_newest_complete_ones(tmp_path):
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-step10" / "files.json").unlink()
    (aside,) = checkpointing._retain(tmp_path, 2, Log())
    # renamed before it is deleted: a kill inside the deletion leaves nothing that looks like a checkpoint
    assert aside.name == ".writing-deleted-checkpoint-step1"
    assert sorted(p.name for p in tmp_path.glob("check*")) == [f"checkpoint-step{s}" for s in (10, 2, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "g" * 64}, "of another model"),
        ({"manifest_hash": "n" * 64}, "another data set .*give the --data_dir.*--allow_changed data_dir"),
        (
            {"options": {**STATE.options, "lerning_rate": 1.0}},
            "unknown key 'lerning_rate'; did you mean 'learning_rate'",
        ),
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


def test_changed_options_are_let_through_by_name_only():
    arguments = {
        "options": checkpointing.options_of(TrainConfig(), [512] * 5),
        "manifest_hash": "n" * 64,
        "fingerprint": STATE.model_fingerprint,
    }
    state = dataclasses.replace(STATE, options={**STATE.options, "learning_rate": 1.0, "seed": 5})
    with pytest.raises(UserError) as caught:
        checkpointing.check_resume(state, **arguments, allowed=("learning_rate", "data_dir"))
    assert "seed: the checkpoint has 5, this run 1234" in str(caught.value) and "learning_rate" not in str(caught.value)
    said = checkpointing.check_resume(state, **arguments, allowed=("learning_rate", "data_dir", "seed"))
    assert len(said) == 3 and "learning_rate: the checkpoint has 1.0, this run 1e-05: allowed" in said[1]
    another_model = dataclasses.replace(STATE, model_fingerprint="g" * 64, manifest_hash="n" * 64)
    with pytest.raises(UserError, match="of another model"):
        checkpointing.check_resume(another_model, **arguments, allowed=tuple(arguments["options"]))


def test_an_option_that_the_checkpoint_does_not_know_is_said():
    options = {name: value for name, value in STATE.options.items() if name != "seed"}
    said = checkpointing.check_resume(
        dataclasses.replace(STATE, options=options),
        options=STATE.options,
        manifest_hash=STATE.manifest_hash,
        fingerprint=STATE.model_fingerprint,
    )
    assert said == ["seed: the checkpoint does not say what it was, this run has 1234"]


@pytest.mark.parametrize("text", ["{", "[]", "", "null", '"x"', "NaN", "1" * 5000, "\udcff", "[" * 100_000])
def test_a_state_that_cannot_be_read_is_a_sentence(tmp_path, text):
    path = write_checkpoint(tmp_path, 5)
    for name, read in (("trainer_state.json", checkpointing.read_state), ("files.json", checkpointing.read_records)):
        (path / name).write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=name):
            read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "5"}, "step: '5' must be of type int"),
        ({"step": True}, "step: True must be of type int"),
        ({"step": 10**30}, "step: 10+ must be from 0 to"),
        ({"step": -1}, "step: -1 must be from 0"),
        ({"tokens_seen": 1.5}, "tokens_seen: 1.5 must be of type int"),
        ({"tokens_seen": float("nan")}, "not valid JSON: NaN"),
        ({"options": []}, "options: .. must be of type dict"),
        ({"options": {}}, "options: bf16 must be true or false"),
        ({"model": None}, "model: None must be of type str"),
        ({"recent_norms": [1.0, 10**400]}, "recent_norms: must be a list of finite numbers"),
        ({"recent_losses": ["1"]}, "recent_losses: must be a list of finite numbers"),
        ({"recent_norms": [1.0]}, "recent_losses and recent_norms hold 0 and 1 numbers"),
        ({"recent_norms": [1.0] * 6, "recent_losses": [1.0] * 6}, "recent_losses and recent_norms hold 6 and 6"),
        ({"recent_norms": [-1.0], "recent_losses": [1.0]}, "recent_losses and recent_norms hold 1 and 1"),
        ({"stepp": 1}, "unknown key 'stepp'; did you mean 'step'"),
        ({"step": 6}, "step: 6, but the folder is checkpoint-step5"),
        ({"world_size": 4}, "world_size: 4, but zero/ holds the shards of 2"),
        ({"skipped_total": 6}, "skipped_in_a_row 0 and skipped_total 6 must not be more"),
    ],
)
def test_a_state_that_is_not_ours_names_file_and_key(tmp_path, change, message):
    path = write_checkpoint(tmp_path, 5, **change)
    with pytest.raises(UserError, match=f"trainer_state.json: {message}"):
        checkpointing.read_state(path)


def test_a_state_without_a_key_is_refused_and_one_of_an_older_version_is_not(tmp_path):
    path = write_checkpoint(tmp_path, 5)
    values = json.loads((path / "trainer_state.json").read_text())
    for name in ("recent_losses", "recent_norms"):
        del values[name]
    (path / "trainer_state.json").write_text(json.dumps(values))
    assert checkpointing.read_state(path) == STATE
    del values["tokens_seen"]
    (path / "trainer_state.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="trainer_state.json: tokens_seen is missing"):
        checkpointing.read_state(path)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("../secret", {"bytes": 1, "chunks_sha256": "0" * 64}, "'../secret' is no path inside the checkpoint"),
        ("zero/../../secret", {"bytes": 1, "chunks_sha256": "0" * 64}, "is no path inside the checkpoint"),
        ("/etc/passwd", {"bytes": 1, "chunks_sha256": "0" * 64}, "is no path inside the checkpoint"),
        (SHARD, {"bytes": -1, "chunks_sha256": "0" * 64}, "bytes is -1"),
        (SHARD, {"bytes": "1", "chunks_sha256": "0" * 64}, "bytes is '1'"),
        (SHARD, {"bytes": 1280, "chunks_sha256": "0" * 63}, "chunks_sha256 is '0+'"),
        (SHARD, [1280], "bytes is None"),
    ],
)
def test_a_file_list_that_is_not_ours_is_refused(tmp_path, name, record, message):
    path = write_checkpoint(tmp_path, 5)
    (tmp_path / "secret").write_text("s")
    records = json.loads((path / "files.json").read_text())
    (path / "files.json").write_text(json.dumps({**records, name: record}))
    with pytest.raises(UserError, match=f"is incomplete: .*files.json: .*{message}"):
        checkpointing.find_checkpoint(str(path), tmp_path, say=Log().line)


def test_a_file_list_must_name_what_is_loaded(tmp_path):
    path = write_checkpoint(tmp_path, 5)
    records = json.loads((path / "files.json").read_text())
    for name in ("trainer_state.json", "fp32.safetensors"):
        (path / "files.json").write_text(json.dumps({k: v for k, v in records.items() if k != name}))
        assert f"does not name {name}" in checkpointing.incomplete_reason(path)
    (path / "files.json").write_text(json.dumps({k: v for k, v in records.items() if k != SHARD}))
    assert checkpointing.incomplete_reason(path) == f"{SHARD} is not in files.json"
    (path / "notes.txt").write_text("mine")  # beside what is loaded people may keep what they like
    (path / "files.json").write_text(json.dumps(records))
    assert checkpointing.incomplete_reason(path) is None


@pytest.mark.parametrize(
    ("content", "said"), [(None, "is missing"), ("", "is empty"), ("nowhere\n", "says 'nowhere'"), ("\0\xff", "says")]
)
def test_latest_may_be_missing_empty_or_wrong(tmp_path, content, said):
    write_checkpoint(tmp_path, 5)
    if content is not None:
        (tmp_path / "latest").write_text(content)
    log = Log()
    assert checkpointing.find_checkpoint("latest", tmp_path, say=log.line).name == "checkpoint-step5"
    assert (
        len(log.lines) == 1
        and said in log.lines[0]
        and "newest complete checkpoint is checkpoint-step5" in log.lines[0]
    )


# ---------------------------------------------------------------------------------------------- shards


def test_what_is_written_is_hashed_and_loads(tmp_path):
    state = {"module": {"a": torch.arange(5_000_000.0)}, "step": 3, "views": torch.ones(4, 4)[1:]}
    shards = shard_files.ShardFiles()
    shards.save(state, str(tmp_path / "a.pt"))
    shards.add(tmp_path / "b.json", b"{}")
    shards.start()
    records = shards.join()
    for name in ("a.pt", "b.json"):
        content = (tmp_path / name).read_bytes()
        assert records[tmp_path / name] == {"bytes": len(content), "chunks_sha256": digest_of(content)}
    loaded = shards.load(str(tmp_path / "a.pt"))
    assert torch.equal(loaded["module"]["a"], state["module"]["a"]) and torch.equal(loaded["views"], state["views"])
    shard_files.check_pickles(tmp_path, key="export")


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4097, 7 * CHUNK + 12_345])
def test_a_hashed_file_holds_what_was_written(tmp_path, monkeypatch, size, direct):
    if not direct:
        monkeypatch.delattr(hashed_files.os, "O_DIRECT")
    content = random.Random(size).randbytes(size)
    path = tmp_path / "file"
    path.write_bytes(b"of an earlier save, and longer" * 10)
    with hashed_files.HashedFile(path) as file:
        for piece in (content[:70], content[70 : CHUNK - 5], content[CHUNK - 5 :]):
            assert file.write(piece) == len(piece)
        record = file.finish()
    assert path.read_bytes() == content
    assert record == {"bytes": size, "chunks_sha256": digest_of(content)}
    assert hashed_files.chunks_sha256(path) == record["chunks_sha256"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


def test_swapped_chunks_are_another_file(tmp_path):
    first, second = random.Random(1).randbytes(CHUNK), random.Random(2).randbytes(CHUNK)
    (tmp_path / "a").write_bytes(first + second)
    (tmp_path / "b").write_bytes(second + first)
    assert hashed_files.chunks_sha256(tmp_path / "a") != hashed_files.chunks_sha256(tmp_path / "b")


def test_a_file_system_that_refuses_direct_writes_gets_ordinary_ones(tmp_path, monkeypatch):
    pwrite, refused = os.pwrite, []

    def refusing(descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(hashed_files.os, "pwrite", refusing)
    content = random.Random(3).randbytes(6 * CHUNK + 77)
    with hashed_files.HashedFile(tmp_path / "file") as file:
        file.write(content)
        assert file.finish() == {"bytes": len(content), "chunks_sha256": digest_of(content)}
    assert refused and (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("inside_a_block", [0, 100])
def test_a_disk_that_fills_up_is_said_with_the_files_name(tmp_path, inside_a_block):
    """A limit on the file's size stands for the disk: the kernel writes what fits, then says no."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK + 3 * 4096 + inside_a_block, limit[1]))
    try:
        with hashed_files.HashedFile(tmp_path / "full") as file:
            for _ in range(12):
                file.write(bytes(CHUNK))
            with pytest.raises(OSError, match="File too large: .*full"):
                file.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)


def test_a_thread_that_cannot_be_had_is_an_error_of_finish(tmp_path):
    with hashed_files.HashedFile(tmp_path / "file") as file:
        file._pool.shutdown()  # as the interpreter does when it ends
        assert file.write(bytes(3 * CHUNK)) == 3 * CHUNK
        with pytest.raises(OSError, match="cannot schedule new futures after shutdown: .*file"):
            file.finish()


def test_a_full_disk_in_the_background_is_an_error_of_join():
    shards = shard_files.ShardFiles()
    shards.save({"a": torch.zeros(1_000_000)}, "/dev/full")
    shards.start()
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        shards.join()


class Planted:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_planted_pickle_is_refused_and_does_nothing(tmp_path, protocol, zipped):
    torch.save(
        {"a": Planted(tmp_path / "done")},
        tmp_path / "x.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        UserError, match=r"resume_from_checkpoint: .*x\.pt (would run posix\.mkdir|is no file of torch\.save)"
    ):
        shard_files.check_pickles(tmp_path, key="resume_from_checkpoint")
    with pytest.raises(pickle.UnpicklingError):
        shard_files.ShardFiles().load(str(tmp_path / "x.pt"))
    assert not (tmp_path / "done").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)  # it would have
    assert (tmp_path / "done").exists()


def test_a_disk_too_full_is_a_sentence(tmp_path):
    assert checkpointing.expected_bytes(10, 5) == 12 * 10 + 2 * 5
    missing = tmp_path / "not" / "there"
    assert checkpointing.space_problem(str(missing), 1) is None
    text = checkpointing.space_problem(str(missing), 2**60)
    assert f"takes about {2**30:.1f} GiB but {tmp_path} has" in text and not missing.exists()
