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

import dataclasses
import functools
import json
import re
import time
import types
from pathlib import Path

import torch

from config import TrainConfig, UserError, read_json
from run_log import say

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
    check_kernels(device)  # first: transformers imports fla, which reads where its tuning is at import
    from safetensors import SafetensorError
    from transformers import KimiLinearForCausalLM

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
        except (OSError, RuntimeError, SafetensorError) as error:
            # RuntimeError: transformers could not fuse the experts, since some weights are not there
            raise UserError(
                f"model_name_or_path: {config.model_name_or_path!r} cannot be loaded ({str(error).splitlines()[0]}); "
                "give a local folder with every safetensors file of a Kimi-Linear checkpoint"
            ) from None
        missing = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
        if missing:
            raise UserError(
                f"model_name_or_path: {config.model_name_or_path} lacks {len(missing)} weights, first {missing[0]!r}; "
                "the checkpoint is incomplete or of another model"
            )
    model.train()
    if device.type == "cpu":
        use_reference_kernels(model)
    return model


@functools.cache  # the trainer loads a model and installs the engine: checked and said once
def check_kernels(device: torch.device) -> None:
    """On a GPU fla's KDA kernel must be the one that runs; transformers alone would fall back to slow torch code."""
    if device.type != "cuda":
        return
    from kernels import keep_kernel_cache, use_kept_tuning

    folder = keep_kernel_cache()
    say(f"kernels: compiled ones are kept in {folder}; {use_kept_tuning(torch.cuda.get_device_capability(device))}")
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

    def __init__(self, named: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], config: TrainConfig):
        self.named, self.buffers = named, buffers
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
        """Values and moments, and the untrained fp32 buffers, as a flat dict of tensors for safetensors."""
        tensors = {f"{name}.value": buffer.detach().cpu().clone() for name, buffer in self.buffers.items()}
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


# ---------------------------------------------------------------------------------------------- back to the Hub's layout


def hub_tensors(name: str, tensor: torch.Tensor):
    """(name, tensor) pairs under which the released checkpoint holds one of transformers' parameters.

    The inverse of what `from_pretrained` converts: experts apart again (w1 gate, w3 up, w2 down), one convolution each
    for q, k and v, gate parameters directly in self_attn. `name` as in the model's state dict.
    """
    name = name.replace(".self_attn.forget_gate.", ".self_attn.")
    if re.search(r"\.mlp\.(gate|experts|shared_experts)\.", name):
        name = name.replace(".mlp.", ".block_sparse_moe.")
    if name.endswith(".conv1d.weight"):
        for letter, part in zip("qkv", tensor.chunk(3, dim=0), strict=True):
            yield name.replace(".conv1d.", f".{letter}_conv1d."), part
    elif name.endswith(".experts.gate_up_proj"):
        for expert, both in enumerate(tensor):
            gate, up = both.chunk(2, dim=0)
            yield name.replace("gate_up_proj", f"{expert}.w1.weight"), gate
            yield name.replace("gate_up_proj", f"{expert}.w3.weight"), up
    elif name.endswith(".experts.down_proj"):
        for expert, down in enumerate(tensor):
            yield name.replace("down_proj", f"{expert}.w2.weight"), down
    else:
        yield name, tensor


def hub_fp32_name(key: str) -> str:
    """'layers.3.A_log' -> 'model.layers.3.self_attn.A_log', the released checkpoint's name of an fp32 tensor."""
    layers, index, name = key.split(".")
    place = "block_sparse_moe.gate" if name in FP32_BUFFERS else "self_attn"
    return f"model.{layers}.{index}.{place}.{name}"


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


