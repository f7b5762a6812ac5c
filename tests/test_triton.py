"""Triton: what the op grid of test_ops.py cannot reach, and what the kernels compile to.

The grid itself runs there, in Triton's interpreter where no GPU is. Here: rows too long for
registers, offsets beyond 2^31, refusals, and every kernel compiled for every target without a GPU
(in a process of its own, because this one interprets). The whole table is `ceg info --kernels`.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from numerics import as_tuple, compare, error_over_slack

import ceg_kernels
from ceg_kernels import OPS, explain, rope_table, triton, use_backend
from ceg_kernels.measure.suite import cases
from ceg_kernels.ops import arguments
from ceg_model import cli, kernel_table

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

pytestmark = pytest.mark.skipif(triton.MISSING is not None, reason=str(triton.MISSING))


def _run(code, **environment):
    """The last line that `code` prints in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_backward"])
def test_rows_longer_than_registers(op, dtype):
    # just beyond what fits, and not a multiple of a block
    rows, size = (3, 16390) if op == "rms_norm" else (7, 8200)
    make = arguments.maker(dtype, DEVICE)
    h, weight, more = make(rows, size), make(size), make(rows, size)
    if op == "rms_norm":
        args = (h, weight, more, 1e-6, 1.0)
    else:
        rstd = OPS["rms_norm"].reference(h.double(), None, None, 1e-6, 0.0)[2].float()
        args = (make(rows, size), more, h, weight, rstd, 1.0)
    assert error_over_slack(OPS[op], "triton", args) <= 1


def test_long_rows_without_weight_and_residual():
    make = arguments.maker(torch.float32, DEVICE)
    args = (make(2, 16390), None, None, 1e-6, 0.0)
    assert error_over_slack(OPS["rms_norm"], "triton", args) <= 1
    args = (make(2, 16390), None, make(2, 16390), None, make(2).abs(), 0.0)
    assert error_over_slack(OPS["rms_norm_backward"], "triton", args) <= 1


# Fits 32 bits, so that it is an offset that wraps around where one is computed in 32 bits: a stride
# that does not fit would widen everything it meets. Rows start at 2 * STRIDE, so that an offset
# that wrapped around at 2^31 meets zeros.
STRIDE = 2**30


def test_offsets_beyond_32_bits_in_rms_norm(far):
    make = arguments.maker(torch.bfloat16, DEVICE)
    x = far.as_strided((4, 64), (STRIDE, 1), 2 * STRIDE)
    x.copy_(make(4, 64))
    args = (x, make(64), None, 1e-6, 0.0)
    y, rest, rstd = OPS["rms_norm"].backend("triton").run(*args)
    assert compare(OPS["rms_norm"], (y, rest, rstd), (x.clone(), *args[1:])) <= 1
    dense = (make(4, 64), None, x.clone(), make(64), rstd, 0.0)
    grads = OPS["rms_norm_backward"].backend("triton").run(*dense[:2], x, *dense[3:])
    assert compare(OPS["rms_norm_backward"], grads, dense) <= 1


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_offsets_beyond_32_bits_in_rope(far, dimension):
    make = arguments.maker(torch.bfloat16, DEVICE)
    shape, strides = [1, 1, 1, 64], [64, 64, 64, 1]
    shape[dimension], strides[dimension] = 4, STRIDE
    q = far.as_strided(shape, strides, 2 * STRIDE)
    q.copy_(make(*shape))
    tail = (*rope_table(4, 64, device=DEVICE), None, False, False)
    outs = OPS["rope"].backend("triton").run(q, q, *tail)
    assert compare(OPS["rope"], outs, (q.clone(), q.clone(), *tail)) <= 1


