"""The planner against the things it predicts: transformers' parameters, DeepSpeed's own buffers, the engine's own list,
and terms worked out by hand (the arithmetic stands in the test)."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import CONFIG as TINY

import engine_plan
import memory_utils
import plan_changes
import plan_picture
import run_plan
import zero3_memory
from config import TrainConfig, UserError, cross_check, load_config, read_json, read_yaml
from hardware import RATES, attention_rates, find_gpu, found_gpus, peak_flops
from kernels import REFERENCE_CHUNK
from model_shape import KIMI_LINEAR_48B, ModelShape, forward_flops, model_flops_per_step
from phase_profiler import PhasePeak, PhaseProfiler
from plan_changes import suggest
from run_plan import plan_run
from zero3_memory import PinnedPool, ZeroSettings, zero_memory

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
T = 2097152
# what the released checkpoint's config.json says, as far as sizes go
HUB = {
    "model_type": "kimi_linear",
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}
SETS = {
    "config_h100_2x.yaml": ("h100", 2048),
    "config_h100_2x_480gib.yaml": ("h100", 480),
    "config_l20_4x40gb.yaml": ("l20", 2560),
    "config_l20_4x40gb_512gib.yaml": ("l20", 512),
}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    """The shipped configs name each other relative to the repository's root; the allocator is set as the trainer does."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", zero3_memory.ALLOCATOR_SETTINGS)


def planned(name: str, **changes):
    config = dataclasses.replace(load_config(["--config", name]), **changes)
    gpu, host = SETS[name]
    processes = read_yaml(config.accelerate_config)["num_processes"]
    machine = {"num_gpus": processes, "gpu": gpu, "gpu_memory_gib": config.gpu_memory_gib, "host_memory_gib": host}
    return config, machine, plan_run(config, KIMI_LINEAR_48B, **machine)


# ---------------------------------------------------------------------------------------------- the model's numbers


@pytest.mark.parametrize(
    "values",
    [
        HUB,
        TINY,
        {**TINY, "q_lora_rank": 12, "attention_bias": True, "num_shared_experts": 2, "first_k_dense_replace": 2},
        {**TINY, "tie_word_embeddings": True},
    ],
    ids=["released", "tiny", "query-latent", "tied"],
)
@pytest.mark.parametrize("layout", ["hub", "transformers"])
def test_every_parameter_is_that_of_transformers(values, layout):
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig(**{k: v for k, v in values.items() if k not in ("model_type", "architectures")})
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    model.tie_weights()
    shape = ModelShape.from_config_dict(values if layout == "hub" else config.to_dict())
    theirs = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert [(p.name, p.shape) for p in shape.parameters] == theirs


def test_released_model_by_hand():
    counts = KIMI_LINEAR_48B.parameter_counts
    assert ModelShape.from_config_dict(HUB) == KIMI_LINEAR_48B
    assert counts["embedding"] == counts["head"] == 163840 * 2304
    assert counts["routed_experts"] == 26 * 256 * 3 * 2304 * 1024 == 47_110_422_528
    # q, kv down, its norm, kv up, o
    assert counts["mla"] == 7 * (2304 * 32 * 192 + 2304 * 576 + 512 + 512 * 32 * 256 + 32 * 128 * 2304)
    # q k v o; convolution; dt_bias, A_log; forget and output gate through 128; beta; output norm
    kda = 4 * 2304 * 4096 + 3 * 4096 * 4 + 4096 + 32 + 2 * (2304 * 128 + 128 * 4096) + 2304 * 32 + 128
    assert counts["kda"] == 20 * kda
    assert counts["norms"] == (2 * 27 + 1) * 2304
    assert KIMI_LINEAR_48B.total_parameters == sum(counts.values())
    assert KIMI_LINEAR_48B.trained_parameters("no_experts") == KIMI_LINEAR_48B.total_parameters - 47_110_422_528
    assert KIMI_LINEAR_48B.trained_parameters("attention") == counts["kda"] + counts["mla"]


def test_trainable_is_the_rule_of_the_trainer():
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    from kimi_model import set_trainable

    config = KimiLinearConfig(**{k: v for k, v in TINY.items() if k not in ("model_type", "architectures")})
    for trainable in ("all", "no_experts", "attention"):
        with torch.device("meta"):
            model = KimiLinearForCausalLM(config)
        set_trainable(model, trainable)
        theirs = {name for name, p in model.named_parameters() if p.requires_grad}
        shape = ModelShape.from_config_dict(TINY)
        assert {p.name for p in shape.parameters if p.trained(trainable)} == theirs


def test_flops_by_hand():
    forward = forward_flops(KIMI_LINEAR_48B, T)
    assert forward["attention"] / 7 == T**2 * 32 * 320 == pytest.approx(4.5e16, rel=1e-3)
    assert forward["head"] == 2 * T * 163840 * 2304
    assert forward["routed_experts"] == 2 * T * 26 * 8 * 3 * 2304 * 1024
    assert forward["router"] == 2 * T * 26 * 256 * 2304
    assert forward["kda_recurrence"] == T * 20 * 32 * 6 * 128 * 128
    # everything but attention together: about 1.3e16, as DESIGN.md says
    assert sum(forward.values()) - forward["attention"] == pytest.approx(1.3e16, rel=0.02)
    both = model_flops_per_step(KIMI_LINEAR_48B, T, 4)
    assert both == {term: 4 * 3 * value for term, value in forward.items()}
    frozen = model_flops_per_step(KIMI_LINEAR_48B, T, 1, trainable="no_experts")
    assert frozen["routed_experts"] == 2 * forward["routed_experts"]
    assert frozen["attention"] == 3 * forward["attention"] and frozen["head"] == 3 * forward["head"]


