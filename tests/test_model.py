"""The model: what each switch does, weights, gradients, loading GPT-2, compiling."""

import dataclasses
import os

import pytest
import torch
from devices import forced, on_each_device
from torch import nn

from ceg_kernels import use_backend
from ceg_kernels.measure.accuracy import FP32_REDUCTION_SLACK, error_fraction
from ceg_model.config import GPTConfig
from ceg_model.gpt import LSTM, LSTMLayer, build_model, parameter_groups
from ceg_model.gpt2 import gpt2_from_state_dict

TINY = GPTConfig(vocab_size=37, seq_len=24, n_layer=2, n_head=4, d_model=32)


def change(**fields):
    return dataclasses.replace(TINY, **fields)


CONFIGS = {
    "baseline": TINY,
    "layer_norm": change(norm="layer_norm", bias=True),
    "rms_norm": change(norm="rms_norm", final_norm="layer_norm"),
    "rope": change(position="rope", n_kv_head=2, qk_norm=True),
    "no positions": change(position="none", tied_head=False, final_norm="none"),
    "mqa, window": change(n_kv_head=1, window=5),
    "native sparse": change(
        attention="native_sparse", n_kv_head=2, select_block=4, select_count=3, sparse_window=5
    ),
    "swiglu": change(mlp="swiglu"),
    "moe": change(mlp="moe", num_experts=4, balance="aux"),
    "moe bias": change(
        mlp="moe", num_experts=4, top_k=1, balance="bias", shared_expert=True, expert="swiglu"
    ),
    "lstm": change(arch="lstm", position="none", norm="layer_norm"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def tokens(batch=2, seq_len=24, seed=1):
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (batch, seq_len), generator=stream)


def logits_of(config, idx, seed=0):
    with torch.no_grad():
        return build_model(config, seed).eval()(idx)[0]


@configs
def test_every_parameter_learns(config):
    model = build_model(config)
    logits, loss = model(tokens(), tokens(seed=2))
    assert logits.shape == (2, 24, 37)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(
        3.61, abs=0.1
    )  # ln 37: the model knows nothing yet
    loss.backward()
    for name, p in model.named_parameters():
        # One expert may get no token at all; the stack of them does.
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def gradients(config, device, backend, dtype):
    """The loss, and what each parameter gets."""
    model = build_model(config).to(device, dtype)
    with use_backend(backend):
        _, loss = model(tokens().to(device), tokens(seed=2).to(device))
        loss.backward()
    return [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]


@on_each_device
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "lstm"])  # no op of ours
def test_loss_and_gradients_are_those_of_the_formula(name, device, backend):
    """All parameters together, in units of their largest gradient: the rule needs many numbers.
    Without those whose gradient cancels, as that of a bias of all keys does."""
    config = CONFIGS[name]
    ours = gradients(config, device, forced(backend), torch.float32)
    gold = gradients(config, "cpu", "reference", torch.float64)
    base = gradients(config, "cpu", "reference", torch.float32)
    units = [t.abs().max() for t in gold]
    errors = [(b.double() - g).abs().max() for b, g in zip(base, gold, strict=True)]
    kept = [i for i, (error, unit) in enumerate(zip(errors, units, strict=True))
            if error < 1e-5 * unit]  # fmt: skip
    assert len(kept) > 0.8 * len(units)
    our, true, near = (
        torch.cat([(ts[i].double() / units[i]).flatten() for i in kept])
        for ts in (ours, gold, base)
    )
    assert error_fraction(our.float(), true, near.float(), FP32_REDUCTION_SLACK) <= 1


@configs
def test_no_position_sees_a_later_one(config):
    idx = tokens()
    later = idx.clone()
    later[:, 15:] = tokens(seed=2)[:, 15:]
    before, after = logits_of(config, idx), logits_of(config, later)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@configs
def test_a_few_steps_lower_the_loss(config):
    model = build_model(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    idx = tokens(4)
    losses = []
    for _ in range(12):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


@configs
def test_same_seed_same_bits(config):
    def step():
        model = build_model(config, seed=3)
        logits, loss = model(tokens(), tokens(seed=2))
        loss.backward()
        return [logits.detach(), *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))
    assert not torch.equal(logits_of(config, tokens(), 3), logits_of(config, tokens(), 4))


