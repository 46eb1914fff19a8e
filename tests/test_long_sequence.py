"""The tiled engine against the untouched transformers model: losses, every gradient, memory, and what it refuses."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_cases import EOS, engine_model, largest_gradient_error, plain_loss_by_document, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from config import UserError
from engine_plan import EngineOptions, engine_buffers, peak_bytes, plan_step
from kimi_model import _model_parts, install_long_sequence, set_trainable
from stash import Stash, Transfer, read_ahead

# transformers computes norms, gates and the recurrence in fp32 even in an fp64 model: 1e-5 is that rounding's size, and an
# engine in fp64 throughout differs by 1e-6 on these models
TOLERANCE = 1e-5

SHAPES = [  # what the random ones below might not meet, by name
    {"mixers": "k", "mlps": "d", "tokens": 17, "segment": 16, "tile": 16},  # one-token last segment and tile
    {"mixers": "m", "mlps": "s", "tokens": 33, "heads": 1, "tile": 32, "segment": 32},
    {"mixers": "m", "mlps": "d", "tokens": 2, "heads": 4, "tile": 1, "segment": 1},  # one target, tiles of one token
    {"mixers": "kk", "mlps": "ss", "tokens": 11, "segment": 2, "tile": 3},  # segments shorter than the convolution
    {"mixers": "km", "mlps": "ds", "tokens": 40, "batch": 2, "segment": 64, "tile": 64},  # tiles larger than the stream
    {"mixers": "kmk", "mlps": "dss", "tokens": 37, "heads": 3, "segment": 8, "tile": 5, "separator": True},
    {"mixers": "kmk", "mlps": "sss", "tokens": 29, "segment": 3, "tile": 4, "separator": True, "batch": 2},
    {"mixers": "kmm", "mlps": "dss", "tokens": 31, "segment": 9, "tile": 6, "trainable": "no_experts"},
    {"mixers": "kmk", "mlps": "dss", "tokens": 31, "segment": 9, "tile": 6, "trainable": "attention"},
    {"mixers": "mk", "mlps": "ss", "tokens": 25, "segment": 7, "tile": 7, "outputs": "recompute", "offload": "host"},
    # reads started in the sweep or attention before: several groups and pieces; one piece; KDA and MLA in pieces that differ
    {"mixers": "mkkmm", "mlps": "sdsds", "tokens": 50, "heads": 1, "segment": 12, "tile": 12, "offload": "host"},
    {"mixers": "mmk", "mlps": "ddd", "tokens": 30, "heads": 3, "segment": 30, "tile": 8, "offload": "host"},
    {"mixers": "kmkm", "mlps": "dsds", "tokens": 41, "heads": 2, "segment": 7, "tile": 18, "offload": "host"},
    {"mixers": "mk", "mlps": "ss", "tokens": 25, "heads": 2, "config": {"q_lora_rank": 10, "attention_bias": True}},
    {"mixers": "kk", "mlps": "ss", "tokens": 19, "config": {"n_group": 3, "topk_group": 2, "n_shared_experts": 2}},
]


def random_shape(seed: int) -> dict:
    pick = random.Random(seed)
    layers = pick.randint(1, 3)
    return {
        "mixers": "".join(pick.choice("km") for _ in range(layers)),
        "mlps": "".join(pick.choice("ds") for _ in range(layers)),
        "tokens": pick.randint(3, 60),
        "batch": pick.choice((1, 1, 2)),
        "segment": pick.randint(1, 24),
        "heads": pick.randint(1, 4),
        "tile": pick.randint(1, 24),
        "offload": pick.choice(("auto", "host", "gpu")),
        "outputs": pick.choice(("keep", "recompute")),
        "separator": pick.random() < 0.4,
        "ignored": pick.random() < 0.5,
        "trainable": pick.choice(("all", "all", "no_experts", "attention")),
        "dtype": pick.choice((torch.float64, torch.float32)),
        "seed": seed,
    }


def run_both(case: dict):
    """(plain model, engine model, plain loss, engine loss) after both backwards."""
    dtype = case.get("dtype", torch.float64)
    plain = tiny_model(case["mixers"], case["mlps"], dtype=dtype, seed=case.get("seed", 0), **case.get("config", {}))
    set_trainable(plain, case.get("trainable", "all"))
    separator = EOS if case.get("separator") else None
    model = engine_model(
        plain,
        segment_tokens=case.get("segment"),
        heads_per_group=case.get("heads"),
        token_tile=case.get("tile"),
        offload=case.get("offload", "auto"),
        attention_outputs=case.get("outputs", "keep"),
        document_separator_id=separator,
    )
    shape = (case.get("batch", 1), case["tokens"])
    ids = torch.randint(4, 97, shape)
    ids[0, -1] = plain.config.pad_token_id  # the padding row takes part but gets no gradient
    if separator is not None:
        ids[torch.rand(shape) < 0.15] = EOS
    labels = ids.clone()
    if case.get("ignored") and case["tokens"] > 3:
        labels[:, 1 : case["tokens"] // 2] = -100
    if separator is None:
        plain_loss = plain(input_ids=ids, labels=labels).loss
    else:
        plain_loss = plain_loss_by_document(plain, ids, labels, EOS)
    engine_loss = model(input_ids=ids, labels=labels).loss
    plain_loss.backward()
    engine_loss.backward()
    return plain, model, plain_loss.item(), engine_loss.item()


@pytest.mark.parametrize(
    "case", [*SHAPES, *(random_shape(seed) for seed in range(24))], ids=lambda case: str(case)[:60]
)
def test_loss_and_every_gradient_match_the_plain_model(case):
    plain, model, plain_loss, engine_loss = run_both(case)
    assert engine_loss == pytest.approx(plain_loss, rel=TOLERANCE)
    error, name = largest_gradient_error(model, plain)
    assert error < TOLERANCE, name


def test_accumulation_with_scaled_losses_adds_up_to_the_plain_gradient():
    plain = tiny_model("km", "ds")
    model = engine_model(plain, segment_tokens=7, heads_per_group=2, token_tile=5)
    for number in range(3):
        ids = torch.randint(4, 97, (1, 20 + number))
        for one in (plain, model):
            (one(input_ids=ids, labels=ids).loss * 0.3).backward()
    error, name = largest_gradient_error(model, plain)
    assert error < TOLERANCE, name


def test_num_items_in_batch_divides_the_sum_as_in_transformers():
    plain = tiny_model("k", "d")
    model = engine_model(plain)
    ids = torch.randint(4, 97, (2, 9))
    expected = plain(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(50)).loss
    found = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(50)).loss
    assert found.item() == pytest.approx(expected.item(), rel=TOLERANCE)


def test_without_gradients_the_same_loss_and_per_token_losses():
    plain = tiny_model("kmk", "dss")
    model = engine_model(plain, segment_tokens=8, heads_per_group=1, token_tile=8)
    ids = torch.randint(4, 97, (2, 21))
    with torch.no_grad():
        expected, found = plain(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids)
        log_probs = expected.logits[:, :-1].float().log_softmax(-1)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=TOLERANCE)
    per_token = -log_probs.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.token_losses[:, :-1].float(), per_token, rtol=1e-4, atol=1e-5)
    assert found.first_choice[:, :-1].equal(log_probs.argmax(-1) == ids[:, 1:])
    assert not found.token_losses[:, -1].any()
    assert found.logits is None


@pytest.mark.parametrize("mixer", ["k", "m"])
def test_the_last_tokens_loss_reaches_the_first_tokens_embedding(mixer):
    """Through one layer alone, over many segments: the state (or the attention) is carried, not dropped."""
    plain = tiny_model(mixer, "d")
    if mixer == "k":  # a slow decay, else the first token is forgotten for real
        with torch.no_grad():
            plain.model.layers[0].self_attn.forget_gate.A_log.fill_(-6.0)
    model = engine_model(plain, segment_tokens=6, heads_per_group=1, token_tile=6)
    ids = torch.arange(4, 54)[None]  # every token once, so that its embedding row belongs to one position
    labels = torch.full_like(ids, -100)
    labels[0, -1] = ids[0, -1]
    for one in (plain, model):
        one(input_ids=ids, labels=labels).loss.backward()
    found = model.model.embed_tokens.weight.grad[ids[0, 0]]
    expected = plain.model.embed_tokens.weight.grad[ids[0, 0]]
    assert expected.norm() > 1e-9
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("mixer", ["k", "m"])
def test_nothing_crosses_a_document_border(mixer):
    model = engine_model(tiny_model(mixer, "d"), segment_tokens=6, token_tile=5, document_separator_id=EOS)
    ids = torch.arange(4, 44)[None].clone()
    ids[0, 17] = EOS
    labels = torch.full_like(ids, -100)
    labels[0, -1] = ids[0, -1]
    model(input_ids=ids, labels=labels).loss.backward()
    grads = model.model.embed_tokens.weight.grad
    assert not grads[ids[0, :18]].any()
    assert grads[ids[0, 18]].any()


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel, self.op = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # an expanded scalar holds one number however large it looks
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > 8 * self.numel:
                self.numel, self.op = tensor.untyped_storage().nbytes() // 8, f"{func} {tuple(tensor.shape)}"
        return out


def test_no_tensor_of_tokens_by_vocabulary_heads_or_tokens_is_made():
    """Largest tensor of a step at T = 2,048: the hidden states themselves (T x 24), far below T x vocabulary (97 -> 400),
    T x heads x head size (4 x 16 x 12) and T x T."""
    tokens = 2048
    plain = tiny_model("km", "ds", vocab_size=400, qk_nope_head_dim=12, v_head_dim=16, num_attention_heads=16,
                       num_key_value_heads=16, linear_num_heads=16)  # fmt: skip
    model = engine_model(plain, segment_tokens=64, heads_per_group=1, token_tile=64)
    ids = torch.randint(4, 400, (1, tokens))
    with LargestTensor() as largest:
        model(input_ids=ids, labels=ids).loss.backward()
    hidden = tokens * plain.config.hidden_size
    reference_attention = 256 * tokens  # the CPU reference's block of scores; GPU kernels hold none
    assert largest.numel <= max(hidden, reference_attention), largest.op
    assert largest.numel < tokens * 400
    assert largest.numel < tokens * 16 * 16 * 2


def test_a_second_backward_is_refused():
    model = engine_model(tiny_model("k", "d"))
    ids = torch.randint(4, 97, (1, 9))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph is not supported"):
        loss.backward()


def test_expert_load_is_counted():
    model = engine_model(tiny_model("k", "s"), token_tile=4)
    engine = model.forward.args[1]
    ids = torch.randint(4, 97, (2, 10))
    model(input_ids=ids, labels=ids).loss.backward()
    assert (
        engine.expert_counts[0].sum() == 2 * 10 * 2
    )  # tokens x experts per token, the recomputation not counted again


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({}, "give input_ids and labels"),
        ({"labels": True, "use_cache": True}, "use_cache cannot be given"),
        ({"labels": True, "inputs_embeds": torch.zeros(1, 4, 24)}, "inputs_embeds cannot be given"),
        ({"labels": True, "attention_mask": torch.tensor([[1, 1, 1, 0]])}, "padded batches are not supported"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(inputs, sentence):
    model = engine_model(tiny_model("k", "d"))
    ids = torch.randint(4, 97, (1, 4))
    if inputs.pop("labels", False):
        inputs["labels"] = ids
    with pytest.raises(UserError, match=sentence):
        model(input_ids=ids, **inputs)


def test_a_model_with_other_modules_is_refused():
    model = tiny_model("k", "s")
    del model.model.layers[0].mlp.shared_experts.up_proj
    with pytest.raises(UserError, match=r"layer 0 .* has no mlp.shared_experts.up_proj.weight"):
        install_long_sequence(model, segment_tokens=None, heads_per_group=None, token_tile=None)
    model = tiny_model("m", "d")
    model.model.layers[0].self_attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"does not know: self_attn.extra.bias, self_attn.extra.weight"):
        install_long_sequence(model, segment_tokens=None, heads_per_group=None, token_tile=None)


def test_dropout_is_refused():
    with pytest.raises(UserError, match=r"attention_dropout: 0.1 must be 0"):
        engine_model(tiny_model("m", "d", attention_dropout=0.1))


def test_a_host_stash_hands_out_copies_and_keeps_what_was_written():
    stash = Stash(Transfer(torch.device("cpu")), 10, 3, torch.float64, on_gpu=False)
    stash.write(0, 10, torch.arange(30.0, dtype=torch.float64).view(10, 3))
    for (start, end), (tile,) in read_ahead([stash], [(6, 10), (0, 6)]):
        tile += 100
        assert stash.data[start:end].max() < 100
        stash.write(start, end, tile)
    assert stash.data[:, 0].tolist() == [100 + 3 * i for i in range(10)]


def stash_of_ones(*, on_gpu: bool = False) -> Stash:
    """What changes its `data` behind its back shows when a read was made."""
    stash = Stash(Transfer(torch.device("cpu")), 10, 1, torch.float64, on_gpu=on_gpu)
    stash.write(0, 10, torch.ones(10, 1, dtype=torch.float64))
    return stash


def test_a_prefetched_span_is_handed_out_once():
    stash = stash_of_ones()
    stash.prefetch(2, 5)
    stash.data.fill_(2)
    assert stash.read(2, 6).eq(2).all()  # another span
    assert stash.read(2, 5).eq(1).all()
    assert stash.read(2, 5).eq(2).all()


def test_a_write_drops_what_was_prefetched_of_its_span_and_nothing_else():
    stash = stash_of_ones()
    for span in ((0, 6), (6, 10)):
        stash.prefetch(*span)
    stash.data.fill_(2)
    stash.write(5, 6, torch.full((1, 1), 3.0, dtype=torch.float64))
    assert stash.read(0, 6)[:, 0].tolist() == [2, 2, 2, 2, 2, 3]
    assert stash.read(6, 10).eq(1).all()


def test_a_dropped_prefetch_is_waited_for():
    """Its tile's memory goes to the work queued next, while the copy into it may still be under way."""

    class Waits(Stash):
        waited = 0

        def finish_read(self, started):
            self.waited += 1
            return super().finish_read(started)

    stash = Waits(Transfer(torch.device("cpu")), 10, 1, torch.float64, on_gpu=False)
    for span in ((0, 4), (4, 8), (8, 10)):
        stash.prefetch(*span)
    stash.write(3, 5, torch.ones(2, 1, dtype=torch.float64))
    assert stash.waited == 2
    stash.free()
    assert stash.waited == 3