# ---------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIE"),
        ("h200", "H200"),
        ("NVIDIA L20", "L20"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
    ],
)
def test_cards_are_found_by_the_drivers_names(name, entry):
    assert find_gpu(name).name == entry


def test_cards_of_this_machine_come_from_the_driver(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert found_gpus() == [("NVIDIA H100 80GB HBM3", 81559 / 1024)] * 2
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert found_gpus() == []


def test_an_unknown_card_has_no_figures():
    assert peak_flops("NVIDIA GeForce RTX 9999") is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    config = load_config(["--config", "config_h100_2x.yaml"])
    with pytest.raises(UserError, match=r"'rtx9999' is in no table here; give its memory with --gpu_memory_gib"):
        plan_run(config, KIMI_LINEAR_48B, num_gpus=2, gpu="rtx9999", gpu_memory_gib=None, host_memory_gib=2048)
    plan = plan_run(config, KIMI_LINEAR_48B, num_gpus=2, gpu="rtx9999", gpu_memory_gib=80, host_memory_gib=2048)
    assert plan.fits and plan.total_seconds is None and plan.cost_usd is None
    assert all(stage.seconds is None and stage.mfu is None for stage in plan.stages)
    assert "n/a (no figures for this card)" in plan.text()
    assert json.loads(plan.to_json())["total_seconds"] is None


def test_a_card_without_measured_kernels_gets_a_bound_and_no_time():
    plan = planned("config_l20_4x40gb.yaml")[2]
    assert plan.total_seconds is None
    assert "n/a (no kernel was measured on this card); its datasheet's peak alone would take" in plan.text()


def test_attention_rates_between_measured_lengths():
    rates = RATES["GH100"]
    assert attention_rates(rates, "auto", 131072) == (733e12, 586e12)
    assert attention_rates(rates, "auto", 4096) == (733e12, 586e12)
    assert attention_rates(rates, "auto", 2097152) == (707e12, 572e12)
    # 262,144 is half-way from 131,072 to 524,288 in powers of two
    assert attention_rates(rates, "auto", 262144) == pytest.approx(((733e12 + 705e12) / 2, (586e12 + 570e12) / 2))


def test_step_time_by_hand():
    """One 2M sequence of the whole model: 1,824 s of attention and 160 s of everything else on an H100."""
    zero = ZeroSettings.from_json(read_json("deepspeed_config_h100.json"), bf16=True)
    seconds = run_plan.step_seconds(
        KIMI_LINEAR_48B,
        zero,
        find_gpu("h100"),
        tokens=T,
        micro_steps=1,
        batch=1,
        ranks=2,
        trainable="all",
        backend="auto",
        keep_attention=True,
    )
    assert seconds["attention forward"] == pytest.approx(7 * 4.5036e16 / 707e12, rel=1e-4)
    assert seconds["attention backward"] == pytest.approx(7 * 2.5 * 4.5036e16 / 572e12, rel=1e-4)
    assert seconds["KDA recurrence"] == pytest.approx(20 * (0.39 + 1.57))
    assert sum(seconds.values()) == pytest.approx(1990, rel=0.01)
    years = 100e9 / (2 * T / sum(seconds.values())) / (365 * 86400)
    assert years == pytest.approx(1.5, abs=0.05)


# ---------------------------------------------------------------------------------------------- ZeRO-3's memory


def test_zero_terms_by_hand():
    """All 49.1 B parameters in the shipped JSON's precisions, two ranks: bytes per parameter 2, 4, 4, 4 and 8."""
    zero = ZeroSettings.from_json(read_json("deepspeed_config_h100.json"), bf16=True)
    memory = zero_memory(KIMI_LINEAR_48B, zero, trainable="all", ranks=2, local_ranks=2, pool=PinnedPool(2**26))
    # dt_bias (4096) and A_log (32) of 20 layers are the trainer's own; every other size is even
    owned = KIMI_LINEAR_48B.total_parameters - 20 * (4096 + 32)
    assert memory.pinned == {
        "weights, trained": 2 * owned,
        "gradients for Adam": 4 * owned,
        "gradient accumulation": 4 * owned,
    }
    assert memory.pageable == {"master weights": 4 * owned, "Adam moments": 8 * owned}
    assert memory.gpu["fp32 decay parameters"] == 16 * 20 * (4096 + 32)
    assert memory.gpu["ZeRO reduce bucket"] == 2 * 200_000_000

    frozen = zero_memory(KIMI_LINEAR_48B, zero, trainable="no_experts", ranks=2, local_ranks=2, pool=PinnedPool(2**26))
    experts = 26 * 256 * 3 * 2304 * 1024
    assert frozen.pinned["weights, frozen"] == 2 * experts
    assert frozen.pageable["Adam moments"] == 8 * (owned - experts)

    low = ZeroSettings.from_json(
        {
            **read_json("deepspeed_config_h100.json"),
            "bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
            "data_types": {"grad_accum_dtype": "bf16"},
        },
        bf16=True,
    )
    memory = zero_memory(KIMI_LINEAR_48B, low, trainable="all", ranks=2, local_ranks=1, pool=PinnedPool(2**26))
    assert memory.pageable == {"master weights": owned, "Adam moments": 2 * owned}  # one of two machines
    assert memory.pinned["gradient accumulation"] == owned


def test_partitions_are_rounded_up():
    """Three ranks, sizes that 3 does not divide: ceil(numel / 3) elements each."""
    shape = ModelShape.from_config_dict(TINY)
    memory = zero_memory(shape, ZeroSettings(), trainable="all", ranks=3, local_ranks=3, pool=None)
    elements = sum(-(-p.numel // 3) for p in shape.parameters if not p.name.endswith(("A_log", "dt_bias")))
    assert memory.pageable["master weights"] == 3 * 4 * elements
    assert elements * 3 > shape.total_parameters - 2 * (32 + 2)


def test_pinned_pool_rounds_to_powers_of_two_and_keeps_blocks():
    pool = PinnedPool()
    pool.allocate(5 * GIB)  # 8
    assert (pool.owned, pool.asked) == (8 * GIB, 5 * GIB)
    pool.free(5 * GIB)
    assert (pool.owned, pool.asked) == (8 * GIB, 0)
    pool.allocate(7 * GIB)  # the kept block
    pool.allocate(3 * GIB)  # 4 more
    assert (pool.owned, pool.asked) == (12 * GIB, 10 * GIB)
    exact = PinnedPool(round_limit=2**26)
    exact.allocate(5 * GIB)
    exact.allocate(3 * 2**20)  # below the limit: 4 MiB
    assert exact.owned == 5 * GIB + 4 * 2**20
    exact.free(5 * GIB)
    assert exact.owned == 4 * 2**20


def test_the_allocators_settings_decide_the_rounding():
    config = load_config(["--config", "config_h100_2x.yaml"])
    machine = {"num_gpus": 2, "gpu": "h100", "gpu_memory_gib": None, "host_memory_gib": 2048}
    lost = {}
    ours: dict = {}
    zero3_memory.set_allocator(ours)
    for name, environ in (("ours", ours), ("torch's own", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})):
        stage = plan_run(config, KIMI_LINEAR_48B, environ=environ, **machine).stages[-1]
        lost[name] = stage.memory.pinned["pinned blocks: rounding, cache"]
    assert lost["ours"] < 8 * GIB and lost["torch's own"] > 300 * GIB
    users = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}
    zero3_memory.set_allocator(users)
    assert users == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}


