"""Kimi-Linear as transformers ships it: load it, keep what must stay fp32, choose its kernels, install the engine.

    model_config = read_model_config(config)                       # transformers' KimiLinearConfig, 2M positions
    model = load_model(config, model_config, device=device)        # Hub name or folder (also under ZeRO-3), or random
    leaves, buffers = take_fp32(model, checkpoint=..., device=...) # A_log, dt_bias, router bias: see below
    install_long_sequence(model, ...)                              # the tiled engine of long_sequence.py

This is the only file that names the model's modules. What it does not do: no layer is written anew here, the class is
transformers' `KimiLinearForCausalLM`; forwards are installed on instances, never on classes.

**fp32 parameters.** `A_log` and `dt_bias` of each KDA layer set the decay of the recurrent state. Rounded to bf16 they
are another model at 2M tokens, and ZeRO-3 in bf16 rounds every parameter it owns. They are 82,000 numbers of 49 B, so
they are taken out of the module's parameters, held in fp32 on every rank, reduced and stepped by their own AdamW.
The router's `e_score_correction_bias` (a buffer, trained by nobody here) is put back in fp32 in the same way.

Symbols: B batch, T tokens, D hidden size, H heads.
"""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import torch

from config import TrainConfig, UserError, read_json

FP32_PARAMETERS = ("A_log", "dt_bias")
FP32_BUFFERS = ("e_score_correction_bias",)
FLA_MINIMUM = (0, 6, 0)


# ---------------------------------------------------------------------------------------------- configuration


def read_model_config(config: TrainConfig):
    """transformers' KimiLinearConfig of this run, with positions up to the longest stage of the curriculum (at least).

    From `model_config` (a JSON, for random weights) or from the checkpoint's own config.json. Layer types come from the
    checkpoint, since the class default puts full attention at other layers than the released model.
    """
    from transformers import AutoConfig, KimiLinearConfig

    if config.model_config:
        values = read_json(config.model_config)
        if values.get("model_type", "kimi_linear") != "kimi_linear":
            raise UserError(
                f"model_config: {config.model_config} is a {values['model_type']!r}; this toolkit trains kimi_linear"
            )
        model_config = KimiLinearConfig(**{k: v for k, v in values.items() if k != "model_type"})
    else:
        name = config.model_name_or_path
        try:
            model_config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model_name_or_path: {name!r} cannot be loaded ({str(error).splitlines()[0]}); give a local folder with "
                "config.json and safetensors files, or a Hub name while online"
            ) from None
        if model_config.model_type != "kimi_linear":
            raise UserError(
                f"model_name_or_path: {name!r} is a {model_config.model_type!r}; this toolkit trains kimi_linear"
            )
    longest = max(stage.seq_length for stage in config.stages)
    model_config.max_position_embeddings = max(longest, model_config.max_position_embeddings)
    model_config.use_cache = False
    return model_config


def describe_layers(model_config) -> str:
    """One line per kind of layer, counted from 0: which are KDA, MLA, dense and MoE."""
    kinds = {
        "KDA": [i for i, kind in enumerate(model_config.layer_types) if kind == "linear_attention"],
        "MLA": [i for i, kind in enumerate(model_config.layer_types) if kind == "full_attention"],
        "dense MLP": [i for i, kind in enumerate(model_config.mlp_layer_types) if kind == "dense"],
        "MoE": [i for i, kind in enumerate(model_config.mlp_layer_types) if kind == "sparse"],
    }
    return "\n".join(f"  {name:<10}{len(layers):>3} layers: {layers}" for name, layers in kinds.items())


# ---------------------------------------------------------------------------------------------- loading