def test_arms_share_the_weights_that_they_share():
    """Names and shapes decide: a paired comparison starts from the same point."""
    base = build_model(TINY, seed=5).state_dict()
    for config in CONFIGS.values():
        if config.arch == "lstm":
            continue
        for name, tensor in build_model(config, seed=5).state_dict().items():
            if name in base and tensor.shape == base[name].shape:
                assert torch.equal(tensor, base[name]), name
    mqa = build_model(change(n_kv_head=1, norm="layer_norm"), seed=5).state_dict()
    shared = {name for name in base if name in mqa and base[name].shape == mqa[name].shape}
    assert {n for n in base if n not in shared} == {
        f"blocks.{i}.attn.{x}_proj.weight" for i in range(2) for x in "kv"
    }


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_model(TINY)
    build_model(CONFIGS["lstm"])
    assert torch.equal(torch.rand(3), expected)


def test_initial_spread_is_gpt2s():
    model = build_model(GPTConfig(n_layer=8, d_model=128, norm="layer_norm", bias=True))
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("norm.weight")))), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert float(p.detach().std()) == pytest.approx(
                0.005 if residual else 0.02, rel=0.05
            ), name


def test_a_window_over_everything_is_full_attention():
    idx = tokens()
    assert torch.equal(logits_of(change(window=24), idx), logits_of(TINY, idx))
    near = logits_of(change(window=3), idx)
    assert torch.equal(near[:, :3], logits_of(TINY, idx)[:, :3])
    assert not torch.allclose(near[:, 3:], logits_of(TINY, idx)[:, 3:])


def test_baseline_has_one_norm_and_it_is_before_the_head():
    assert [n for n, _ in build_model(TINY).named_parameters() if "norm" in n] == [
        "final_norm.weight"
    ]
    assert change(norm="rms_norm").norm_at_end == "rms_norm"
    assert change(final_norm="none").norm_at_end == "none"


def test_window_counts_the_token_itself():
    config = change(window=1, position="none", n_layer=1)
    idx = tokens()
    swapped = idx.clone()
    swapped[:, :-1] = idx[:, :-1].flip(1)
    torch.testing.assert_close(logits_of(config, idx)[:, -1], logits_of(config, swapped)[:, -1])


def test_mqa_is_mha_with_equal_heads():
    one, many = build_model(change(n_kv_head=1)), build_model(TINY)
    state = one.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].repeat(4, 1)
    many.load_state_dict(state)
    torch.testing.assert_close(one(tokens())[0], many(tokens())[0])


def test_balancing_loss_counts_in_training_only():
    config = CONFIGS["moe"]
    model, plain = build_model(config), build_model(dataclasses.replace(config, aux_coef=0.0))
    idx = tokens()
    extra = (model(idx, idx)[1] - plain(idx, idx)[1]).detach()
    assert float(extra) == pytest.approx(0.01, rel=0.5)  # aux_coef times 1 at balance
    assert torch.equal(model.eval()(idx, idx)[1], plain.eval()(idx, idx)[1])


def test_after_step_moves_the_bias_and_the_state_dict_keeps_it():
    model = build_model(CONFIGS["moe bias"])
    model(tokens())
    model.after_step()
    bias = model.blocks[0].mlp.gate.e_score_correction_bias
    torch.testing.assert_close(bias.abs(), 0.001 * bias.sign().abs())
    assert bias.abs().max() > 0
    assert "blocks.0.mlp.gate.e_score_correction_bias" in model.state_dict()
    build_model(TINY).after_step()  # nothing to do, and no error


def test_dropout_is_off_in_eval():
    model, idx = build_model(change(dropout=0.5)), tokens()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(model.eval()(idx)[0], build_model(TINY).eval()(idx)[0])


def test_lstm_layer_is_torchs_lstm():
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(16, 16, batch_first=True), LSTMLayer(16)
    order = torch.tensor([1, 0, 3, 2])  # torch: input, forget, cell, output

    def ordered(t):
        return t.unflatten(0, (4, 16))[order].flatten(0, 1)

    with torch.no_grad():
        ours.input_proj.weight.copy_(ordered(theirs.weight_ih_l0))
        ours.input_proj.bias.copy_(ordered(theirs.bias_ih_l0 + theirs.bias_hh_l0))
        ours.state_proj.weight.copy_(ordered(theirs.weight_hh_l0))
    x = torch.randn(3, 9, 16)
    torch.testing.assert_close(ours(x), theirs(x)[0])


def test_lstm_starts_with_open_forget_gates():
    layer = LSTM(CONFIGS["lstm"]).layers[0]
    assert torch.equal(layer.input_proj.bias, torch.arange(4 * 32).lt(32).float())
    assert float(layer.state_proj.weight.detach().std()) == pytest.approx(96**-0.5, rel=0.05)


