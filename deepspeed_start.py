"""Processes and optimizer as DeepSpeed and Accelerate must be given them, so that what runs is what the JSON says.

    accelerator = start_accelerator(config, "deepspeed_config_h100.json")     # ZeRO-3 over nccl, or over gloo without a GPU
    optimizer = make_optimizer(model, config, "deepspeed_config_h100.json", log)

Every line here that looks odd stands for something that Accelerate or DeepSpeed does otherwise; the comment says what.
"""

from __future__ import annotations

import datetime
import os
import warnings

from config import TrainConfig, UserError, read_json
from run_log import RunLog, say


def resolve_deepspeed(path: str, config: TrainConfig) -> dict:
    """The DeepSpeed JSON with every 'auto' that the training config owns filled in.

    Accumulation is counted by the loop itself, since it may change from stage to stage; DeepSpeed is told the number for
    its own records and asked not to scale the loss by it.
    """
    ds = read_json(path)
    ds["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
    ds["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    ds["gradient_clipping"] = config.max_grad_norm
    ds.pop("train_batch_size", None)
    ds["bf16"] = {**ds.get("bf16", {}), "enabled": config.bf16}
    # Accelerate would replace our CPU AdamW by one of its own making with adamw_mode=False: weight decay then goes
    # through the moments as L2 (seen in accelerate 1.15), which trains another model
    ds["zero_force_ds_cpu_optimizer"] = False
    return ds


def start_accelerator(config: TrainConfig, deepspeed_json: str, *, collective_timeout_s: float = 1800):
    """Accelerate with DeepSpeed ZeRO-3 on GPUs (nccl) or, without any, on CPU processes (gloo).

    `collective_timeout_s`: Accelerate's own 10 minutes are shorter than the wait for a rank that compiles its kernels.
    """
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    from compiled_ops import load_cpu_ops

    # Accelerate reads the JSON's path from the environment too and would keep its 'auto's; the plugin has them filled in
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
    ds = resolve_deepspeed(deepspeed_json, config)
    offload = ds["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    if offload or not torch.cuda.is_available():
        load_cpu_ops(say)
    plugin = DeepSpeedPlugin(hf_ds_config=ds, zero3_init_flag=True)
    # Without gloo Accelerate has no DeepSpeed-on-CPU path: every process would believe it is rank 0 of 1
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    handlers = [InitProcessGroupKwargs(backend=backend, timeout=datetime.timedelta(seconds=collective_timeout_s))]
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        join_restarted_processes(backend, collective_timeout_s)
    # torch deprecated the collectives that DeepSpeed calls; a line per call and rank would bury the log
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision="bf16" if config.bf16 else "no",
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        kwargs_handlers=handlers,
    )


def join_restarted_processes(backend: str, timeout_s: float) -> None:
    """The process group after `accelerate launch --max_restarts` has started the ranks again.

    The launcher keeps its key-value store, in which torch 2.13 then finds the addresses of the dead ranks under the same
    keys (seen: connection refused, or ranks waiting for each other). So each attempt gets keys of its own.
    """
    import torch
    from torch.distributed import PrefixStore, TCPStore, init_process_group

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # rank 0 hosts a store of its own: it is new
    timeout = datetime.timedelta(seconds=timeout_s)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    prefix = f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    init_process_group(
        backend,
        store=PrefixStore(prefix, store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
        device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else None,
    )


def make_optimizer(model, config: TrainConfig, deepspeed_json: str, log: RunLog):
    """AdamW where the states live: DeepSpeed's CPU Adam when they are offloaded, torch's fused one otherwise."""
    import torch

    from kimi_model import parameter_groups

    groups = parameter_groups(model, config.weight_decay)
    if not groups:
        raise UserError(f"trainable: {config.trainable!r} leaves no parameter to train in this model")
    common = {
        "lr": 0.0,  # set before every step; DeepSpeed takes a first step of its own when it allocates the moments
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    zero = read_json(deepspeed_json)["zero_optimization"]
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        from compiled_ops import exact

        log.line("optimizer: DeepSpeed CPU Adam")
        bf16_moments = (read_json(deepspeed_json).get("bf16") or {}).get("bf16_optimizer_states") is True
        return exact(DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=not bf16_moments, **common))
    log.line("optimizer: torch AdamW")
    return torch.optim.AdamW(groups, **common)