@pytest.mark.parametrize("few", [True, False], ids=["decode, one pass", "tiles, two passes"])
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_offsets_beyond_32_bits_in_attention(far, dimension, few):
    from ceg_kernels.triton.attention_config import UNUSED, forced

    make = arguments.maker(torch.bfloat16, DEVICE)
    shape, strides = [1, 1, 1, 64], [64, 64, 64, 1]
    shape[dimension], strides[dimension] = 4, STRIDE
    x = far.as_strided(shape, strides, 2 * STRIDE)
    x.copy_(make(*shape))
    tail = None, None, shape[1], shape[1], None, None, 0.2, False, -1, -1, 0.0
    forward, backward = (
        OPS[op].backend("triton").run for op in ("attention", "attention_backward")
    )
    dense = x.contiguous()
    with forced({} if few else {"decode": UNUSED, "bwd": UNUSED}):
        saved = forward(dense, dense, dense, *tail)
        grads = backward(dense, None, dense, dense, dense, *saved, *tail)
        ours = *forward(x, x, x, *tail), *backward(x, None, x, x, x, *saved, *tail)
    for far_away, near in zip(ours, (*saved, *grads), strict=True):
        assert torch.equal(far_away, near)


@pytest.fixture
def far_sums(tmp_path):
    """2^32 + 2^28 fp32 numbers of which nobody has most, as `far` in conftest.py."""
    size = 2**32 + 2**28
    if CUDA:
        if torch.cuda.mem_get_info()[0] < 5 * size:
            pytest.skip("needs 22 GiB of free GPU memory")
        return torch.zeros(size, device=DEVICE)
    file = tmp_path / "sums"
    file.touch()
    os.truncate(file, 4 * size)
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32)


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["split", "sequence", "head"])
def test_sums_of_dq_beyond_32_bits(monkeypatch, far_sums, dimension):
    """The workspace of the one pass, with the third of a dimension 2^31 numbers after the first."""
    from ceg_kernels.triton import attention_backward
    from ceg_kernels.triton.attention_config import Tile, forced

    make = arguments.maker(torch.bfloat16, DEVICE)
    batch, heads = (3, 1) if dimension == 1 else (1, 3)
    q, k, v, dout = (make(batch, 40, heads, 16) for _ in range(4))
    k, v = k[:, :, :1], v[:, :, :1]  # a group, whose heads the kernel steps through
    tail = None, None, 40, 40, None, None, 0.2, True, -1, -1, 0.0
    forward, backward = (
        OPS[op].backend("triton").run for op in ("attention", "attention_backward")
    )
    given = dout, None, q, k, v, *forward(q, k, v, *tail), *tail
    seen = []

    def workspace(q, shape):
        strides = list(torch.empty(shape, device="meta").stride())
        strides[dimension] = STRIDE
        seen.append(far_sums.as_strided(shape, strides, 2 * STRIDE).fill_(math.nan))
        return seen[-1]

    with forced({"bwd": Tile(16, 16, 4, 1, 3)}):
        near = backward(*given)
        monkeypatch.setattr(attention_backward, "_workspace", workspace)
        far_away = backward(*given)
    assert all(torch.equal(a, b) for a, b in zip(far_away, near, strict=True))
    assert seen[0].shape[dimension] == 3
    assert seen[0].select(dimension, 2).count_nonzero()


