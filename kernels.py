"""Which kernel does the work: KDA, short convolution, full attention, routed experts, gated MLP, norms, loss.

    keep_kernel_cache()                                          # before triton is imported
    kernels = choose_kernels(device, dtype, qk_dim=192, v_dim=128, attention_backend="auto")
    print(kernels.text)                                          # what runs and why

On CUDA: fla's `chunk_kda` and `causal_conv1d`, one of three attention backends, torch's grouped matmul and the Triton
kernels of triton_kernels.py. On the CPU, and as the measure of everything above: the plain torch functions named
`*_reference` in this file, which work in fp64, fp32 and bf16. Nothing here falls back in silence: what cannot run is
refused with a sentence, and torch's 'efficient' and 'math' attention (142 and a few TFLOP/s) are never chosen.

Every function works on one packed stream of tokens; `Documents` says where documents begin in it, and no state, no
convolution tap and no attention crosses such a border. A batch of B sequences is a stream with B documents.

Symbols: T tokens of the stream, H heads, K key size, V value size, D hidden size, E experts, F expert width,
n tokens of a tile, S = n * experts per token rows sorted by expert. KDA: q, k, v, raw gate g, raw beta, state S_HKV.
"""

from __future__ import annotations

import bisect
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from config import UserError

FLASH4_PIN = "4.0.0b36"
REFERENCE_CHUNK = 16  # KDA reference: its largest tensor is T x chunk x H x K
REFERENCE_QUERY_BLOCK = 256  # attention reference: its largest tensor is H x block x T


def keep_kernel_cache(environ=os.environ) -> Path:
    """Keep compiled kernels and autotuning results across runs; returns the folder. Call it before triton is imported.

    Cold, fla's autotuning of the KDA kernels takes about 300 s. What the user has set is left alone.
    """
    environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    home = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(environ.setdefault("TRITON_CACHE_DIR", str(home / "kimi_linear_2m" / "triton")))


def use_kept_tuning(capability: tuple[int, int], environ=os.environ) -> str:
    """Let fla take its tuning from tuned_kernels/ if this kind of GPU is there; returns what happens, for the log.

    Call it before fla is imported. `capability`: the GPU's compute capability; an H200 takes what was tuned on an H100. With
    'full', fla looks for the same shapes, then for others, then takes a default, and tunes only kernels that have no file.
    """
    folder = Path(__file__).resolve().parent / "tuned_kernels" / f"sm_{capability[0]}{capability[1]}"
    if "FLA_CACHE_MODE" in environ and environ.get("FLA_CONFIG_DIR") != str(folder):
        return f"fla's tuning: as FLA_CACHE_MODE={environ['FLA_CACHE_MODE']} says"
    if not folder.is_dir():
        return "fla tunes its kernels for this GPU in the first step (minutes, then kept)"
    environ["FLA_CACHE_MODE"], environ["FLA_CONFIG_DIR"] = "full", str(folder)
    return f"fla's tuning is taken from {folder.parent.name}/{folder.name}"


