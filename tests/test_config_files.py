"""The files of other tools are refused by key, and what this toolkit knows of their keys is what their owners know."""

import dataclasses
import json

import pytest
import tiny

from config import UserError, cross_check, load_config, parse_json, read_json, read_yaml
from config_files import ACCELERATE, DEEPSPEED, MODEL, accelerate_problems, deepspeed_problems, model_problems

LAYERS = tiny.CONFIG["linear_attn_config"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        ({"curriculum_learning": {"enabled": True}}, "unknown key 'curriculum_learning'; take it out"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping is '1.0', but must be a number of at least 0 or 'auto'"),
        ({"bf16": True}, "bf16 is True, but must be a section of keys"),
        ({"data_types": None}, "data_types is None, but must be a section of keys"),
        ({"zero_optimization": {"stage": 3.0}}, "zero_optimization.stage is 3.0, but must be a whole number"),
        (
            {"zero_optimization": {"reduce_bucket_size": -1}},
            "reduce_bucket_size is -1, but must be a whole number of at",
        ),
        ({"zero_optimization": {"sub_group_size": 10**30}}, "sub_group_size is 1000"),
        (
            {"zero_optimization": {"offload_param": {"device": "disk"}}},
            "offload_param.device is 'disk', but must be 'none' or",
        ),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "is 'nvme', so nvme_path must name a folder"),
    ],
)
def test_a_deepspeed_json_is_refused_by_key(change, message):
    (problem,) = deepspeed_problems({"bf16": {"enabled": "auto"}, **change}, "ds.json")
    assert problem.startswith("ds.json") and message in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_processes": "two"}, "num_processes is 'two', but must be a whole number of at least 1"),
        ({"num_proceses": 2}, "unknown key 'num_proceses'; did you mean 'num_processes'?"),
        ({"distributed_type": "FSDP"}, "distributed_type is 'FSDP', but must be 'DEEPSPEED'"),
        ({"deepspeed_config": ["x"]}, "deepspeed_config is ['x'], but must be a section of keys"),
        ({"machine_rank": 1}, "machine_rank is 1, but must be below num_machines 1"),
    ],
)
def test_an_accelerate_yaml_is_refused_by_key(change, message):
    (problem,) = accelerate_problems(change, "launch.yaml")
    assert problem.startswith("launch.yaml") and message in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_sise": 32}, "unknown key 'hidden_sise'; did you mean 'hidden_size'?"),
        ({"hidden_size": "32"}, "hidden_size is '32', but must be a whole number of at least 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but must be 'silu'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, but must be a number"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, but must be num_attention_heads 2"),
        ({"num_experts_per_token": 5}, "num_experts_per_token 5 cannot be chosen from num_experts 4"),
        ({"num_local_experts": 8}, "num_experts 4 and num_local_experts 8 are one value; keep one"),
        ({"eos_token_id": 97}, "eos_token_id is 97, not below vocab_size 97"),
        ({"first_k_dense_replace": 5}, "first_k_dense_replace is 5, more than 4 layers"),
        ({"linear_attn_config": {**LAYERS, "kda_layers": [1, 2, 3]}}, "must name each of the layers 1 to 4 once"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ({"linear_head_dim": 8}, "linear_attn_config.head_dim 16 and linear_head_dim 8 are one value; keep one"),
    ],
)
def test_a_model_json_is_refused_by_key(change, message):
    assert model_problems(tiny.CONFIG, "model.json", unknown=True) == []
    (problem,) = model_problems({**tiny.CONFIG, **change}, "model.json", unknown=True)
    assert problem.startswith("model.json") and message in problem


def test_a_key_left_out_is_the_released_models():
    values = {key: value for key, value in tiny.CONFIG.items() if key != "pad_token_id"}
    (problem,) = model_problems(values, "model.json", unknown=True)
    assert "pad_token_id is 163839 (left out, so the released model's), not below vocab_size 97" in problem
    # a checkpoint's own file may have keys that this toolkit does not know
    assert model_problems({**tiny.CONFIG, "new_in_2027": 1}, "config.json", unknown=False) == []


def test_all_problems_of_all_files_come_at_once(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": "3"}, "fp61": {}}))
    (tmp_path / "model.json").write_text(json.dumps({**tiny.CONFIG, "vocab_size": -1}))
    config = load_config(["--deepspeed", str(tmp_path / "ds.json"), "--model_config", str(tmp_path / "model.json")])
    text = "\n".join(cross_check(config, world_size=2, environ={}))
    for part in ("stage is '3'", "unknown key 'fp61'; did you mean 'fp16'?", "vocab_size is -1"):
        assert part in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1e999}', "1e999 is not a number"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        ("{}".encode("utf-16"), "not UTF-8 text; save the file as UTF-8"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, message):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match=message) as caught:
        read_json(str(tmp_path / "x.json"))
    assert "x.json" in str(caught.value)
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "with a byte order mark") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"seed: 1\nseed: 2\n", "key 'seed' is there twice"),
        (b"", "expected 'key: value' lines, found nothing"),
        (b"- 1\n", "found a list"),
        (b"a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"a: 2026-99-99", "not valid YAML"),
        (b"a: " + b"[" * 5000, "not valid YAML"),
        ("größe: 1".encode("latin-1"), "byte 2 is not UTF-8 text"),
    ],
)
def test_yaml_is_read_strictly(tmp_path, text, message):
    (tmp_path / "x.yaml").write_bytes(text)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(str(tmp_path / "x.yaml"))
    assert "x.yaml" in str(caught.value)


@pytest.mark.parametrize("value", [".nan", ".inf", "1e999", "[1]", "true"])
def test_a_float_option_is_a_finite_number(tmp_path, value):
    (tmp_path / "x.yaml").write_text(f"learning_rate: {value}\n")
    with pytest.raises(UserError, match="learning_rate: .* is not a float"):
        load_config(["--config", str(tmp_path / "x.yaml")])


def test_what_we_let_through_their_owners_know():
    from accelerate.commands.config.config_args import ClusterConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from transformers import KimiLinearConfig

    def names(kind):
        return {name for key, f in kind.model_fields.items() for name in (key, f.alias)}

    zero = DEEPSPEED["zero_optimization"]
    assert set(zero) <= names(DeepSpeedZeroConfig)
    assert set(zero["offload_optimizer"]) <= names(DeepSpeedZeroOffloadOptimizerConfig)
    assert set(zero["offload_param"]) <= names(DeepSpeedZeroOffloadParamConfig)
    assert set(DEEPSPEED["bf16"]) <= names(DeepSpeedBF16Config)
    assert set(ACCELERATE) <= {f.name for f in dataclasses.fields(ClusterConfig)}
    # every key that transformers writes is known here, so that its files are never refused
    assert set(json.loads(KimiLinearConfig().to_json_string(use_diff=False))) <= set(MODEL)
