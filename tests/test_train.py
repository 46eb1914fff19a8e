"""The whole trainer under accelerate launch: equalities that must hold between runs, and what stops a run."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import time

import launched
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

import checkpointing
import data_loader
import kimi_model
from config import TrainConfig, UserError, load_config, parse_curriculum
from train_continual_2m import check_data, learning_rate_at

CURRICULUM = "0:64,3:96,6:128"  # stage switches before steps 3 and 6
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    tiny.write_tokens(path / "tokens")
    (path / "model.json").write_text(json.dumps(tiny.CONFIG))
    return path


@pytest.fixture
def options(folder):
    def build(output: str, *extra: str, curriculum: str = CURRICULUM, accumulation: int = 2, data=None):
        return (
            *("--data_dir", str(data or folder / "tokens"), "--output_dir", str(folder / output)),
            *("--model_config", str(folder / "model.json"), "--deepspeed", launched.DEEPSPEED),
            *("--curriculum", curriculum, "--num_train_steps", str(STEPS), "--learning_rate", "1e-3"),
            *("--warmup_steps", "2", "--gradient_accumulation_steps", str(accumulation), "--save_steps", "100"),
            *("--segment_tokens", "32", "--token_tile", "48", "--heads_per_group", "1", *extra),
        )

    return build


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The run that others are compared with: two ranks, bf16, the tiled engine."""
    output = launched.train(
        *("--data_dir", str(folder / "tokens"), "--output_dir", str(folder / "whole")),
        *("--model_config", str(folder / "model.json"), "--deepspeed", launched.DEEPSPEED),
        *("--curriculum", CURRICULUM, "--num_train_steps", str(STEPS), "--learning_rate", "1e-3"),
        *("--warmup_steps", "2", "--gradient_accumulation_steps", "2", "--save_steps", "3"),
        *("--segment_tokens", "32", "--token_tile", "48", "--heads_per_group", "1"),
        *("--wandb_project", "test", "--wandb_mode", "offline"),
    )
    return output, launched.losses(folder / "whole")


