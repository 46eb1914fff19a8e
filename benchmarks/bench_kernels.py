"""Times of the single kernels the engine is made of, on one GPU, at the real model's layer shapes.

    python benchmarks/bench_kernels.py --out OUT.jsonl            # all; one JSON line per measurement, as it is made
    python benchmarks/bench_kernels.py --compile 12               # only compile fla's tuning candidates, in 12 processes
    python benchmarks/bench_kernels.py --save_tuning tuned_kernels/sm_90    # what fla's tuning chose here, for other machines

Times are medians of CUDA-event timings after warm-up, on random data. FLOPs are counted from shapes (causal attention: half
the square).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

D, HEADS, SIZE, EXPERTS, WIDTH, TOP_K, VOCABULARY = 2304, 32, 128, 64, 1024, 8, 163_840


def compile_candidates(processes: int) -> None:
    """Compile every candidate configuration of fla's autotuners into the Triton cache, in parallel.

    Tuning compiles them one after the other (about 285 s); compiled, it only has to time them. The workers tune nothing for
    real, so they must not store tuning results.
    """
    environment = {**os.environ, "TRITON_CACHE_AUTOTUNING": "0", "FLA_CACHE_RESULTS": "0"}
    workers = [
        subprocess.Popen([sys.executable, __file__, "--compile_worker", str(i)], env=environment)
        for i in range(processes)
    ]
    for worker in workers:
        worker.wait()


def compile_worker(number: int) -> None:
    import torch
    from triton.runtime.autotuner import Autotuner

    run = kda_runner(1024)
    import fla.ops.kda  # noqa: F401

    for tuner in [x for x in gc.get_objects() if isinstance(x, Autotuner)]:
        random.Random(number).shuffle(tuner.configs)
        tuner.__dict__["do_bench"] = lambda call, quantiles: (call(), [1.0, 1.0, 1.0])[1]
    run(several=True)
    torch.cuda.synchronize()


def save_tuning(folder: Path) -> None:
    """Write the fastest candidate of every tuned fla kernel in TRITON_CACHE_DIR as fla's own config files.

    fla reads them through FLA_CONFIG_DIR (fla/ops/utils/cache.py): an equal key first, then one that differs in numbers only,
    then `default_config`, here that of the real model's 32 heads.
    """
    import hashlib

    kernels: dict[str, dict] = {}
    for path in sorted(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.autotune.json")):
        found = json.loads(path.read_text())
        best = min(found["configs_timings"], key=lambda pair: pair[1][0])[0]
        config = {
            name: best[name] for name in ("kwargs", "num_warps", "num_stages", "num_ctas", "maxnreg", "ir_override")
        }
        kernel = kernels.setdefault(
            path.name.removesuffix(".autotune.json"), {"default_config": None, "autotune_entries": {}}
        )
        key = json.dumps(found["key"], separators=(",", ":"), sort_keys=True)
        kernel["autotune_entries"][hashlib.md5(key.encode()).hexdigest()] = {
            "autotune_key": found["key"],
            "config": config,
        }
        if kernel["default_config"] is None or HEADS in found["key"]:
            kernel["default_config"] = config
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in kernels.items():
        # fla takes the first entry that differs in numbers only: the largest shapes come first
        entries = sorted(
            values["autotune_entries"].items(),
            key=lambda item: [-n for n in item[1]["autotune_key"] if not isinstance(n, str)],
        )
        values["autotune_entries"] = dict(entries)
        (folder / f"{name}.json").write_text(json.dumps({"kernel_name": name, **values}, indent=1) + "\n")
    print(f"{folder}: {len(kernels)} kernels")


def kda_runner(tokens: int):
    import torch

    import kernels

    make = lambda *shape: torch.randn(*shape, device="cuda").bfloat16().requires_grad_()  # noqa: E731
    q, k, v, g = (make(tokens, HEADS, SIZE) for _ in range(4))
    beta, weight = make(tokens, HEADS), make(HEADS * SIZE, 4)
    raw, tail = make(tokens, HEADS * SIZE), make(3, HEADS * SIZE)
    A_log, dt_bias = (torch.rand(n, device="cuda").requires_grad_() for n in (HEADS, HEADS * SIZE))
    state = torch.zeros(HEADS, SIZE, SIZE, device="cuda").requires_grad_()

    def run(backward: bool = True, several: bool = False):
        for borders in ((0, tokens), (0, tokens // 3, tokens))[: 1 + several]:
            documents = kernels.Documents(borders)
            out, last = kernels.kda_fla(q, k, v, g, beta, A_log, dt_bias, state, documents)
            conv = kernels.causal_conv_fla(raw, weight, tail, documents)
            if backward:
                torch.autograd.grad([out, last, conv], [q, state, raw], [out, last, conv])

    return run


class Bench:
    def __init__(self, out: str | None):
        self.file = Path(out) if out else None

    def record(self, **values) -> None:
        line = json.dumps(values)
        print(line, flush=True)
        if self.file:
            with self.file.open("a") as file:
                file.write(line + "\n")

    def time(self, name: str, function, *, flops: float = 0, nbytes: float = 0, repeat: int = 7, **more) -> float:
        import torch

        try:
            function()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            times = []
            for _ in range(repeat):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        except Exception as error:
            self.record(name=name, error=f"{type(error).__name__}: {str(error)[:300]}", **more)
            return float("nan")
        ms = sorted(times)[len(times) // 2]
        peak = (torch.cuda.max_memory_allocated() - base) / 2**30
        values = {"ms": round(ms, 4), "extra_gib": round(peak, 3)}
        if flops:
            values["tflops"] = round(flops / ms / 1e9, 1)
        if nbytes:
            values["gb_s"] = round(nbytes / ms / 1e6, 1)
        self.record(name=name, **values, **more)
        return ms


def bench_all(out: str | None, only: set[str]) -> None:
    import torch

    bench = Bench(out)
    started = time.time()
    for name, function in (
        ("matmul", bench_matmul),
        ("copies", bench_copies),
        ("experts", bench_experts),
        ("quack", bench_quack),
        ("norms", bench_norms),
        ("loss", bench_loss),
        ("attention", bench_attention),
        ("kda", bench_kda),
    ):
        if only and name not in only:
            continue
        function(bench)
        torch.cuda.empty_cache()
        bench.record(name=f"section {name} done", seconds=round(time.time() - started, 1))


def bench_matmul(bench: Bench) -> None:
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    bench.time("matmul 8192^3", lambda: a @ b, flops=2 * 8192**3)


def bench_copies(bench: Bench) -> None:
    import torch

    from stash import HostPool

    size = 2**30
    started = time.time()
    pool = HostPool()
    hosts = [pool.take(size) for _ in range(2)]
    bench.record(name="pin 2 GiB", seconds=round(time.time() - started, 2))
    device = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    bench.time("host to gpu", lambda: device[0].copy_(hosts[0], non_blocking=True), nbytes=size)
    bench.time("gpu to host", lambda: hosts[1].copy_(device[1], non_blocking=True), nbytes=size)
    other = torch.cuda.Stream()

    def both():
        other.wait_stream(torch.cuda.current_stream())
        device[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(other):
            hosts[1].copy_(device[1], non_blocking=True)
        torch.cuda.current_stream().wait_stream(other)

    bench.time("both ways at once", both, nbytes=2 * size)


def bench_experts(bench: Bench) -> None:
    for tokens in (16384, 32768, 65536):
        bench_experts_of(bench, tokens)


def bench_experts_of(bench: Bench, tokens: int) -> None:
    import torch

    import kernels

    chosen = kernels.choose_kernels(torch.device("cuda"), torch.bfloat16, qk_dim=192, v_dim=128)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, D, device="cuda").mul_(0.02).bfloat16().requires_grad_()
    down = torch.randn(EXPERTS, D, WIDTH, device="cuda").mul_(0.02).bfloat16().requires_grad_()
    x = torch.randn(tokens, D, device="cuda").bfloat16().requires_grad_()
    expert = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K)[1]
    weight = torch.rand(tokens, TOP_K, device="cuda").requires_grad_()
    once = 2 * tokens * TOP_K * 3 * D * WIDTH
    rows = tokens * TOP_K
    ends = torch.arange(1, EXPERTS + 1, device="cuda", dtype=torch.int32) * (rows // EXPERTS)
    x_SD, h = torch.randn(rows, D, device="cuda").bfloat16(), torch.randn(rows, 2 * WIDTH, device="cuda").bfloat16()
    a, w_S = torch.randn(rows, WIDTH, device="cuda").bfloat16(), torch.rand(rows, device="cuda")
    places = torch.randperm(rows, device="cuda").view(tokens, TOP_K)
    up, dn = gate_up.detach(), down.detach()
    t = {"tokens": tokens}
    bench.time("grouped gate_up", lambda: chosen.grouped_matmul(x_SD, up, ends), flops=once * 2 / 3, **t)
    bench.time("grouped down", lambda: chosen.grouped_matmul(a, dn, ends), flops=once / 3, **t)
    bench.time("grouped d gate_up", lambda: chosen.grouped_matmul(h, up.mT, ends), flops=once * 2 / 3, **t)
    bench.time("grouped dW gate_up", lambda: chosen.grouped_weight_grad(h, x_SD, ends), flops=once * 2 / 3, **t)
    bench.time("grouped dW down", lambda: chosen.grouped_weight_grad(x_SD, a, ends), flops=once / 3, **t)
    bench.time("gather rows", lambda: x.detach().index_select(0, places.view(-1) // TOP_K), nbytes=rows * D * 4, **t)
    bench.time("gated", lambda: chosen.gated(h, w_S), nbytes=rows * WIDTH * 6, **t)
    bench.time("gated backward", lambda: chosen.gated_backward(h, a, w_S), nbytes=rows * WIDTH * 12, **t)
    bench.time("combine", lambda: chosen.combine(x_SD, places), nbytes=rows * D * 2 + tokens * D * 2, **t)
    total = torch.zeros(EXPERTS, 2 * WIDTH, D, device="cuda")
    bench.time("add dW to fp32", lambda: total.add_(up), nbytes=total.numel() * 10, **t)

    def forward():
        with torch.no_grad():
            return kernels.Experts.apply(x, weight, expert, gate_up, down, chosen, True)

    def both():
        y = kernels.Experts.apply(x, weight, expert, gate_up, down, chosen, False)
        torch.autograd.grad(y, [x, weight, gate_up, down], x.detach())

    bench.time("experts forward", forward, flops=once, **t)
    bench.time("experts backward with recompute", both, flops=3 * once, **t)
    bench_transformers_experts(bench, x, expert, weight, gate_up, down, once)


def bench_transformers_experts(bench: Bench, x, expert, weight, gate_up, down, once) -> None:
    import torch
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearExperts

    config = KimiLinearConfig(num_local_experts=EXPERTS)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = KimiLinearExperts(config)
    module.gate_up_proj, module.down_proj = torch.nn.Parameter(gate_up.detach()), torch.nn.Parameter(down.detach())

    def both():
        y = module(x, expert, weight)
        torch.autograd.grad(y, [x, weight, module.gate_up_proj, module.down_proj], x.detach())

    bench.time("transformers grouped_mm forward + backward", both, flops=3 * once, tokens=x.shape[0], repeat=3)


def bench_quack(bench: Bench) -> None:
    """quack's variable-length GEMMs (it comes with flash-attn-4) against torch's grouped one."""
    import torch

    try:
        from quack.gemm_interface import gemm, gemm_add_inplace
    except Exception as error:
        bench.record(name="quack", error=f"{type(error).__name__}: {str(error)[:200]}")
        return
    tokens = 65536
    rows, once = tokens * TOP_K, 2 * tokens * TOP_K * 3 * D * WIDTH
    up = torch.randn(EXPERTS, 2 * WIDTH, D, device="cuda").mul_(0.02).bfloat16()
    x, h = torch.randn(rows, D, device="cuda").bfloat16(), torch.randn(rows, 2 * WIDTH, device="cuda").bfloat16()
    cu = torch.arange(0, EXPERTS + 1, device="cuda", dtype=torch.int32) * (rows // EXPERTS)
    total = torch.zeros(EXPERTS, 2 * WIDTH, D, device="cuda")
    two = {"flops": once * 2 / 3, "tokens": tokens}
    bench.time("quack gate_up", lambda: gemm(x, up.mT, cu_seqlens_m=cu, tuned=False), **two)
    bench.time("quack d gate_up", lambda: gemm(h, up, cu_seqlens_m=cu, tuned=False), **two)
    bench.time("quack dW gate_up", lambda: gemm(h.t(), x, cu_seqlens_k=cu, tuned=False), **two)
    bench.time(
        "quack dW gate_up added in fp32", lambda: gemm_add_inplace(h.t(), x, total, cu_seqlens_k=cu, tuned=False), **two
    )


def bench_norms(bench: Bench) -> None:
    for tokens in (16384, 65536):
        bench_norms_of(bench, tokens)


def bench_norms_of(bench: Bench, tokens: int) -> None:
    """The fused norms and the eager chains. `gb_s` counts what the fused ones move, for the chains too."""
    import torch

    import kernels
    import triton_kernels

    make = lambda *shape: torch.randn(*shape, device="cuda").bfloat16().requires_grad_()  # noqa: E731
    hidden, latent, out, gate = make(tokens, D), make(tokens, 576), *(make(tokens, HEADS, SIZE) for _ in range(2))
    rms, gated = "rms_norm", "gated_norm"
    cases = (  # name, norm, inputs, columns of them, tensors moved forward and backward
        ("hidden state", rms, [hidden], D, 2, 3),
        ("latent", rms, [latent], 512, 2, 3),
        ("KDA output", gated, [out, gate], SIZE, 3, 5),
    )
    for name, norm, inputs, columns, forward_moves, backward_moves in cases:
        views, one = [x[..., :columns] for x in inputs], 2 * inputs[0][..., :columns].numel()
        leaves = [*views, make(columns)]
        d_out = torch.randn_like(views[0]).contiguous()
        for kind, function in (
            ("fused", getattr(triton_kernels, norm)),
            ("eager", getattr(kernels, f"{norm}_reference")),
        ):

            def run(function, leaves, d_out, backward: bool):
                with torch.set_grad_enabled(backward):
                    y = function(*leaves, 1e-5)
                if backward:
                    torch.autograd.grad(y, leaves, d_out)

            for backward, passes in ((False, forward_moves), (True, forward_moves + backward_moves)):
                title = f"{norm} of {name}, {kind}, forward{' + backward' * backward}"
                call = functools.partial(run, function, leaves, d_out, backward)
                bench.time(title, call, nbytes=passes * one, tokens=tokens)


def bench_loss(bench: Bench) -> None:
    for tokens in (8192, 16384):
        bench_loss_of(bench, tokens)


def bench_loss_of(bench: Bench, tokens: int) -> None:
    import torch

    import triton_kernels

    head = torch.randn(VOCABULARY, D, device="cuda").mul_(0.02).bfloat16()
    total = torch.zeros(VOCABULARY, D, device="cuda")
    hidden = torch.randn(tokens, D, device="cuda").bfloat16()
    labels = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
    logits = hidden @ head.t()
    once, t = 2 * tokens * VOCABULARY * D, {"tokens": tokens}
    bench.time("loss logits", lambda: hidden @ head.t(), flops=once, **t)
    bench.time(
        "loss kernel",
        lambda: triton_kernels.cross_entropy(logits, labels, 1e-6, True),
        nbytes=logits.numel() * 6,
        **t,
    )
    bench.time("loss d hidden", lambda: logits @ head, flops=once, **t)
    bench.time(
        "loss dW to fp32, then added",
        lambda: total.add_(torch.mm(logits.t(), hidden, out_dtype=torch.float32)),
        flops=once,
        **t,
    )
    bench.time("loss dW bf16, then added", lambda: total.add_(logits.t() @ hidden), flops=once, **t)
    bench.time(
        "loss dW added in the matmul",
        lambda: torch.ops.aten.addmm.dtype_out(total, logits.t(), hidden, torch.float32, out=total),
        flops=once,
        **t,
    )


def bench_attention(bench: Bench) -> None:
    for name in ("flash4", "cudnn", "flash"):
        for tokens, heads in ((65536, 4), (65536, 8), (131072, 4)):
            bench_attention_of(bench, name, tokens, heads)


def bench_attention_of(bench: Bench, name: str, tokens: int, heads: int) -> None:
    import torch

    import kernels

    documents = kernels.Documents((0, tokens))
    try:
        attention, _ = kernels.choose_attention(torch.device("cuda"), qk_dim=192, v_dim=128, wanted=name)
    except Exception as error:
        bench.record(name=f"attention {name}", error=str(error)[:200])
        return
    q, k = (torch.randn(tokens, heads, 192, device="cuda").bfloat16() for _ in range(2))
    v, d_out = (torch.randn(tokens, heads, 128, device="cuda").bfloat16() for _ in range(2))
    flops, t = tokens**2 * heads * 320, {"tokens": tokens, "heads": heads}
    bench.time(
        f"attention {name} forward",
        lambda: attention.forward(q, k, v, documents, 192**-0.5),
        flops=flops,
        repeat=3,
        **t,
    )
    out, lse = attention.forward(q, k, v, documents, 192**-0.5)
    bench.time(
        f"attention {name} backward",
        lambda: attention.backward(d_out, q, k, v, out, lse, documents, 192**-0.5),
        flops=2.5 * flops,
        repeat=3,
        **t,
    )


def bench_kda(bench: Bench) -> None:
    for tokens in (32768, 65536):
        run = kda_runner(tokens)
        bench.time("kda and convolution forward", functools.partial(run, False), tokens=tokens, repeat=3)
        bench.time("kda and convolution forward + backward", functools.partial(run, True), tokens=tokens, repeat=3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--compile", type=int, default=0, help="processes; compile only")
    parser.add_argument("--compile_worker", type=int, default=None)
    parser.add_argument(
        "--save_tuning", type=Path, help="write fla's tuning results in TRITON_CACHE_DIR to this folder"
    )
    arguments = parser.parse_args()
    if arguments.compile_worker is not None:
        compile_worker(arguments.compile_worker)
    elif arguments.save_tuning:
        save_tuning(arguments.save_tuning)
    elif arguments.compile:
        compile_candidates(arguments.compile)
    else:
        bench_all(arguments.out, set(filter(None, arguments.only.split(","))))