def test_parameter_groups():
    model = build_model(change(norm="layer_norm", bias=True))
    decay, rest = parameter_groups(model, 0.3)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() >= 2 for p in decay["params"])
    assert all(p.dim() == 1 for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


@on_each_device
@configs
def test_bf16_autocast(config, device, backend):
    model, idx = build_model(config), tokens()
    exact = model(idx, idx)[1].detach()
    model, idx = model.to(device), idx.to(device)
    with torch.autocast(device, torch.bfloat16), use_backend(backend):
        _, loss = model(idx, idx)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact), rel=5e-3)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@on_each_device
@pytest.mark.parametrize("name", ["rope", "native sparse", "moe", "moe bias"])
def test_compiles_in_one_graph(name, device, backend):
    torch._dynamo.reset()
    config = dataclasses.replace(CONFIGS[name], norm="rms_norm", n_layer=1)
    model, idx = build_model(config).to(device), tokens().to(device)
    with use_backend(forced(backend)):
        _, loss = model(idx, idx)
        loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        # aot_eager: dynamo, fake tensors and autograd's trace, without a minute of C++ compilation.
        _, compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(idx, idx)
        torch.testing.assert_close(compiled, loss)
        compiled.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.fixture(scope="module")
def gpt2():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=40, n_embd=48, n_layer=3, n_head=4, attn_pdrop=0.0,
        layer_norm_epsilon=1e-3, initializer_range=0.08,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)  # biases and norms start trivial
    return model


@pytest.mark.parametrize("prefixed", [True, False], ids=["GPT2LMHeadModel", "GPT2Model"])
def test_gpt2_gives_equal_logits(gpt2, prefixed):
    idx = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))
    ours = gpt2_from_state_dict((gpt2 if prefixed else gpt2.transformer).state_dict(), 4, 1e-3)
    with torch.no_grad():
        theirs = gpt2(idx).logits
        torch.testing.assert_close(ours.eval()(idx)[0], theirs, atol=2e-5, rtol=2e-5)


def test_gpt2_refuses_another_model(gpt2):
    state = gpt2.state_dict()
    with pytest.raises(ValueError, match=r"must have 'wte.weight' \(GPT-2's\), got no tensors"):
        gpt2_from_state_dict({}, 4)
    missing = {k: v for k, v in state.items() if k != "transformer.h.1.ln_2.bias"}
    with pytest.raises(ValueError, match=r"state_dict must have 'h.1.ln_2.bias'"):
        gpt2_from_state_dict(missing, 4)
    with pytest.raises(ValueError, match=r"got also adapter"):
        gpt2_from_state_dict({**state, "adapter": torch.zeros(1)}, 4)
    cut = {**state, "transformer.h.1.attn.c_proj.weight": torch.zeros(48, 47)}
    with pytest.raises(
        ValueError, match=r"c_proj.weight must have shape \(48, 48\), got \(48, 47\)"
    ):
        gpt2_from_state_dict(cut, 4)
    with pytest.raises(ValueError, match=r"lm_head.weight must equal wte.weight"):
        gpt2_from_state_dict({**state, "lm_head.weight": torch.zeros(61, 48)}, 4)
    with pytest.raises(ValueError, match="n_head must divide d_model, got n_head 5"):
        gpt2_from_state_dict(state, 5)


def test_bad_input_is_refused():
    model = build_model(TINY)
    with pytest.raises(ValueError, match="idx must have at most seq_len = 24 positions, got 25"):
        model(tokens(seq_len=25))
    with pytest.raises(ValueError, match=r"idx must be \(B, T\) int64, got \(24,\)"):
        model(tokens()[0])
    with pytest.raises(ValueError, match=r"targets must have idx's shape \(2, 24\), got \(2, 23\)"):
        model(tokens(), tokens()[:, 1:])


