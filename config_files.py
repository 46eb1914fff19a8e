"""What the files of other tools may hold: the DeepSpeed JSON, the Accelerate YAML, the model's config.json.

    problems = deepspeed_problems(values, "deepspeed_config_h100.json")     # sentences; an empty list for a sound file
    problems = accelerate_problems(values, "accelerate_config_h100.yaml")
    problems = model_problems(values, "model.json", unknown=True)

Their owners are lax: DeepSpeed ignores an unknown key at the top level, transformers any unknown key, and both answer a wrong type with a traceback minutes later, once per rank. Here a key is known, of its type
and in its range before anything starts. Values that contradict each other across files are config.cross_check's business.

Standard library only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

LARGEST = 2**63 - 1  # what torch and C++ hold


@dataclass(frozen=True)
class Rule:
    """A value's rule: `holds(value)`, and the words that finish the sentence 'KEY is VALUE, but must be ...'."""

    words: str
    holds: Callable[[object], bool]


def integer(least: int = 0, most: int = LARGEST) -> Rule:
    words = f"a whole number of at least {least}" + (f" and at most {most}" if most != LARGEST else "")
    return Rule(words, lambda v: type(v) is int and least <= v <= most)


def number(least: float = 0.0, most: float = math.inf) -> Rule:
    words = f"a number of at least {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
    return Rule(words, lambda v: type(v) in (int, float) and math.isfinite(v) and least <= v <= most)


def one_of(*values) -> Rule:
    words = " or ".join(repr(value) for value in values)
    return Rule(words, lambda v: any(type(v) is type(value) and v == value for value in values))


def either(*rules: Rule) -> Rule:
    return Rule(" or ".join(rule.words for rule in rules), lambda v: any(rule.holds(v) for rule in rules))


def list_of(rule: Rule) -> Rule:
    return Rule(f"a list, each item {rule.words}", lambda v: isinstance(v, list) and all(map(rule.holds, v)))


BOOL = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("text", lambda v: isinstance(v, str) and v != "")
NULL = Rule("null", lambda v: v is None)
SECTION = Rule("a section of keys", lambda v: isinstance(v, dict))
ANYTHING = Rule("anything", lambda v: True)
AUTO = one_of("auto")
POSITIVE = integer(1)
COUNT = integer()