# ---------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Documents:
    """Borders of a packed stream: bounds[0] = 0 < first token of each further document < bounds[-1] = tokens."""

    bounds: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.bounds[-1]

    @property
    def spans(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))

    @cached_property
    def longest(self) -> int:
        return max(end - start for start, end in self.spans)

    def starts_at(self, token: int) -> bool:
        """Whether a document begins at this token."""
        place = bisect.bisect_left(self.bounds, token)
        return place < len(self.bounds) and self.bounds[place] == token

    def within(self, start: int, end: int) -> Documents:
        """The borders inside tokens start..end, counted from start. The first piece may be the rest of a document."""
        first = bisect.bisect_right(self.bounds, start)
        last = bisect.bisect_left(self.bounds, end)
        return Documents((0, *(bound - start for bound in self.bounds[first:last]), end - start))

    def cu_seqlens(self, device, dtype) -> torch.Tensor:
        return torch.tensor(self.bounds, dtype=dtype, device=device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where transformers computes in fp32: fp64 stays fp64, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------- KDA


def kda_reference(q_THK, k_THK, v_THV, g_THK, beta_TH, A_log, dt_bias, state_HKV, documents: Documents):
    """Kimi delta attention by chunks in plain torch, with gate, beta and l2 norms computed inside.

    g and beta are the raw projections. `state_HKV` is the state before the stream's first token (None: zero); it belongs
    to the first document. Returns (o_THV in v's dtype, state after the last token, fp32 or fp64).
    """
    dtype = compute_dtype(v_THV.dtype)
    heads, key_size = q_THK.shape[1:]
    q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q_THK.to(dtype), k_THK.to(dtype)))
    decay = -torch.exp(A_log.to(dtype)).view(1, heads, 1)
    g = decay * F.softplus(g_THK.to(dtype) + dt_bias.to(dtype).view(1, heads, key_size))
    inputs = (q * key_size**-0.5, k, v_THV.to(dtype), g, torch.sigmoid(beta_TH.to(dtype)))
    outputs = []
    for start, end in documents.spans:
        state = state_HKV if start == 0 else None
        if state is None:
            state = v_THV.new_zeros(heads, key_size, v_THV.shape[-1], dtype=dtype)
        out, state = _kda_document(*(x[start:end] for x in inputs), state.to(dtype))
        outputs.append(out)
    return torch.cat(outputs).to(v_THV.dtype), state


def _kda_document(q_THK, k_THK, v_THV, g_THK, beta_TH, state_HKV):
    """The recurrence over one document: within a chunk solved as a triangular system, across chunks by the state."""
    tokens, chunk = q_THK.shape[0], min(REFERENCE_CHUNK, q_THK.shape[0])
    padding = -tokens % chunk

    def chunks(x):  # [T, H, ...] -> [chunks, H, C, ...]; padded tokens have k = beta = g = 0 and change no state
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, padding))
        return x.unflatten(0, (-1, chunk)).transpose(1, 2)

    q, k, v, g, beta = (chunks(x) for x in (q_THK, k_THK, v_THV, g_THK, beta_TH.unsqueeze(-1)))
    G = g.cumsum(-2)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    # decay from token j to token i, per key channel; masked before exp so that nothing overflows
    between = (G.unsqueeze(-2) - G.unsqueeze(-3)).masked_fill(later[..., None], -math.inf).exp()
    qk = torch.einsum("nhik,nhjk,nhijk->nhij", q, k, between)
    kk = torch.einsum("nhik,nhjk,nhijk->nhij", k, k, between).tril(-1) * beta
    right = torch.cat([beta * v, beta * k * G.exp()], -1)
    solved = torch.linalg.solve_triangular(kk, right, upper=False, unitriangular=True)
    new_v, seen_k = solved.split([v.shape[-1], k.shape[-1]], -1)
    q_in, k_out = q * G.exp(), k * (G[..., -1:, :] - G).exp()
    outputs = []
    for n in range(q.shape[0]):
        v_n = new_v[n] - seen_k[n] @ state_HKV
        outputs.append(q_in[n] @ state_HKV + qk[n] @ v_n)
        state_HKV = G[n, :, -1, :, None].exp() * state_HKV + k_out[n].transpose(-1, -2) @ v_n
    return torch.stack(outputs).transpose(1, 2).flatten(0, 1)[:tokens], state_HKV


def kda_fla(q_THK, k_THK, v_THV, g_THK, beta_TH, A_log, dt_bias, state_HKV, documents: Documents):
    """fla's chunk kernel, same meaning as `kda_reference`; the state is fp32.

    A missing state is passed as zeros: fla tunes its kernels once more for calls without one.
    """
    from fla.ops.kda import chunk_kda

    if state_HKV is None:
        state_HKV = q_THK.new_zeros(*q_THK.shape[1:], v_THV.shape[-1], dtype=torch.float32)
    cu_seqlens, state = None, state_HKV.unsqueeze(0)
    if len(documents.bounds) > 2:
        cu_seqlens = documents.cu_seqlens(q_THK.device, torch.long)
        state = F.pad(state, (0, 0) * 3 + (0, len(documents.bounds) - 2))
    out, state = chunk_kda(
        *(x.unsqueeze(0) for x in (q_THK, k_THK, v_THV, g_THK, beta_TH)),
        A_log=A_log.reshape(-1),
        dt_bias=dt_bias.reshape(-1),
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        cu_seqlens=cu_seqlens,
    )
    return out[0], state[-1]


