"""flash-attn-4's backward with a larger tile, for this model's head sizes (192 for q and k, 128 for v) on Hopper.

    backward = HopperBackward()                          # kernels.py makes one where it runs
    dq, dk, dv = backward(d_out, q, k, v, out, lse, cu_seqlens, longest, scale)

Why another tile. flash-attn-4 works on 64 queries x 96 keys at a time and holds P and dS in shared memory, where both warp
groups read every operand again: 4,000 clocks of shared-memory traffic for 2,500 of matrix arithmetic, so that traffic binds
(472 TFLOP/s at 262,144 tokens). Here a tile is 64 x 128, each warp group owns 64 keys, computes S and dP transposed and
feeds P and dS to the next product from its registers: 3,800 clocks for 3,300. The accumulators of dK and dV take 160 of a
thread's 240 registers, so S, dP and dQ are never there together, and P is kept in bf16 only (dS is formed from the rounded
P: its error grows from 0.0024 to 0.0030 of the gradient). 573 TFLOP/s at 262,144 tokens in the same minute on one H100
(benchmarks/results/flash4_wide_tile_h100.json; benchmarks/NOTES.md has the count).

The kernel is flash-attn-4's own (`FlashAttentionBackwardSm90`: loads, pipelines, masks, the sum of dQ, the epilogue) but for
the work on one block of queries, written anew below. It uses that package's inside, so its version is pinned (kernels.py).

Symbols: T tokens, H heads, K = 192, V = 128; M = 64 queries, N = 128 keys of a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import flash_attn.cute.interface as flash4
import torch
from cutlass import Boolean, Float32, Int32, cute
from cutlass.cute.nvgpu import warpgroup
from flash_attn.cute import utils
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.named_barrier import NamedBarrierBwd
from quack import layout_utils

M, N, K, V = 64, 128, 192, 128
WARP_GROUPS = 2


class WideTileBackward(FlashAttentionBackwardSm90):
    """Causal, as many key heads as query heads, no score or mask functions."""

    def __init__(self):
        super().__init__(
            cutlass.BFloat16,
            K,
            V,
            is_causal=True,
            tile_m=M,
            tile_n=N,
            Q_stage=2,
            dO_stage=1,
            PdS_stage=2,  # a block's dS is read while the next one's is written: one barrier a block
            SdP_swapAB=True,
            dKV_swapAB=False,
            dQ_swapAB=False,
            AtomLayoutMSdP=1,
            AtomLayoutNdKV=WARP_GROUPS,
            AtomLayoutMdQ=1,
            num_threads=(WARP_GROUPS + 1) * 128,
        )

    @cute.jit
    def mma_one_m_block(
        self,
        m_block: Int32,
        state_q,
        state_do,
        warp_group_idx: Int32,
        mma_qk_fn: Callable,
        mma_dov_fn: Callable,
        mma_pdo_fn: Callable,
        mma_dsq_fn: Callable,
        mma_dsk_fn: Callable,
        copy_P_r2s,
        copy_dS_r2s: Callable,
        pipeline_Q,
        pipeline_dO,
        tLSEsLSE: cute.Tensor,
        tLSEsdPsum: cute.Tensor,
        tdQsdQaccum: cute.Tensor,
        softmax_scale_log2: Float32,
        PdS_barrier,
        is_dQ_wg: cutlass.Constexpr[bool] = True,
        mask_fn: Callable | None = None,
        score_mod_fn: Callable | None = None,
        score_mod_bwd_fn: Callable | None = None,
        dKV_accumulate: Boolean = True,
    ):
        """One block of M queries against this thread block's N keys. Products are started in the order S, dP, dV, dK, dQ;
        `wg_wait=n` waits until at most the n youngest are under way."""
        stage, first = state_q.index, not dKV_accumulate
        pipeline_Q.consumer_wait(state_q, pipeline_Q.consumer_try_wait(state_q))
        S_NM = mma_qk_fn(A_idx=stage, wg_wait=0)
        # only blocks on the diagonal have a key after a query; the last keys' blocks, whose rows may lie beyond the
        # document, are all among them
        if m_block * M < (mask_fn.keywords["n_block"] + 1) * N:
            mask_fn(S_NM, m_block=m_block)
        S_mn = layout_utils.reshape_acc_to_mn(S_NM, transpose=True)
        for m in cutlass.range_constexpr(cute.size(S_mn, mode=[0])):
            lse = tLSEsLSE[m, stage]  # read where it is used: 16 registers that nobody has to spare
            for n in cutlass.range_constexpr(cute.size(S_mn, mode=[1])):
                S_mn[m, n] = cute.math.exp2(S_mn[m, n] * softmax_scale_log2 - lse, fastmath=True)
        P = utils.cvt_f16(layout_utils.reshape_acc_to_frgA(S_NM), self.dtype)

        pipeline_dO.consumer_wait(state_do, pipeline_dO.consumer_try_wait(state_do))
        dP_NM = mma_dov_fn(A_idx=0, wg_wait=-1)
        mma_pdo_fn(tCrA=P, B_idx=0, zero_init=first, wg_wait=1)  # dP is there, dV goes on
        dP_mn = layout_utils.reshape_acc_to_mn(dP_NM, transpose=True)
        for m in cutlass.range_constexpr(cute.size(dP_mn, mode=[0])):
            row_sum = tLSEsdPsum[m, 0]
            for n in cutlass.range_constexpr(cute.size(dP_mn, mode=[1])):
                dP_mn[m, n] = dP_mn[m, n] - row_sum
        dP = layout_utils.reshape_acc_to_frgA(dP_NM)  # the order of P
        for i in cutlass.range_constexpr(cute.size(dP)):
            dP[i] = dP[i] * Float32(P[i])
        dS = utils.cvt_f16(dP, self.dtype)

        mma_dsq_fn(tCrA=dS, B_idx=stage, zero_init=first, wg_wait=-1)  # dK, while dS goes to the other warp group
        copy_dS_r2s(dS, dst_idx=stage)
        cute.arch.fence_view_async_shared()
        PdS_barrier.arrive_and_wait()
        warpgroup.wait_group(0)  # dS's registers are free for dQ
        pipeline_dO.consumer_release(state_do)
        dQ = mma_dsk_fn(A_idx=stage, wg_wait=0)
        pipeline_Q.consumer_release(state_q)

        threads = self.num_threads_per_warp_group + cute.arch.WARP_SIZE
        empty, full = int(NamedBarrierBwd.dQEmptyWG0), int(NamedBarrierBwd.dQFullWG0)
        cute.arch.barrier(barrier_id=empty + warp_group_idx, number_of_threads=threads)
        cute.autovec_copy(cute.make_tensor(dQ.iterator, cute.make_layout(tdQsdQaccum.shape)), tdQsdQaccum)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=full + warp_group_idx, number_of_threads=threads)
        state_q.advance()
        state_do.advance()
        return state_q, state_do


class HopperBackward:
    """Holds the compiled kernels: one process compiles each of them once (seconds)."""

    def __init__(self):
        self._compiled: dict[tuple, Callable] = {}

    def __call__(self, d_out_THV, q_THK, k_THK, v_THV, out_THV, lse_HT, cu_seqlens, longest: int, scale: float):
        """(dq, dk, dv) of causal attention in bf16. `cu_seqlens`: int32 borders of the documents, or None for one document;
        `longest`: tokens of the longest document. `lse_HT`: log-sum-exp of the scaled scores, fp32.

        On fake tensors the kernels are compiled and nothing runs, as in flash-attn-4: that needs no GPU."""
        fake = flash4.is_fake_mode()
        tokens, heads = q_THK.shape[:2]
        whole = cu_seqlens is None
        # each document begins at a multiple of M in the kernel's own buffers
        rows = (tokens + (1 if whole else len(cu_seqlens)) * M - 1) // M * M
        new = lambda *shape: torch.empty(*((1,) if whole else ()), *shape, dtype=torch.float32, device=q_THK.device)  # noqa: E731
        dq_sum, row_sum, lse_log2 = new(heads, rows * K), new(heads, rows), new(heads, rows)
        batch = (lambda x: x.contiguous().unsqueeze(0)) if whole else torch.Tensor.contiguous
        q, k, v, out, d_out, lse = (batch(x) for x in (q_THK, k_THK, v_THV, out_THV, d_out_THV, lse_HT))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        # rows' sums of out * d_out, log-sum-exps to base 2, zeros for the sum of dq
        flash4._bwd_preprocess(
            out,
            d_out,
            row_sum,
            lse,
            lse_log2,
            dq_sum,
            cu_seqlens,
            None,
            None,
            cutlass.BFloat16,
            K,
            V,
            M,
            fake_mode=fake,
        )
        many = not whole and len(cu_seqlens) - 1 > flash4.BIN_BATCH_SEARCH_THRESH
        tiles = flash4._compute_tile_cumsum(cu_seqlens=cu_seqlens, tile_size=N)[0] if many else None
        key = (whole, many, longest <= M, longest <= N)
        if key not in self._compiled:
            self._compiled[key] = _compile(q, k, v, d_out, lse_log2, row_sum, dq_sum, dk, dv, scale, cu_seqlens, tiles)
        if not fake:
            nothing = (None,) * 7  # used lengths, window, semaphores
            self._compiled[key](
                *(q, k, v, d_out, lse_log2, row_sum, dq_sum, dk, dv, scale, cu_seqlens, cu_seqlens),
                *(*nothing, utils.AuxData(None, None), None, tiles),
            )
        flash4._bwd_postprocess_convert(
            *(dq_sum, dq, scale, cu_seqlens, None, 90, cutlass.BFloat16, K, M, WARP_GROUPS * 128, 1, False),
            fake_mode=fake,
        )
        return dq.view_as(q_THK), dk.view_as(k_THK), dv.view_as(v_THV)


def _compile(q, k, v, d_out, lse_log2, row_sum, dq_sum, dk, dv, scale: float, cu_seqlens, tiles) -> Callable:
    tensors = [flash4.to_cute_tensor(x) for x in (q, k, v, d_out, lse_log2, row_sum, dq_sum, dk, dv)]
    borders, tiles = (None if x is None else flash4.to_cute_tensor(x, assumed_align=4) for x in (cu_seqlens, tiles))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    rest = (*(None,) * 7, utils.AuxData(None, None), None, tiles, stream)
    return cute.compile(WideTileBackward(), *tensors, scale, borders, borders, *rest, options="--enable-tvm-ffi")