def test_a_tile_that_is_read_next_is_a_copy_of_what_was_written():
    stash, tile = stash_of_ones(), torch.full((4, 1), 5.0, dtype=torch.float64)
    stash.write(0, 4, tile, read_next=True)
    tile += 1
    stash.data.fill_(2)
    assert stash.read(0, 4).eq(5).all()
    assert stash.read(0, 4).eq(2).all()


def test_a_stash_on_the_gpu_prefetches_nothing():
    stash = stash_of_ones(on_gpu=True)
    stash.prefetch(0, 4)
    stash.write(4, 8, torch.ones(4, 1, dtype=torch.float64), read_next=True)
    stash.data.fill_(2)
    assert stash.read(0, 4).eq(2).all() and stash.read(4, 8).eq(2).all()


@pytest.mark.parametrize("pieces", [[(0, 10)], [(0, 6), (6, 10)], [(6, 10), (0, 6)]])
def test_read_ahead_starts_the_next_sweeps_reads_with_its_last_piece(pieces):
    stash, following = stash_of_ones(), stash_of_ones()
    for number, _ in enumerate(read_ahead([stash], pieces, [(following, 0, 3)])):
        following.data.fill_(10 + number)  # after the reads that are started with this piece
    last = len(pieces) - 1
    assert following.read(0, 3).eq(9 + last if last else 1).all()
    assert following.read(0, 3).eq(10 + last).all()