def refused(options, folder, output):
    """What a refused start says on stderr; nothing may have been written."""
    done = launched.launch("train_continual_2m.py", *options, ranks=1)
    assert "exitcode  : 2" in done.stderr, done.stderr[-3000:]
    assert not (folder / output).exists(), "a refused start must write nothing"
    return "\n".join(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_a_refused_start_says_why_and_writes_nothing(options, folder, tmp_path):
    tiny.write_tokens(tmp_path / "few", documents=3)
    text = refused(options("no1", data=tmp_path / "few", curriculum="0:100000"), folder, "no1")
    assert "less than one sequence of the first stage (100,000); tokenize more data" in text
    text = refused(options("no2", data=tmp_path / "none"), folder, "no2")
    assert "none does not exist; make it with: python tokenize_dataset.py" in text


def test_data_of_another_tokenizer_is_refused(folder, tmp_path):
    config = load_config(["--data_dir", str(tmp_path / "wide"), "--model_config", str(folder / "model.json")])
    config = dataclasses.replace(config, curriculum=CURRICULUM)
    model_config = kimi_model.read_model_config(config)
    tiny.write_tokens(tmp_path / "wide", vocabulary=200)
    with pytest.raises(UserError, match="tokenizer 'random' of 200 ids, but the model has 97"):
        check_data(data_loader.open_dataset(str(tmp_path / "wide")), config, model_config)
    # a model folder with a tokenizer of its own: compared by content
    Tokenizer(models.WordLevel({"[EOS]": 0}, unk_token="[EOS]")).save(str(tmp_path / "tokenizer.json"))
    config = dataclasses.replace(config, model_config=None, model_name_or_path=str(tmp_path))
    with pytest.raises(UserError, match="written with tokenizer 'random' .*not with that of"):
        check_data(data_loader.open_dataset(str(folder / "tokens")), config, model_config)


def test_run_goes_through_every_stage_and_learns(uninterrupted, folder):
    output, losses = uninterrupted
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1
    assert "ZeRO stage 3" in output and "2 ranks" in output
    records = launched.metrics(folder / "whole")
    assert [records[s]["seq_length"] for s in range(1, STEPS + 1)] == [64] * 3 + [96] * 3 + [128] * 2
    assert records[STEPS]["tokens_seen"] == 4 * (3 * 64 + 3 * 96 + 2 * 128)
    assert list((folder / "whole" / "wandb").glob("offline-run-*")), "no offline W&B run was written"
    assert (folder / "whole" / "latest").read_text().strip() == f"checkpoint-step{STEPS}"


def test_stops_before_on_and_after_a_stage_switch_then_equals_the_uninterrupted_run(options, folder, uninterrupted):
    for stop_after in (2, 3, 4):
        resume = ("--resume_from_checkpoint", "latest")  # the first run finds none and says so
        launched.train(*options("chain", *resume, "--stop_after_steps", str(stop_after)))
    launched.train(*options("chain", "--resume_from_checkpoint", str(folder / "chain" / "checkpoint-step4")))
    assert launched.losses(folder / "chain") == uninterrupted[1]


def records_of(checkpoint):
    """Size and SHA-256 of each file but trainer_state.json's, and the state."""
    records = json.loads((checkpoint / "files.json").read_text())
    return records, checkpointing.read_state(checkpoint)


def test_a_save_behind_the_next_step_holds_what_one_that_waits_holds(folder, uninterrupted):
    """Step 3 was saved while step 4 ran in the one, before an exit in the other; step 8 after different histories."""
    assert "checkpoint-step3 (" in uninterrupted[0] and "training waited" in uninterrupted[0]
    for step in (3, 8):
        background = folder / "whole" / f"checkpoint-step{step}"
        waiting = folder / "chain" / f"checkpoint-step{step}"
        assert waiting.is_dir(), "made by test_stops_before_on_and_after_a_stage_switch_..."
        assert records_of(background) == records_of(waiting)
        assert checkpointing.incomplete_reason(background, checksums=True) is None


def test_killed_ranks_are_started_again_and_nothing_is_lost(options, folder, uninterrupted):
    """`accelerate launch --max_restarts`: one rank killed before there is a checkpoint, the other one after."""
    code, output, errors, _ = launched.run_with_signals(
        folder / "killed",
        *options("killed", "--resume_from_checkpoint", "latest", "--save_steps", "3"),
        signals={"step      1/": (signal.SIGKILL, 1), "step      5/": (signal.SIGKILL, 0)},
        restarts=2,
    )
    assert code == 0, output[-2000:] + errors[-4000:]
    assert output.count("yet, starting at step 0") == 2 and "resumed from" in output
    assert launched.losses(folder / "killed") == uninterrupted[1]


def test_a_stopped_rank_ends_the_run_and_is_named(options, folder):
    code, _, errors, seconds = launched.run_with_signals(
        folder / "stopped",
        *options("stopped", "--hang_timeout_minutes", "0.15"),
        signals={"step      2/": (signal.SIGSTOP, 0)},
    )
    # 9 s of silence, two looks of 2 s, 6 s to dump stacks, and the launcher's own end
    assert code != 0 and seconds < 30, seconds
    assert re.search(
        r"ERROR: rank 0 \(process .* has (been stopped|given no sign) for \d+ s.*; last phase: \w+ of step", errors
    )
    assert "exitcode  : 4" in errors
    assert "ERROR: rank 0" in (folder / "stopped" / "log.txt").read_text()
    for rank in (0, 1):
        (stacks,) = (folder / "stopped").glob(f"hang-*-rank{rank}.txt")
        assert "train_continual_2m.py" in stacks.read_text()


def test_a_step_replayed_alone_says_what_the_run_saw_and_leaves_no_trace(options, folder, uninterrupted, monkeypatch):
    """Step 7 (counted from 1) on the weights after step 6; with another learning rate allowed, and a secret in the options."""
    before = sorted(str(path) for path in (folder / "whole").rglob("*") if "checkpoint" in str(path))
    lines = (folder / "whole" / "metrics.jsonl").read_text()
    monkeypatch.setenv("SOME_API_TOKEN", "correct-horse-battery")
    output = launched.train(
        *options("whole", "--resume_from_checkpoint", str(folder / "whole" / "checkpoint-step6"), "--replay_step", "6"),
        *("--learning_rate", "3e-3", "--allow_changed", "learning_rate", "--wandb_run_name", "correct-horse-battery"),
    )
    rows = re.findall(r"^ +(\d+) +\d +\d +(\d+\.\d+)  stream ([\d,]+) to .*shard_0", output, re.M)
    assert sorted(int(row[0]) for row in rows) == [0, 1, 2, 3]
    assert sum(float(row[1]) for row in rows) / 4 == pytest.approx(uninterrupted[1][6], abs=1e-4)
    norms = [float(value) for value in re.findall(r"^[a-z][\w.]+ +[\d.]+[KM]? +([\d.e-]+) +0$", output, re.M)]
    expected = launched.metrics(folder / "whole")[7]["grad_norm"]
    assert math.hypot(*norms) == pytest.approx(expected, rel=1e-3)
    assert "learning_rate: the checkpoint has 0.001, this run 0.003: allowed" in output
    assert sorted(str(path) for path in (folder / "whole").rglob("*") if "checkpoint" in str(path)) == before
    assert (folder / "whole" / "metrics.jsonl").read_text() == lines
    written = output + (folder / "whole" / "log.txt").read_text()
    written += (folder / "whole" / "resolved_config.json").read_text()
    assert "correct-horse-battery" not in written and "<SOME_API_TOKEN>" in written


def test_a_gradient_spike_is_skipped_before_the_update_and_resume_is_bit_equal(options, folder):
    extra = ("--num_train_steps", "21", "--save_steps", "18")
    done = launched.launch("tests/spike_worker.py", *options("spike", *extra, curriculum="0:64"))
    assert done.returncode == 0, done.stderr[-3000:]
    records = launched.metrics(folder / "spike")
    assert [step for step, record in sorted(records.items()) if record["skipped"]] == [18]
    assert "more than 10 times" in records[18]["skip_reason"] and records[18]["start_token"] == 17 * 4 * 64
    state = checkpointing.read_state(folder / "spike" / "checkpoint-step18")
    assert len(state.recent_norms) == 17 and records[18]["grad_norm"] not in state.recent_norms
    again = ("--resume_from_checkpoint", str(folder / "spike" / "checkpoint-step18"))
    launched.train(*options("spike2", *extra, *again, curriculum="0:64"))
    resumed = launched.metrics(folder / "spike2")
    assert {step: resumed[step]["loss"] for step in resumed} == {step: records[step]["loss"] for step in (19, 20, 21)}


def test_sigterm_inside_an_accumulation_loses_nothing(options, folder, uninterrupted):
    with subprocess.Popen(
        launched.command("train_continual_2m.py", *options("signal"), ranks=2),
        cwd=launched.ROOT,
        env=launched.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        worker = None
        for line in process.stdout:
            if line.startswith("stop: 'kill -TERM "):
                worker = int(line.split()[3].rstrip("'"))
            if line.startswith("step      1/"):
                break
        time.sleep(0.05)  # now it is somewhere inside step 2's accumulation
        subprocess.run(["kill", f"-{signal.SIGTERM}", str(worker)], check=True)
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    assert "stopped by SIGTERM" in rest and "saved" in rest
    assert len(launched.metrics(folder / "signal")) < STEPS
    launched.train(*options("signal", "--resume_from_checkpoint", "latest"))
    assert launched.losses(folder / "signal") == uninterrupted[1]


def test_one_rank_equals_two_and_accumulation_equals_batch(options, folder):
    """fp32, so that only the order of sums differs: the same four sequences a step in three arrangements."""
    shapes = {"1x4": (1, 4, 1), "2x2": (2, 2, 1), "2x1": (2, 1, 2)}  # ranks, accumulation, batch
    found = {}
    for name, (ranks, accumulation, batch) in shapes.items():
        extra = ("--no-bf16", "--per_device_train_batch_size", str(batch), "--stop_after_steps", "5")
        extra += ("--save_steps", "3")
        launched.train(*options(name, *extra, accumulation=accumulation), ranks=ranks)
        found[name] = launched.losses(folder / name)
    assert found["2x2"] == pytest.approx(found["1x4"], rel=2e-6)
    assert found["2x1"] == pytest.approx(found["1x4"], rel=2e-6)


def test_another_number_of_ranks_continues_the_same_run(options, folder):
    """fp32, at the same four sequences a step: 2 ranks, 1, 2, 4 and 2 again, each from the checkpoint of the one before."""
    whole = ("--no-bf16",)
    launched.train(*options("ranks2", *whole, accumulation=2), ranks=2)
    resume = ("--resume_from_checkpoint", "latest")
    before = None
    for ranks, until in ((2, 2), (1, 3), (2, 4), (4, 6), (2, STEPS)):
        extra = (*whole, *resume, "--stop_after_steps", str(until))
        output = launched.train(*options("moved", *extra, accumulation=4 // ranks), ranks=ranks)
        if before:
            assert f"was written by {before} processes, converting for {ranks}" in output
        before = ranks
    assert launched.losses(folder / "moved") == pytest.approx(launched.losses(folder / "ranks2"), rel=3e-6)
    assert not list((folder / "moved").glob(".writing-*"))


def test_training_equals_a_plain_torch_loop(folder):
    """From a checkpoint in the Hub's layout: ZeRO-3, offload, two ranks, the tiled engine and DeepSpeed's CPU Adam give
    the losses of transformers' own model under torch's AdamW, with decoupled weight decay large enough to show."""
    tiny.write_hub_checkpoint(folder / "hub")
    arguments = (
        *("--data_dir", str(folder / "tokens"), "--output_dir", str(folder / "zero")),
        *("--model_name_or_path", str(folder / "hub"), "--deepspeed", launched.DEEPSPEED, "--no-bf16"),
        *("--curriculum", CURRICULUM, "--num_train_steps", str(STEPS), "--learning_rate", "2e-3"),
        *("--warmup_steps", "2", "--gradient_accumulation_steps", "2", "--save_steps", "100", "--weight_decay", "1.0"),
    )
    launched.train(*arguments)
    config = load_config(list(arguments))
    model = kimi_model.load_model(config, kimi_model.read_model_config(config), device=torch.device("cpu"))
    leaves, _ = kimi_model.take_fp32(model, checkpoint=str(folder / "hub"), device=torch.device("cpu"))
    groups = kimi_model.parameter_groups(model, config.weight_decay)
    groups.append({"params": list(leaves.values()), "weight_decay": 0.0})
    adamw = torch.optim.AdamW(groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
    dataset = data_loader.open_dataset(config.data_dir)
    schedule = data_loader.Schedule(
        stages=config.stages,
        num_train_steps=STEPS,
        world_size=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
    )
    plain, norms = [], []
    with data_loader.WindowLoader(dataset, schedule, seed=config.seed, rank=0) as loader:
        for step in range(STEPS):
            ids = torch.from_numpy(loader.micro_batch(step, 0))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for leaf in leaves.values():
                leaf.grad.mul_(min(1.0, config.max_grad_norm / (norm.item() + 1e-6)))
            for group in adamw.param_groups:
                group["lr"] = learning_rate_at(step, config)
            adamw.step()
            adamw.zero_grad()
            plain.append(loss.item())
            norms.append(norm.item())
    records = launched.metrics(folder / "zero")
    assert launched.losses(folder / "zero") == pytest.approx(plain, rel=3e-6)
    assert [records[s]["grad_norm"] for s in range(1, STEPS + 1)] == pytest.approx(norms, rel=1e-4)


def test_exported_checkpoint_gives_the_trainers_loss_in_stock_transformers(options, folder, tmp_path):
    """The state after step 3, exported: a stock model's loss on step 4's sequences is what the trainer logged for it."""
    output = folder / "2x2"
    checkpoint = output / "checkpoint-step3"
    assert checkpoint.is_dir(), "made by test_one_rank_equals_two_and_accumulation_equals_batch"
    checkpointing.export(checkpoint, tmp_path / "model")
    # the names are the released checkpoint's
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tiny.hub_tensors(tiny.CONFIG))
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    kimi_model.use_reference_kernels(model)
    dataset = data_loader.open_dataset(str(folder / "tokens"))
    schedule = data_loader.Schedule(
        stages=parse_curriculum(CURRICULUM),
        num_train_steps=STEPS,
        world_size=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    loader = data_loader.WindowLoader(dataset, schedule, seed=TrainConfig().seed, rank=0)
    with torch.no_grad():
        losses = []
        for micro_step in range(4):
            ids = torch.from_numpy(loader.micro_batch(3, micro_step))
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
    loader.close()
    assert sum(losses) / 4 == pytest.approx(launched.metrics(output)[4]["loss"], rel=1e-6)
    # fp32 stays fp32, bit for bit
    saved = load_file(checkpoint / "fp32.safetensors")["layers.0.A_log.value"]
    assert torch.equal(model.model.layers[0].self_attn.forget_gate.A_log.detach(), saved)


def test_reference_engine_gives_the_same_losses(options, folder):
    extra = ("--no-bf16", "--stop_after_steps", "4")
    launched.train(*options("tiled32", *extra))
    launched.train(*options("reference32", *extra, "--engine", "reference"))
    assert launched.losses(folder / "reference32") == pytest.approx(launched.losses(folder / "tiled32"), rel=2e-6)


def test_tokens_per_step_changes_the_accumulation_with_the_stage(options, folder):
    extra = ("--tokens_per_step", "384", "--stop_after_steps", "7")
    launched.train(*options("held", *extra))
    sequences = [record["sequences"] for _, record in sorted(launched.metrics(folder / "held").items())]
    assert sequences == [6, 6, 6, 4, 4, 4, 4]  # 384 tokens: 6 x 64, 4 x 96; at 128 two micro-steps of two ranks


def test_nonfinite_gradients_skip_the_step_on_all_ranks_and_end_the_run(options, folder):
    done = launched.launch("tests/nan_worker.py", *options("nan"))
    assert done.returncode != 0
    records = launched.metrics(folder / "nan")
    skipped = [step for step, record in sorted(records.items()) if record["skipped"]]
    assert skipped == [2, 4, 5, 6, 7, 8], done.stderr[-3000:]
    assert "5 steps in a row" in done.stdout and "exitcode  : 3" in done.stderr
    assert (folder / "nan" / "latest").read_text().strip() == "checkpoint-step8"
    assert records[3]["loss"] is not None and records[2]["loss"] is None
