"""flash-attn-4 at this model's head sizes (192 for q and k, 128 for v) with other tiles than its own, on one Hopper GPU.

    python benchmarks/bench_flash4_tiles.py --out benchmarks/results/flash4_tiles_h100.json
    ... --only "backward 64x96 (its own)" "backward 64x128, ours" --out benchmarks/results/flash4_wide_tile_h100.json

"ours" is flash4_backward.py, which the engine runs; all others change flash-attn-4's own numbers only. Each candidate is
compiled in a process of its own, all at once; they are timed one at a time, at 4 heads of 65,536 and of 262,144 tokens,
causal, medians of three. Forward FLOPs are T^2 * heads * 320, backward 2.5 times that. Beside the speed stand the relative
errors against fp32 (output; dq, dk, dv), since several tiles compile and compute something else. Clock (MHz) and power (W)
are nvidia-smi's while the longest is repeated.

    python benchmarks/bench_flash4_tiles.py --registers --out benchmarks/results/flash4_registers.json

compiles the backward candidates for sm_90a without a GPU and counts in their machine code: bytes of stack, loads and stores
of spilled registers, wgmma instructions and waits for them (as many waits as wgmmas: the assembler serialized them).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OWN_BACKWARD = {
    "m_block_size": 64,
    "n_block_size": 96,
    "num_stages_Q": 2,
    "num_stages_dO": 2,
    "num_stages_PdS": 1,
    "SdP_swapAB": False,
    "dKV_swapAB": True,
    "dQ_swapAB": False,
    "AtomLayoutMSdP": 1,
    "AtomLayoutNdKV": 2,
    "AtomLayoutMdQ": 1,
    "num_wg": 2,
}
BACKWARD = {
    "backward 64x96 (its own)": {},
    "backward 64x112": {"n_block_size": 112, "num_stages_dO": 1},
    "backward 64x112, dQ swapped": {"n_block_size": 112, "num_stages_dO": 1, "dQ_swapAB": True, "AtomLayoutMdQ": 2},
    "backward 64x128": {"n_block_size": 128, "num_stages_dO": 1},
    "backward 64x128, P and dS in registers": {
        "n_block_size": 128,
        "num_stages_dO": 1,
        "SdP_swapAB": True,
        "dKV_swapAB": False,
    },
    "backward 64x96, one dO stage": {"num_stages_dO": 1},
    "backward 64x96, three warp groups": {"num_wg": 3, "AtomLayoutNdKV": 3},
    "backward 64x96, dQ by one warp group": {"dQ_single_wg": True},
}
FORWARD = {  # rows, columns, P in registers, overlap inside a warp group
    "forward 128x128 (its own)": (128, 128, True, True),
    "forward 128x112": (128, 112, True, True),
    "forward 128x96": (128, 96, True, True),
    "forward 192x112": (192, 112, True, False),
    "forward 192x96": (192, 96, True, False),
}
OURS = "backward 64x128, ours"
SCALE = 192**-0.5
LONGEST = 262_144
LOCK = Path("/tmp/flash4_tiles.lock")


def worker(name: str) -> dict:
    import flash_attn.cute.interface as flash4
    import torch

    import kernels

    if name in FORWARD:
        flash4._tile_size_fwd_sm90 = lambda *_, **__: flash4.FwdConfig(*FORWARD[name])
    elif name in BACKWARD:
        flash4._tile_size_bwd_sm90 = lambda *_, **__: flash4.BwdConfig(**{**OWN_BACKWARD, **BACKWARD[name]})

    ours, _ = kernels.choose_attention(torch.device("cuda"), qk_dim=192, v_dim=128, wanted="flash4")

    def data(tokens, heads):
        torch.manual_seed(0)
        sizes = (192, 192, 128, 128)
        return [torch.randn(1, tokens, heads, size, device="cuda", dtype=torch.bfloat16) for size in sizes]

    def forward(q, k, v):
        return flash4._flash_attn_fwd(q, k, v, softmax_scale=SCALE, causal=True, return_lse=True)[:2]

    def backward(q, k, v, out, d_out, lse):
        if name == OURS:
            documents = kernels.Documents((0, q.shape[1]))
            return ours.backward(d_out[0], q[0], k[0], v[0], out[0], lse[0], documents, SCALE)
        return flash4._flash_attn_bwd(q, k, v, out, d_out, lse, softmax_scale=SCALE, causal=True)

    *qkv, d_out = data(2048, 2)
    out, lse = forward(*qkv)
    wide = [x.float().requires_grad_() for x in qkv]
    scores = torch.einsum("bihd,bjhd->bhij", wide[0], wide[1]) * SCALE
    later = torch.ones(2048, 2048, device="cuda", dtype=torch.bool).triu(1)
    expected = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(later, float("-inf")).softmax(-1), wide[2])
    pairs = [(out, expected)]
    if name not in FORWARD:
        expected_grads = torch.autograd.grad(expected, wide, d_out.float())
        grads = backward(*qkv, out, d_out, lse)
        pairs += [(grad.view_as(want), want) for grad, want in zip(grads, expected_grads, strict=True)]
    found = {"name": name, "relative errors": [float((a - b).norm() / b.norm()) for a, b in pairs]}

    def timed(tokens):
        *qkv, d_out = data(tokens, 4)
        out, lse = forward(*qkv)
        run = partial(forward, *qkv) if name in FORWARD else partial(backward, *qkv, out, d_out, lse)
        seconds = []
        for _ in range(4):  # the first is a warm-up
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        median = statistics.median(seconds[1:])
        flops = tokens**2 * 4 * 320 * (1 if name in FORWARD else 2.5)
        state = clock_and_power(run) if tokens == LONGEST else {}
        return {"ms": median * 1e3, "TFLOP/s": flops / median / 1e12, **state}

    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for tokens in (65536, LONGEST):
            found[f"{tokens} tokens"] = timed(tokens)
            torch.cuda.empty_cache()
    return found


def registers(name: str) -> dict:
    """In a process whose environment `compile_only` made: compile one backward candidate and read its machine code."""
    import flash_attn.cute.interface as flash4
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from flash4_backward import HopperBackward

    with FakeTensorMode():
        new = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="cuda")  # noqa: E731
        tokens, heads, batch = 4096, 4, () if name == OURS else (1,)
        d_out, q, k, v, out = (new(*batch, tokens, heads, size) for size in (128, 192, 192, 128, 128))
        lse = new(*batch, heads, tokens, dtype=torch.float32)
        if name == OURS:
            HopperBackward()(d_out, q, k, v, out, lse, None, tokens, SCALE)
        else:
            flash4._tile_size_bwd_sm90 = lambda *_, **__: flash4.BwdConfig(**{**OWN_BACKWARD, **BACKWARD[name]})
            flash4._flash_attn_bwd(q, k, v, out, d_out, lse, softmax_scale=SCALE, causal=True)
    compiled = Path(os.environ["CUTE_DSL_DUMP_DIR"]).glob("*.cubin")
    largest = max(compiled, key=lambda path: path.stat().st_size)  # beside the kernels before and after it
    run = lambda what: subprocess.run([cuobjdump(), what, largest], capture_output=True, text=True, check=True).stdout  # noqa: E731
    code, usage = run("-sass"), run("-res-usage")
    patterns = {"spill loads": "LDL", "spill stores": "STL", "wgmma": "HGMMA", "waits": "WARPGROUP.DEPBAR"}
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    return {"name": name, "stack bytes": stack, **{key: code.count(word) for key, word in patterns.items()}}


def cuobjdump() -> str:
    """CUDA's own, or the one that triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def compile_only(names: list[str]) -> list[dict]:
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            target = {"CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_ARCH": "sm_90", "FLASH_ATTENTION_NUM_SMS": "132"}
            keep = {"CUTE_DSL_KEEP_CUBIN": "1", "CUTE_DSL_DUMP_DIR": folder}
            words = [sys.executable, __file__, "--registers", "--worker", name]
            done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **target, **keep})
        failed = {"name": name, "error": done.stderr.strip().splitlines()[-1:]}
        rows.append(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed)
        print(rows[-1], flush=True)
    return rows