def load_model(config: TrainConfig, model_config, *, device: torch.device):
    """The model in the run's dtype, on `device` or, under ZeRO-3, partitioned as it is loaded.

    With `model_config` given: random weights, the same for any number of ranks. Else the checkpoint's weights through
    `from_pretrained` (which converts the Hub's unfused experts and split convolutions).
    Raises UserError if the checkpoint cannot be found or does not hold every weight.
    """
    from transformers import KimiLinearForCausalLM

    check_kernels(device)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    # fp64 and CPU have no grouped matmul worth the name; "eager" loops over the experts
    model_config._experts_implementation = "grouped_mm" if device.type == "cuda" else "eager"
    if config.model_config:
        torch.manual_seed(config.seed)
        model = KimiLinearForCausalLM._from_config(model_config, dtype=dtype, attn_implementation="sdpa")
    else:
        try:
            model, report = KimiLinearForCausalLM.from_pretrained(
                config.model_name_or_path,
                config=model_config,
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        except OSError as error:
            raise UserError(
                f"model_name_or_path: {config.model_name_or_path!r} cannot be loaded "
                f"({str(error).splitlines()[0]}); give a local folder with safetensors files"
            ) from None
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(
                f"model_name_or_path: {config.model_name_or_path} lacks {len(missing)} weights, first {missing[0]!r}; "
                "the checkpoint is incomplete or of another model"
            )
    model.train()
    if device.type == "cpu":
        use_reference_kernels(model)
    return model


def check_kernels(device: torch.device) -> None:
    """On a GPU fla's KDA kernel must be the one that runs; transformers alone would fall back to slow torch code."""
    if device.type != "cuda":
        return
    try:
        from importlib.metadata import version

        import fla.ops.kda  # noqa: F401

        found = version("fla-core")
    except Exception as error:
        raise UserError(
            f"flash-linear-attention: cannot be imported on this GPU machine ({error}); "
            "pip install -r requirements.txt (the torch fallback is hundreds of times slower)"
        ) from None
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:3])
    if numbers < FLA_MINIMUM:
        raise UserError(
            f"fla-core: {found} is installed but >= 0.6.0 is needed; older kernels overflow int32 offsets "
            "past 524,288 tokens. pip install -r requirements.txt"
        )


def use_reference_kernels(model) -> None:
    """Bind transformers' own torch code to this model's KDA layers, on the instances.

    Where triton is installed and no GPU is there, transformers binds fla's kernels at import and every call dies with
    '0 active drivers'. Its torch function is kept as `__wrapped__`; the layer's forward is rebuilt over a copy of its
    globals in which the kernel names are the torch functions, so nothing outside this model changes.
    """
    from transformers.models.kimi_linear import modeling_kimi_linear as source

    forward = source.KimiLinearDeltaAttention.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    names = {}
    for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", "causal_conv1d_fn"):
        function = getattr(source, name)
        names[name] = getattr(function, "__wrapped__", function)
    rebound = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, **names},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    rebound.__kwdefaults__ = forward.__kwdefaults__
    for module in model.modules():
        if isinstance(module, source.KimiLinearDeltaAttention):
            module.forward = types.MethodType(rebound, module)


# ---------------------------------------------------------------------------------------------- what stays fp32


def read_fp32_tensors(checkpoint: str) -> dict[str, torch.Tensor]:
    """The checkpoint's own A_log, dt_bias and e_score_correction_bias as fp32, by layer and name: 'layers.3.A_log'.

    `checkpoint` is a Hub name or folder in the Hub's layout. Reads these tensors only (82,000 numbers of 49 B), from
    safetensors files. Source of the names: the released checkpoint's index.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    index = cached_file(checkpoint, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        files = sorted({file for name, file in weight_map.items() if name.endswith((*FP32_PARAMETERS, *FP32_BUFFERS))})
    else:
        files = ["model.safetensors"]
    found = {}
    for file in files:
        with safe_open(cached_file(checkpoint, file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open has no __iter__)
                match = re.search(r"layers\.(\d+)\..*\b(" + "|".join((*FP32_PARAMETERS, *FP32_BUFFERS)) + ")$", name)
                if match:
                    found[f"layers.{match[1]}.{match[2]}"] = tensors.get_tensor(name).float()
    return found


def take_fp32(model, *, checkpoint: str | None, device: torch.device) -> tuple[dict, dict]:
    """Move A_log and dt_bias out of the parameters into fp32 leaf tensors; collect the router biases in fp32.

    Call it after loading and before DeepSpeed sees the model. Returns
      leaves  {'layers.3.A_log': [1, 1, H, 1], 'layers.3.dt_bias': [H * K], ...}, each with requires_grad; the modules
              find them under their old attribute names, so any forward uses them;
      buffers {'layers.3.e_score_correction_bias': [experts], ...}, for `restore_fp32_buffers`.
    With a `checkpoint` the values are its own, bit for bit; without one they are the model's initial values.
    """
    stored = read_fp32_tensors(checkpoint) if checkpoint else {}
    leaves, buffers = {}, {}
    for key, module, name in _fp32_places(model):
        if name in FP32_BUFFERS:
            buffers[key] = stored.get(key, module._buffers[name]).detach().float().to(device)
            continue
        parameter = module._parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        value = stored[key] if key in stored else _gathered(parameter)
        leaf = value.detach().float().reshape(shape).to(device).clone().requires_grad_()
        del module._parameters[name]
        setattr(module, name, leaf)
        leaves[key] = leaf
    restore_fp32_buffers(model, buffers)
    return leaves, buffers


def restore_fp32_buffers(model, buffers: dict[str, torch.Tensor]) -> None:
    """Put the router biases back as fp32. DeepSpeed casts buffers when it wraps the model, so call it again after that:
    in bf16 a handful of distinct values would be left for 256 experts."""
    for key, module, name in _fp32_places(model):
        if name in FP32_BUFFERS:
            module._buffers[name] = buffers[key]


def _fp32_places(model):
    """(key, module, attribute) of everything that stays fp32: ('layers.3.A_log', forget gate of layer 3, 'A_log')."""
    for layer_index, layer in enumerate(model.model.layers):
        for module in layer.modules():
            for name in (*FP32_PARAMETERS, *FP32_BUFFERS):
                if name in module._parameters or name in module._buffers:
                    yield f"layers.{layer_index}.{name}", module, name


def _gathered(parameter) -> torch.Tensor:
    """A parameter's full value, also when ZeRO-3 has partitioned it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


