"""The numbers of a Kimi-Linear model: every parameter with its shape, and the FLOPs of a step, without torch.

    shape = ModelShape.from_config_dict(json.load(open("config.json")))   # transformers' layout or the Hub's
    shape.total_parameters, shape.parameter_counts["routed_experts"]
    model_flops_per_step(KIMI_LINEAR_48B, 2097152, sequences=1)

Exact to the parameter: tests compare names, shapes and order with transformers' KimiLinearForCausalLM.
FLOPs count multiply + add as 2. Symbols: T tokens of one sequence, D hidden size, H heads, K key and V value size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

GROUPS = (
    "embedding",
    "head",
    "kda",
    "mla",
    "dense_mlp",
    "routed_experts",
    "shared_experts",
    "router",
    "norms",
)


def is_trained(group: str, trainable: str) -> bool:
    """Whether `--trainable` leaves this group of parameters trained (the same rule as kimi_model.set_trainable)."""
    if trainable == "no_experts":
        return group != "routed_experts"
    if trainable == "attention":
        return group in ("kda", "mla")
    return True


@dataclass(frozen=True)
class Parameter:
    """One parameter of transformers' KimiLinearForCausalLM: its name, shape and group; `layer` is None outside layers."""

    name: str
    shape: tuple[int, ...]
    group: str
    layer: int | None = None

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def own_fp32(self) -> bool:
        """A_log and dt_bias: the trainer takes them out of ZeRO and keeps them in fp32 (kimi_model.py)."""
        return self.name.endswith((".A_log", ".dt_bias"))

    def trained(self, trainable: str) -> bool:
        return is_trained(self.group, trainable)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one Kimi-Linear model; the defaults are transformers' own. Layers are counted from 0."""

    vocab_size: int = 163840
    hidden_size: int = 2304
    intermediate_size: int = 9216
    moe_intermediate_size: int = 1024
    num_attention_heads: int = 32
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    attention_bias: bool = False
    linear_num_heads: int = 32
    linear_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    num_experts: int = 256
    experts_per_token: int = 8
    num_shared_experts: int = 1
    mla_layers: tuple[int, ...] = (4, 8, 12, 16, 20, 24)
    dense_layers: tuple[int, ...] = (0,)
    num_layers: int = 27

    @classmethod
    def from_config_dict(cls, d: dict) -> ModelShape:
        """From the config.json that transformers writes or from the Hub's own (layers there are counted from 1).

        Keys that are missing take transformers' defaults. Raises KeyError for a layer number beyond the model.
        """
        linear = d.get("linear_attn_config") or {}
        first = lambda *names, default: next((d[n] for n in names if d.get(n) is not None), default)  # noqa: E731
        layers = d.get("num_hidden_layers", cls.num_layers)
        if d.get("layer_types"):
            mla = [i for i, kind in enumerate(d["layer_types"]) if kind == "full_attention"]
        elif "full_attn_layers" in linear:
            mla = [layer - 1 for layer in linear["full_attn_layers"]]
        else:
            mla = [i for i in range(layers) if i and i % 4 == 0]
        if d.get("mlp_layer_types"):
            dense = [i for i, kind in enumerate(d["mlp_layer_types"]) if kind == "dense"]
        else:
            dense = list(range(min(layers, d.get("first_k_dense_replace", 1))))
        if mla and max(mla) >= layers:
            raise KeyError(f"full_attn_layers names layer {max(mla) + 1} of a model with {layers} layers")
        same_name = (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads qk_nope_head_dim "
            "qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank attention_bias"
        )
        return cls(
            **{name: first(name, default=getattr(cls, name)) for name in same_name.split()},
            linear_num_heads=linear.get("num_heads", first("linear_num_heads", default=cls.linear_num_heads)),
            linear_head_dim=linear.get("head_dim", first("linear_head_dim", default=cls.linear_head_dim)),
            linear_conv_kernel_dim=linear.get(
                "short_conv_kernel_size", first("linear_conv_kernel_dim", default=cls.linear_conv_kernel_dim)
            ),
            num_experts=first("num_local_experts", "num_experts", default=cls.num_experts),
            experts_per_token=first("num_experts_per_tok", "num_experts_per_token", default=cls.experts_per_token),
            num_shared_experts=first("n_shared_experts", "num_shared_experts", default=cls.num_shared_experts),
            mla_layers=tuple(sorted(mla)),
            dense_layers=tuple(sorted(dense)),
            num_layers=layers,
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def linear_dim(self) -> int:
        """Width of q, k, v and o in a KDA layer, all heads."""
        return self.linear_num_heads * self.linear_head_dim

    @property
    def kda_layers(self) -> int:
        return self.num_layers - len(self.mla_layers)

    @property
    def moe_layers(self) -> int:
        return self.num_layers - len(self.dense_layers)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter, in the order of the model's own `named_parameters()`."""
        found = [Parameter("model.embed_tokens.weight", (self.vocab_size, self.hidden_size), "embedding")]
        for layer in range(self.num_layers):
            attention = self._mla_parameters() if layer in self.mla_layers else self._kda_parameters()
            group = "mla" if layer in self.mla_layers else "kda"
            rows = [(f"self_attn.{name}", shape, group) for name, shape in attention]
            rows += self._mlp_parameters(dense=layer in self.dense_layers)
            rows += [(f"{name}.weight", (self.hidden_size,), "norms") for name in _LAYER_NORMS]
            found += [Parameter(f"model.layers.{layer}.{name}", shape, group, layer) for name, shape, group in rows]
        found.append(Parameter("model.norm.weight", (self.hidden_size,), "norms"))
        # transformers' class ties nothing, whatever tie_word_embeddings says
        found.append(Parameter("lm_head.weight", (self.vocab_size, self.hidden_size), "head"))
        return tuple(found)

    def _kda_parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        d, width, head, heads = self.hidden_size, self.linear_dim, self.linear_head_dim, self.linear_num_heads
        return [
            ("q_proj.weight", (width, d)),
            ("k_proj.weight", (width, d)),
            ("v_proj.weight", (width, d)),
            ("conv1d.weight", (3 * width, 1, self.linear_conv_kernel_dim)),
            ("forget_gate.dt_bias", (width,)),
            ("forget_gate.A_log", (1, 1, heads, 1)),
            ("forget_gate.f_a_proj.weight", (head, d)),
            ("forget_gate.f_b_proj.weight", (width, head)),
            ("b_proj.weight", (heads, d)),
            ("g_a_proj.weight", (head, d)),
            ("g_b_proj.weight", (width, head)),
            ("o_norm.weight", (head,)),
            ("o_proj.weight", (d, width)),
        ]

    def _mla_parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        d, heads, rank = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        bias = lambda name, size: [(f"{name}.bias", (size,))] if self.attention_bias else []  # noqa: E731
        if self.q_lora_rank is None:
            query = [("q_proj.weight", (heads * self.qk_head_dim, d))]
        else:
            query = [
                ("q_a_proj.weight", (self.q_lora_rank, d)),
                *bias("q_a_proj", self.q_lora_rank),
                ("q_a_layernorm.weight", (self.q_lora_rank,)),
                ("q_b_proj.weight", (heads * self.qk_head_dim, self.q_lora_rank)),
            ]
        return [
            *query,
            ("kv_a_proj_with_mqa.weight", (rank + self.qk_rope_head_dim, d)),
            *bias("kv_a_proj_with_mqa", rank + self.qk_rope_head_dim),
            ("kv_a_layernorm.weight", (rank,)),
            ("kv_b_proj.weight", (heads * (self.qk_nope_head_dim + self.v_head_dim), rank)),
            ("o_proj.weight", (d, heads * self.v_head_dim)),
            *bias("o_proj", d),
        ]

    def _mlp_parameters(self, *, dense: bool) -> list[tuple[str, tuple[int, ...], str]]:
        d = self.hidden_size

        def swiglu(prefix: str, width: int, group: str):
            return [
                (f"{prefix}.gate_proj.weight", (width, d), group),
                (f"{prefix}.up_proj.weight", (width, d), group),
                (f"{prefix}.down_proj.weight", (d, width), group),
            ]

        if dense:
            return swiglu("mlp", self.intermediate_size, "dense_mlp")
        experts, width = self.num_experts, self.moe_intermediate_size
        return [
            ("mlp.experts.gate_up_proj", (experts, 2 * width, d), "routed_experts"),
            ("mlp.experts.down_proj", (experts, d, width), "routed_experts"),
            ("mlp.gate.weight", (experts, d), "router"),
            *swiglu("mlp.shared_experts", width * self.num_shared_experts, "shared_experts"),
        ]

    @cached_property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters per group of GROUPS."""
        counts = dict.fromkeys(GROUPS, 0)
        for parameter in self.parameters:
            counts[parameter.group] += parameter.numel
        return counts

    @cached_property
    def total_parameters(self) -> int:
        return sum(self.parameter_counts.values())

    def trained_parameters(self, trainable: str) -> int:
        return sum(p.numel for p in self.parameters if p.trained(trainable))


_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")

# the released model: its config.json names the MLA layers 4,8,12,16,20,24,27, counted from 1
KIMI_LINEAR_48B = ModelShape(mla_layers=(3, 7, 11, 15, 19, 23, 26))


# ---------------------------------------------------------------------------------------------- arithmetic


def forward_flops(shape: ModelShape, seq_length: int) -> dict[str, float]:
    """Forward FLOPs of one sequence of T tokens per term; a weight used by a token costs 2, whatever computes it.

    attention       layers x T^2 x H x (K + V): q.k and p.v over the causal half, 2 x T^2/2 x H x (K + V). At T = 2,097,152
                    one layer of the released model is T^2 x 32 x 320 = 4.5e16.
    kda_recurrence  layers x T x H x 6KV: what one token does to a head's K x V state (predict, correct, read), 2KV each.
    routed_experts  T x experts per token x one expert's weights; the rest: 2 x T x the group's matrices.
    """
    tokens = float(seq_length)
    weights = dict.fromkeys(GROUPS, 0)
    for p in shape.parameters:
        if len(p.shape) > 1 and not p.own_fp32:
            weights[p.group] += p.numel
    weights["routed_experts"] = weights["routed_experts"] * shape.experts_per_token // max(1, shape.num_experts)
    heads, k, v = shape.num_attention_heads, shape.qk_head_dim, shape.v_head_dim
    kda_state = shape.linear_num_heads * shape.linear_head_dim**2
    return {
        "attention": len(shape.mla_layers) * tokens**2 * heads * (k + v),
        "kda_recurrence": shape.kda_layers * tokens * 6 * kda_state,
        "kda_projections": 2 * tokens * weights["kda"],
        "mla_projections": 2 * tokens * weights["mla"],
        "routed_experts": 2 * tokens * weights["routed_experts"],
        "shared_experts": 2 * tokens * weights["shared_experts"],
        "router": 2 * tokens * weights["router"],
        "dense_mlp": 2 * tokens * weights["dense_mlp"],
        "head": 2 * tokens * weights["head"],
    }


# terms of matrix products whose group of parameters has another name
MATRIX_GROUP = {"kda_projections": "kda", "mla_projections": "mla"}


def model_flops_per_step(
    shape: ModelShape, seq_length: int, sequences: int, *, trainable: str = "all"
) -> dict[str, float]:
    """FLOPs per term of forward and backward over `sequences` sequences; what is recomputed is not counted.

    Backward is twice the forward (gradients of inputs and of weights); for frozen matrices once (inputs only).
    """
    totals = {}
    for term, forward in forward_flops(shape, seq_length).items():
        group = MATRIX_GROUP.get(term, term)
        frozen = group in GROUPS and not is_trained(group, trainable)
        totals[term] = sequences * forward * (2 if frozen else 3)
    return totals