# ---------------------------------------------------------------------------------------------- short convolution


def causal_conv_reference(x_TD, weight_DW, tail_WD, documents: Documents):
    """SiLU of the depthwise causal convolution over W taps. `tail_WD`: the W-1 inputs before the first token, of the same
    document (None: zeros). Returns [T, D]."""
    width = weight_DW.shape[1]
    outputs = []
    for start, end in documents.spans:
        before = tail_WD if start == 0 else None
        if before is None:
            before = x_TD.new_zeros(width - 1, x_TD.shape[1])
        padded = torch.cat([before, x_TD[start:end]]).t().unsqueeze(0)
        outputs.append(F.conv1d(padded, weight_DW.unsqueeze(1), groups=x_TD.shape[1])[0].t())
    return F.silu(torch.cat(outputs))


def causal_conv_fla(x_TD, weight_DW, tail_WD, documents: Documents):
    """fla's Triton convolution, same meaning as `causal_conv_reference`; a missing tail is passed as zeros, as above."""
    from fla.modules.causal_conv1d import causal_conv1d

    if tail_WD is None:
        tail_WD = x_TD.new_zeros(weight_DW.shape[1] - 1, x_TD.shape[1])
    state, cu_seqlens = F.pad(tail_WD.t(), (1, 0)).unsqueeze(0), None  # fla does not read the first of its W columns
    if len(documents.bounds) > 2:
        cu_seqlens = documents.cu_seqlens(x_TD.device, torch.long)
        state = F.pad(state, (0, 0) * 2 + (0, len(documents.bounds) - 2))
    return causal_conv1d(
        x_TD.unsqueeze(0),
        weight=weight_DW,
        initial_state=state.contiguous(),
        activation="silu",
        cu_seqlens=cu_seqlens,
    )[0][0]


# ---------------------------------------------------------------------------------------------- full attention


class ReferenceAttention:
    """Causal softmax attention by blocks of queries in plain torch, with its own backward from (output, log-sum-exp)."""

    name = "reference"

    def forward(self, q_THK, k_THK, v_THV, documents: Documents, scale: float):
        """Returns (o_THV in v's dtype, log-sum-exp lse_HT in fp32 or fp64)."""
        out = torch.empty_like(v_THV)
        lse_HT = v_THV.new_empty(v_THV.shape[1], v_THV.shape[0], dtype=compute_dtype(v_THV.dtype))
        for q, k, v, rows, columns in self._blocks(q_THK, k_THK, v_THV, documents):
            scores = self._scores(q, k, scale, rows, columns)
            lse = scores.logsumexp(-1)
            lse_HT[:, rows] = lse
            out[rows] = torch.einsum("hij,jhv->ihv", (scores - lse[..., None]).exp(), v).to(out.dtype)
        return out, lse_HT

    def backward(self, do_THV, q_THK, k_THK, v_THV, o_THV, lse_HT, documents: Documents, scale: float):
        """Returns (dq, dk, dv) in the inputs' dtypes."""
        dtype = lse_HT.dtype
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q_THK, k_THK, v_THV))
        for q, k, v, rows, columns in self._blocks(q_THK, k_THK, v_THV, documents):
            p = (self._scores(q, k, scale, rows, columns) - lse_HT[:, rows, None]).exp()
            do = do_THV[rows].to(dtype)
            row_sum = (do * o_THV[rows].to(dtype)).sum(-1).t()
            ds = p * (torch.einsum("ihv,jhv->hij", do, v) - row_sum[..., None]) * scale
            dv[columns] += torch.einsum("hij,ihv->jhv", p, do)
            dq[rows] += torch.einsum("hij,jhk->ihk", ds, k)
            dk[columns] += torch.einsum("hij,ihk->jhk", ds, q)
        return dq.to(q_THK.dtype), dk.to(k_THK.dtype), dv.to(v_THV.dtype)

    @staticmethod
    def _blocks(q, k, v, documents: Documents):
        dtype = compute_dtype(v.dtype)
        for start, end in documents.spans:
            for first in range(start, end, REFERENCE_QUERY_BLOCK):
                rows = slice(first, min(first + REFERENCE_QUERY_BLOCK, end))
                columns = slice(start, rows.stop)
                yield q[rows].to(dtype), k[columns].to(dtype), v[columns].to(dtype), rows, columns

    @staticmethod
    def _scores(q, k, scale, rows, columns):
        i = torch.arange(rows.start, rows.stop, device=q.device)
        j = torch.arange(columns.start, columns.stop, device=q.device)
        return (torch.einsum("ihk,jhk->hij", q, k) * scale).masked_fill(j > i[:, None], -math.inf)


