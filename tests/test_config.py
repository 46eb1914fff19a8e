"""Options: precedence, strictness, and numbers that live in several files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from config import (
    DEFAULT_CURRICULUM,
    FIELDS,
    Stage,
    TrainConfig,
    UserError,
    cross_check,
    load_config,
    mask_secrets,
    parse_curriculum,
)


def test_command_line_wins_over_yaml_wins_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 3e-4\nseed: 7\nbf16: false\nwarmup_steps: 1_000\n")
    config = load_config(["--config", str(tmp_path / "c.yaml"), "--seed", "8"])
    assert (config.learning_rate, config.seed, config.bf16, config.warmup_steps) == (3e-4, 8, False, 1000)
    assert config.weight_decay == TrainConfig().weight_decay


def test_several_data_folders_with_weights(tmp_path):
    (tmp_path / "c.yaml").write_text("data_dir: [a@0.6, b@0.4]\n")
    assert load_config(["--config", str(tmp_path / "c.yaml")]).data_dir == "a@0.6,b@0.4"
    assert load_config(["--data_dir", "c@1", "--data_dir", "d@3"]).data_dir == "c@1,d@3"


def test_allow_changed_is_repeatable_and_a_list():
    assert load_config(["--allow_changed", "seed", "--allow_changed", "bf16,data_dir"]).allowed_changes == (
        *("seed", "bf16", "data_dir"),
    )


def test_secrets_of_the_environment_are_masked():
    environ = {
        "HF_TOKEN": "hf_abcdefgh",
        "WANDB_API_KEY": "0123456789",
        "DB_PASSWORD_OLD": "hunter2hunter2",
        "MY_KEY": "1",
    }
    text = mask_secrets("a hf_abcdefgh b 0123456789 c hunter2hunter2 d 1", {**environ, "HOME": "a hf"})
    assert text == "a <HF_TOKEN> b <WANDB_API_KEY> c <DB_PASSWORD_OLD> d 1"


def test_yaml_is_read_without_running_anything(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/done']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(["--config", str(file)])
    assert not (tmp_path / "done").exists()


def test_every_option_round_trips_through_yaml(tmp_path):
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(TrainConfig())))
    assert load_config(["--config", str(file)]) == TrainConfig()


def test_default_curriculum():
    assert parse_curriculum(DEFAULT_CURRICULUM)[0] == Stage(0, 1048576)
    assert parse_curriculum(DEFAULT_CURRICULUM)[-1] == Stage(10000, 2097152)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "1"], "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        (["--num_train_steps", "many"], "num_train_steps: 'many' is not an int"),
        (["--num_train_steps", "0"], "num_train_steps: 0 must be greater than 0"),
        (["--curriculum", "0:1024,5:2048,5:4096"], "steps must increase, but step 5 comes after step 5"),
        (["--curriculum", "1:1024"], "first stage starts at step 1"),
        (["--curriculum", "0-1024"], "'0-1024' is not STEP:TOKENS"),
        (["--engine", "fast"], "engine: 'fast' is not one of tiled, reference"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
        (["--document_mask", "--engine", "reference"], "document_mask: needs --engine tiled"),
        (
            ["--allow_changed", "seed,lerning_rate"],
            "allow_changed: unknown key 'lerning_rate'; did you mean 'learning_rate'",
        ),
        (["--replay_step", "3"], "replay_step: needs --resume_from_checkpoint"),
        (["--replay_step", "30000", "--resume_from_checkpoint", "latest"], "replay_step: 30000 must be in"),
        (["--spike_factor", "-1"], "spike_factor: -1.0 must not be negative"),
        (["stray"], "'stray' belongs to no option"),
    ],
)
def test_rejections_by_message(arguments, message):
    with pytest.raises(UserError, match=message):
        load_config(arguments)


def test_all_problems_are_said_at_once(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("sede: 1\nbf16: maybe\nlearning_rate: [1]\n")
    with pytest.raises(UserError) as caught:
        load_config(["--config", str(file), "--save_step", "3"])
    text = str(caught.value)
    for part in ("'sede'; did you mean 'seed'", "bf16: 'maybe'", "learning_rate: [1]", "did you mean 'save_steps'"):
        assert part in text


def write_files(folder, *, ds=None, accelerate=None):
    ds = {"zero_optimization": {"stage": 3}, **(ds or {})}
    (folder / "ds.json").write_text(json.dumps(ds))
    values = {"num_processes": 2, "deepspeed_config": {"deepspeed_config_file": str(folder / "ds.json")}}
    (folder / "acc.yaml").write_text(yaml.safe_dump({**values, **(accelerate or {})}))
    return TrainConfig(
        deepspeed=str(folder / "ds.json"), accelerate_config=str(folder / "acc.yaml"), gradient_accumulation_steps=8
    )


def test_agreeing_files_pass(tmp_path):
    config = write_files(tmp_path, ds={"train_batch_size": 16, "gradient_accumulation_steps": 8})
    assert cross_check(config, world_size=2, environ={}) == []


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        ({"train_batch_size": 12}, "train_batch_size: .*ds.json says 12 but the training config gives 16"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: .*ds.json says 4 .* gives 8"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu: .*says 2 .* gives 1"),
        ({"gradient_clipping": 5.0}, "gradient_clipping: .*says 5.0 .* gives 1.0"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "stage is 2; this trainer needs stage 3 and offload_optimizer needs it",
        ),
        ({"optimizer": {"type": "AdamW"}}, "has a section 'optimizer'; the training config owns it"),
        ({"bf16": {"enabled": False}}, "bf16: .*says False but the training config says True"),
        ({"fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_deepspeed_json_must_agree(tmp_path, ds, message):
    problems = cross_check(write_files(tmp_path, ds=ds), world_size=2, environ={})
    assert len(problems) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(problems[0])


def test_processes_and_json_of_the_launch_must_agree(tmp_path):
    config = write_files(tmp_path, accelerate={"deepspeed_config": {"deepspeed_config_file": "other.json"}})
    environ = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "third.json"}
    text = "\n".join(cross_check(config, world_size=4, environ=environ))
    assert "acc.yaml says 2 but 4 processes were launched" in text
    assert "'other.json'" in text and "'third.json'" in text


def test_accelerate_accumulation_must_agree(tmp_path):
    accelerate = {
        "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json"), "gradient_accumulation_steps": 3}
    }
    (problem,) = cross_check(write_files(tmp_path, accelerate=accelerate), world_size=2, environ={})
    assert "acc.yaml says 3 but the training config says 8" in problem


def test_every_field_has_help():
    assert all(f.metadata.get("help") for f in FIELDS.values())


GLOO_THREAD_HOLDS_A_TENSOR = """
import sys, time
import deepspeed, torch
import torch.distributed as dist
from config import run_main

def main():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    sys.setswitchinterval(1000)  # this thread keeps the interpreter's lock until it ends
    tensor = torch.zeros(4)
    tensor.attribute = "kept by its Python object, which the thread then has the last reference to"
    dist.all_reduce(tensor, async_op=True)
    del tensor
    ends = time.monotonic() + 0.2
    while time.monotonic() < ends:
        pass
    print("done")
    return 3

run_main(main)
"""


def test_a_rank_ends_with_its_exit_code_while_a_gloo_thread_holds_a_tensor():
    """By the interpreter's own end it is SIGABRT, every time."""
    command = [sys.executable, "-c", GLOO_THREAD_HOLDS_A_TENSOR]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and done.stdout.endswith("done\n"), done.stderr
