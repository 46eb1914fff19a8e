"""Tiny Kimi-Linear models for the engine's tests: the untouched transformers model and the same weights in the engine."""

from __future__ import annotations

import copy
import itertools

import torch
from transformers import KimiLinearConfig, KimiLinearForCausalLM

from kimi_model import install_long_sequence, use_reference_kernels

EOS = 2
SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 3,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}


def tiny_model(mixers: str, mlps: str, *, dtype=torch.float64, seed: int = 0, **changes):
    """`mixers` 'kmk' and `mlps` 'dss' (k KDA, m MLA, d dense, s sparse) -> a model with transformers' own torch code."""
    config = KimiLinearConfig(
        **{**SIZES, **changes},
        num_hidden_layers=len(mixers),
        layer_types=["full_attention" if kind == "m" else "linear_attention" for kind in mixers],
        mlp_layer_types=["sparse" if kind == "s" else "dense" for kind in mlps],
    )
    config.use_cache = False
    config._experts_implementation = "eager"  # transformers' grouped path has no fp64
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM._from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # initial weights of 0.02 leave every gate at its middle and every expert alike: the test would see little
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.mul_(6)
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    use_reference_kernels(model)
    return model.train()


def engine_model(plain, **options):
    """A copy of `plain` that runs through the engine."""
    model = copy.deepcopy(plain)
    install_long_sequence(model, **{"segment_tokens": None, "heads_per_group": None, "token_tile": None, **options})
    return model


def plain_loss_by_document(plain, input_ids, labels, separator: int):
    """The loss with documents cut apart, from the untouched model: each document runs alone, then one head and one mean."""
    rows = []
    for row in input_ids:
        ends = [i + 1 for i, token in enumerate(row.tolist()) if token == separator]
        bounds = sorted({0, *ends, len(row)})
        pieces = [
            plain.model(input_ids=row[None, start:end]).last_hidden_state for start, end in itertools.pairwise(bounds)
        ]
        rows.append(torch.cat(pieces, 1))
    logits = plain.lm_head(torch.cat(rows))
    return plain.loss_function(logits=logits, labels=labels, vocab_size=plain.config.vocab_size)


def largest_gradient_error(model, reference) -> tuple[float, str]:
    """Worst relative error of one parameter's gradient, and the parameter. Errors are relative to the parameter's gradient
    or, where that all but vanishes, to a thousandth of the whole gradient's size."""
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    whole = torch.stack([g.double().norm() for g in expected.values()]).norm()
    errors = {
        name: ((found[name].double() - g.double()).norm() / torch.maximum(g.double().norm(), 1e-3 * whole)).item()
        for name, g in expected.items()
    }
    worst = max(errors, key=errors.get)
    return errors[worst], worst