@pytest.mark.parametrize("outputs", ["keep", "recompute"])
def test_every_prefetched_tile_is_read(monkeypatch, outputs):
    """One that no sweep asks for would lie on the GPU until its stash is given back."""
    prefetched, dropped = [], []
    prefetch, drop = Stash.prefetch, Stash._drop

    def counted_prefetch(stash, start, end):
        prefetched.append((start, end))
        prefetch(stash, start, end)

    def watched_drop(stash, start, end):
        before = set(stash._ahead)
        drop(stash, start, end)
        dropped.extend(before - set(stash._ahead))

    monkeypatch.setattr(Stash, "prefetch", counted_prefetch)
    monkeypatch.setattr(Stash, "_drop", watched_drop)
    options = {"segment_tokens": 10, "heads_per_group": 1, "offload": "host", "attention_outputs": outputs}
    for tile, tokens in ((5, 47), (10, 47), (20, 47), (20, 15), (5, 10)):
        model = engine_model(tiny_model("kmmk", "dsds"), token_tile=tile, **options)
        ids = torch.randint(4, 97, (1, tokens))
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(prefetched) > 100 and not dropped


# ---------------------------------------------------------------------------------------------- the plan


def real_shape(layers=None):
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig(
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        mlp_layer_types=["dense"] + ["sparse"] * 3,
        num_local_experts=64,
    )
    with torch.device("meta"):
        return _model_parts(KimiLinearForCausalLM(config)).shape