class Flash4Attention:
    """flash-attn-4 (`flash_attn.cute`): the fastest on Hopper. Documents run in one variable-length call.

    `hopper_backward`: our tile for its backward (flash4_backward.py), None where that does not apply.
    """

    name = "flash4"

    def __init__(self, hopper_backward: Callable | None = None):
        self._hopper_backward = hopper_backward

    def forward(self, q_THK, k_THK, v_THV, documents: Documents, scale: float):
        from flash_attn.cute.interface import _flash_attn_fwd

        arguments, unpack = self._layout(documents, q_THK.device)
        out, lse, *_ = _flash_attn_fwd(
            *(unpack(x) for x in (q_THK, k_THK, v_THV)),
            softmax_scale=scale,
            causal=True,
            return_lse=True,
            **arguments,
        )
        return out.view_as(v_THV), lse.view(v_THV.shape[1], v_THV.shape[0])

    def backward(self, do_THV, q_THK, k_THK, v_THV, o_THV, lse_HT, documents: Documents, scale: float):
        from flash_attn.cute.interface import _flash_attn_bwd

        arguments, unpack = self._layout(documents, q_THK.device)
        if self._hopper_backward is not None:
            borders, longest = arguments.get("cu_seqlens_q"), documents.longest
            return self._hopper_backward(do_THV, q_THK, k_THK, v_THV, o_THV, lse_HT, borders, longest, scale)
        lse = lse_HT if arguments else lse_HT.unsqueeze(0)
        dq, dk, dv = _flash_attn_bwd(
            *(unpack(x) for x in (q_THK, k_THK, v_THV, o_THV, do_THV)),
            lse,
            softmax_scale=scale,
            causal=True,
            **arguments,
        )
        return dq.view_as(q_THK), dk.view_as(k_THK), dv.view_as(v_THV)

    @staticmethod
    def _layout(documents: Documents, device):
        """(variable-length arguments, how a [T, H, *] tensor is handed over): dense [1, T, H, *] for one document."""
        if len(documents.bounds) == 2:
            return {}, lambda x: x.unsqueeze(0)
        cu_seqlens = documents.cu_seqlens(device, torch.int32)
        names = ("cu_seqlens_q", "cu_seqlens_k")
        lengths = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), documents.longest)
        return {**dict.fromkeys(names, cu_seqlens), **lengths}, lambda x: x


