"""The reference kernels against slower and plainer arithmetic, in fp64; the choice of kernels; the kernel cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from config import UserError
from kernels import Documents, Experts, GatedMlp, ReferenceAttention

PLAIN = kernels.reference_kernels("test")


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- documents


def test_borders_inside_a_piece():
    documents = Documents((0, 5, 6, 20))
    assert documents.spans == [(0, 5), (5, 6), (6, 20)]
    assert documents.within(0, 20).bounds == (0, 5, 6, 20)
    assert documents.within(5, 6).bounds == (0, 1)
    assert documents.within(3, 10).bounds == (0, 2, 3, 7)
    assert documents.within(6, 12).bounds == (0, 6)
    assert [documents.starts_at(i) for i in (0, 4, 5, 6, 7)] == [True, False, True, True, False]
    assert documents.longest == 14


# ---------------------------------------------------------------------------------------------- KDA and convolution


def kda_token_by_token(q, k, v, g, beta, A_log, dt_bias, state, documents):
    """The recurrence as it is written down: decay, read, correct, write, one token at a time."""
    heads, size = q.shape[1:]
    unit = lambda x: x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)  # noqa: E731
    q, k = unit(q) / math.sqrt(size), unit(k)
    decay = torch.exp(-torch.exp(A_log).view(heads, 1) * F.softplus(g + dt_bias.view(heads, size)))
    beta, S, out = torch.sigmoid(beta), state, []
    for t in range(q.shape[0]):
        if t and documents.starts_at(t):
            S = torch.zeros_like(S)
        S = decay[t][..., None] * S
        read = torch.einsum("hk,hkv->hv", k[t], S)
        S = S + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - read))
        out.append(torch.einsum("hk,hkv->hv", q[t], S))
    return torch.stack(out), S


@pytest.mark.parametrize("bounds", [(0, 1), (0, 16), (0, 37), (0, 5, 6, 37)])
def test_kda_by_chunks_is_the_recurrence(bounds):
    T, H, K, V = bounds[-1], 2, 6, 5
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state")
    shapes = ((T, H, K), (T, H, K), (T, H, V), (T, H, K), (T, H), (H,), (H * K,), (H, K, V))
    values = [draw(*shape).requires_grad_() for shape in shapes]
    results = []
    for function in (kernels.kda_reference, kda_token_by_token):
        out, state = function(*values, Documents(bounds))
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (out, state)]
        grads = torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), values)
        results.append([out, state, *grads])
    for name, found, expected in zip(("out", "last state", *names), *results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_kda_in_two_pieces_is_kda_whole():
    T, cut, H, K = 30, 13, 2, 4
    q, k, v, g = (draw(T, H, K) for _ in range(4))
    beta, A_log, dt_bias = draw(T, H), draw(H), draw(H * K)

    def run(a, b, state):
        return kernels.kda_reference(
            *(x[a:b] for x in (q, k, v, g, beta)), A_log, dt_bias, state, Documents((0, b - a))
        )

    whole, last = run(0, T, None)
    first, state = run(0, cut, None)
    second, state = run(cut, T, state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(state, last)


def test_a_strong_decay_overflows_nothing():
    T, H, K = 64, 1, 4
    g = torch.full((T, H, K), 500.0, dtype=torch.float64, requires_grad=True)
    out, _ = kernels.kda_reference(
        draw(T, H, K), draw(T, H, K), draw(T, H, K), g, draw(T, H), draw(H), draw(H * K), None, Documents((0, T))
    )
    (grad,) = torch.autograd.grad(out.sum(), [g])
    assert torch.isfinite(out).all() and torch.isfinite(grad).all()


def test_convolution_with_carried_inputs_and_borders():
    x, weight, tail = draw(12, 3), draw(3, 4), draw(3, 3)
    found = kernels.causal_conv_reference(x, weight, tail, Documents((0, 5, 12)))
    for t in range(12):
        history = torch.cat([tail, x[: t + 1]]) if t < 5 else torch.cat([torch.zeros(3, 3), x[5 : t + 1]])
        expected = F.silu((history[-4:].t() * weight).sum(1))
        torch.testing.assert_close(found[t], expected)


# ---------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("bounds", [(0, 1), (0, 300), (0, 7, 8, 300)])
def test_attention_by_blocks_is_softmax_attention(bounds):
    T, H, K, V = bounds[-1], 2, 6, 4
    q, k, v = (draw(T, H, size).requires_grad_() for size in (K, K, V))
    d_out, documents = draw(T, H, V), Documents(bounds)
    attention = ReferenceAttention()
    out, lse = attention.forward(q.detach(), k.detach(), v.detach(), documents, 0.3)
    i = torch.arange(T)
    number = torch.zeros(T, dtype=torch.int64)
    for bound in bounds[1:-1]:
        number[bound:] += 1
    allowed = (i[None] <= i[:, None]) & (number[None] == number[:, None])
    scores = (torch.einsum("ihk,jhk->hij", q, k) * 0.3).masked_fill(~allowed, -math.inf)
    expected = torch.einsum("hij,jhv->ihv", scores.softmax(-1), v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    grads = attention.backward(d_out, q.detach(), k.detach(), v.detach(), out, lse, documents, 0.3)
    for found, wanted in zip(grads, torch.autograd.grad(expected, [q, k, v], d_out), strict=True):
        torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------------------------------------- experts, MLP, norms, loss


@pytest.mark.parametrize("hit", [5, 2], ids=["all experts", "three experts without a token"])
def test_experts_are_a_weighted_sum_of_mlps(hit):
    n, D, width, E, k = 9, 6, 4, 5, 2
    x, weight, gate_up, down = (draw(*s).requires_grad_() for s in ((n, D), (n, k), (E, 2 * width, D), (E, D, width)))
    expert = torch.rand(n, hit).topk(k)[1]
    d_out = draw(n, D)
    expected = torch.zeros(n, D, dtype=torch.float64)
    for token in range(n):
        for j in range(k):
            e = expert[token, j]
            gate, up = (gate_up[e] @ x[token]).chunk(2)
            expected[token] += weight[token, j] * (down[e] @ (F.silu(gate) * up))
    inputs = [x, weight, gate_up, down]
    wanted = torch.autograd.grad(expected, inputs, d_out)
    out = Experts.apply(x, weight, expert, gate_up, down, PLAIN, True)
    torch.testing.assert_close(out, expected)
    for need_output in (True, False):  # without the output the gradients are the same
        out = Experts.apply(x, weight, expert, gate_up, down, PLAIN, need_output)
        for found, grad in zip(torch.autograd.grad(out, inputs, d_out), wanted, strict=True):
            torch.testing.assert_close(found, grad)


def test_frozen_experts_get_no_weight_gradient():
    calls = []
    watched = dataclasses.replace(PLAIN, grouped_weight_grad=lambda *a: calls.append(a))
    x, weight = draw(4, 6).requires_grad_(), draw(4, 2)
    out = Experts.apply(x, weight, torch.tensor([[0, 1]] * 4), draw(3, 8, 6), draw(3, 6, 4), watched, True)
    out.sum().backward()
    assert x.grad is not None and not calls


def test_gated_mlp_gradients():
    tensors = [draw(*s).requires_grad_() for s in ((5, 6), (7, 6), (7, 6), (6, 7))]
    x, gate, up, down = tensors
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    d_out = draw(5, 6)
    wanted = torch.autograd.grad(expected, tensors, d_out)
    for need_output in (True, False):
        out = GatedMlp.apply(*tensors, PLAIN, need_output)
        if need_output:
            torch.testing.assert_close(out, expected)
        for found, grad in zip(torch.autograd.grad(out, tensors, d_out), wanted, strict=True):
            torch.testing.assert_close(found, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True], ids=["rms_norm", "gated_norm"])
def test_norms_are_those_of_transformers(gated, dtype):
    """Outputs bit for bit, gradients of everything, rows of a slice included."""
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNorm, KimiLinearRMSNormGated

    x, gate, d = (draw(7, 3, 24)[..., :16].to(dtype).requires_grad_() for _ in range(3))
    module = (KimiLinearRMSNormGated if gated else KimiLinearRMSNorm)(16, eps=1e-3).to(dtype)
    torch.nn.init.normal_(module.weight)
    inputs = [x, gate] if gated else [x]
    reference = kernels.gated_norm_reference if gated else kernels.rms_norm_reference
    out, expected = reference(*inputs, module.weight, 1e-3), module(*inputs)
    assert out.dtype == dtype and out.equal(expected)
    leaves = [*inputs, module.weight]
    for found, wanted in zip(*(torch.autograd.grad(y, leaves, d) for y in (out, expected)), strict=True):
        torch.testing.assert_close(found, wanted)


def test_norms_work_in_fp64():
    x, gate, weight = (draw(*shape).requires_grad_() for shape in ((5, 8), (5, 8), (8,)))
    assert torch.autograd.gradcheck(lambda x, w: kernels.rms_norm_reference(x, w, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda *t: kernels.gated_norm_reference(*t, 1e-3), (x, gate, weight))


def test_cross_entropy_writes_its_gradient_over_the_logits():
    logits, label = draw(6, 11).requires_grad_(), torch.tensor([3, -100, 0, 10, 5, -100])
    expected = F.cross_entropy(logits, label, reduction="none", ignore_index=-100)
    (wanted,) = torch.autograd.grad(expected.sum() * 0.25, [logits])
    found = logits.detach().clone()
    losses, first_choice = kernels.cross_entropy_reference(found, label, 0.25, True)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, wanted)
    assert first_choice.equal((logits.argmax(-1) == label) & (label != -100))


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_documents_of_one_token_need_no_kernel(name):
    """cuDNN refuses them; a stream of nothing else shows, without a GPU, what is done instead."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(4, 2, size) for size in (24, 24, 16, 16))
    documents, attention, reference = (
        Documents((0, 1, 2, 3, 4)),
        kernels.SdpaAttention(name),
        kernels.ReferenceAttention(),
    )
    found, expected = (which.forward(q, k, v, documents, 0.3) for which in (attention, reference))
    torch.testing.assert_close(found, expected)
    grads = attention.backward(d_out, q, k, v, *found, documents, 0.3)
    wanted = reference.backward(d_out, q, k, v, *expected, documents, 0.3)
    torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the choice


