"""The arms of the study: each builds small and trains a step, kernels have their twins."""

import dataclasses

import pytest
import torch

from ceg_kernels import use_backend
from ceg_model.config import GPTConfig
from ceg_model.flops import model_flops
from ceg_model.gpt import LSTM, build_model, parameter_groups
from ceg_model.study.innovations import BASELINE, INNOVATIONS, config_changes, kernel_ops, twin

# A scale may set what an arm has to take back.
SCALE = {"n_layer": 1, "d_model": 32, "n_head": 4, "seq_len": 48, "n_kv_head": 2, "d_ff": 96}


def config_of(arm, **scale):
    base = {**BASELINE, "vocab_size": 64, **SCALE, **scale}
    return GPTConfig.from_dict({**base, **config_changes(arm, base)})


@pytest.mark.parametrize("arm", INNOVATIONS)
def test_every_arm_trains_a_step(arm):
    model = build_model(config_of(arm))
    stream = torch.Generator().manual_seed(0)
    idx = torch.randint(64, (2, 48), generator=stream)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    # As the study does: the reference everywhere but where the arm brings a kernel.
    moved = kernel_ops(arm)
    ops = ("attention", "rope", "rms_norm", "moe_route", "moe_dispatch", "moe_combine")
    with use_backend({op: "reference" for op in ops if op not in moved}):
        before = model(idx, idx)[1]
        before.backward()
        optimizer.step()
        after = model(idx, idx)[1]
    assert 0 < float(after.detach()) < float(before.detach())


def test_twins():
    """A kernel costs no C: equal losses to its twin's, and equal FLOPs."""
    twins = {arm: twin(arm) for arm in INNOVATIONS if twin(arm) is not None}
    assert twins == {
        "flash_attention": "baseline", "rms_norm_fused": "rms_norm", "rope_fused": "rope",
    }  # fmt: skip
    for arm, same in twins.items():
        assert config_of(arm) == config_of(same)
    assert twin("ln_rope_fa") is None  # LayerNorm with RoPE, and no kernel, is no arm
    assert twin("layer_norm") is None


def test_the_lstm_takes_back_what_it_has_no_place_for():
    config = config_of("lstm", position="rope", window=8, qk_norm=True, mlp="swiglu")
    assert isinstance(build_model(config), LSTM)
    assert (config.n_layer, config.d_model, config.norm) == (1, 32, "none")
    assert "inverse" in INNOVATIONS["lstm"].published[0].what


def test_native_sparse_attention_sees_fewer_pairs_where_contexts_are_long():
    """What it adds (keys and values for three branches) outweighs that at the sizes of a CPU."""

    def ratio(seq_len):
        base, sparse = (config_of(arm, seq_len=seq_len) for arm in ("baseline", "native_sparse"))
        return model_flops(sparse).total / model_flops(base).total

    assert ratio(128) > 1.1 > 1 > ratio(2048)
    small = config_of("native_sparse")
    assert dataclasses.replace(small, attention="full") == config_of("baseline")
