"""Loads a checkpoint as the trainer does, under ZeRO-3 in bf16, and writes down what the kernels are given.

accelerate launch ... tests/fp32_worker.py CHECKPOINT OUTPUT_DIR
"""

import dataclasses
import sys
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed_start
import kimi_model
from config import load_config, run_main
from run_log import RunLog


def main() -> None:
    checkpoint, output = sys.argv[1], Path(sys.argv[2])
    config = load_config(["--model_name_or_path", checkpoint, "--deepspeed", "demo/deepspeed.json"])
    accelerator = deepspeed_start.start_accelerator(config, config.deepspeed)
    rank, device = accelerator.process_index, accelerator.device
    model = kimi_model.load_model(config, kimi_model.read_model_config(config), device=device)
    _leaves, buffers = kimi_model.take_fp32(model, checkpoint=checkpoint, device=device)
    report = kimi_model.install_long_sequence(
        model, segment_tokens=16, heads_per_group=1, token_tile=16, offload="auto", attention_outputs="keep"
    )
    optimizer = deepspeed_start.make_optimizer(model, config, config.deepspeed, RunLog(output / "run", rank=rank))
    engine, _ = accelerator.prepare(model, optimizer)
    kimi_model.restore_fp32_buffers(engine.module, buffers)

    given = []  # (A_log, dt_bias) of every call, in the order of layers and segments
    kernels = report.engine.kernels

    def spy(q, k, v, g, beta, A_log, dt_bias, *rest):
        given.append((A_log.detach().clone(), dt_bias.detach().clone()))
        return kernels.kda(q, k, v, g, beta, A_log, dt_bias, *rest)

    report.engine.kernels = dataclasses.replace(kernels, kda=spy)
    ids = torch.arange(3, 19)[None]  # one segment: the first two calls are layers 0 and 2, forward
    engine(input_ids=ids, labels=ids, use_cache=False)
    seen = {
        f"layers.{layer}.{name}": given[i][j]
        for i, layer in enumerate((0, 2))
        for j, name in enumerate(("A_log", "dt_bias"))
    }
    for i, layer in enumerate(engine.module.model.layers):
        if hasattr(layer.mlp, "gate"):
            seen[f"layers.{i}.e_score_correction_bias"] = layer.mlp.gate.e_score_correction_bias
    whole = [engine.module.lm_head.weight, engine.module.model.layers[1].mlp.experts.down_proj]
    with deepspeed.zero.GatheredParameters(whole):
        seen["lm_head"], seen["down_proj"] = whole[0].detach().clone(), whole[1].detach().clone()
    torch.save(seen, output / f"rank{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
