"""The engine on a GPU: bf16 against an fp32 reference, no worse than plain transformers in bf16; host and GPU placement.

Real layer shapes (hidden 2304, 32 heads, experts 1024 wide), fewer experts and words so that three copies fit one card.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

from kimi_model import check_kernels, install_long_sequence  # noqa: E402

TOKENS, VOCABULARY, EOS = 8192, 32_768, 5
NOTHING_FIXED = {"segment_tokens": None, "heads_per_group": None, "token_tile": None}


def real_layers(dtype):
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig(
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        mlp_layer_types=["dense"] + ["sparse"] * 3,
        num_local_experts=16,
        vocab_size=VOCABULARY,
        pad_token_id=VOCABULARY - 1,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    config.use_cache = False
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = KimiLinearForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        for name, parameter in model.named_parameters():
            if "dt_bias" in name or "A_log" in name:  # fp32 in the checkpoint, whatever the model's dtype
                parameter.data = parameter.data.float()
    model = model.to(dtype) if dtype != torch.bfloat16 else model
    return model.train()


def loss_and_gradients(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), grads


def total_error(grads, reference) -> float:
    return (
        sum((grads[n] - g).norm() ** 2 for n, g in reference.items()) / sum(g.norm() ** 2 for g in reference.values())
    ).sqrt().item()  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def kept_tuning():
    check_kernels(
        torch.device("cuda")
    )  # before fla is imported: the plain path too takes its tuning from the repository


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(1)
    return torch.randint(10, VOCABULARY - 2, (1, TOKENS), device="cuda")


@pytest.fixture(scope="module")
def reference(ids):
    """fp32 through the engine's reference kernels (equal to transformers' own, tests/test_long_sequence.py)."""
    model = real_layers(torch.float32)
    install_long_sequence(model, segment_tokens=2048, heads_per_group=8, token_tile=4096, attention_backend="reference")
    return loss_and_gradients(model, ids)


def test_bf16_is_no_worse_than_the_plain_bf16_path(ids, reference):
    plain = loss_and_gradients(real_layers(torch.bfloat16), ids)
    torch.cuda.empty_cache()
    model = real_layers(torch.bfloat16)
    print(install_long_sequence(model, segment_tokens=3000, heads_per_group=12, token_tile=2048))
    tiled = loss_and_gradients(model, ids)
    plain_error, tiled_error = total_error(plain[1], reference[1]), total_error(tiled[1], reference[1])
    print(f"loss: fp32 {reference[0]:.6f}, plain bf16 {plain[0]:.6f}, tiled bf16 {tiled[0]:.6f}")
    print(f"error of the whole gradient: plain {plain_error:.5f}, tiled {tiled_error:.5f}")
    assert abs(tiled[0] - reference[0]) <= max(abs(plain[0] - reference[0]), 2e-4 * reference[0])
    assert tiled_error <= 1.05 * plain_error
    for name, expected in reference[1].items():
        own, theirs = ((g[name] - expected).norm() / expected.norm() for g in (tiled[1], plain[1]))
        assert own <= max(1.25 * theirs, 1e-3), f"{name}: tiled {own:.4f}, plain {theirs:.4f}"


def test_places_and_tiles_change_nothing(ids, reference):
    """Host and GPU, kept and recomputed attention, few and many tiles: as near to fp32 as the largest tiles are."""
    errors = []
    for options in (
        {**NOTHING_FIXED, "offload": "gpu"},
        {"segment_tokens": 1024, "heads_per_group": 4, "token_tile": 1024, "offload": "host"},
        {**NOTHING_FIXED, "heads_per_group": 4, "offload": "host", "attention_outputs": "recompute"},
    ):
        model = real_layers(torch.bfloat16)
        install_long_sequence(model, **options)
        loss, grads = loss_and_gradients(model, ids)
        assert loss == pytest.approx(reference[0], rel=2e-4)
        errors.append(total_error(grads, reference[1]))
        print(f"{options}: loss {loss:.6f}, error of the whole gradient {errors[-1]:.5f}")
        del model
        torch.cuda.empty_cache()
    assert max(errors) <= 1.05 * errors[0]


def test_document_borders(ids, reference):
    """bf16 with varlen kernels against fp32 with the reference kernels: no worse than bf16 is on one undivided document."""
    model = real_layers(torch.bfloat16)
    install_long_sequence(model, **NOTHING_FIXED)
    undivided = total_error(loss_and_gradients(model, ids)[1], reference[1])
    del model
    ids = ids.clone()
    ids[0, [0, 1, 40, 2500, 2503, 7000]] = EOS
    wide, model = real_layers(torch.float32), real_layers(torch.bfloat16)
    install_long_sequence(
        wide,
        segment_tokens=2048,
        heads_per_group=8,
        token_tile=4096,
        attention_backend="reference",
        document_separator_id=EOS,
    )
    expected = loss_and_gradients(wide, ids)
    del wide
    install_long_sequence(model, segment_tokens=3000, heads_per_group=16, token_tile=4096, document_separator_id=EOS)
    found = loss_and_gradients(model, ids)
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    own = total_error(found[1], expected[1])
    print(f"error of the whole gradient: {own:.5f} with document borders, {undivided:.5f} without")
    assert own <= 1.1 * undivided