class Fp32Optimizer:
    """AdamW for the fp32 leaves, replicated on every rank: reduce their gradients, then step with the run's lr.

    No weight decay (they are gates, not matrices). Clipped by the same factor as the rest of the model; their own norm
    is not part of the global norm, which DeepSpeed computes over the parameters it owns.
    """

    def __init__(self, named: dict[str, torch.Tensor], config: TrainConfig):
        self.named = named
        self.adamw = torch.optim.AdamW(
            list(named.values()) or [torch.zeros(1, requires_grad=True)],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=0.0,
        )

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def reduce_gradients(self) -> None:
        """Average the gradients over ranks, in one message."""
        import torch.distributed as dist

        leaves = [leaf for leaf in self.named.values() if leaf.grad is not None]
        if not leaves or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        flat = torch.cat([leaf.grad.reshape(-1) for leaf in leaves])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for leaf, grad in zip(leaves, flat.split([leaf.numel() for leaf in leaves]), strict=True):
            leaf.grad.copy_(grad.view_as(leaf))

    def step(self, *, lr: float, clip_factor: float) -> None:
        for leaf in self.named.values():
            if leaf.grad is not None:
                leaf.grad.mul_(clip_factor)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Values and moments as a flat dict of tensors, for safetensors."""
        tensors = {}
        for name, leaf in self.named.items():
            tensors[f"{name}.value"] = leaf.detach().cpu().clone()
            for key, value in self.adamw.state.get(leaf, {}).items():
                tensors[f"{name}.{key}"] = value.detach().cpu().clone()
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, leaf in self.named.items():
            if f"{name}.value" not in tensors:
                raise UserError(f"checkpoint: fp32 parameter {name!r} is missing; it is of another model")
            with torch.no_grad():
                leaf.copy_(tensors[f"{name}.value"])
            moments = {
                key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors
            }
            if moments:
                self.adamw.state[leaf] = {
                    key: value.clone() if key == "step" else value.to(leaf.device).clone()
                    for key, value in moments.items()
                }


# ---------------------------------------------------------------------------------------------- what is trained


def set_trainable(model, trainable: str) -> None:
    """Freeze what `trainable` leaves out: 'all' nothing, 'no_experts' the routed experts, 'attention' all but KDA and MLA.

    Call it before DeepSpeed sees the model: frozen parameters then never reach the optimizer.
    """
    for name, parameter in model.named_parameters():
        if trainable == "no_experts":
            parameter.requires_grad_(".mlp.experts." not in name)
        elif trainable == "attention":
            parameter.requires_grad_(".self_attn." in name)


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """Two AdamW groups of the trainable parameters: matrices with weight decay, vectors (norms) without."""
    groups = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups[len(shape) > 1].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]