def test_torch_knows_the_allocators_settings():
    code = f"import torch; torch._C._accelerator_setAllocatorSettings({zero3_memory.ALLOCATOR_SETTINGS!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


WORKER = """
import json, sys, torch, deepspeed
from transformers import KimiLinearConfig, KimiLinearForCausalLM
values, ds = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sys.path.insert(0, sys.argv[3])
from kimi_model import parameter_groups, set_trainable
deepspeed.init_distributed("gloo")
config = KimiLinearConfig(**values)
model = KimiLinearForCausalLM(config).to(torch.bfloat16)
for module in model.modules():
    for name in ("A_log", "dt_bias"):
        module._parameters.pop(name, None)
set_trainable(model, sys.argv[4])
optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(parameter_groups(model, 0.1))
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
z = engine.optimizer
size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
print("RESULT", json.dumps({
    "weights, trained": size(z.param_groups_fp16_flat_cpu_memory),
    "weights, frozen": size(p.ds_tensor for p in model.parameters() if not p.requires_grad),
    "master weights": size(z.fp32_partitioned_groups_flat),
    "gradients for Adam": size(t.grad for t in z.fp32_partitioned_groups_flat),
    "gradient accumulation": size([z.grad_partitions_flat_buffer]),
    "sub-groups": [t.numel() for t in z.fp32_partitioned_groups_flat],
    "bucket": size(b.buffer for b in z.ipg_buckets.values()),
}))
"""