def gather_whole_layers(model) -> None:
    """Under ZeRO-3: gather a decoder layer's parameters as one, before its forward and before its backward.

    Gathered module by module, ranks can issue collectives in different orders (experts are hit data-dependently,
    recomputation stops early) and wait for each other forever (seen on two ranks with the plain forward).
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [type(model.model.layers[0])])


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


# ---------------------------------------------------------------------------------------------- the long-sequence engine


@dataclasses.dataclass
class EngineReport:
    """What `install_long_sequence` chose. `str()` is the text for the start-up log; tile sizes follow at each new length."""

    kernels: str
    options: str
    engine: object

    def __str__(self) -> str:
        return "\n  ".join(["tiled, exact", *self.kernels.splitlines(), self.options])


@functools.cache
def _engine_output_class():
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    @dataclasses.dataclass
    class EngineOutput(MoeCausalLMOutputWithPast):
        """The usual output with `logits=None`, and per token: its loss and whether the label was the first choice, at the
        position that predicts it; [B, T], 0 and False where the label is ignored."""

        token_losses: torch.Tensor | None = None
        first_choice: torch.Tensor | None = None

    return EngineOutput


def install_long_sequence(
    model,
    *,
    segment_tokens: int | None,
    heads_per_group: int | None,
    token_tile: int | None,
    offload: str = "auto",
    attention_outputs: str = "auto",
    attention_backend: str = "auto",
    document_separator_id: int | None = None,
    gpu_budget_gib: float | None = None,
    reserve_tokens: int | None = None,
) -> EngineReport:
    """Make `model(input_ids=..., labels=...)` run forward and backward through the tiled engine (long_sequence.py).

    `model` is any transformers KimiLinearForCausalLM, before DeepSpeed prepares it. Sizes left at None are planned for each
    sequence length from `gpu_budget_gib` (default: the card's memory). `offload` and `attention_outputs` as in config.py.
    With `document_separator_id`, a document ends with that token and nothing crosses its end. With `reserve_tokens` (tokens
    of the longest micro-batch of the run), the host memory that such a step needs is pinned now and not in its first step.
    Raises UserError where the model has something the engine does not do, or a kernel would be silently slow.
    """
    from engine_plan import EngineOptions
    from kernels import choose_kernels
    from long_sequence import LongSequenceEngine

    _check_engine_can_run(model.config)
    parts = _model_parts(model)
    device = _engine_device(model)
    check_kernels(device)
    kernels = choose_kernels(
        device,
        model.dtype,
        qk_dim=parts.shape.qk_dim,
        v_dim=parts.shape.v_dim,
        attention_backend=attention_backend,
    )
    options = EngineOptions(
        segment_tokens=segment_tokens,
        heads_per_group=heads_per_group,
        token_tile=token_tile,
        offload=offload,
        attention_outputs=attention_outputs,
        document_separator_id=document_separator_id,
        gpu_budget_gib=gpu_budget_gib,
    )
    engine = LongSequenceEngine(parts, kernels, options, device)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.gradient_checkpointing_disable()  # the engine recomputes by itself; both would run every layer twice
    gather_whole_layers(model)
    _bind_forwards(model, engine)
    borders = (
        "documents attend across their borders"
        if document_separator_id is None
        else f"documents end with id {document_separator_id}; nothing crosses their end"
    )
    if reserve_tokens is not None and device.type == "cuda":
        started = time.perf_counter()
        pinned_gib = engine.reserve(reserve_tokens, model.dtype)
        say(f"engine: {pinned_gib:.1f} GiB of host memory pinned in {time.perf_counter() - started:.1f} s")
    return EngineReport(kernels.text, borders, engine)


def _check_engine_can_run(config) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    refusals = {
        f"attention_dropout: {config.attention_dropout} must be 0": config.attention_dropout,
        f"hidden_act: {config.hidden_act!r} must be 'silu'": config.hidden_act != "silu",
        f"num_key_value_heads: {kv_heads} must equal num_attention_heads {heads}": heads != kv_heads,
        "tie_word_embeddings: true must be false": config.tie_word_embeddings,
    }
    broken = [text for text, is_broken in refusals.items() if is_broken]
    if broken:
        raise UserError("\n".join(f"{text} for the tiled engine; use --engine reference" for text in broken))


def _engine_device(model) -> torch.device:
    """Where the model will compute: its parameters' device, or this process's GPU when ZeRO-3 keeps them on the host."""
    weight = model.model.embed_tokens.weight
    if torch.cuda.is_available() and (weight.is_cuda or hasattr(weight, "ds_id")):
        return torch.device("cuda", torch.cuda.current_device())
    return weight.device


def _model_parts(model):
    """The engine's description of this model: where each tensor is, and every size. Raises UserError if one is missing."""
    from engine_plan import Shape
    from long_sequence import LayerPart, ModelParts, Part

    config = model.config
    layers = list(model.model.layers)
    kinds = tuple(
        ("mla" if config.layer_types[i] == "full_attention" else "kda", "moe" if kind == "sparse" else "dense")
        for i, kind in enumerate(config.mlp_layer_types[: len(layers)])
    )
    shape = Shape(
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        kda_heads=config.linear_num_heads,
        kda_dim=config.linear_head_dim,
        conv_width=config.linear_conv_kernel_dim,
        mla_heads=config.num_attention_heads,
        nope_dim=config.qk_nope_head_dim,
        shared_key=config.qk_rope_head_dim,
        v_dim=config.v_head_dim,
        latent=config.kv_lora_rank,
        dense_width=config.intermediate_size,
        expert_width=config.moe_intermediate_size,
        shared_width=config.moe_intermediate_size * config.n_shared_experts,
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        layers=kinds,
    )
    latent_norms = [
        layer.self_attn.kv_a_layernorm for layer, (mixer, _) in zip(layers, kinds, strict=True) if mixer == "mla"
    ]
    return ModelParts(
        shape=shape,
        embedding=Part({"weight": (model.model.embed_tokens, "weight")}),
        layers=tuple(
            LayerPart(_layer_sources(layer, i, *kind), *kind)
            for i, (layer, kind) in enumerate(zip(layers, kinds, strict=True))
        ),
        norm=Part({"weight": (model.model.norm, "weight")}),
        head=Part({"weight": (model.lm_head, "weight")}),
        norm_eps=model.model.norm.variance_epsilon,
        latent_norm_eps=latent_norms[0].variance_epsilon if latent_norms else 0.0,
        padding_id=model.model.embed_tokens.padding_idx,
        top_k=config.num_experts_per_tok,
        expert_groups=config.n_group,
        top_groups=config.topk_group,
        normalise_weights=config.norm_topk_prob,
        routed_scaling=config.routed_scaling_factor,
    )


_KDA_TENSORS = {
    "q": "q_proj.weight",
    "k": "k_proj.weight",
    "v": "v_proj.weight",
    "conv": "conv1d.weight",
    "forget_a": "forget_gate.f_a_proj.weight",
    "forget_b": "forget_gate.f_b_proj.weight",
    "A_log": "forget_gate.A_log",
    "dt_bias": "forget_gate.dt_bias",
    "beta": "b_proj.weight",
    "gate_a": "g_a_proj.weight",
    "gate_b": "g_b_proj.weight",
    "out_norm": "o_norm.weight",
    "out": "o_proj.weight",
}
_MLA_TENSORS = {
    "kv_a": "kv_a_proj_with_mqa.weight",
    "kv_norm": "kv_a_layernorm.weight",
    "kv_b": "kv_b_proj.weight",
    "out": "o_proj.weight",
}
_MLA_QUERY_TENSORS = {
    False: {"q": "q_proj.weight"},
    True: {"q_a": "q_a_proj.weight", "q_norm": "q_a_layernorm.weight", "q_b": "q_b_proj.weight"},
}
_MLA_BIASES = {"kv_a_bias": "kv_a_proj_with_mqa.bias", "out_bias": "o_proj.bias", "q_a_bias": "q_a_proj.bias"}
_DENSE_TENSORS = {"gate": "gate_proj.weight", "up": "up_proj.weight", "down": "down_proj.weight"}
_MOE_TENSORS = {
    "router": "gate.weight",
    "router_bias": "gate.e_score_correction_bias",
    "expert_gate_up": "experts.gate_up_proj",
    "expert_down": "experts.down_proj",
    "shared_gate": "shared_experts.gate_proj.weight",
    "shared_up": "shared_experts.up_proj.weight",
    "shared_down": "shared_experts.down_proj.weight",
}


def _layer_sources(layer, index: int, mixer: str, mlp: str) -> dict:
    """{the engine's name: (module, attribute)} of every tensor of a decoder layer, checked to cover all its parameters."""
    attention = dict(_KDA_TENSORS)
    if mixer == "mla":
        attention = {**_MLA_TENSORS, **_MLA_QUERY_TENSORS[layer.self_attn.q_a_proj is not None]}
        present = {name for name, _ in layer.self_attn.named_parameters()}
        attention.update({name: path for name, path in _MLA_BIASES.items() if path in present})
    paths = {
        "input_norm": "input_layernorm.weight",
        "post_norm": "post_attention_layernorm.weight",
        **{name: f"self_attn.{path}" for name, path in attention.items()},
        **{name: f"mlp.{path}" for name, path in (_MOE_TENSORS if mlp == "moe" else _DENSE_TENSORS).items()},
    }
    sources = {}
    for name, path in paths.items():
        owner, _, attribute = path.rpartition(".")
        try:
            module = layer.get_submodule(owner)
        except AttributeError:
            module = None
        if getattr(module, attribute, None) is None:
            raise UserError(
                f"engine: layer {index} ({mixer}, {mlp}) has no {path}; this transformers version names its modules "
                "otherwise (tested: 5.17 and 5.23)"
            )
        sources[name] = (module, attribute)
    forgotten = sorted({name for name, _ in layer.named_parameters()} - set(paths.values()))
    if forgotten:
        raise UserError(
            f"engine: layer {index} has parameters that the tiled engine does not know: {', '.join(forgotten)}"
        )
    return sources


def _bind_forwards(model, engine) -> None:
    """Replace `forward` on this model's instances. Modules are still called, so hooks (ZeRO-3's) fire as always."""
    import long_sequence

    model.model.embed_tokens.forward = lambda input_ids, step: long_sequence.run_embedding(engine, step)
    for index, layer in enumerate(model.model.layers):
        layer.forward = functools.partial(_run_layer, engine, index)
    model.model.norm.forward = lambda dummy, step: long_sequence.run_norm(engine, step, dummy)
    model.lm_head.forward = lambda dummy, step: long_sequence.run_loss(engine, step, dummy)
    model.forward = functools.partial(_engine_forward, model, engine)


def _run_layer(engine, index: int, dummy: torch.Tensor, step):
    import long_sequence

    return long_sequence.run_layer(engine, step, index, dummy)


def _engine_forward(
    model,
    engine,
    input_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **others,
):
    """transformers' KimiLinearForCausalLM.forward for training and scoring: input_ids and labels [B, T] -> loss.

    Labels are shifted inside, -100 is ignored, the mean is over valid tokens (or the sum over `num_items_in_batch`).
    """
    given = sorted(name for name, value in others.items() if value is not None and value is not False)
    if given and given != ["return_dict"]:
        raise UserError(f"engine: {', '.join(given)} cannot be given to the tiled engine; use --engine reference")
    if input_ids is None or labels is None:
        raise UserError("engine: the tiled engine computes losses: give input_ids and labels (it never builds logits)")
    if attention_mask is not None and not bool((attention_mask == 1).all()):
        raise UserError("engine: padded batches are not supported; pack documents and use --document_mask")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1).to(input_ids.device)
    divisor = (shifted != -100).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    step = engine.start(input_ids, shifted, divisor, model.dtype)
    dummy = model.model.embed_tokens(input_ids, step)
    for layer in model.model.layers:
        dummy = layer(dummy, step)
    dummy = model.model.norm(dummy, step)
    loss = model.lm_head(dummy, step)
    return _engine_output_class()(
        loss=loss,
        token_losses=step.token_losses.view(input_ids.shape),
        first_choice=step.first_choice.view(input_ids.shape),
    )