class SdpaAttention:
    """torch SDPA's cuDNN or flash kernel, called below autograd so that (output, log-sum-exp) are kept where we want.

    One call per document, none for a document of one token, which cuDNN refuses. 'flash' wants equal head sizes: v is padded to q's (d_v 128 -> 192), which costs arithmetic
    but runs on cards before Hopper.
    """

    def __init__(self, name: str):
        self.name = name
        ops = torch.ops.aten
        self._forward, self._backward = {
            "cudnn": (ops._scaled_dot_product_cudnn_attention, ops._scaled_dot_product_cudnn_attention_backward),
            "flash": (ops._scaled_dot_product_flash_attention, ops._scaled_dot_product_flash_attention_backward),
        }[name]

    def forward(self, q_THK, k_THK, v_THV, documents: Documents, scale: float):
        outs, lses = [], []
        for start, end in documents.spans:
            if end - start == 1:
                outs.append(v_THV[start:end])
                scores = (q_THK[start].float() * k_THK[start].float()).sum(-1, keepdim=True)
                lses.append(scores * scale)
                continue
            q, k, v = self._heads_first(q_THK, k_THK, v_THV, start, end)
            if self.name == "cudnn":
                out, lse, *_ = self._forward(q, k, v, None, True, 0.0, True, False, scale=scale)
            else:
                out, lse, *_ = self._forward(q, k, v, 0.0, True, False, scale=scale)
            outs.append(out[0, :, :, : v_THV.shape[-1]].transpose(0, 1))
            lses.append(lse.reshape(v_THV.shape[1], -1)[:, : end - start])
        return (outs[0].contiguous(), lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses, 1))

    def backward(self, do_THV, q_THK, k_THK, v_THV, o_THV, lse_HT, documents: Documents, scale: float):
        grads = []
        seed = torch.zeros((), dtype=torch.int64, device=q_THK.device)
        for start, end in documents.spans:
            if end - start == 1:  # its only weight is 1 whatever q and k are
                zeros = torch.zeros_like(q_THK[start:end])
                grads.append([zeros, zeros, do_THV[start:end]])
                continue
            q, k, v = self._heads_first(q_THK, k_THK, v_THV, start, end)
            out, _, do = self._heads_first(o_THV, o_THV, do_THV, start, end, width=v.shape[-1])
            lse = lse_HT[:, start:end].unsqueeze(0).contiguous()
            length = end - start
            if self.name == "cudnn":
                grad = self._backward(
                    do,
                    q,
                    k,
                    v,
                    out,
                    lse.unsqueeze(-1),
                    seed,
                    seed,
                    None,
                    None,
                    None,
                    length,
                    length,
                    0.0,
                    True,
                    scale=scale,
                )
            else:
                grad = self._backward(
                    do, q, k, v, out, lse, None, None, length, length, 0.0, True, seed, seed, scale=scale
                )
            grads.append([x[0].transpose(0, 1) for x in grad])
        dq, dk, dv = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*grads, strict=True))
        return dq, dk, dv[..., : v_THV.shape[-1]]

    def _heads_first(self, q, k, v, start, end, width: int | None = None):
        """[1, H, T, *] views of one document; for 'flash' the last size is padded to q's (or `width`)."""
        views = [x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        if self.name == "flash":
            width = width or q.shape[-1]
            views = [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in views]
        return views


# ---------------------------------------------------------------------------------------------- routed experts


def grouped_matmul_reference(x_SK, weight_ENK, ends_E):
    """Rows of expert e times weight[e] transposed: [S, K], [E, N, K] -> [S, N]. `ends_E`: where each expert's rows end."""
    out = x_SK.new_zeros(x_SK.shape[0], weight_ENK.shape[1])
    for expert, (start, end) in _groups(ends_E):
        out[start:end] = x_SK[start:end] @ weight_ENK[expert].t()
    return out


def grouped_weight_grad_reference(dy_SN, x_SK, ends_E):
    """Gradient of `grouped_matmul`'s weight: [S, N], [S, K] -> [E, N, K]."""
    out = x_SK.new_zeros(len(ends_E), dy_SN.shape[1], x_SK.shape[1])
    for expert, (start, end) in _groups(ends_E):
        out[expert] = dy_SN[start:end].t() @ x_SK[start:end]
    return out


def _groups(ends_E):
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, (start, end)
        start = end


def grouped_matmul_torch(x_SK, weight_ENK, ends_E):
    """torch's grouped GEMM (bf16, SM80 and later), same meaning as `grouped_matmul_reference`."""
    return torch._grouped_mm(x_SK, weight_ENK.transpose(-2, -1), offs=ends_E)


def grouped_weight_grad_torch(dy_SN, x_SK, ends_E):
    return torch._grouped_mm(dy_SN.t(), x_SK, offs=ends_E)


def gated_reference(h_S2F, weight_S):
    """silu(gate) * up, times the row's routing weight if there is one: [S, 2F] -> [S, F]."""
    gate, up = h_S2F.chunk(2, -1)
    out = F.silu(gate) * up
    return out if weight_S is None else (out * weight_S[:, None]).to(h_S2F.dtype)


def gated_backward_reference(h_S2F, da_SF, weight_S):
    """Backward of `gated_reference`: returns (dh [S, 2F], the forward's output [S, F], dweight [S] or None)."""
    dtype = compute_dtype(h_S2F.dtype)
    gate, up = h_S2F.to(dtype).chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    da = da_SF.to(dtype)
    dweight = None if weight_S is None else (da * silu * up).sum(-1).to(weight_S.dtype)
    scale = 1.0 if weight_S is None else weight_S[:, None].to(dtype)
    dgate, dup = da * scale * up * sigmoid * (1 + gate * (1 - sigmoid)), da * scale * silu
    return torch.cat([dgate, dup], -1).to(h_S2F.dtype), (silu * up * scale).to(h_S2F.dtype), dweight


def combine_reference(y_SD, places_nk):
    """Sum each token's rows: [S, D], places [n, k] (row of the token's j-th expert) -> [n, D], summed in fp32 or more."""
    return y_SD[places_nk].to(compute_dtype(y_SD.dtype)).sum(1).to(y_SD.dtype)


class Experts(torch.autograd.Function):
    """Routed experts on a tile: tokens x_nD, routing weights [n, k] and expert numbers [n, k] -> [n, D].

    The routing weight is applied before the down projection (which is linear), so that neither forward nor backward
    needs the down projection's output: its weight's gradient is a dot product of things the backward has anyway.
    `need_output=False` (the backward pass's recomputation) therefore stops after the up projection and returns zeros.
    """

    @staticmethod
    def forward(ctx, x_nD, weight_nk, expert_nk, gate_up_E2FD, down_EDF, kernels: Kernels, need_output: bool):
        k = expert_nk.shape[1]
        experts_sorted, order = torch.sort(expert_nk.reshape(-1).to(torch.int16), stable=True)
        numbers = torch.arange(gate_up_E2FD.shape[0], dtype=torch.int16, device=x_nD.device)
        ends = torch.searchsorted(experts_sorted, numbers, right=True).to(torch.int32)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.shape[0], device=order.device)
        places = places.view(-1, k)
        token = order // k
        x_SD = x_nD.index_select(0, token)
        weight_S = weight_nk.reshape(-1).index_select(0, order)
        h = kernels.grouped_matmul(x_SD, gate_up_E2FD, ends)
        ctx.save_for_backward(x_SD, h, weight_S, token, order, places, ends, gate_up_E2FD, down_EDF)
        ctx.kernels, ctx.shape = kernels, weight_nk.shape
        if not need_output:
            return x_nD.new_zeros(()).expand_as(x_nD)
        return kernels.combine(kernels.grouped_matmul(kernels.gated(h, weight_S), down_EDF, ends), places)

    @staticmethod
    def backward(ctx, dy_nD):
        x_SD, h, weight_S, token, order, places, ends, gate_up, down = ctx.saved_tensors
        kernels = ctx.kernels
        dy_SD = dy_nD.index_select(0, token)
        da = kernels.grouped_matmul(dy_SD, down.transpose(-2, -1), ends)
        dh, a, dweight_S = kernels.gated_backward(h, da, weight_S)
        ddown = kernels.grouped_weight_grad(dy_SD, a, ends) if ctx.needs_input_grad[4] else None
        del da, a, dy_SD
        dgate_up = kernels.grouped_weight_grad(dh, x_SD, ends) if ctx.needs_input_grad[3] else None
        dx = kernels.combine(kernels.grouped_matmul(dh, gate_up.transpose(-2, -1), ends), places)
        dweight = torch.empty_like(dweight_S).index_copy_(0, order, dweight_S).view(ctx.shape)
        return dx, dweight, None, dgate_up, ddown, None, None


class GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) with explicit backward; `need_output=False` as in `Experts`."""

    @staticmethod
    def forward(ctx, x_nD, gate_FD, up_FD, down_DF, kernels: Kernels, need_output: bool):
        h = torch.cat([F.linear(x_nD, gate_FD), F.linear(x_nD, up_FD)], -1)
        ctx.save_for_backward(x_nD, h, gate_FD, up_FD, down_DF)
        ctx.kernels = kernels
        if not need_output:
            return x_nD.new_zeros(()).expand_as(x_nD)
        return F.linear(kernels.gated(h, None), down_DF)

    @staticmethod
    def backward(ctx, dy_nD):
        x, h, gate, up, down = ctx.saved_tensors
        dh, a, _ = ctx.kernels.gated_backward(h, dy_nD @ down, None)
        dgate_h, dup_h = dh.chunk(2, -1)
        _, need_gate, need_up, need_down = ctx.needs_input_grad[:4]
        dgate = dgate_h.t() @ x if need_gate else None
        dup = dup_h.t() @ x if need_up else None
        ddown = dy_nD.t() @ a if need_down else None
        return torch.addmm(dgate_h @ gate, dup_h, up), dgate, dup, ddown, None, None


# ---------------------------------------------------------------------------------------------- norms


def rms_norm_reference(x_nD, weight_D, eps: float):
    """transformers' KimiLinearRMSNorm: normalised in fp32, rounded, then scaled in x's dtype; [n, D] -> [n, D]."""
    wide = x_nD.to(compute_dtype(x_nD.dtype))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * wide.to(x_nD.dtype)


def gated_norm_reference(out_THV, gate_THV, weight_V, eps: float):
    """transformers' KimiLinearRMSNormGated: normalised, scaled and gated in fp32, rounded once; [T, H, V] all three."""
    dtype = compute_dtype(out_THV.dtype)
    wide = out_THV.to(dtype)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_V.to(dtype) * wide * torch.sigmoid(gate_THV.to(dtype))).to(out_THV.dtype)