def test_sums_of_dq_of_a_packed_sequence_beyond_32_bits(monkeypatch, far, far_sums):
    """One that starts at row 2^27: its tiles do so at 2^27 * 16 = 2^31 numbers."""
    from ceg_kernels.triton import attention_backward
    from ceg_kernels.triton.attention_config import Tile, forced
    from ceg_kernels.triton.attention_problem import problem_of
    from ceg_kernels.triton.launch import gpu_of

    make, first = arguments.maker(torch.bfloat16, DEVICE), 2**27
    near = q, k, v, dout = [make(1, 40, 1, 16) for _ in range(4)]
    tail = None, None, 40, 40, None, None, 0.2, True, -1, -1, 0.0
    out, lse = OPS["attention"].backend("triton").run(q, k, v, *tail)
    tile, backward = Tile(16, 16, 4, 1, 1), OPS["attention_backward"].backend("triton").run
    with forced({"bwd": tile}):
        expected = backward(dout, None, q, k, v, out, lse, *tail)
    # Each has rows of its own behind the others', the first of all sequences 2^31 numbers before.
    q, k, v, dout, dq = (
        far.as_strided((first + 40, 1, 16), (16, 16, 1), 2**22 * i) for i in range(5)
    )
    for rows, given in zip((q, k, v, dout), near, strict=True):
        rows[first:] = given[0]
    cu = torch.tensor([first, first + 40], dtype=torch.int32, device=DEVICE)
    p = problem_of(q, k, v, cu, cu, 40, 40, *tail[4:6], *tail[7:])
    delta = (near[3].float() * out.float()).sum(-1)
    statistics = [
        far_sums.as_strided((1, first + 40), (first + 40, 1), 2**31 - 2**28 * i) for i in (1, 2)
    ]
    statistics[0][0, first:], statistics[1][0, first:] = lse[0, 0], delta[0, :, 0]
    seen = []

    def workspace(q, shape):
        contiguous = torch.empty(shape, device="meta").stride()
        seen.append(far_sums.as_strided(shape, contiguous, 2**31))
        return seen[-1]

    monkeypatch.setattr(attention_backward, "_workspace", workspace)
    dk, dv = torch.empty_like(near[1][0]), torch.empty_like(near[2][0])
    dk, dv = (t.as_strided((first + 40, 1, 16), (0, 16, 1)) for t in (dk, dv))  # not looked at
    attention_backward._one_pass(
        dout, q, k, v, *statistics, p, (p.left, p.right, 0.2, 0.0), gpu_of(q), dq, dk, dv, tile, 1
    )  # fmt: skip
    assert torch.equal(dq[first:], expected[0][0])
    tiles = seen[0][0, 0, 0, first // 16 :]
    assert tiles.count_nonzero()


def test_too_many_tokens_are_refused():
    q = torch.zeros(2, device=DEVICE).expand(1, 2**31, 1, 2)
    with pytest.raises(ValueError, match=r"q must have fewer than 2\^31 - 1024 tokens, got 2147"):
        triton.launcher("rope", "rope")(q, q, *rope_table(4, 2, device=DEVICE), None, False, False)


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_positions_outside_the_table(bad):
    q = torch.ones(1, 3, 2, 8, device=DEVICE)
    table = rope_table(4, 8, device=DEVICE)
    positions = torch.tensor([[0, bad, 3]], device=DEVICE)
    out, _ = triton.launcher("rope", "rope")(q, q, *table, positions, False, False)
    assert out[:, 1].isnan().all()
    assert out[:, [0, 2]].isfinite().all()
    if not CUDA:
        with use_backend("triton"), pytest.raises(ValueError, match=r"positions must be in \[0, 4"):
            ceg_kernels.rope(q, q, *table, positions=positions)


def test_the_gradient_goes_through_the_kernels():
    """One of each public function, forward and backward, against the formula."""
    make = arguments.maker(torch.float32, DEVICE)
    q, weight = make(2, 5, 4, 16).requires_grad_(), make(16).requires_grad_()
    k, table, upstream = make(2, 5, 2, 16), rope_table(5, 16, device=DEVICE), make(2, 5, 4, 16)
    grads = {}
    for backend in ("triton", "reference"):
        with use_backend(backend):
            out, _ = ceg_kernels.rope(ceg_kernels.rms_norm(q, weight), k, *table)
        grads[backend] = torch.autograd.grad(out, (q, weight), upstream)
    for ours, theirs in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not CUDA, reason="the interpreter runs one program at a time")
@pytest.mark.parametrize(
    "op", [op.name for op in OPS.values() if any(b.name == "triton" for b in op.backends)]
)
def test_same_bits_every_time(op):
    shape = next(shape for shape in OPS[op].shapes.values() if shape.group == "quick")
    args = shape.make(torch.bfloat16, "cuda")
    first = OPS[op].backend("triton").run(*args)
    for _ in range(20):
        again = as_tuple(OPS[op].backend("triton").run(*args))
        for a, b in zip(as_tuple(first), again, strict=True):
            assert torch.equal(a, b)


def _rms_norm_args(dtype=torch.float32, device=DEVICE):
    return torch.zeros(2, 8, dtype=dtype, device=device), None, None, 1e-6, 0.0


def test_it_runs_only_when_asked_for():
    text = explain("rms_norm", *_rms_norm_args())
    assert "triton: could run them: use_backend forces it" in text


def test_the_interpreter_is_not_benchmarked():
    found = {case.op: case.backends() for case in cases("quick", dtypes=["float32"])}
    assert found["rms_norm"] == ["cpu", "torch", "reference"]


