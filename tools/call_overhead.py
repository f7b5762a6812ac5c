"""What a call costs the host beside its work: each op on a few rows, with stock torch in turn.

    python tools/call_overhead.py        # a table; --json: one object a line

One thread, fp32 on the CPU, where the kernels themselves take 1 to 4 us here. What is left is the
public function's checks, torch's dispatcher and autograd, the choice of a backend and the outputs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ceg_kernels import (
    flash_attention,
    moe_combine,
    moe_dispatch,
    moe_route,
    rms_norm,
    rope,
    rope_table,
)
from ceg_kernels.measure.clock import time_interleaved

Call = Callable[[], Any]


def calls(wanted: bool) -> dict[str, tuple[Call, Call | None]]:
    """Op -> its call and stock torch's, where there is one; `wanted`: with gradients."""
    x, weight = torch.randn(8, 64), torch.randn(64)
    q, logits = torch.randn(1, 8, 2, 32), torch.randn(8, 4)
    cos, sin = rope_table(8, 32)
    for t in (x, weight, q, logits) if wanted else ():
        t.requires_grad_()
    heads_first = q.transpose(1, 2).detach().requires_grad_(wanted)
    routing = moe_route(logits, 2)
    rows, plan = moe_dispatch(x, routing)
    return {
        "rms_norm": (lambda: rms_norm(x, weight), lambda: F.rms_norm(x, (64,), weight)),
        "rope": (lambda: rope(q, q, cos, sin), None),
        "flash_attention": (
            lambda: flash_attention(q, q, q, causal=True),
            lambda: F.scaled_dot_product_attention(*3 * (heads_first,), is_causal=True),
        ),
        "moe_route": (lambda: moe_route(logits, 2), None),
        "moe_dispatch": (lambda: moe_dispatch(x, routing), None),
        "moe_combine": (lambda: moe_combine(rows, plan, routing.weights), None),
    }


def measure() -> Iterator[dict[str, Any]]:
    """Of each op, without and with gradients: microseconds of a call, ours and stock torch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for wanted in (False, True):
            of = calls(wanted)
            turns = {f"{op} ceg": ours for op, (ours, _) in of.items()}
            turns |= {f"{op} torch": stock for op, (_, stock) in of.items() if stock is not None}
            took = {name: 1e6 * t.median_s for name, t in time_interleaved(turns).items()}
            for op in of:
                yield {
                    "call": op,
                    "gradients": wanted,
                    "host_us": took[f"{op} ceg"],
                    "torch_us": took.get(f"{op} torch"),
                }
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    for row in measure():
        if as_json:
            print(json.dumps(row))
        else:
            beside = "" if row["torch_us"] is None else f", stock torch {row['torch_us']:5.1f}"
            way = "to be differentiated" if row["gradients"] else "without gradients"
            print(f"{row['call']:16} {way:21} {row['host_us']:6.1f} us{beside}")


if __name__ == "__main__":
    main()