# ---------------------------------------------------------------------------------------------- cross-entropy


def cross_entropy_reference(logits_nV, label_n, scale: float, want_grad: bool):
    """Per-token loss of a tile, and the gradient of scale * sum(loss) in place of the logits.

    Labels of -100 cost nothing. Returns (loss [n] fp32 or fp64, whether the label was the first choice [n]).
    """
    wide = logits_nV.to(compute_dtype(logits_nV.dtype))
    valid = label_n != -100
    place = label_n.clamp(min=0)[:, None]
    picked = wide.gather(1, place)[:, 0]
    lse = wide.logsumexp(-1)
    first_choice = valid & (picked >= wide.amax(-1))
    if want_grad:
        grad = (wide - lse[:, None]).exp()
        grad.scatter_add_(1, place, torch.full_like(place, -1, dtype=grad.dtype))
        logits_nV.copy_(grad * (valid * scale)[:, None])
    return torch.where(valid, lse - picked, 0), first_choice


# ---------------------------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Kernels:
    """The functions one run uses. `text` says which and why, one line each, for the log."""

    kda: Callable
    causal_conv: Callable
    attention: object
    grouped_matmul: Callable
    grouped_weight_grad: Callable
    gated: Callable
    gated_backward: Callable
    combine: Callable
    rms_norm: Callable
    gated_norm: Callable
    cross_entropy: Callable
    text: str


def reference_kernels(why: str) -> Kernels:
    """Plain torch for everything."""
    return Kernels(
        kda=kda_reference,
        causal_conv=causal_conv_reference,
        attention=ReferenceAttention(),
        grouped_matmul=grouped_matmul_reference,
        grouped_weight_grad=grouped_weight_grad_reference,
        gated=gated_reference,
        gated_backward=gated_backward_reference,
        combine=combine_reference,
        rms_norm=rms_norm_reference,
        gated_norm=gated_norm_reference,
        cross_entropy=cross_entropy_reference,
        text=f"all kernels: plain torch references ({why})",
    )