@pytest.mark.parametrize(
    ("missing", "interpreted", "args", "match"),
    [
        ("triton is not installed (test)", True, _rms_norm_args(), "triton is not installed"),
        (None, False, _rms_norm_args(device="cpu"), "needs tensors on a GPU, got one on cpu"),
        (None, True, _rms_norm_args(device="meta"), "needs tensors on a GPU, got one on meta"),
        (None, True, _rms_norm_args(torch.float64),
         r"needs dtype in \{float32, bfloat16, float16\}, got float64"),
    ],
)  # fmt: skip
def test_refusals_say_why(monkeypatch, missing, interpreted, args, match):
    monkeypatch.setattr(triton, "MISSING", missing)
    monkeypatch.setattr(triton, "INTERPRETED", interpreted)
    monkeypatch.setattr(OPS["rms_norm"], "_chosen", {})
    with use_backend("triton"), pytest.raises(RuntimeError, match=f"refuses: {match}"):
        OPS["rms_norm"].choose(*args)


def test_kernels_are_imported_when_they_are_chosen_and_not_before():
    # torch's own FLOP counter imports triton, so that this can be asked of our modules only.
    code = (
        "import sys, torch, ceg_kernels; x = torch.zeros(2, 8)\n"
        "ceg_kernels.explain('rms_norm', x, None, None, 1e-6, 0.0); ceg_kernels.rms_norm(x)\n"
        "early = 'ceg_kernels.triton.rms_norm' in sys.modules\n"
        "with ceg_kernels.use_backend('triton'): ceg_kernels.rms_norm(x)\n"
        "print(early, 'ceg_kernels.triton.rms_norm' in sys.modules)"
    )
    assert _run(code, TRITON_INTERPRET="1") == "False True"


@pytest.fixture(scope="module")
def compiled():
    """Each kernel in its first case for every target, and one that cannot fit its registers."""
    code = (
        "import dataclasses as d, json\n"
        "from ceg_kernels.triton import compile as c\n"
        "facts = list(c.report(every_case=False))\n"
        "launches = {case: one for _, case, one in c._launches(c.TARGETS['sm_90'])\n"
        "            if one.kernel.__name__ == 'rms_norm_bwd_kernel'}\n"
        "wide = d.replace(launches['D8192 fp32 residual'], warps=1)\n"
        "target = c.TARGETS['sm_90']\n"
        "facts += [c.describe(c.build(wide, target), target, 'planted', 'one warp')]\n"
        "one_pass = next(one for _, _, one in c._launches(target, ['attention_backward'])\n"
        "                if one.kernel.__name__ == 'attention_bwd_kernel')\n"
        "blocks = c.build(one_pass, target).asm['ttir'].split('scf.for')\n"
        "ptx = {}\n"
        "for target in map(c.TARGETS.get, ('sm_80', 'sm_90')):\n"
        "    _, _, forward = next(c._launches(target, ['attention']))\n"
        "    ptx[target.gpu.arch] = c.build(forward, target).asm['ptx']\n"
        "print(json.dumps({'facts': [d.asdict(f) | {'wrong': f.wrong} for f in facts],\n"
        "                  'between blocks of keys': blocks[1], 'forward': ptx}))"
    )
    return json.loads(_run(code, TRITON_INTERPRET="0"))


@pytest.mark.parametrize(
    "target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
)
def test_every_kernel_compiles_without_spills_and_fits(compiled, target):
    facts = [f for f in compiled["facts"] if f["target"] == target and f["family"] != "planted"]
    sources = (path.read_text() for path in (ROOT / "ceg_kernels" / "triton").glob("*.py"))
    expected = re.findall(r"^def (\w+_kernel)\(", "\n".join(sources), re.MULTILINE)
    assert {f["kernel"] for f in facts} == set(expected)
    for fact in facts:
        assert fact["wrong"] is None, fact
        # A thread of CDNA 3 has 256 vector registers and 256 for accumulators.
        assert 0 < fact["registers"] <= (512 if target == "gfx942" else 255), fact


