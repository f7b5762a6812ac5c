"""A training step of a small GPT: kernels all off, each family on alone, all on.

    pytest bench/bench_train_step.py --benchmark

"torch" is stock torch under the same model, parameters and data: all off. Beside every measured
step stands the one that the kernels' own times predict (Amdahl): what "torch" takes, less what each
call of a family that is on was measured to save on the very tensors that the step gives it,

    predicted = torch's step - sum over families, calls (torch's seconds - ours)

What is left of the measured step over the predicted is `unexplained`: caches, the allocator,
autograd around the ops, the dispatcher, the machine's mood.
"""

from __future__ import annotations

import pytest
import torch

from ceg_kernels import use_backend
from ceg_kernels.measure import memory
from ceg_kernels.measure.steps import Step, call_times, step_extras
from ceg_kernels.op import Cost
from ceg_model.config import GPTConfig
from ceg_model.flops import model_flops
from ceg_model.gpt import build_model
from ceg_model.op_calls import OpArguments

# 10M parameters beside the embedding, and every kernel of ours but the mixture's
STEP = GPTConfig(
    n_layer=6, d_model=384, n_head=6, seq_len=512, norm="rms_norm", position="rope", mlp="swiglu"
)
BATCH = 4
FAMILIES = ("attention", "rope", "rms_norm")
DTYPES = (torch.float32, torch.bfloat16)


def savings(calls: OpArguments, ours: str, device: str) -> dict[str, float]:
    """Seconds a step that each family's calls take less on `ours` than on stock torch."""
    backends = dict.fromkeys(calls.arguments, (ours, "torch"))
    times, _ = call_times(calls.arguments, backends, device=device)
    saved = dict.fromkeys(FAMILIES, 0.0)
    for call, count in calls.counts.items():
        difference = times[call, "torch"] - times[call, ours]
        saved[call[0].removesuffix("_backward")] += count * difference
    return saved


def backends_of(on: tuple[str, ...], ours: str) -> dict[str, str]:
    return {family: ours if family in on else "torch" for family in FAMILIES}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_training_step(dtype, device, ours, benchmark, report):
    """Forward, backward and AdamW; bfloat16 is autocast's, with fp32 parameters."""
    tokens = torch.randint(STEP.vocab_size, (BATCH, STEP.seq_len + 1), device=device)
    losses = {}

    def step_of(name: str, backends: str | dict[str, str]):
        model = build_model(STEP, seed=0).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            with use_backend(backends):
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    _, loss = model(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.setdefault(name, float(loss.detach()))

        return step

    variants: dict[str, str | dict[str, str]] = {ours: backends_of(FAMILIES, ours)}
    if benchmark.disabled:
        benchmark.pedantic(step_of(ours, variants[ours]))
        return
    variants["torch"] = backends_of((), ours)
    variants |= {f"{family} alone": backends_of((family,), ours) for family in FAMILIES}
    variants["reference"] = "reference"
    memory.prepare()
    steps = {name: step_of(name, backends) for name, backends in variants.items()}
    extra_flops = {}
    for name, step in steps.items():
        with OpArguments() as calls:
            step()
        extra_flops[name] = calls.extra_flops
        if name == "torch":
            saved = savings(calls, ours, device)
    assert max(losses.values()) - min(losses.values()) < (1e-4 if dtype == torch.float32 else 1e-2)

    flops = model_flops(STEP, batch=BATCH).total
    shape = f"d{STEP.d_model}-l{STEP.n_layer}-t{STEP.seq_len}-b{BATCH}"
    rows = report("gpt_step", "fwd_bwd", shape, dtype, steps, Cost(flops, 0), max_s=6.0)
    stock_s = rows["torch"]["median_s"]
    for name, row in rows.items():
        on = [f for f in FAMILIES if isinstance(variants[name], dict) and variants[name][f] == ours]
        predicted = None if name == "reference" else stock_s - sum(saved[f] for f in on)
        step_extras(row, Step(BATCH * STEP.seq_len, extra_flops[name], predicted))
    benchmark.pedantic(steps[ours], rounds=3)