def test_zero_terms_are_those_of_deepspeed(tmp_path):
    """DeepSpeed's own buffers on two ranks, to the byte."""
    values = {k: v for k, v in TINY.items() if k not in ("model_type", "architectures")}
    ds = read_json("demo/deepspeed.json")
    ds |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    ds["bf16"] = {"enabled": True}
    ds["zero_optimization"] |= {"sub_group_size": 5000, "reduce_bucket_size": 3000}
    environ = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environ["MASTER_PORT"] = str(_free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(values), json.dumps(ds), str(ROOT), "no_experts"],
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    found = [json.loads(re.search(r"RESULT (.*)", out)[1]) if "RESULT" in out else pytest.fail(out) for out in outputs]

    zero = ZeroSettings.from_json(ds, bf16=True)
    shape = ModelShape.from_config_dict(TINY)
    memory = zero_memory(shape, zero, trainable="no_experts", ranks=2, local_ranks=2, pool=None)
    for term, size in memory.pageable.items():
        if term != "Adam moments":  # made at the first step
            assert size == found[0][term] + found[1][term], term
    assert memory.pageable["Adam moments"] == 2 * memory.pageable["master weights"]
    assert memory.gpu["ZeRO reduce bucket"] == found[0]["bucket"]
    trained = [p for p in shape.parameters if p.trained("no_experts") and not p.own_fp32]
    halves = [[-(-p.numel // 2) for p in trained if (len(p.shape) > 1) == matrices] for matrices in (True, False)]
    assert found[0]["sub-groups"] == [n for group in halves for n in zero3_memory.sub_groups(group, 5000)]
    assert len(found[0]["sub-groups"]) > 2


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# ---------------------------------------------------------------------------------------------- the engine's memory


def test_engine_terms_are_the_engines_own():
    config, _, plan = planned("config_h100_2x.yaml")
    zero = run_plan.read_zero(config)
    shape = run_plan.engine_shape(KIMI_LINEAR_48B)
    longest = run_plan.engine_step(config, KIMI_LINEAR_48B, zero, plan.machine, plan.engine, T)
    pinned = engine_plan.engine_buffers(shape, T, longest)
    for stage in plan.stages:
        step = run_plan.engine_step(config, KIMI_LINEAR_48B, zero, plan.machine, plan.engine, stage.seq_length)
        buffers = engine_plan.engine_buffers(shape, stage.seq_length, step)
        ours = sum(size for term, size in stage.memory.gpu.items() if term in {b.name for b in buffers})
        assert ours == engine_plan.peak_bytes(buffers, "gpu")
        # pinned when the run starts, for its longest sequences, and held through every stage; two ranks
        ours = sum(size for term, size in stage.memory.pinned.items() if term in {b.name for b in pinned})
        assert ours == 2 * engine_plan.peak_bytes(pinned, "host")
        assert ours == 2 * sum(engine_plan.host_stashes(shape, T, longest))


@pytest.mark.parametrize(
    ("tokens", "gpu_gib", "options"),
    [
        (65536, 68, {}),  # one segment, everything on the GPU
        (262144, 68, {"segment_tokens": 16384, "token_tile": 16384, "heads_per_group": 2}),
        (524288, 30, {}),  # everything on the host
    ],
)
def test_listed_buffers_are_what_the_engine_holds(tokens, gpu_gib, options):
    """The engine's own code, layers of the released sizes, on tensors without storage: bytes alive at each phase's peak."""
    import trace_memory
    from bench_engine import MODEL

    plan, listed, traced = trace_memory.trace(
        MODEL,
        tokens,
        engine_plan.EngineOptions(attention_outputs="keep", **options),
        gpu_gib=gpu_gib,
        kda=trace_memory.allocating_kda,
        conv=trace_memory.allocating_conv,
    )
    assert plan.stream == ("host" if gpu_gib < 40 else "gpu")
    assert set(listed) == set(engine_plan.PHASES)
    for phase in listed:
        # 0.1: a tile that waits for its copy may keep the tensor alive that it is a part of
        assert listed[phase] == pytest.approx(traced[phase], rel=0.1), phase
    assert max(listed.values()) == pytest.approx(max(traced.values()), rel=0.03)


def test_expandable_segment_by_hand():
    """Pages of 20 MiB: three blocks of 30, the middle one given back, leave a hole that 40 MiB do not fit and 10 do."""
    from trace_memory import ExpandableSegment

    mib, segment = 2**20, ExpandableSegment()
    offsets = [segment.take(30 * mib) for _ in range(3)]
    assert offsets == [0, 30 * mib, 60 * mib] and segment.reserved == 100 * mib
    segment.give(offsets[1], 30 * mib)
    assert segment.take(40 * mib) == 90 * mib and segment.reserved == 140 * mib  # 10 were free at the end
    assert segment.take(10 * mib) == 130 * mib  # the smallest range that fits
    assert segment.take(10 * mib) == 30 * mib
    for offset, size in ((0, 30), (60, 30), (30, 10)):
        segment.give(offset * mib, size * mib)
    assert segment.take(90 * mib) == 0 and segment.reserved == 140 * mib


def test_frozen_experts_have_no_gradients_on_the_gpu():
    """256 experts x 3 x 2304 x 1024 weights of a layer: their sum in fp32 is not there in KDA's backward, in bf16 not in
    attention's, and a tile's own gradients (later of them gate, up and down, 6 rows less of width 1024) not in the MLP's."""
    shape, experts = run_plan.engine_shape(KIMI_LINEAR_48B), 256 * 3 * 2304 * 1024
    zero = ZeroSettings()
    config, machine, plan = planned("config_h100_2x.yaml")
    step = run_plan.engine_step(config, KIMI_LINEAR_48B, zero, plan.machine, plan.engine, T)
    sums = {}
    for frozen in (False, True):
        buffers = engine_plan.engine_buffers(shape, T, step, frozen_experts=frozen)
        for phase in engine_plan.PHASES:
            sums[frozen, phase] = sum(b.bytes for b in buffers if not b.phases or phase in b.phases)
    saved = {phase: sums[False, phase] - sums[True, phase] for phase in engine_plan.PHASES}
    assert saved["kda"] == 4 * experts and saved["attention"] == saved["mla_input"] == 2 * experts
    assert saved["loss"] == 0 and saved["kda_mlp"] >= 4 * experts + 2 * experts // 3
    frozen = plan_run(dataclasses.replace(config, trainable="no_experts"), KIMI_LINEAR_48B, **machine).stages[-1]
    term = "gradients of one layer"
    assert plan.stages[-1].memory.gpu[term] - frozen.memory.gpu[term] == saved[plan.stages[-1].gpu_phase]


def test_reserve_grows_from_stage_to_stage_up_to_the_limit():
    """4 layers, 64 experts of the released sizes, bf16 accumulation, one H100: what the allocator keeps besides.

    Gathered ahead in a GPU-resident step: all weights but the layer that runs (64 experts, router, shared expert, KDA) and
    what is prefetched (the bucket's 50 M elements and a gate/up of 64 x 2048 x 2304). Copies of the head's gradient: 2 bytes
    read back and 4 in fp32. On the host the CPU is held back: one layer.
    """
    from bench_engine import MODEL

    shape = ModelShape.from_config_dict(MODEL)
    zero = dataclasses.replace(ZeroSettings(), accumulation_bytes=2)
    layer = sum(p.numel for p in shape.parameters if p.layer == 2 and not p.own_fp32)
    owned = sum(p.numel for p in shape.parameters if not p.own_fp32)
    prefetched = 50_000_000 + 64 * 2048 * 2304
    assert zero3_memory.gathered_ahead(shape, zero, resident=True) == 2 * (owned - layer - prefetched)
    assert zero3_memory.gathered_ahead(shape, zero, resident=False) == 2 * layer
    memory = zero_memory(shape, zero, trainable="all", ranks=1, local_ranks=1, pool=None)
    assert memory.gpu["ZeRO's prefetched weights"] == 2 * prefetched
    assert memory.gpu["gradient that waits for its reduction"] == 2 * 64 * 2048 * 2304
    # the filled bucket (500 M by default) is more than the head: 2 bytes as one, then 2 + 4
    assert memory.idle["ZeRO's copies of a gradient"] == 500_000_000 * (2 + 2 + 4)
    shipped = dataclasses.replace(zero, reduce_bucket_size=200_000_000)
    memory = zero_memory(shape, shipped, trainable="all", ranks=1, local_ranks=1, pool=None)
    assert memory.idle["ZeRO's copies of a gradient"] == 163840 * 2304 * (2 + 4)

    config = dataclasses.replace(
        load_config(["--config", "config_h100_2x.yaml"]), curriculum="0:65536,1:524288,2:262144"
    )
    machine = {"num_gpus": 1, "gpu": "h100", "gpu_memory_gib": 72, "host_memory_gib": 512}
    plan = plan_run(dataclasses.replace(config, num_train_steps=3), shape, zero=shipped, **machine)
    first, second, third = (stage.gpu_reserve for stage in plan.stages)
    assert first < second == third <= 72 * GIB - run_plan.GPU_CONTEXT
    idle = sum(plan.stages[0].memory.idle.values())
    assert first == plan.stages[0].gpu_bytes + idle - run_plan.GPU_CONTEXT


RUNS = sorted((ROOT / "benchmarks/results").glob("engine_*_h100.json"))


def test_runs_on_an_h100_are_predicted():
    """Every stage of every recorded run: allocator's reserve and host within 10 %, the step within 15 % where the run's
    kernels are today's."""
    import bench_planner

    points = [bench_planner.point_of(record) for path in RUNS for record in bench_planner.read_records(path)]
    assert len({(p.name, p.tokens, p.tiles) for p in points if p.seconds is not None}) >= 6
    for p in points:
        assert p.plan.gpu_reserve == pytest.approx(p.gpu_reserved, rel=0.10), p.source
        assert p.plan.host_bytes == pytest.approx(p.host, rel=0.10), p.source
        if p.seconds is not None:
            assert p.plan.step_seconds == pytest.approx(p.seconds, rel=0.15), p.source


def test_kept_layer_inputs_by_hand():
    """One residual stream of 2M tokens is T x 2304 x 2 bytes = 9 GiB; 27 layers' inputs are kept, on each of two ranks."""
    stage = planned("config_h100_2x.yaml")[2].stages[-1]
    inputs = next(size for term, size in stage.memory.pinned.items() if term.startswith("hidden states, inputs of 27"))
    assert inputs == 2 * 27 * T * 2304 * 2 == 2 * 27 * 9 * GIB
    outputs = next(size for term, size in stage.memory.pinned.items() if term.startswith("attention outputs"))
    assert outputs >= 2 * 7 * T * 32 * 128 * 2


def test_engine_shape_is_the_one_the_model_gives():
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    import kimi_model

    config = KimiLinearConfig(**{k: v for k, v in TINY.items() if k not in ("model_type", "architectures")})
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    ours = run_plan.engine_shape(ModelShape.from_config_dict(TINY))
    assert kimi_model._model_parts(model).shape == ours


# ---------------------------------------------------------------------------------------------- whole plans


@pytest.mark.parametrize("name", SETS)
def test_shipped_sets_are_consistent_and_fit(name):
    config, _, plan = planned(name)
    assert cross_check(config, world_size=None, environ={}) == []
    assert plan.fits, plan.verdict
    assert plan.warnings == ()
    assert plan.stages[-1].seq_length == T
    assert 100e9 <= plan.total_tokens <= 150e9


@pytest.mark.parametrize("name", ["deepspeed_config_h100.json", "deepspeed_config_l20.json"])
def test_shipped_json_keeps_the_trainers_optimizer(name):
    """Without this Accelerate replaces our AdamW by a CPU Adam with adamw_mode off: weight decay through the gradient."""
    ds = read_json(name)
    assert ds["zero_force_ds_cpu_optimizer"] is False
    for place in ("offload_optimizer", "offload_param"):
        assert ds["zero_optimization"][place] == {"device": "cpu", "pin_memory": True}
    # accumulated in fp32, which DeepSpeed does not do by itself for a bf16 model
    assert ZeroSettings.from_json(ds, bf16=True).accumulation_bytes == 4


@pytest.mark.parametrize("name", ["config_h100_2x.yaml", "config_l20_4x40gb.yaml"])
def test_the_requirement_in_the_comment_is_the_planned_one(name):
    need = int(re.search(r"needs ([\d,]+) GiB of host memory", (ROOT / name).read_text())[1].replace(",", ""))
    config, machine, _ = planned(name)
    fits = lambda gib: plan_run(config, KIMI_LINEAR_48B, **{**machine, "host_memory_gib": gib}).fits  # noqa: E731
    assert fits(need) and not fits(0.95 * need)


def test_all_parameters_do_not_fit_a_common_machine_and_what_does():
    config, machine, _ = planned("config_h100_2x.yaml")
    machine["host_memory_gib"] = 480
    plan = plan_run(config, KIMI_LINEAR_48B, **machine)
    assert not plan.fits
    assert plan.verdict.startswith("does not fit: host memory is short at 2,097,152 tokens: GPU ")
    assert re.search(
        r"host [\d,.]+ of 465\.6 GiB \(largest: hidden states, inputs of 27 layers, 486\.0\)$", plan.verdict
    )
    lines = suggest(config, KIMI_LINEAR_48B, plan, **machine)
    text = "\n".join(lines)
    order = [
        "grad_accum_dtype",
        "--trainable no_experts",
        "bf16_optimizer_states",
        "nvme",
        "--num_processes 1",
        "second",
    ]
    places = [next(i for i, line in enumerate(lines) if word in line) for word in order]
    assert places == sorted(places)
    assert re.search(r"--trainable no_experts \(routed experts frozen\): host [\d,]+ -> [\d,]+ GiB", text)
    enough = next(line for line in lines if line.startswith("enough together"))
    assert enough.startswith("enough together: --trainable no_experts; --num_processes 1: fits")
    assert "as it stands the run fits at no length" in text
    assert "each step reads and writes 1.38 TB" in text  # 49.1 B parameters x 28 bytes
    assert re.search(r"as it stands the run needs [\d,]+ GiB of host memory a machine", text)


def test_each_suggestion_says_what_it_frees():
    """No experts trained: 20 bytes of state per routed expert's weight are gone (4 + 4 + 4 + 8)."""
    config, machine, plan = planned("config_h100_2x.yaml")
    frozen = plan_run(dataclasses.replace(config, trainable="no_experts"), KIMI_LINEAR_48B, **machine)
    saved = plan.stages[-1].host_bytes - frozen.stages[-1].host_bytes
    assert saved == pytest.approx(20 * 26 * 256 * 3 * 2304 * 1024, rel=1e-2)


def test_longest_length_that_fits():
    config, machine, _ = planned("config_h100_2x.yaml", trainable="no_experts")
    machine["host_memory_gib"] = 480
    longest = plan_changes.longest_that_fits(config, KIMI_LINEAR_48B, **machine)
    fits = lambda n: plan_run(dataclasses.replace(config, curriculum=f"0:{n}"), KIMI_LINEAR_48B, **machine).fits  # noqa: E731
    assert 1048576 <= longest < T and longest % 65536 == 0
    assert fits(longest) and not fits(longest + 65536)


def test_fixed_tiles_too_large_are_named():
    config, machine, plan = planned("config_l20_4x40gb.yaml", heads_per_group=32, segment_tokens=262144)
    assert not plan.fits and "GPU memory is short" in plan.verdict
    lines = suggest(config, KIMI_LINEAR_48B, plan, **machine)
    assert lines[0].startswith("leave segment_tokens, heads_per_group to the planner: ") and lines[0].endswith(", fits")


def test_attention_is_recomputed_only_where_the_host_is_short():
    config, machine, plan = planned("config_h100_2x.yaml")
    assert plan.engine.attention_outputs == "keep"
    short = plan_run(config, KIMI_LINEAR_48B, **{**machine, "host_memory_gib": 1650})
    assert short.fits and short.engine.attention_outputs == "recompute"
    extra = short.stages[-1].seconds["attention forward"] / plan.stages[-1].seconds["attention forward"]
    assert extra == pytest.approx(2)


def test_the_contract_command_lines_tokens_are_questioned():
    """2 GPUs x 256 x 2M x 30,000 steps: 32 T tokens (the shorter stages a little less) where 126 B are meant."""
    config = dataclasses.replace(load_config(["--config", "config_h100_2x.yaml"]), tokens_per_step=None)
    machine = {"num_gpus": 2, "gpu": "h100", "gpu_memory_gib": None, "host_memory_gib": 2048}
    plan = plan_run(config, KIMI_LINEAR_48B, dataset_tokens=10**11, **machine)
    by_hand = 512 * (2500 * (1048576 + 1310720 + 1572864 + 1835008) + 20000 * 2097152)
    assert plan.total_tokens == by_hand == pytest.approx(29e12, rel=0.02)
    first, second = plan.warnings
    assert "28.86T tokens in all, where 100 to 150 B are meant; --tokens_per_step 4194304 makes it 125.83B" in first
    assert second == "the schedule reads 28.86T tokens but the data set has 100.00B: 288.6 epochs"
    assert all(f"WARNING: {warning}" in plan.text() for warning in plan.warnings)


def test_reference_engine_is_refused_at_length():
    """Logits alone: 65,536 tokens x 163,840 words x (2 + 2 + 4 + 4) bytes = 120 GiB, 40 of them the fp32 copy."""
    _, _, plan = planned("config_h100_2x.yaml", engine="reference", curriculum="0:65536")
    assert plan.stages[0].memory.gpu["logits of every token"] == 120 * GIB
    assert not plan.fits and "GPU memory is short" in plan.verdict
    assert "WARNING: engine reference: " in plan.text()


def test_more_machines_share_the_states_and_not_the_sequences():
    config, machine, plan = planned("config_h100_2x.yaml")
    both = plan_run(config, KIMI_LINEAR_48B, **{**machine, "num_gpus": 4, "num_machines": 2})
    one, two = plan.stages[-1].memory, both.stages[-1].memory
    assert two.pageable["Adam moments"] == pytest.approx(one.pageable["Adam moments"] / 2, rel=1e-6)
    hidden = next(term for term in one.pinned if term.startswith("hidden states"))
    assert two.pinned[hidden] == one.pinned[hidden]
    assert "host 2,048 GiB in each of 2 machines" in both.text()


def test_micro_steps_are_the_loaders():
    from data_loader import Schedule

    for name in SETS:
        config, machine, plan = planned(name)
        schedule = Schedule(
            stages=config.stages,
            num_train_steps=config.num_train_steps,
            world_size=machine["num_gpus"],
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            tokens_per_step=config.tokens_per_step,
        )
        for stage, wanted in zip(plan.stages, config.stages, strict=True):
            step = schedule.step(wanted.start_step)
            assert (stage.micro_steps, stage.tokens_per_step) == (step.accumulation_steps, step.tokens)
        assert plan.total_tokens == schedule.total_tokens


def test_stages_that_are_never_reached_do_not_count():
    config, machine, _ = planned("config_h100_2x.yaml", num_train_steps=3000)
    plan = plan_run(config, KIMI_LINEAR_48B, **machine)
    assert [(s.seq_length, s.steps) for s in plan.stages] == [(1048576, 2500), (1310720, 500)]
    config = dataclasses.replace(config, num_train_steps=30000, stop_after_steps=2500)
    assert [s.seq_length for s in plan_run(config, KIMI_LINEAR_48B, **machine).stages] == [1048576]


def test_budget_buys_a_share_of_every_stage():
    config, _, plan = planned("config_h100_2x.yaml", gpu_hour_usd=2.5)
    assert plan.cost_usd == pytest.approx(plan.total_seconds / 3600 * 2 * 2.5)
    text = plan_changes.budget_schedule(config, plan, hours=plan.total_seconds / 3600 / 10)
    assert "(250 steps of 4.19M tokens at 1,048,576; " in text
    assert '--num_train_steps 3000 --curriculum "0:1048576,250:1310720,500:1572864,750:1835008,1000:2097152"' in text
    assert "buy no step of each stage" in plan_changes.budget_schedule(config, plan, hours=0.1)


def test_demo_on_the_cpu():
    """No GPU: everything lies in the processes' memory, and the model is small beside Python and its libraries."""
    config = load_config(["--config", "demo/config.yaml"])
    shape = memory_utils.read_shape(config)
    plan = plan_run(config, shape, num_gpus=2, gpu=None, gpu_memory_gib=None, host_memory_gib=16)
    assert plan.fits and plan.verdict.startswith("fits; fullest at 2,048 tokens: host ")
    stage = plan.stages[-1]
    assert not stage.memory.gpu and not stage.memory.pinned
    assert "n/a (no figures for this card)" in plan.text()
    # 2 ranks x 60 tensors of T x chunk x H x K in fp32
    assert stage.memory.pageable["KDA in plain torch"] == 2 * 60 * 2048 * REFERENCE_CHUNK * shape.linear_dim * 4
    owned = 4 * shape.total_parameters
    assert stage.memory.pageable["master weights"] == pytest.approx(owned, rel=1e-2)
    small = plan_run(config, shape, num_gpus=2, gpu=None, gpu_memory_gib=None, host_memory_gib=0.5)
    assert not small.fits and "host memory is short" in small.verdict


# ---------------------------------------------------------------------------------------------- the command


def run_command(*words: str):
    return subprocess.run(
        [sys.executable, "memory_utils.py", *words], capture_output=True, text=True, timeout=60, cwd=ROOT
    )


def test_command_gives_json_and_text():
    words = ["--config", "config_h100_2x.yaml", "--gpu", "h100", "--host_memory_gib", "2048", "--gpu_hour_usd", "2.5"]
    done = run_command(*words, "--json")
    plan = json.loads(done.stdout)
    assert plan["fits"] is True and plan["cost_usd"] > 10000 and len(plan["stages"]) == 5
    assert plan["machine"]["num_gpus"] == 2  # from the Accelerate YAML
    assert plan["stages"][-1]["memory"]["pageable"]["Adam moments"] > 8 * 49e9
    done = run_command(*words, "--gpus", "1", "--budget_usd", "5000")
    assert "on 1 x h100 (79.1 GiB), host 2,048 GiB" in done.stdout
    assert "budget: 2,000.0 hours on 1 GPUs buy " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "rtx9999"], "gpu: 'rtx9999' is in no table here; give its memory with --gpu_memory_gib"),
        (["--budget_usd", "10", "--gpu", "h100"], "budget_usd: needs the price of a GPU hour; add --gpu_hour_usd"),
        (["--gpus", "3", "--machines", "2", "--gpu", "h100"], "machines: 3 GPUs do not divide into 2 equal machines"),
        (["--gpu_memori_gib", "10"], "unknown key 'gpu_memori_gib'; did you mean 'gpu_memory_gib'?"),
        (["--model_name_or_path", "someone/else"], "'someone/else' is no local folder with a config.json"),
    ],
)
def test_command_refuses_with_a_sentence(words, message):
    done = run_command("--config", "config_h100_2x.yaml", *words)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(bool(found_gpus()), reason="plans for the GPU found here")
