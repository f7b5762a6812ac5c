"""Peers from libraries: what they are called with, why they are refused, how their absence is said.

Liger and flash-attn are stood in for by functions of the same signatures, since few machines that
run tests have them; where Liger is installed, it is run itself. Left out: flash-attn and cuDNN's
kernel themselves, which need a GPU.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import json
import sys
import types

import pytest
import torch

from ceg_kernels import OPS, moe_combine, moe_dispatch, moe_route
from ceg_kernels.measure import libraries, peers
from ceg_kernels.measure.run import LOOSE, run_case
from ceg_kernels.measure.suite import PEERS, Case, _formula_error
from tests.test_bench import ONE, known_roofs, run  # noqa: F401
from tests.test_measure import ROOFS
from tests.test_measure_run import RMS

ROPE = Case("rope", "fwd", "quick-2x512-h8-d64", "float32", "cpu")


def _rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert (casting_mode, in_place) == ("llama", False)
    wide = X.float()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(X.dtype)
    return y if W is None else (y * (W + offset)).to(X.dtype)


def _add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    return _rms_norm(X + R, W, eps, offset, casting_mode, in_place), X + R


def _rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """Over its inputs where (B, T, H, D) lies in memory, as Liger's."""
    out = []
    for x in (q, k):
        x = x.transpose(1, 2).contiguous()
        assert cos.shape == sin.shape == (1, x.shape[1], x.shape[3])
        a, b = x.chunk(2, -1)
        x.copy_(x * cos.unsqueeze(2) + torch.cat((-b, a), -1) * sin.unsqueeze(2))
        out.append(x.transpose(1, 2))
    return tuple(out)