def test_a_kernel_that_spills_is_seen(compiled):
    (fact,) = [f for f in compiled["facts"] if f["family"] == "planted"]
    assert fact["spill_bytes"] > 0
    assert fact["wrong"].startswith("spills ")


def test_threads_wait_before_they_read_the_sums_of_others(compiled):
    """dQ's partial sums are loaded in another layout than they were stored in."""
    assert re.search(r"\b(ttg|gpu)\.barrier\b", compiled["between blocks of keys"])


def test_blocks_are_loaded_by_descriptors_where_the_gpu_has_them(compiled):
    copies = {gpu: "cp.async.bulk.tensor" in ptx for gpu, ptx in compiled["forward"].items()}
    assert copies == {"sm_80": False, "sm_90": True}


@pytest.fixture
def facts():
    from ceg_kernels.triton.compile import Facts

    return Facts(
        target="sm_90", family="rope", case="D64", kernel="rope_kernel", warps=4, registers=42,
        spill_bytes=0, shared_bytes=0, shared_limit=1000, tensor_core=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes a thread"),
        ({"shared_bytes": 1001}, "shared memory must be <= 1000 bytes, got 1001"),
        ({"tensor_core": "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32"}, "rounded to tf32"),
        ({"tensor_core": "v_mfma_f32_16x16x8_xf32"}, "rounded to tf32"),
        ({"tensor_core": "v_mfma_f32_16x16x4_f32"}, None),
    ],
)
def test_ceg_info_kernels_prints_the_table_and_fails_on_a_wrong_row(
    monkeypatch, capsys, facts, change, wrong
):
    row = dataclasses.replace(facts, **change)
    asked = []
    monkeypatch.setattr(kernel_table, "compiled", lambda targets: asked.append(targets) or [row])
    assert cli.main(["info", "--kernels", "sm_90,gfx942"]) == (0 if wrong is None else 1)
    out = capsys.readouterr().out
    assert asked == [("sm_90", "gfx942")]
    assert "rope_kernel" in out
    assert wrong is None or wrong in out
    cli.main(["info", "--kernels", "sm_90", "--json"])
    assert json.loads(capsys.readouterr().out) == [dataclasses.asdict(row) | {"wrong": row.wrong}]
    assert (row.wrong is None) == (wrong is None)


@pytest.mark.skipif(not triton.INTERPRETED, reason="this process compiles")
def test_an_interpreting_process_cannot_compile(capsys):
    assert cli.main(["info", "--kernels"]) == 2
    assert "kernels must be compiled, got TRITON_INTERPRET=1" in capsys.readouterr().err


def test_an_unknown_target_is_named(monkeypatch):
    from triton import knobs

    from ceg_kernels.triton.compile import report

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"target must be one of sm_80, sm_86, .*, got 'sm_70'"):
        list(report(["sm_70"]))


@pytest.mark.parametrize(
    ("target", "family", "once"),
    [
        ("sm_80", "rope", False),
        ("sm_86", "rope", True),
        ("sm_86", "attention_backward", False),
        ("sm_89", "attention_backward", True),
        ("sm_89", "attention", False),
    ],
)
def test_gpus_like_sm_80_compile_what_their_memory_decides_on(monkeypatch, target, family, once):
    from triton import knobs

    from ceg_kernels.triton import compile

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(compile, "build", lambda one, _: SimpleNamespace(hash=object(), one=one))
    monkeypatch.setattr(compile, "describe", lambda built, *_: built.one.kernel.__name__)
    kernels = list(compile.report([target], families=[family]))
    assert (len(kernels) == len(set(kernels))) == once


def test_the_host_pays_for_as_few_launches_as_there_are_kernels():
    done = subprocess.run(
        [sys.executable, "tools/launch_overhead.py", "--json"], cwd=ROOT, capture_output=True,
        text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row.pop("call"): row for row in map(json.loads, done.stdout.splitlines())}
    assert {call: row["launches"] for call, row in rows.items()} == {
        "rms_norm": 1, "rope": 1, "attention": 1, "attention, one query": 1,
        "attention backward": 3,
    }  # fmt: skip
    # Of all calls together: one alone may have met another process.
    ours, tritons = (sum(row[key] for row in rows.values()) for key in ("host_us", "triton_us"))
    assert 0 < tritons < ours