def test_the_shape_counts_a_layers_parameters_as_transformers_has_them():
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    shape = real_shape()
    config = KimiLinearConfig(
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        mlp_layer_types=["dense"] + ["sparse"] * 3,
        num_local_experts=64,
    )
    with torch.device("meta"):
        layers = KimiLinearForCausalLM(config).model.layers
    for layer, kind in zip(layers, shape.layers, strict=True):
        matrices = sum(p.numel() for p in layer.parameters() if p.dim() > 1 and p.numel() > 1000)
        assert shape.layer_parameters(*kind) == matrices


@pytest.mark.parametrize("budget_gib, stream", [(72, "host"), (38, "host")])
def test_two_million_tokens_are_planned_within_the_card(budget_gib, stream):
    shape, tokens = real_shape(), 2**21
    plan = plan_step(
        shape, tokens, element_bytes=2, options=EngineOptions(), gpu_bytes=budget_gib * 2**30, training=True
    )
    assert plan.stream == stream
    assert peak_bytes(engine_buffers(shape, tokens, plan), "gpu") <= budget_gib * 2**30
    assert "MORE THAN THERE IS" not in plan.text


def test_a_short_sequence_stays_on_the_gpu_and_options_win_over_the_plan():
    options = EngineOptions(segment_tokens=4096, heads_per_group=3, token_tile=2048, attention_outputs="recompute")
    plan = plan_step(real_shape(), 65536, element_bytes=2, options=options, gpu_bytes=72 * 2**30, training=True)
    assert (plan.stream, plan.attention_outputs, plan.query_gradients) == ("gpu", "gpu", "gpu")
    assert (plan.segment_tokens, plan.heads_per_group, plan.token_tile, plan.keep_attention) == (4096, 3, 2048, False)


def test_what_cannot_fit_is_said():
    plan = plan_step(
        real_shape(), 2**21, element_bytes=2, options=EngineOptions(offload="gpu"), gpu_bytes=20 * 2**30, training=True
    )
    assert "MORE THAN THERE IS" in plan.text


# ---------------------------------------------------------------------------------------------- ZeRO-3


def test_zero3_on_two_ranks_equals_the_plain_model():
    """Losses over steps with accumulation, and the weights after them; CPU processes, gloo, parameters offloaded."""
    pytest.importorskip("deepspeed")
    worker = Path(__file__).parent / "zero3_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    paths = os.pathsep.join([str(worker.parent), str(worker.parent.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "zero3 parity: ok" in done.stdout
