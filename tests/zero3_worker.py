"""Run by test_long_sequence.py on two ranks: the engine under ZeRO-3 with CPU offload against the plain model alone."""

from __future__ import annotations

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from engine_cases import tiny_model

from config import run_main
from kimi_model import install_long_sequence

STEPS, ACCUMULATION, TOKENS = 3, 2, 23
# a large epsilon: without it Adam turns a gradient of pure rounding noise into a full step of either sign
ADAM = {"lr": 1e-2, "eps": 1e-3}


def batch(step: int, micro: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randint(4, 97, (1, TOKENS), generator=generator)


def plain_run(model, ranks: int) -> list[float]:
    """The same steps in one process: the mean over ranks and micro-steps, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro in range(ACCUMULATION):
            for rank in range(ranks):
                ids = batch(step, micro, rank)
                loss = model(input_ids=ids, labels=ids).loss / (ACCUMULATION * ranks)
                loss.backward()
                total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def main() -> None:
    torch.set_num_threads(1)
    # before a ZeRO-3 plugin exists: transformers would partition both models as they are made
    plain = tiny_model("kmk", "dss", dtype=torch.float32)
    model = tiny_model("kmk", "dss", dtype=torch.float32)
    initial = [p.detach().clone() for p in model.parameters()]
    zero = {"device": "cpu", "pin_memory": False}
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 1e9,  # Accelerate would clip at 1.0
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": 3,
                "offload_param": zero,
                "offload_optimizer": zero,
                "stage3_param_persistence_threshold": 0,  # partition even the norms
            },
        }
    )
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    ranks = accelerator.num_processes
    assert ranks == 2

    install_long_sequence(model, segment_tokens=9, heads_per_group=3, token_tile=7)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    engine, _ = accelerator.prepare(model, optimizer)

    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro in range(ACCUMULATION):
            ids = batch(step, micro, accelerator.process_index)
            engine.set_gradient_accumulation_boundary(micro == ACCUMULATION - 1)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += loss.item() / ACCUMULATION
        both = torch.tensor([total])
        torch.distributed.all_reduce(both)
        losses.append(both.item() / ranks)

    expected = plain_run(plain, ranks)
    for found, wanted in zip(losses, expected, strict=True):
        assert abs(found - wanted) < 1e-5 * wanted, (losses, expected)
    moved = error = 0.0
    for parameter, wanted, start in zip(engine.module.parameters(), plain.parameters(), initial, strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            moved += (wanted - start).norm().item() ** 2
            error += (parameter.detach() - wanted).norm().item() ** 2
    assert error**0.5 < 1e-4 * moved**0.5, (error, moved)
    if accelerator.process_index == 0:
        print(
            f"zero3 parity: ok, losses {losses}, plain {expected}, weights differ by {(error / moved) ** 0.5:.1e} of the update"
        )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
