"""Tiny Kimi-Linear models for the tests: a config, and a checkpoint written in the Hub's own layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "model_type": "kimi_linear",
    "architectures": ["KimiLinearForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "linear_attn_config": {
        "full_attn_layers": [2, 4],
        "kda_layers": [1, 3],
        "head_dim": 16,
        "num_heads": 2,
        "short_conv_kernel_size": 4,
    },
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def hub_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every weight under the released checkpoint's names: experts unfused, convolutions split, gate parameters flat.

    Matrices are bf16 as released, A_log, dt_bias and the router's bias fp32 with values that bf16 cannot hold.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = config["linear_attn_config"]
    d, heads, k = config["hidden_size"], linear["num_heads"], linear["head_dim"]

    def matrix(*shape, scale=0.05):
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    tensors = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], d),
        "model.norm.weight": torch.ones(d).bfloat16(),
        "lm_head.weight": matrix(config["vocab_size"], d),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = torch.ones(d).bfloat16()
        tensors[f"{layer}.post_attention_layernorm.weight"] = torch.ones(d).bfloat16()
        attention = f"{layer}.self_attn"
        if i + 1 in linear["kda_layers"]:
            for name in "qkv":
                tensors[f"{attention}.{name}_proj.weight"] = matrix(heads * k, d)
                tensors[f"{attention}.{name}_conv1d.weight"] = matrix(heads * k, 1, 4, scale=0.3)
            tensors[f"{attention}.f_a_proj.weight"] = matrix(k, d)
            tensors[f"{attention}.f_b_proj.weight"] = matrix(heads * k, k)
            tensors[f"{attention}.g_a_proj.weight"] = matrix(k, d)
            tensors[f"{attention}.g_b_proj.weight"] = matrix(heads * k, k)
            tensors[f"{attention}.b_proj.weight"] = matrix(heads, d)
            tensors[f"{attention}.o_norm.weight"] = torch.ones(k).bfloat16()
            tensors[f"{attention}.o_proj.weight"] = matrix(d, heads * k)
            tensors[f"{attention}.A_log"] = torch.rand(1, 1, heads, 1, generator=generator) + 0.1
            tensors[f"{attention}.dt_bias"] = torch.randn(heads * k, generator=generator)
        else:
            h, qk = config["num_attention_heads"], config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
            rank, v = config["kv_lora_rank"], config["v_head_dim"]
            tensors[f"{attention}.q_proj.weight"] = matrix(h * qk, d)
            tensors[f"{attention}.kv_a_proj_with_mqa.weight"] = matrix(rank + config["qk_rope_head_dim"], d)
            tensors[f"{attention}.kv_a_layernorm.weight"] = torch.ones(rank).bfloat16()
            tensors[f"{attention}.kv_b_proj.weight"] = matrix(h * (config["qk_nope_head_dim"] + v), rank)
            tensors[f"{attention}.o_proj.weight"] = matrix(d, h * v)
        if i < config["first_k_dense_replace"]:
            for name, shape in mlp_shapes(d, config["intermediate_size"]).items():
                tensors[f"{layer}.mlp.{name}.weight"] = matrix(*shape)
        else:
            moe = f"{layer}.block_sparse_moe"
            tensors[f"{moe}.gate.weight"] = matrix(config["num_experts"], d, scale=0.3)
            tensors[f"{moe}.gate.e_score_correction_bias"] = (
                torch.randn(config["num_experts"], generator=generator) / 50
            )
            for e in range(config["num_experts"]):
                width = config["moe_intermediate_size"]
                tensors[f"{moe}.experts.{e}.w1.weight"] = matrix(width, d)
                tensors[f"{moe}.experts.{e}.w3.weight"] = matrix(width, d)
                tensors[f"{moe}.experts.{e}.w2.weight"] = matrix(d, width)
            for name, shape in mlp_shapes(d, config["moe_intermediate_size"]).items():
                tensors[f"{moe}.shared_experts.{name}.weight"] = matrix(*shape)
    return tensors


def mlp_shapes(d: int, width: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, d), "up_proj": (width, d), "down_proj": (d, width)}


def write_hub_checkpoint(
    folder: Path, config: dict = CONFIG, seed: int = 0, shards: int = 2
) -> dict[str, torch.Tensor]:
    """A checkpoint folder as the Hub has it: config.json, safetensors shards and their index. Returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hub_tensors(config, seed)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, str(folder / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def write_tokens(folder: Path, *, documents: int = 120, vocabulary: int = 97, seed: int = 0, tokenizer_hash: str = "x"):
    """A finished folder of three shards of random token documents, each ending in EOS (id 2)."""
    import numpy as np

    import data_loader

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    shards = []
    for i in range(3):
        with data_loader.ShardWriter(folder, f"shard_{i:05d}") as writer:
            for _ in range(documents // 3):
                tokens = generator.zipf(1.3, int(generator.integers(5, 400))).clip(3, vocabulary - 1).astype("<i4")
                tokens[-1] = 2
                writer.add(tokens, np.array([len(tokens)]))
            shards.append(writer.close())
    manifest = data_loader.Manifest(
        tokenizer_name="random",
        tokenizer_hash=tokenizer_hash,
        vocab_size=vocabulary,
        eos_token="[EOS]",
        eos_token_id=2,
        max_seq_length=128,
        total_tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        shards=tuple(shards),
    )
    data_loader.write_file_durably(folder / "manifest.json", manifest.to_json())
    return manifest
