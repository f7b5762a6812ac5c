"""Model FLOPs: the declared sum against torch's counter and against published numbers."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ceg_kernels import use_backend
from ceg_model.config import GPTConfig
from ceg_model.flops import model_flops, params_count
from ceg_model.gpt import build_model
from ceg_model.mfu import check_dense, dense_peak, mfu, palm_flops_per_token

TINY = GPTConfig(vocab_size=37, seq_len=24, n_layer=2, n_head=4, d_model=32)
MOE = dataclasses.replace(TINY, mlp="moe", num_experts=4)
LSTM = dataclasses.replace(TINY, arch="lstm", position="none")
GPT2 = GPTConfig(
    vocab_size=50257, seq_len=1024, n_layer=12, n_head=12, d_model=768, norm="layer_norm"
)


def change(base=TINY, **fields):
    return dataclasses.replace(base, **fields)


CONFIGS = {
    "baseline": TINY,
    "layer_norm": change(norm="layer_norm"),
    "rms_norm": change(norm="rms_norm"),
    "final norm alone": change(final_norm="rms_norm"),
    "no norm at all": change(final_norm="none"),
    "rope": change(position="rope"),
    "no positions": change(position="none"),
    "gqa": change(n_kv_head=2),
    "mqa with rope and qk_norm": change(n_kv_head=1, position="rope", qk_norm=True),
    "window": change(window=5),
    "window wider than the sequence": change(window=100),
    "swiglu": change(mlp="swiglu"),
    "odd width, biases, untied": change(d_ff=50, bias=True, tied_head=False),
    "moe": MOE,
    "moe top 1": change(MOE, top_k=1),
    "moe top 3 of swiglu": change(MOE, top_k=3, expert="swiglu"),
    "moe shared": change(MOE, shared_expert=True),
    "moe shared swiglu": change(MOE, shared_expert=True, expert="swiglu"),
    "moe auxiliary loss": change(MOE, balance="aux"),
    "moe bias": change(MOE, balance="bias", top_k=3),
    "all at once": change(
        MOE, norm="rms_norm", position="rope", n_kv_head=2, qk_norm=True, window=7, dropout=0.1,
        balance="bias", shared_expert=True, tied_head=False,
    ),
    "lstm": LSTM,
    "lstm with norms": change(LSTM, norm="rms_norm", n_layer=1, tied_head=False),
}  # fmt: skip
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@configs
@pytest.mark.parametrize(("batch", "seq_len"), [(2, 24), (1, 1), (3, 7)])
def test_equals_the_counter_of_torch(config, batch, seq_len):
    model = build_model(config)
    idx = torch.randint(config.vocab_size, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        _, loss = model(idx, idx)
        forward = counter.get_total_flops()
        loss.backward()
    expected = model_flops(config, seq_len, batch)
    assert forward == expected.forward
    assert counter.get_total_flops() == expected.total
    assert expected.per_token * batch * seq_len == pytest.approx(expected.total)


@pytest.mark.parametrize("backend", ["reference", "torch", None])
def test_count_does_not_depend_on_how_it_is_computed(backend):
    config = change(CONFIGS["all at once"], qk_norm=False)
    model, idx = build_model(config), torch.randint(config.vocab_size, (2, 24))
    with FlopCounterMode(display=False) as counter, use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = model(idx, idx)
        loss.backward()
    assert counter.get_total_flops() == model_flops(config, batch=2).total


@configs
def test_params_count(config):
    model = build_model(config)
    assert params_count(config) == sum(p.numel() for p in model.parameters())
    without = [p.numel() for name, p in model.named_parameters() if not name.startswith("pos")]
    assert params_count(config, positions=False) == sum(without)


def test_active_params_of_a_mixture():
    dense, moe = params_count(TINY), params_count(MOE, active=True)
    assert moe == dense + TINY.n_layer * MOE.num_experts * MOE.d_model  # the router
    assert params_count(MOE) > moe
    assert params_count(TINY, active=True) == dense


def test_batch_and_bad_lengths():
    one, many = model_flops(MOE), model_flops(MOE, batch=6)
    assert (many.forward, many.backward) == (6 * one.forward, 6 * one.backward)
    assert model_flops(MOE, MOE.seq_len) == one
    with pytest.raises(ValueError, match=r"seq_len must be in \[1, 24\] .* got 25 and 1"):
        model_flops(TINY, 25)
    with pytest.raises(ValueError, match="batch at least 1, got 24 and 0"):
        model_flops(TINY, batch=0)


def test_gpt2_124m():
    assert params_count(GPT2) == 124_337_664
    full = model_flops(GPT2, causal=False)
    assert full.forward == 291_648_307_200
    assert full.total == 874_944_921_600
    palm = palm_flops_per_token(params_count(GPT2, positions=False), 12, 12, 64, 1024)
    assert palm == 854_553_600
    assert palm * 1024 == 875_062_886_400
    # The published ratio counts T^2 / 2 pairs; the mask leaves T (T + 1) / 2.
    half = full.total - 3 * 2 * GPT2.n_layer * GPT2.d_model * 1024**2
    assert half / full.total == pytest.approx(0.9337, abs=5e-5)
    diagonal = 3 * 2 * GPT2.n_layer * GPT2.d_model * 1024
    assert model_flops(GPT2).total == half + diagonal


@pytest.mark.parametrize(
    ("n_layer", "n_head", "d_model", "seq_len", "n_params", "per_token"),
    [
        (8, 8, 512, 512, 50_921_984, 330_697_728),
        (6, 6, 384, 512, 29_933_952, 193_759_488),
        (10, 12, 768, 1024, 109_413_120, 750_850_560),
    ],
    ids=["v1", "v2 compact", "v2 full"],
)
def test_models_of_the_paper(n_layer, n_head, d_model, seq_len, n_params, per_token):
    """Sanderson et al. 2025: no norm but a LayerNorm before the head, padded vocabulary."""
    config = GPTConfig(
        vocab_size=50304, seq_len=seq_len, n_layer=n_layer, n_head=n_head, d_model=d_model,
    )  # fmt: skip
    counted = params_count(config, positions=False)
    assert counted == n_params
    palm = palm_flops_per_token(counted, n_layer, n_head, d_model // n_head, seq_len)
    assert palm == per_token


@pytest.mark.parametrize(
    ("n_layer", "d_model", "d_ff", "n_head", "ratio"),
    [
        (10, 640, 2560, 10, 1.03),
        (20, 1024, 4096, 16, 1.10),
        (24, 1280, 5120, 10, 1.08),
        (26, 1792, 7168, 14, 1.04),
        (28, 2048, 8192, 16, 1.03),
        (40, 3584, 14336, 28, 0.99),
    ],
    ids=["73M", "305M", "552M", "1.1B", "1.6B", "6.8B"],
)
def test_chinchilla_table_a4(n_layer, d_model, d_ff, n_head, ratio):
    """Hoffmann et al. 2022: FLOPs without embeddings and logits, over 6 N D with all parameters.

    They count 3 H T^2 for the softmax of a layer; their relative positions are one more d x d
    matrix a layer, which is in N alone.
    """
    config = GPTConfig(
        vocab_size=32000, seq_len=2048, n_layer=n_layer, n_head=n_head, d_model=d_model, d_ff=d_ff,
        position="none",
    )  # fmt: skip
    logits = 6 * 2048 * 32000 * d_model
    softmax = 3 * 3 * n_layer * n_head * 2048**2
    flops = model_flops(config, causal=False).total - logits + softmax
    n_params = params_count(config) + n_layer * d_model**2
    assert flops / (6 * n_params * 2048) == pytest.approx(ratio, abs=0.005)


def test_published_mfus():
    # nanoGPT: 100 sequences in 0.755 s on an A100.
    a100 = dense_peak("NVIDIA A100-SXM4-80GB").flops
    gpt2 = 100 * model_flops(GPT2, causal=False).total
    assert mfu(gpt2, 0.755, peak=a100) == pytest.approx(0.3714, abs=5e-5)
    # PaLM 540B: 118 layers, 48 heads of 256 in a model of width 18432.
    tpu = {"peak": dense_peak("TPU v4").flops, "devices": 6144}
    palm = palm_flops_per_token(540_350_000_000, 118, 48, 256, 2048)
    assert mfu(238.3e3 * palm, 1.0, **tpu) == pytest.approx(0.462, abs=5e-4)
    assert mfu(238.3e3 * 6 * 540.35e9, 1.0, **tpu) == pytest.approx(0.457, abs=5e-4)
    # MT-NLG 530B: 105 layers, 128 heads, d = 20480.
    n_params = params_count(
        GPTConfig(vocab_size=51200, seq_len=2048, n_layer=105, n_head=128, d_model=20480)
    )
    assert n_params == pytest.approx(530e9, rel=2e-3)
    cards = {"peak": a100, "devices": 2240}
    assert mfu(65.43e3 * 6 * n_params, 1.0, **cards) == pytest.approx(0.297, abs=1e-3)
    with_attention = palm_flops_per_token(n_params, 105, 128, 160, 2048)
    assert mfu(65.43e3 * with_attention, 1.0, **cards) == pytest.approx(0.302, abs=1e-3)


def test_mfu_refuses_what_cannot_be():
    assert mfu(1e12, 1.0, peak=2e12) == 0.5
    with pytest.raises(ValueError, match=r"MFU must be at most 1, got 2.000 .*the peak is too low"):
        mfu(4e12, 1.0, peak=2e12)
    with pytest.raises(ValueError, match=r"dense, got 1.979e\+15: the bfloat16 figure of the H100"):
        mfu(1e12, 1.0, peak=1979e12)
    with pytest.raises(ValueError, match=r"of the A100 with sparsity; dense is 3.12e\+14"):
        check_dense(624e12, "float16")
    check_dense(1979e12, "float8")  # dense there
    with pytest.raises(ValueError, match="peak must be above 0 FLOP/s, got 0"):
        check_dense(0)
    with pytest.raises(ValueError, match="seconds must be above 0"):
        mfu(1.0, 0.0, peak=1e12)


def test_dense_peaks():
    assert dense_peak("NVIDIA H200").flops == dense_peak("NVIDIA H100 80GB HBM3").flops == 989e12
    assert dense_peak("NVIDIA H100 PCIe", "float16").flops == 756e12
    assert dense_peak("NVIDIA H200", "float8") is None
    assert dense_peak("Some CPU") is None
    assert "datasheet" in dense_peak("NVIDIA A100-SXM4-80GB", "float32").source