def _flash_attn(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert q.dtype in (torch.float16, torch.bfloat16)
    tail = None, None, q.shape[1], k.shape[1], alibi_slopes, None, softmax_scale, causal
    return OPS["attention"].reference(q, k, v, *tail, *window_size, softcap)[0]


def _install(monkeypatch, name, **functions):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, function in functions.items():
        setattr(module, key, function)


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins for the libraries, on a machine that passes for one with a GPU."""
    _install(
        monkeypatch, "liger_kernel.transformers.functional", liger_rms_norm=_rms_norm,
        liger_fused_add_rms_norm=_add_rms_norm, liger_rope=_rope,
    )  # fmt: skip
    _install(monkeypatch, "flash_attn", flash_attn_func=_flash_attn)
    monkeypatch.setattr(libraries, "absent", lambda peer, device: None)


def _errors(op, name, dtype, device="cpu"):
    peer, errors = peers.find(op, name), {}
    for sample in OPS[op].samples(dtype, device):
        if peer.why_not(*sample.args) is None and "huge" not in sample.name:
            before = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args]
            errors[sample.name] = _formula_error(OPS[op], peer, sample.args)
            pairs = zip(before, sample.args, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "name"), libraries.FORMULAS)
def test_a_library_is_called_for_what_the_op_computes(installed, op, name, dtype):
    if name == "cudnn":
        pytest.skip("cuDNN's kernel needs a GPU; it is called as the flash kernel is")
    if name in ("flash", "flash-attn") and dtype == torch.float32:
        assert not _errors(op, name, dtype)  # refused
        return
    errors = _errors(op, name, dtype)
    assert len(errors) >= 6
    assert max(errors.values()) < LOOSE / 2, errors


def test_a_wrong_library_is_refused(installed, monkeypatch):
    _install(monkeypatch, "flash_attn", flash_attn_func=lambda q, k, v, **rest: _flash_attn(
        q, k[:, :-1], v[:, :-1], **rest
    ))  # fmt: skip
    assert min(_errors("attention", "flash-attn", torch.bfloat16).values()) < LOOSE  # one key: 0
    op = OPS["attention"]
    args = op.shapes["quick-b2-t512-h4-d64-causal"].make(torch.bfloat16, "cpu")
    assert _formula_error(op, peers.find("attention", "flash-attn"), args) > LOOSE


def test_the_sdpa_kernel_is_really_forced():
    args = OPS["attention"].shapes["quick-b2-t512-h4-d64-causal"].make(torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match=r"No (viable backend|available kernel)"):
        peers.find("attention", "cudnn").run(*args)


def test_grouped_heads_reach_sdpa_and_flash_attn(installed):
    args = OPS["attention"].shapes["llama-b4-t1-k4096-h32/8-d128-causal"]
    q, k, v, *tail = args.make(torch.bfloat16, "cpu")
    tail[1], tail[3] = None, 64
    short = q, k[:, :64], v[:, :64], *tail
    for name in ("flash", "flash-attn"):
        peer = peers.find("attention", name)
        assert peer.why_not(*short) is None
        assert _formula_error(OPS["attention"], peer, short) < LOOSE / 2


def test_rows_of_a_library_carry_its_name_and_its_inputs_stay(installed):
    names = ["cpu", *RMS.formulas()]
    rows = {n: r.row for n, r in run_case(RMS, names, roofs=ROOFS, min_time_s=0.01).items()}
    assert rows["liger"]["peer"] == rows["liger"]["backend"] == "liger"
    assert rows["liger"]["median_s"] > 0
    assert 0 < rows["liger"]["max_error_over_slack"] < LOOSE
    args = ROPE.args()
    want = [a.clone() for a in args[:4]]
    call = ROPE.call("liger", args)
    first = call()[0].clone()
    assert not torch.equal(call()[0], first)  # it turns its own copies, on and on
    assert all(torch.equal(a, b) for a, b in zip(args[:4], want, strict=True))


def test_a_library_of_another_version_is_a_row_without_a_time(installed, monkeypatch):
    def newer(X, W, eps):
        raise AssertionError("not reached")

    _install(
        monkeypatch, "liger_kernel.transformers.functional", liger_rms_norm=newer,
        liger_fused_add_rms_norm=newer, liger_rope=newer,
    )  # fmt: skip
    row = run_case(RMS, ["liger", "cpu"], roofs=ROOFS, min_time_s=0.01)["liger"].row
    assert row["median_s"] is None
    assert row["status"].startswith("not timed: TypeError: ")


def test_why_a_peer_is_absent(monkeypatch):
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    assert peers.absent("liger", "cpu") == "liger-kernel is not installed, needs a GPU, got cpu"
    assert peers.absent("flash-attn", "cuda:0") == "flash-attn is not installed"
    assert peers.absent("cudnn", "cpu") == "needs a GPU, got cpu"
    assert peers.absent("flash", "cuda") is None
    assert [peers.absent(name, "cpu") for name in ("eager", "compile", "loop")] == [None] * 3
    assert peers.find("rms_norm", "liger").why_not(*RMS.args()).startswith("liger-kernel is not")


def test_a_library_that_does_not_import_or_lacks_a_function_is_absent(monkeypatch):
    _install(monkeypatch, "flash_attn")
    assert peers.absent("flash-attn", "cuda") == "flash-attn has no flash_attn_func"

    def broken(name):
        raise ImportError("undefined symbol: abc\nand more")

    monkeypatch.setattr(libraries.importlib, "import_module", broken)
    assert peers.absent("flash-attn", "cuda") == (
        "flash-attn does not import: undefined symbol: abc"
    )


@pytest.mark.parametrize(
    ("op", "name", "changes", "words"),
    [
        ("attention", "flash", {"causal": True, "q": 7}, "needs Tq = Tk, or one query"),
        ("attention", "cudnn", {"softcap": 3.0}, "without cu_seqlens, ALiBi, sink or softcap"),
        ("attention", "flash-attn", {"left": 3}, "called without a window"),
        ("attention", "flash-attn", {"dtype": torch.float32}, "float16, bfloat16, got float32"),
        ("rope", "liger", {"interleaved": True}, "rotates whole heads by halves"),
        ("rope", "liger", {"dtype": torch.float64}, "bfloat16, got float64"),
        ("rms_norm", "liger", {"weight": None, "residual": torch.zeros(1)}, "needs a weight"),
    ],
    ids=str,
)
def test_refusals_say_why(monkeypatch, op, name, changes, words):
    monkeypatch.setattr(libraries, "absent", lambda peer, device: None)
    changes = dict(changes)
    shape = next(iter(OPS[op].shapes.values()))
    args = list(shape.make(changes.pop("dtype", torch.bfloat16), "cpu"))
    peer = peers.find(op, name)
    assert peer.why_not(*args) is None or changes == {}
    names = list(inspect.signature(peers.FORMULAS[op][0]).parameters)
    for key, value in changes.items():
        args[names.index(key)] = args[0][:, :value] if key == "q" else value
    assert words in peer.why_not(*args)


def test_the_loop_over_experts_is_the_chain():
    x, logits = torch.randn(70, 24), torch.randn(70, 9)
    logits[:, 3] = -50  # an expert that nobody chooses
    routing = moe_route(logits, 2)
    rows, plan = moe_dispatch(x, routing)
    want = moe_combine(rows, plan, routing.weights)
    torch.testing.assert_close(peers.moe_loop(x, logits, 2), want)


def test_peers_of_each_op():
    assert peers.of("rms_norm") == ("eager", "compile", "liger")
    assert peers.of("attention") == ("eager", "compile", "flash-attn", "cudnn", "flash")
    assert peers.of("moe_index") == ("eager", "compile")
    assert peers.of("moe_route_backward") == ()
    assert Case("rms_norm", "bwd", "s", "float32", "cpu").formulas() == ()
    assert peers.find("rms_norm", "cudnn") is peers.find("rms_norm", "loop") is None


def test_absent_peers_are_named_at_the_end(tmp_path, known_roofs):  # noqa: F811
    options = *ONE, "--peers=eager,liger,flash,loop", f"--results={tmp_path}/rows.jsonl"
    done = run("bench/", "--benchmark", *options, cache=known_roofs)
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [one for one in done.stdout.splitlines() if one.startswith("absent peers: ")]
    if not torch.cuda.is_available():
        assert "liger: liger-kernel is not installed, needs a GPU, got cpu; " in line or (
            "liger: needs a GPU, got cpu; " in line
        )
        assert "; flash: needs a GPU, got cpu; " in line
    assert line.endswith("loop: takes none of the cases that ran")
    assert "eager" not in line
    rows = [json.loads(one) for one in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert "eager" in {row["peer"] for row in rows}


def test_all_peers_by_one_name():
    done = run("bench/", "--benchmark", *ONE, "--peers=all", "--collect-only")
    for name in PEERS:
        takes = name in ("torch", "reference", "eager", "compile")
        takes = takes or (name == "liger" and peers.absent(name, "cuda") is None
                          and torch.cuda.is_available())  # fmt: skip
        assert (f"-{name}]" in done.stdout) == takes


@pytest.mark.skipif(
    libraries._missing(*libraries.MODULES["liger"]) is not None, reason="liger-kernel is not there"
)
def test_liger_itself(monkeypatch):
    # Without a GPU: RoPE only, since the interpreter lacks libdevice, and has no bfloat16 maths.
    gpu = torch.cuda.is_available()
    monkeypatch.setattr(libraries, "absent", lambda peer, device: None)
    for op in ("rope", "rms_norm") if gpu else ("rope",):
        for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
            errors = _errors(op, "liger", dtype, "cuda" if gpu else "cpu")
            assert len(errors) >= 6
            assert max(errors.values()) < LOOSE / 2, errors