def clock_and_power(call) -> dict[str, float]:
    """Means of clock and power over the later half of two seconds of calls."""
    import torch

    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "100"]
    watcher = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    began = time.perf_counter()
    while time.perf_counter() - began < 2:
        call()
        torch.cuda.synchronize()
    watcher.terminate()
    samples = [list(map(float, line.split(","))) for line in watcher.communicate()[0].splitlines() if "," in line]
    clocks, watts = zip(*samples[len(samples) // 2 :], strict=True)
    return {"clock, MHz": statistics.mean(clocks), "power, W": statistics.mean(watts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", help="names of candidates; without it all")
    parser.add_argument("--registers", action="store_true", help="compile the backward candidates only, without a GPU")
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps((registers if arguments.registers else worker)(arguments.worker)))
        return
    if arguments.registers:
        rows = compile_only(arguments.only or [*BACKWARD, OURS])
        arguments.out.write_text(json.dumps({"target": "sm_90a", "rows": rows}, indent=1))
        return
    import torch

    started, rows = time.time(), []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    names = arguments.only or [*BACKWARD, OURS, *FORWARD]
    workers = [subprocess.Popen([sys.executable, __file__, "--worker", name], **pipes) for name in names]
    for name, process in zip(names, workers, strict=True):
        stdout, stderr = process.communicate()
        failed = {"name": name, "error": stderr.strip().splitlines()[-1:]}
        rows.append(json.loads(stdout.splitlines()[-1]) if process.returncode == 0 else failed)
        print(rows[-1], flush=True)
    record = {"card": torch.cuda.get_device_name(), "seconds": time.time() - started, "rows": rows}
    arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
