"""Published figures that anyone can recompute, as far as no other test holds them already.

Elsewhere: test_flops.py has the model FLOPs and MFUs (GPT-2, nanoGPT, PaLM, MT-NLG, Chinchilla, the
paper's models), test_estimate.py the paper's Table III, the speedruns and the published laws within
a run, test_endpoint.py those laws fitted, test_coverage.py the half-widths by seeds.

Left out: figures whose inputs were not published, Gopher's MFU and PaLM's HFU among them.
"""

import numpy as np
import pytest

from ceg_model.config import GPTConfig
from ceg_model.flops import params_count
from ceg_model.mfu import palm_flops_per_token
from ceg_model.study.trend import MARGIN, classify, slope_of


def paper_model(**shape):
    return params_count(GPTConfig(vocab_size=50304, **shape), positions=False)


def test_compute_of_the_papers_run():
    n = paper_model(seq_len=512, n_layer=8, n_head=8, d_model=512)
    per_token = palm_flops_per_token(n, 8, 8, 64, 512)
    assert per_token * 262_144 * 50_000 == pytest.approx(4.3345e18, rel=1e-5)


def test_the_papers_compute_independent_bundle_declines():
    """Its v2: 3.483 on the compact and 1.800 on the full model, one seed each."""
    compact = palm_flops_per_token(
        paper_model(seq_len=512, n_layer=6, n_head=6, d_model=384), 6, 6, 64, 512
    )
    full = palm_flops_per_token(
        paper_model(seq_len=1024, n_layer=10, n_head=12, d_model=768), 10, 12, 64, 1024
    )
    tokens = 2  # a sequence twice as long
    x = np.log([compact, full * tokens])
    assert np.exp(x[1] - x[0]) == pytest.approx(7.75, abs=0.005)
    gains = np.log([3.483, 1.800])
    assert slope_of(x, gains) == pytest.approx(-0.32, abs=0.005)
    trend = classify([(x[i : i + 1], gains[i : i + 1]) for i in range(2)])
    assert trend.label == "inconclusive"  # two points decide nothing


def test_axes_of_two_laws_with_a_common_floor():
    """Gundlach et al. 2025: a_v / a_b - 1 against C_v, 1 - a_b / a_v against C_b."""
    a_b, a_v = 0.065, 0.094
    log_v = np.log([1e15, 1e16, 1e17, 1e18])
    log_b = (np.log(36.3 / 88.0) + a_v * log_v) / a_b
    gains = log_b - log_v
    trend = classify([(np.full(3, x), np.full(3, y)) for x, y in zip(log_b, gains, strict=True)])
    assert trend.slope == pytest.approx(1 - a_b / a_v, abs=1e-9)
    assert trend.slope_c_v == pytest.approx(0.4462, abs=5e-5)
    assert trend.label == "compute-dependent"
    assert np.log(1.1) / np.log(10) == pytest.approx(MARGIN, abs=5e-4)
    assert trend.ends == pytest.approx((5.97, 130.1), rel=1e-3)


def test_pairing_turns_four_percent_into_less_than_one():
    """0.006 nats an arm, 0.001 paired, where a percent of compute is worth 0.00143 nats."""
    nats_per_log = 0.006 / np.log(1.042)
    assert np.expm1(0.001 / nats_per_log) == pytest.approx(0.007, abs=2e-4)