def test_command_without_a_gpu_asks_for_its_name_unless_the_model_is_small():
    done = run_command("--config", "config_h100_2x.yaml")
    assert done.returncode == 2 and "add --gpu h100, l20, ... to plan for that card" in done.stderr
    done = run_command("--config", "demo/config.yaml")
    assert done.returncode == 0 and "planned as processes on the CPU" in done.stdout


def test_a_plan_needs_no_torch():
    code = (
        "import sys, memory_utils, run_plan; from config import load_config; from phase_profiler import PhaseProfiler;"
        "from model_shape import KIMI_LINEAR_48B;"
        "c = load_config(['--config', 'config_h100_2x.yaml']);"
        "p = run_plan.plan_run(c, KIMI_LINEAR_48B, num_gpus=2, gpu='h100', gpu_memory_gib=None, host_memory_gib=480);"
        "p.text(); PhaseProfiler(); print(sorted(set(sys.modules) & {'torch', 'numpy', 'transformers', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    config, machine, plan = planned("config_h100_2x.yaml")
    plan_picture.draw(config, KIMI_LINEAR_48B, plan, str(tmp_path / "memory.png"), **machine)
    assert (tmp_path / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---------------------------------------------------------------------------------------------- the profiler


def _refusing_proc(folder: Path) -> Path:
    """A /proc/self in which the high-water mark cannot be reset."""
    (folder / "status").symlink_to("/proc/self/status")
    (folder / "clear_refs").mkdir()
    return folder


@pytest.mark.parametrize("reset", [True, False], ids=["kernel", "sampled"])
def test_profiler_sees_a_peak_that_is_gone_at_the_end(reset, tmp_path):
    profiler = PhaseProfiler() if reset else PhaseProfiler(proc=_refusing_proc(tmp_path))
    if not reset:
        assert profiler.process_source == "sampled every 5 ms"
    with profiler.phase("before"):
        pass
    size = 300 * 2**20
    with profiler.phase("forward"):
        block = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.05)
        del block
    with profiler.phase("after"):
        pass
    with profiler.phase("forward"):  # the highest of both entries stays
        pass
    peaks = profiler.peaks
    assert peaks["forward"].process - peaks["before"].process == pytest.approx(size, rel=0.1)
    assert peaks["after"].process - peaks["before"].process < size / 4
    assert peaks["forward"].entered == 2 and peaks["forward"].seconds > 0.05
    assert re.search(r"^forward +0\.000 +0\.000 +0\.000 +\d+\.\d+", profiler.table(), re.M)


def test_profiler_refuses_nesting_and_survives_an_exception():
    profiler = PhaseProfiler()
    nested = pytest.raises(RuntimeError, match="'inner' entered inside phase 'outer'")
    with nested, profiler.phase("outer"), profiler.phase("inner"):
        pass
    with profiler.phase("next"):
        pass
    assert set(profiler.peaks) == {"outer", "next"}


def test_predicted_beside_measured():
    _, _, plan = planned("config_h100_2x.yaml")
    stage = plan.stages[0]
    reserved, process = int(1.1 * stage.gpu_reserve), stage.host_bytes // 4
    backward = PhasePeak(gpu_allocated=GIB, gpu_reserved=reserved, process=process)
    text = run_plan.compare_text(plan, 1048576, {"forward": PhasePeak(process=GIB), "backward": backward})
    first, second = text.splitlines()
    assert re.fullmatch(
        r"memory of this rank at 1,048,576 tokens: GPU predicted [\d.]+, measured [\d.]+ GiB \(\+10\.0%\); "
        r"process predicted [\d.]+, measured [\d.]+ GiB \(-50\.0%\)",
        first,
    )
    assert second == (
        "  peaks per phase, GiB (GPU allocated / reserved / process): forward 0.00 / 0.00 / 1.00; "
        f"backward 1.00 / {reserved / GIB:.2f} / {process / GIB:.2f}"
    )


def test_no_gpu_is_compared_where_none_was_used():
    """A limit may be planned for (--gpu_memory_gib) on a machine without a card."""
    _, _, plan = planned("config_h100_2x.yaml")
    text = run_plan.compare_text(plan, 1048576, {"backward": PhasePeak(process=GIB)})
    assert text == (
        "memory of this rank at 1,048,576 tokens: process 1.00 GiB, on the CPU; the plan is one for a GPU, so there is nothing "
        "to compare\n  peaks per phase, GiB (process): backward 1.00"
    )


def test_older_torch_gets_expandable_segments_only(monkeypatch):
    for version, settings in (("2.11.0+cu130", zero3_memory.EXPANDABLE), ("2.13.0", zero3_memory.ALLOCATOR_SETTINGS)):
        monkeypatch.setattr(zero3_memory.metadata, "version", lambda name, version=version: version)
        environ: dict = {}
        zero3_memory.set_allocator(environ)
        assert environ == {"PYTORCH_ALLOC_CONF": settings}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_profiler_on_a_gpu():
    torch.zeros(1, device="cuda")
    profiler = PhaseProfiler()
    with profiler.phase("forward"):
        on_gpu = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        pinned = torch.empty(2**27, dtype=torch.uint8, pin_memory=True)
    peak = profiler.peaks["forward"]
    assert peak.gpu_allocated >= on_gpu.numel() and peak.gpu_reserved >= peak.gpu_allocated
    assert peak.pinned >= pinned.numel()


def test_trainer_options_are_all_planned_with():
    """The planner's own options and the trainer's must not collide."""
    own = {action.dest for action in memory_utils.build_parser()._actions}
    assert not own & {f.name for f in dataclasses.fields(TrainConfig)}