def choose_kernels(
    device: torch.device, dtype: torch.dtype, *, qk_dim: int, v_dim: int, attention_backend: str = "auto"
) -> Kernels:
    """The kernels for this device and dtype. Raises UserError where only a silently slow path would be left."""
    if device.type != "cuda":
        if attention_backend not in ("auto", "reference"):
            raise UserError(
                f"attention_backend: {attention_backend!r} needs a GPU; on the CPU leave it at 'auto' or 'reference'"
            )
        return reference_kernels("CPU")
    if dtype != torch.bfloat16:
        if attention_backend not in ("auto", "reference"):
            raise UserError(
                f"attention_backend: {attention_backend!r} has no {dtype} kernel; train in bf16 (--bf16) or take 'reference'"
            )
        return reference_kernels(f"{dtype} on a GPU is for comparison only: hundreds of times slower than bf16")
    try:
        import fla.modules.causal_conv1d
        import fla.ops.kda  # noqa: F401
    except Exception as error:  # fla raises ImportError, RuntimeError or a triton error depending on what is missing
        raise UserError(
            f"flash-linear-attention: cannot be imported on this GPU machine ({error}); pip install -r requirements.txt "
            "(the plain torch recurrence would be hundreds of times slower)"
        ) from None
    import triton_kernels

    attention, why = choose_attention(device, qk_dim=qk_dim, v_dim=v_dim, wanted=attention_backend)
    return Kernels(
        kda=kda_fla,
        causal_conv=causal_conv_fla,
        attention=attention,
        grouped_matmul=grouped_matmul_torch,
        grouped_weight_grad=grouped_weight_grad_torch,
        gated=triton_kernels.gated,
        gated_backward=triton_kernels.gated_backward,
        combine=triton_kernels.combine,
        rms_norm=triton_kernels.rms_norm,
        gated_norm=triton_kernels.gated_norm,
        cross_entropy=triton_kernels.cross_entropy,
        text=f"KDA and convolution: fla\nfull attention: {attention.name} ({why})\n"
        "experts: torch grouped GEMM with fused gating; norms: fused; loss: cross-entropy in place of the logits",
    )


def choose_attention(device: torch.device, *, qk_dim: int, v_dim: int, wanted: str):
    """(backend, reason). 'auto' takes the fastest one that runs here: flash4, cudnn, flash; see benchmarks/NOTES.md."""
    if wanted in ("efficient", "math"):
        raise UserError(
            f"attention_backend: {wanted!r} is refused on a GPU: it runs at 142 TFLOP/s forward and 35 backward (efficient) "
            "or slower, where others reach 500; use 'auto'"
        )
    if wanted == "reference":
        return ReferenceAttention(), "asked for; plain torch, for comparison only"
    capability = torch.cuda.get_device_capability(device)
    problems = {}
    if capability[0] not in (9, 10):
        problems["flash4"] = f"needs Hopper or Blackwell, this GPU is sm_{capability[0]}{capability[1]}"
        problems["cudnn"] = f"has no kernel for head sizes {qk_dim}/{v_dim} before Hopper"
    else:
        try:
            from importlib.metadata import version

            import flash_attn.cute.interface  # noqa: F401

            if version("flash-attn-4") != FLASH4_PIN:
                problems["flash4"] = (
                    f"flash-attn-4 {version('flash-attn-4')} is installed, {FLASH4_PIN} is the tested one"
                )
        except Exception as error:  # its DSL raises many kinds when a part is missing
            problems["flash4"] = f"flash-attn-4 cannot be imported ({type(error).__name__}: {error})"
    order = ("flash4", "cudnn", "flash")
    if wanted != "auto":
        if wanted not in order:
            raise UserError(f"attention_backend: {wanted!r} is not one of auto, {', '.join(order)}, reference")
        if wanted in problems and not problems[wanted].endswith("tested one"):
            raise UserError(f"attention_backend: {wanted!r} cannot run here: {problems[wanted]}; use 'auto'")
        if wanted == "flash4":
            return _flash4(capability, qk_dim, v_dim, problems, "asked for")
        return SdpaAttention(wanted), "asked for"
    name = next(name for name in order if name not in problems)
    reason = "the fastest that runs here"
    if problems:
        reason += "; not " + "; not ".join(f"{other}: {problem}" for other, problem in problems.items())
    return _flash4(capability, qk_dim, v_dim, problems, reason) if name == "flash4" else (SdpaAttention(name), reason)


def _flash4(capability: tuple[int, int], qk_dim: int, v_dim: int, problems: dict[str, str], reason: str):
    """(flash-attn-4, reason): with our tile in the backward where that was measured, on Hopper with the tested version."""
    # its compiler says so twice, in a paragraph each; nothing follows from it
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted to a JitArgument")
    if capability[0] != 9 or (qk_dim, v_dim) != (192, 128) or "flash4" in problems:
        return Flash4Attention(), reason
    from flash4_backward import HopperBackward

    return Flash4Attention(HopperBackward()), f"{reason}; its backward with our tile of 64 x 128"