def test_the_cpu_runs_references_and_refuses_gpu_backends():
    chosen = kernels.choose_kernels(torch.device("cpu"), torch.float32, qk_dim=192, v_dim=128)
    assert chosen.attention.name == "reference" and "CPU" in chosen.text
    with pytest.raises(UserError, match="'flash4' needs a GPU"):
        kernels.choose_kernels(torch.device("cpu"), torch.float32, qk_dim=192, v_dim=128, attention_backend="flash4")


@pytest.mark.parametrize(
    ("capability", "sizes", "problems"),
    [((10, 0), (192, 128), {}), ((9, 0), (128, 128), {}), ((9, 0), (192, 128), {"flash4": "another version"})],
    ids=["Blackwell", "other head sizes", "an untested flash-attn-4"],
)
def test_our_backward_tile_runs_only_where_it_was_tested(capability, sizes, problems):
    """tests/test_gpu_kernels.py has the case in which it runs; here its import alone would fail."""
    attention, reason = kernels._flash4(capability, *sizes, problems, "asked for")
    assert attention._hopper_backward is None and reason == "asked for"


@pytest.mark.parametrize("wanted", ["efficient", "math"])
def test_slow_backends_are_refused_wherever_they_are_asked_for(wanted):
    with pytest.raises(UserError, match="refused on a GPU: it runs at 142 TFLOP/s"):
        kernels.choose_attention(torch.device("cuda"), qk_dim=192, v_dim=128, wanted=wanted)


