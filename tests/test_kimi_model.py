"""Loading the Hub's layout through the real path, and what must stay fp32."""

import json

import launched
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import kimi_model
from config import UserError, load_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return folder, tiny.write_hub_checkpoint(folder)


def load(folder, *options):
    config = load_config(["--model_name_or_path", str(folder), *options])
    model_config = kimi_model.read_model_config(config)
    return kimi_model.load_model(config, model_config, device=CPU), model_config


def test_hub_layout_is_converted(hub):
    folder, tensors = hub
    model, config = load(folder, "--no-bf16")
    assert config.layer_types == ["linear_attention", "full_attention"] * 2  # counted from 1 in the checkpoint
    assert config.mlp_layer_types == ["dense", "sparse", "sparse", "sparse"]
    assert config.max_position_embeddings == 2097152
    experts = model.model.layers[1].mlp.experts
    stem = "model.layers.1.block_sparse_moe.experts.3"
    assert torch.equal(
        experts.gate_up_proj[3], torch.cat([tensors[f"{stem}.w1.weight"], tensors[f"{stem}.w3.weight"]]).float()
    )
    assert torch.equal(experts.down_proj[3], tensors[f"{stem}.w2.weight"].float())
    convolution = model.model.layers[0].self_attn.conv1d.weight
    stacked = torch.cat([tensors[f"model.layers.0.self_attn.{name}_conv1d.weight"] for name in "qkv"])
    assert torch.equal(convolution, stacked.float())


def test_fp32_leaves_hold_the_checkpoints_bits_in_a_bf16_model(hub):
    folder, tensors = hub
    model, _ = load(folder)
    assert model.dtype == torch.bfloat16
    leaves, buffers = kimi_model.take_fp32(model, checkpoint=str(folder), device=CPU)
    stored = tensors["model.layers.0.self_attn.A_log"]
    assert not torch.equal(stored.bfloat16().float(), stored), "the test needs values that bf16 cannot hold"
    assert torch.equal(leaves["layers.0.A_log"], stored)
    assert torch.equal(leaves["layers.2.dt_bias"], tensors["model.layers.2.self_attn.dt_bias"])
    bias = tensors["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"]
    assert torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert torch.equal(buffers["layers.1.e_score_correction_bias"], bias)
    assert not any("A_log" in name or "dt_bias" in name for name, _ in model.named_parameters())
    ids = torch.arange(3, 60)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert leaves["layers.2.A_log"].grad.abs().sum() > 0 and leaves["layers.2.A_log"].grad.dtype == torch.float32


def test_fp32_values_reach_the_kernels_under_zero3_in_bf16(hub, tmp_path):
    """Two ranks, ZeRO-3 with offload, bf16: what the KDA kernel and the router are given equals the checkpoint's bits."""
    folder, tensors = hub
    done = launched.launch("tests/fp32_worker.py", str(folder), str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        seen = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for layer in (0, 2):
            for name in ("A_log", "dt_bias"):
                stored = tensors[f"model.layers.{layer}.self_attn.{name}"].flatten()
                assert torch.equal(seen[f"layers.{layer}.{name}"].flatten(), stored)
        for layer in (1, 2, 3):
            stored = tensors[f"model.layers.{layer}.block_sparse_moe.gate.e_score_correction_bias"]
            assert torch.equal(seen[f"layers.{layer}.e_score_correction_bias"], stored)
        # and the ordinary weights came through ZeRO-3's conversion as they are in the checkpoint
        assert torch.equal(seen["lm_head"], tensors["lm_head.weight"])
        experts = [tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(4)]
        assert torch.equal(seen["down_proj"], torch.stack(experts))


def test_trainable_freezes_what_it_says(hub):
    folder, _ = hub
    for trainable, trained, frozen in (
        ("no_experts", "lm_head", ".experts.gate_up_proj"),
        ("attention", "self_attn.o_proj", "lm_head"),
    ):
        model, _ = load(folder)
        kimi_model.set_trainable(model, trainable)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        assert all(flag for name, flag in flags.items() if trained in name)
        assert not any(flag for name, flag in flags.items() if frozen in name)
        groups = kimi_model.parameter_groups(model, 0.1)
        assert sum(len(group["params"]) for group in groups) == sum(flags.values())
        assert {group["weight_decay"] for group in groups} <= {0.1, 0.0}


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    tiny.write_hub_checkpoint(tmp_path, shards=3)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = {k: v for k, v in values["weight_map"].items() if "00002" not in v}
    index.write_text(json.dumps(values))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded .*every safetensors file"):
        load(tmp_path)


def test_a_checkpoint_that_lacks_one_norm_is_refused(tmp_path):
    tiny.write_hub_checkpoint(tmp_path, shards=1)
    file = tmp_path / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))
    with pytest.raises(UserError, match=r"lacks 1 weights, first 'model\.norm\.weight'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"model_type": "llama"}, "is a 'llama'; this toolkit trains kimi_linear"), (None, "cannot be loaded")],
)
def test_other_models_are_refused(tmp_path, values, message):
    if values:
        (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        kimi_model.read_model_config(load_config(["--model_name_or_path", str(tmp_path)]))