def check(values, rules: dict, source: str, *, prefix: str = "", unknown: bool = True) -> list[str]:
    """Every key of `values` that is unknown (if `unknown` matters), of a wrong type or out of range; sections recursively."""
    if not isinstance(values, dict):
        return [f"{source}: {prefix.rstrip('.')} is {values!r:.60}, but must be a section of keys"]
    problems = []
    for name, value in values.items():
        rule = rules.get(name)
        if rule is None:
            if unknown:
                near = difflib.get_close_matches(str(name), list(rules), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "; take it out"
                problems.append(f"{source}: unknown key {f'{prefix}{name}'!r}{hint}")
        elif isinstance(rule, dict):
            problems += check(value, rule, source, prefix=f"{prefix}{name}.", unknown=unknown)
        elif not rule.holds(value):
            problems.append(f"{source}: {prefix}{name} is {value!r:.60}, but must be {rule.words}")
    return problems


# ---------------------------------------------------------------------------- DeepSpeed's JSON

_DEVICE = one_of("none", "cpu", "nvme")
DEEPSPEED = {
    # what the training config owns may be repeated or left to it
    "train_batch_size": either(POSITIVE, AUTO),
    "train_micro_batch_size_per_gpu": either(POSITIVE, AUTO),
    "gradient_accumulation_steps": either(POSITIVE, AUTO),
    "gradient_clipping": either(number(), AUTO),
    "bf16": {
        "enabled": either(BOOL, AUTO),
        "immediate_grad_update": BOOL,
        "check_grad_overflow": BOOL,
        "bf16_master_weights_and_grads": BOOL,
        "bf16_optimizer_states": BOOL,
    },
    "fp16": {"enabled": either(BOOL, AUTO)},
    "optimizer": SECTION,  # known, so that cross_check can say who owns them
    "scheduler": SECTION,
    "data_types": {
        "grad_accum_dtype": one_of("fp32", "bf16", None),
        "keep_in_fp32_modules": list_of(TEXT),
    },
    "zero_optimization": {
        "stage": integer(0, 3),
        "offload_optimizer": {
            "device": _DEVICE,
            "nvme_path": TEXT,
            "buffer_count": POSITIVE,
            "pin_memory": BOOL,
            "pipeline_read": BOOL,
            "pipeline_write": BOOL,
            "fast_init": BOOL,
            "ratio": number(0, 1),
        },
        "offload_param": {
            "device": _DEVICE,
            "nvme_path": TEXT,
            "buffer_count": POSITIVE,
            "buffer_size": POSITIVE,
            "max_in_cpu": COUNT,
            "pin_memory": BOOL,
        },
        "overlap_comm": BOOL,
        "contiguous_gradients": BOOL,
        "reduce_scatter": BOOL,
        "allgather_partitions": BOOL,
        "round_robin_gradients": BOOL,
        "ignore_unused_parameters": BOOL,
        "memory_efficient_linear": BOOL,
        "log_trace_cache_warnings": BOOL,
        "enable_sanity_checks": BOOL,
        "reduce_bucket_size": POSITIVE,
        "allgather_bucket_size": POSITIVE,
        "sub_group_size": POSITIVE,
        "stage3_prefetch_bucket_size": COUNT,
        "stage3_param_persistence_threshold": COUNT,
        "stage3_model_persistence_threshold": COUNT,
        "stage3_max_live_parameters": COUNT,
        "stage3_max_reuse_distance": COUNT,
        "stage3_module_granularity_threshold": COUNT,
        "stage3_gather_16bit_weights_on_model_save": BOOL,
        "stage3_use_all_reduce_for_fetch_params": BOOL,
        "stage3_allgather_sequential": BOOL,
        "leaf_module": {"classes": list_of(TEXT), "names": list_of(TEXT), "name_suffixes": list_of(TEXT)},
    },
    "zero_allow_untested_optimizer": BOOL,
    "zero_force_ds_cpu_optimizer": BOOL,
    "communication_data_type": one_of("fp32", "bf16", "fp16", None),
    "steps_per_print": POSITIVE,
    "wall_clock_breakdown": BOOL,
    "memory_breakdown": BOOL,
    "dump_state": BOOL,
    "comms_logger": SECTION,
    "flops_profiler": SECTION,
    "tensorboard": SECTION,
    "csv_monitor": SECTION,
    "aio": SECTION,
}


def deepspeed_problems(values: dict, source: str) -> list[str]:
    """What this trainer would not run rightly with. Sections that change the mathematics behind its back are unknown."""
    problems = check(values, DEEPSPEED, source)
    zero = values.get("zero_optimization")
    for section in ("offload_optimizer", "offload_param"):
        part = zero.get(section) if isinstance(zero, dict) else None
        if isinstance(part, dict) and part.get("device") == "nvme" and not part.get("nvme_path"):
            problems.append(f"{source}: zero_optimization.{section}.device is 'nvme', so nvme_path must name a folder")
    return problems


# ---------------------------------------------------------------------------- Accelerate's YAML

ACCELERATE = {
    "compute_environment": one_of("LOCAL_MACHINE"),
    "distributed_type": one_of("DEEPSPEED"),
    "deepspeed_config": {
        "deepspeed_config_file": TEXT,
        "zero3_init_flag": BOOL,
        "gradient_accumulation_steps": either(POSITIVE, AUTO),
        "gradient_clipping": either(number(), AUTO),
        "zero_stage": integer(0, 3),
        "zero3_save_16bit_model": BOOL,
        "offload_optimizer_device": _DEVICE,
        "offload_param_device": _DEVICE,
        "deepspeed_multinode_launcher": TEXT,
        "deepspeed_hostfile": TEXT,
        "deepspeed_inclusion_filter": TEXT,
        "deepspeed_exclusion_filter": TEXT,
    },
    "num_machines": integer(1, 100_000),
    "num_processes": integer(1, 1_000_000),
    "machine_rank": COUNT,
    "main_training_function": TEXT,
    "main_process_ip": TEXT,
    "main_process_port": integer(0, 65535),
    "rdzv_backend": TEXT,
    "same_network": BOOL,
    "mixed_precision": one_of("no", "bf16", False),  # YAML reads a bare no as false
    "downcast_bf16": either(BOOL, one_of("no", "yes")),
    "gpu_ids": either(TEXT, COUNT),
    "enable_cpu_affinity": BOOL,
    "use_cpu": one_of(False),
    "debug": BOOL,
    "dynamo_config": SECTION,
    "tpu_env": list_of(TEXT),
    "tpu_use_cluster": BOOL,
    "tpu_use_sudo": BOOL,
}


def accelerate_problems(values: dict, source: str) -> list[str]:
    problems = check(values, ACCELERATE, source)
    machines, rank = values.get("num_machines", 1), values.get("machine_rank", 0)
    if type(machines) is int and type(rank) is int and rank >= machines:
        problems.append(f"{source}: machine_rank is {rank}, but must be below num_machines {machines}")
    return problems


# ---------------------------------------------------------------------------- the model's config.json

_SIZE = integer(1, 2**31 - 1)
_TOKEN = either(integer(0, 2**31 - 1), NULL)
_LAYERS = list_of(integer(1, 2**31 - 1))
# What transformers takes for a key that is left out, where rules below compare it with one that is there
RELEASED = {
    "vocab_size": 163840,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_expert_group": 1,
    "topk_group": 1,
    "pad_token_id": 163839,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
}
# What gives the tensors their shapes. Two spellings: transformers' own and the released checkpoint's.
SIZES = {
    ("vocab_size",): _SIZE,
    ("hidden_size",): _SIZE,
    ("intermediate_size",): _SIZE,
    ("moe_intermediate_size",): _SIZE,
    ("num_hidden_layers",): integer(1, 10_000),
    ("num_attention_heads",): _SIZE,
    ("kv_lora_rank",): _SIZE,
    ("qk_nope_head_dim",): _SIZE,
    ("qk_rope_head_dim",): _SIZE,
    ("v_head_dim",): _SIZE,
    ("num_experts", "num_local_experts"): _SIZE,
    ("num_experts_per_token", "num_experts_per_tok"): _SIZE,
    ("num_shared_experts", "n_shared_experts"): _SIZE,
}
MODEL = {
    **{name: rule for names, rule in SIZES.items() for name in names},
    "model_type": TEXT,
    "num_key_value_heads": _SIZE,
    "q_lora_rank": either(_SIZE, NULL),
    "head_dim": _SIZE,
    "qk_head_dim": _SIZE,
    "linear_attn_config": {
        "full_attn_layers": _LAYERS,
        "kda_layers": _LAYERS,
        "head_dim": _SIZE,
        "num_heads": _SIZE,
        "short_conv_kernel_size": _SIZE,
    },
    "layer_types": either(list_of(one_of("full_attention", "linear_attention")), NULL),
    "mlp_layer_types": either(list_of(one_of("dense", "sparse")), NULL),
    "linear_head_dim": _SIZE,
    "linear_num_heads": _SIZE,
    "linear_conv_kernel_dim": _SIZE,
    "first_k_dense_replace": COUNT,
    "moe_layer_freq": one_of(1),
    "moe_renormalize": BOOL,
    "norm_topk_prob": BOOL,
    "moe_router_activation_func": one_of("sigmoid"),
    "num_expert_group": _SIZE,
    "n_group": _SIZE,
    "topk_group": _SIZE,
    "use_grouped_topk": BOOL,
    "routed_scaling_factor": number(),
    "output_router_logits": one_of(False),
    "hidden_act": one_of("silu"),
    "rms_norm_eps": number(),
    "initializer_range": number(),
    "attention_bias": BOOL,
    "attention_dropout": number(0, 1),
    "tie_word_embeddings": BOOL,
    "mla_use_nope": one_of(True),
    "max_position_embeddings": _SIZE,
    "model_max_length": _SIZE,
    "pretraining_tp": one_of(1),
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": either(_TOKEN, list_of(integer(0, 2**31 - 1))),
    "architectures": either(list_of(TEXT), NULL),
    # what transformers writes into every config and this model does not read
    **dict.fromkeys(
        "auto_map dtype torch_dtype transformers_version _name_or_path use_cache rope_theta rope_scaling "
        "num_nextn_predict_layers id2label label2id problem_type chunk_size_feed_forward is_encoder_decoder "
        "output_attentions output_hidden_states return_dict".split(),
        ANYTHING,
    ),
}


def model_problems(values: dict, source: str, *, unknown: bool) -> list[str]:
    """`unknown`: whether an unknown key is one (in a hand-written --model_config it is a misspelt one; the config.json of a
    checkpoint may have keys that this toolkit does not know). A size left out is the released model's."""
    problems = check(values, MODEL, source, unknown=unknown) if values else [f"{source}: holds no key"]
    if problems:
        return problems
    found = {names[0]: _one_value(values, names, source, problems) for names in SIZES}
    value = lambda *names: next((values[n] for n in names if n in values), RELEASED[names[0]])  # noqa: E731
    heads, kv_heads = value("num_attention_heads"), value("num_key_value_heads")
    if heads != kv_heads:
        problems.append(f"{source}: num_key_value_heads is {kv_heads}, but must be num_attention_heads {heads}")
    experts = found["num_experts"] or RELEASED["num_experts"]
    chosen = found["num_experts_per_token"] or RELEASED["num_experts_per_token"]
    if chosen > experts:
        problems.append(f"{source}: num_experts_per_token {chosen} cannot be chosen from num_experts {experts}")
    groups, top = value("num_expert_group", "n_group"), value("topk_group")
    if top > groups or experts % groups:
        problems.append(
            f"{source}: num_experts {experts} in {groups} groups of which {top} are chosen do not go together"
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = value(name) if isinstance(value(name), list) else [value(name)]
        if any(i is not None and i >= value("vocab_size") for i in ids):
            left_out = "" if name in values else " (left out, so the released model's)"
            problems.append(f"{source}: {name} is {value(name)}{left_out}, not below vocab_size {value('vocab_size')}")
    return problems + _layer_problems(values, source)


def _one_value(values: dict, names: tuple[str, ...], source: str, problems: list[str]):
    """The value under any of its spellings; two spellings with two values are a problem."""
    given = {name: values[name] for name in names if name in values}
    if len(set(given.values())) > 1:
        problems.append(f"{source}: {' and '.join(f'{k} {v}' for k, v in given.items())} are one value; keep one")
    return next(iter(given.values()), None)


def _layer_problems(values: dict, source: str) -> list[str]:
    """Each layer is exactly one of KDA and MLA; the lists are counted from 1, the types from 0."""
    layers, linear = (
        values.get("num_hidden_layers", RELEASED["num_hidden_layers"]),
        values.get("linear_attn_config", {}),
    )
    problems = []
    sizes = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
    sizes["short_conv_kernel_size"] = "linear_conv_kernel_dim"
    for name, other in sizes.items():
        if name in linear and other in values and linear[name] != values[other]:
            problems.append(
                f"{source}: linear_attn_config.{name} {linear[name]} and {other} {values[other]} are one value; keep one"
            )
    mla, kda = linear.get("full_attn_layers"), linear.get("kda_layers")
    if values.get("layer_types") is not None:
        if len(values["layer_types"]) != layers:
            problems.append(f"{source}: layer_types has {len(values['layer_types'])} entries for {layers} layers")
    elif mla is not None and kda is not None:
        if sorted(mla + kda) != list(range(1, layers + 1)):
            problems.append(
                f"{source}: linear_attn_config.full_attn_layers and kda_layers must name each of the layers 1 to {layers} once"
            )
    else:
        problems.append(
            f"{source}: which layers are MLA and which KDA is not said: linear_attn_config.full_attn_layers and kda_layers "
            "(counted from 1), or layer_types"
        )
    if values.get("first_k_dense_replace", 0) > layers:
        problems.append(
            f"{source}: first_k_dense_replace is {values['first_k_dense_replace']}, more than {layers} layers"
        )
    if values.get("mlp_layer_types") is not None and len(values["mlp_layer_types"]) != layers:
        problems.append(f"{source}: mlp_layer_types has {len(values['mlp_layer_types'])} entries for {layers} layers")
    return problems