SPARSE = {"attention": "native_sparse"}
BAD_CONFIGS = [
    ({"n_head": 5}, ValueError, "n_head must divide d_model, got n_head 5 and d_model 32"),
    ({"n_kv_head": 3}, ValueError, "n_kv_head must divide n_head, got n_kv_head 3 and n_head 4"),
    ({"n_head": 32, "position": "rope"}, ValueError, "'rope' needs an even d_model / n_head"),
    ({"mlp": "moe", "num_experts": 2, "top_k": 3}, ValueError, "at most num_experts, got 3 of 2"),
    ({"mlp": "moe", "bias": True}, ValueError, "bias must be False with mlp 'moe'"),
    ({"mlp": "moe", "d_ff": 20}, ValueError, "d_ff must be a multiple of 8 with mlp 'moe', got 20"),
    ({"mlp": "moe", "d_model": 36}, ValueError, "d_model must be a multiple of 8"),
    ({"balance": "aux"}, ValueError, "balance needs mlp 'moe', got balance 'aux' with mlp 'gelu'"),
    ({"shared_expert": True}, ValueError, "shared_expert needs mlp 'moe'"),
    ({"expert": "swiglu"}, ValueError, "expert needs mlp 'moe'"),
    ({"norm": "batch"}, ValueError, "norm must be one of none, layer_norm, rms_norm, got 'batch'"),
    ({"final_norm": "l2"}, ValueError, "final_norm must be one of"),
    ({"position": "alibi"}, ValueError, "position must be one of none, learned, rope, got 'alibi'"),
    ({"mlp": "relu"}, ValueError, "mlp must be one of gelu, swiglu, moe, got 'relu'"),
    ({"mlp": "moe", "balance": "x"}, ValueError, "balance must be one of none, aux, bias"),
    ({"mlp": "moe", "expert": "x"}, ValueError, "expert must be one of gelu, swiglu"),
    ({"arch": "rnn"}, ValueError, "arch must be one of gpt, lstm, got 'rnn'"),
    (
        {"attention": "linear"},
        ValueError,
        "attention must be one of full, native_sparse, got 'linear'",
    ),
    (
        {"select_count": 4},
        ValueError,
        r"select_count must be 6 with attention 'full' \(it has no use for it\), got 4",
    ),
    (
        {"arch": "lstm", "position": "none", "sparse_window": 8},
        ValueError,
        "sparse_window must be 32 with arch 'lstm'",
    ),
    (
        {"arch": "lstm", "position": "none", "attention": "native_sparse"},
        ValueError,
        "attention must be 'full' with arch 'lstm'",
    ),
    ({**SPARSE, "window": 8}, ValueError, "window must be None with attention 'native_sparse'"),
    ({**SPARSE, "compress_stride": 3}, ValueError, "must divide compress_block, got 3 and 8"),
    ({**SPARSE, "select_block": 6}, ValueError, "must divide select_block, got 4 and 6"),
    ({**SPARSE, "compress_block": 28}, ValueError, "at most seq_len .* got 28 and 24"),
    ({**SPARSE, "select_count": 2}, ValueError, "select_count must be at least 3 .* got 2"),
    ({**SPARSE, "compress_block": 0}, ValueError, "compress_block must be at least 1, got 0"),
    ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    ({"n_layer": 0}, ValueError, "n_layer must be at least 1, got 0"),
    ({"d_model": 32.0}, TypeError, "d_model must be an int, got 32.0"),
    ({"top_k": True}, TypeError, "top_k must be an int, got True"),
    ({"qk_norm": 1}, TypeError, "qk_norm must be True or False, got 1"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"dropout": "no"}, TypeError, "dropout must be a number, got 'no'"),
    ({"norm_eps": 0.0}, ValueError, "norm_eps must be above 0, got 0.0"),
    ({"rope_base": 1.0}, ValueError, "rope_base must be above 1, got 1.0"),
    ({"aux_coef": -1.0}, ValueError, "aux_coef must be 0 or above, got -1.0"),
    ({"bias_rate": -1.0}, ValueError, "bias_rate must be 0 or above, got -1.0"),
    ({"arch": "lstm"}, ValueError, "position must be 'none' with arch 'lstm'"),
    (
        {"arch": "lstm", "position": "none", "window": 3},
        ValueError,
        "window must be None with arch",
    ),
]


@pytest.mark.parametrize(
    ("fields", "error", "text"), BAD_CONFIGS, ids=[str(b[0]) for b in BAD_CONFIGS]
)
def test_bad_configs_are_refused(fields, error, text):
    with pytest.raises(error, match=text):
        change(**fields)


def test_config_survives_a_dict_and_names_unknown_fields():
    for config in CONFIGS.values():
        assert GPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(
        ValueError, match="GPTConfig has no field 'n_heads'; its fields: vocab_size,"
    ):
        GPTConfig.from_dict({"n_heads": 4})


def test_default_widths():
    """A mixture spends the FLOPs of the dense MLP it replaces."""
    assert change().ff_width == 128
    assert change(mlp="swiglu").ff_width == 88  # 8 * 32 / 3 = 85.3, rounded up to 8
    assert change(mlp="moe", top_k=2).ff_width == 64
    assert change(mlp="moe", top_k=3, shared_expert=True).ff_width == 32
    assert change(mlp="moe", top_k=2, expert="swiglu").ff_width == 48  # 42.7
    assert change(mlp="moe", d_ff=40).ff_width == 40