def test_kernel_cache_is_kept_and_the_users_own_is_left_alone():
    environ = {"XDG_CACHE_HOME": "/somewhere"}
    assert str(kernels.keep_kernel_cache(environ)) == "/somewhere/kimi_linear_2m/triton"
    assert environ["TRITON_CACHE_AUTOTUNING"] == "1"
    environ = {"TRITON_CACHE_DIR": "/mine", "TRITON_CACHE_AUTOTUNING": "0"}
    assert str(kernels.keep_kernel_cache(environ)) == "/mine"
    assert environ["TRITON_CACHE_AUTOTUNING"] == "0"


def test_tuning_is_taken_from_the_repository_where_the_gpu_is_known():
    environ = {}
    assert "taken from tuned_kernels/sm_90" in kernels.use_kept_tuning((9, 0), environ)
    assert environ["FLA_CACHE_MODE"] == "full"
    files = sorted(Path(environ["FLA_CONFIG_DIR"]).glob("*.json"))
    assert "chunk_kda_bwd_kernel_intra" in {file.stem for file in files}
    for file in files:  # fla's format: kernel name, entries by the md5 of their key, and a default
        values = json.loads(file.read_text())
        assert values["kernel_name"] == file.stem
        for name, entry in values["autotune_entries"].items():
            key = json.dumps(entry["autotune_key"], separators=(",", ":"), sort_keys=True)
            assert hashlib.md5(key.encode()).hexdigest() == name
        assert {"kwargs", "num_warps", "num_stages", "num_ctas"} <= set(values["default_config"])
    unknown = {}
    assert "tunes its kernels for this GPU" in kernels.use_kept_tuning((8, 9), unknown)
    assert unknown == {}
    assert "FLA_CACHE_MODE=strict" in kernels.use_kept_tuning((9, 0), {"FLA_CACHE_MODE": "strict"})
