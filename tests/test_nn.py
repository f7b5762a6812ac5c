"""The drop-in modules against the modules whose place they take."""

import os

import pytest
import torch
import torch.nn.functional as F
from devices import forced, needs_gpu, on_each_device
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ceg_kernels import use_backend
from ceg_kernels.nn import FlashAttention, MoE, RMSNorm, RotaryEmbedding, grouped_linear


def transformers(name):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers", reason="transformers is not installed")
    return pytest.importorskip(f"transformers.models.{name}")


def randomised(module, seed=0, std=0.5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std)
    return module


def assert_same(ours, theirs, x, **kwargs):
    """Outputs and every gradient, with a random gradient from above."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(a, **kwargs), theirs(b, **kwargs)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(a.grad, b.grad)
    for (name, p), (_, q) in zip(
        sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True
    ):
        error = (p.grad - q.grad).abs().max()
        assert error <= 1e-5 * q.grad.abs().max() + 1e-6, f"{name}: off by {error}"


@on_each_device
def test_rms_norm_takes_the_place_of_torchs(device, backend):
    theirs = randomised(nn.RMSNorm(48, eps=1e-5)).to(device)
    ours = RMSNorm(48, 1e-5).to(device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, residual = torch.randn(2, 2, 48, device=device)
    with use_backend(backend):
        assert_same(ours, theirs, torch.randn(3, 5, 48, device=device))
        y, total = ours(x, residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, theirs(x + residual))


def test_rms_norm_starts_as_the_identity_scale():
    x = torch.randn(4, 16)
    torch.testing.assert_close(RMSNorm(16, weight_offset=1.0)(x), RMSNorm(16)(x))
    assert RMSNorm(16, weight_offset=1.0).weight.abs().max() == 0


def test_rotary_embedding_rotates_as_llama_does():
    llama = transformers("llama.modeling_llama")
    q, k = torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16)
    ours = RotaryEmbedding(16, 32, base=500.0)
    assert not ours.state_dict()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 3, 0, 1, 31, 2, 8]])
    angle = positions[..., None] * 500.0 ** (-torch.arange(0, 16, 2) / 16)
    angle = torch.cat((angle, angle), -1)
    expected = llama.apply_rotary_pos_emb(
        q.transpose(1, 2), k.transpose(1, 2), angle.cos(), angle.sin()
    )
    for y, x in zip(ours(q, k, positions), expected, strict=True):
        torch.testing.assert_close(y, x.transpose(1, 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(q, k)[0][0], ours(q, k, positions)[0][0])


@on_each_device
def test_rotary_table_survives_casts_and_empty_memory(device, backend):
    exact = RotaryEmbedding(16, 32).to(device)
    q, k = torch.randn(2, 7, 4, 16, device=device), torch.randn(2, 7, 2, 16, device=device)
    with use_backend("reference"):
        expected = exact(q, k)
    for module in (
        RotaryEmbedding(16, 32).to(device, torch.bfloat16),
        RotaryEmbedding(16, 32).to("meta").to_empty(device=device),
    ):
        assert module.cos.dtype == torch.float32
        assert torch.equal(module.cos, exact.cos)
        assert torch.equal(module.sin, exact.sin)
        with use_backend(backend):
            torch.testing.assert_close(module(q, k), expected)


def test_rotary_refuses_a_longer_sequence():
    q = torch.randn(1, 33, 2, 16)
    with pytest.raises(ValueError, match="at most max_seq_len = 32 positions, got 33"):
        RotaryEmbedding(16, 32)(q, q)


@on_each_device
def test_flash_attention_module(device, backend):
    dtype, near = (torch.bfloat16, 0.02) if backend == "cuda" else (torch.float32, 1e-5)
    q, k, v = (torch.randn(2, 9, heads, 16, device=device, dtype=dtype) for heads in (4, 2, 2))
    module = FlashAttention(causal=True, softmax_scale=0.3)
    assert not module.state_dict()
    heads_first = (t.float().transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(
        *heads_first, is_causal=True, scale=0.3, enable_gqa=True
    )
    with use_backend(backend):
        ours, first = module(q, k, v), FlashAttention(causal=True, window=(0, 0))(q, k, v)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected.transpose(1, 2), atol=near, rtol=near)
    torch.testing.assert_close(first, v.repeat_interleave(2, dim=2))


@on_each_device
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_moe_takes_the_place_of_mixtrals(top_k, device, backend):
    mixtral = transformers("mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=32, intermediate_size=24, num_local_experts=4, num_experts_per_tok=top_k,
        experts_implementation="eager",
    )  # fmt: skip
    theirs = randomised(mixtral.MixtralSparseMoeBlock(config), std=0.2).to(device)
    ours = MoE(32, 24, 4, top_k).to(device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with use_backend(forced(backend)):
        assert_same(ours, theirs, torch.randn(2, 13, 32, device=device))


@on_each_device
def test_moe_with_deepseeks_bias_and_shared_expert(device, backend):
    ours = randomised(MoE(16, 24, 4, 2, score="sigmoid", balance_bias=True, shared_width=8))
    ours = ours.to(device)
    assert set(ours.state_dict()) == {
        "gate.weight",
        "gate.e_score_correction_bias",
        "experts.gate_up_proj",
        "experts.down_proj",
        *(f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    bias = ours.gate.e_score_correction_bias
    bias.copy_(torch.tensor([0.0, 9.0, 0.0, 8.0]))  # outweighs every score: experts 1 and 3
    x = torch.randn(5, 16, device=device)
    scores = (x @ ours.gate.weight.T).sigmoid()[:, [1, 3]]
    expected = ours.shared_experts(x)
    for e, weight in zip((1, 3), (scores / scores.sum(1, keepdim=True)).T, strict=True):
        gate, up = (x @ ours.experts.gate_up_proj[e].T).chunk(2, dim=-1)
        expected = expected + weight[:, None] * (F.silu(gate) * up @ ours.experts.down_proj[e].T)
    with use_backend(backend):
        torch.testing.assert_close(ours(x), expected)


def test_bias_balances_the_load():
    torch.manual_seed(0)
    module = MoE(16, 8, 8, 2, score="sigmoid", balance_bias=True)
    x = torch.randn(512, 16) + 0.5  # off centre, so that some experts are favoured

    def imbalance():
        module.gate.tokens_seen.zero_()
        module(x)
        load = module.gate.tokens_seen.float()
        assert load.sum() == 2 * 512
        return float(load.max() / load.mean())

    before = imbalance()
    for _ in range(200):
        module(x)
        module.update_bias(0.01)
        assert not module.gate.tokens_seen.any()
    assert before > 1.5
    assert imbalance() < 1.1
    module.eval()
    module.gate.tokens_seen.zero_()
    module(x)
    assert not module.gate.tokens_seen.any()  # evaluation is no evidence of the training load


def test_bias_counts_the_tokens_of_every_rank(monkeypatch):
    module = MoE(8, 8, 2, 1, score="sigmoid", balance_bias=True)
    module.gate.tokens_seen.copy_(torch.tensor([3, 1]))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    elsewhere = torch.tensor([0, 4])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda seen: seen.add_(elsewhere))
    module.update_bias(0.5)
    assert module.gate.e_score_correction_bias.tolist() == [0.5, -0.5]


@on_each_device
def test_router_decides_in_fp32(device, backend):
    module, x = MoE(16, 8, 4, 2).to(device), torch.randn(32, 16, device=device)
    exact = x @ module.gate.weight.T
    with torch.autocast(device, torch.bfloat16), use_backend(backend):
        torch.testing.assert_close(module.gate(x), exact)


def test_modules_say_what_they_are():
    assert "48, eps=1e-05, weight_offset=1.0" in repr(RMSNorm(48, 1e-5, weight_offset=1.0))
    assert "16, max_seq_len=32, base=500.0" in repr(RotaryEmbedding(16, 32, base=500.0))
    assert "causal=True, window=(4, 0)" in repr(FlashAttention(causal=True, window=(4, 0)))


def test_auxiliary_loss_is_one_when_balanced_and_larger_when_not():
    module = MoE(8, 8, 4, 1)
    nn.init.zeros_(module.gate.weight)
    with torch.no_grad():
        module.gate.weight.copy_(4 * torch.eye(4, 8))
    even = torch.eye(4, 8).repeat(3, 1)
    _, balanced = module(even, return_aux=True)
    _, skewed = module(even[:1].repeat(12, 1), return_aux=True)
    assert float(balanced.detach()) == pytest.approx(1.0)
    assert float(skewed.detach()) == pytest.approx(
        4 * float(torch.softmax(torch.tensor([4.0, 0, 0, 0]), 0)[0])
    )
    skewed.backward()
    assert module.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 0], [0, 0, 0, 8], [2, 2, 2, 2], [0, 0, 0, 0]])
def test_grouped_linear(sizes, device):
    rows = torch.randn(sum(sizes), 16, device=device, requires_grad=True)
    weight = torch.randn(4, 24, 16, device=device, requires_grad=True)
    offsets = F.pad(torch.tensor(sizes, device=device).cumsum(0), (1, 0)).int()
    out = grouped_linear(rows, weight, offsets)
    expected = torch.cat([x @ w.T for x, w in zip(rows.split(sizes), weight, strict=True)])
    torch.testing.assert_close(out, expected)
    for dout in (torch.randn_like(out), torch.ones((), device=device).expand_as(out)):
        ours = torch.autograd.grad(out, (rows, weight), dout, retain_graph=True)
        theirs = torch.autograd.grad(expected, (rows, weight), dout, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


def test_grouped_linear_is_a_sound_op():
    rows, weight = torch.randn(9, 8, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    torch.library.opcheck(torch.ops.ceg_nn.grouped_linear.default, (rows, weight, offsets))
    dout = torch.randn(9, 4)
    torch.library.opcheck(torch.ops.ceg_nn.grouped_outer.default, (dout, rows.detach(), offsets))
    with FlopCounterMode(display=False) as counter:
        grouped_linear(rows, weight, offsets).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 9 * 8 * 4


def test_moe_refuses_more_choices_than_experts():
    with pytest.raises(ValueError, match=r"top_k must be in \[1, num_experts = 4\], got 5"):
        MoE(8, 8, 4, 5)
