"""Choosing a backend: forcing, refusing with reasons, explaining; and who imports whom."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ceg_kernels
from ceg_kernels import OPS, explain, use_backend
from ceg_kernels.op import Backend

ROOT = Path(__file__).resolve().parent.parent


def test_unforced_the_native_kernel_runs_on_cpu():
    for op in OPS.values():
        args = next(iter(op.samples(torch.float32, "cpu"))).args
        assert op.choose(*args).name == "cpu"


def test_forcing_a_backend_for_one_op_covers_its_backward_and_nothing_else():
    x = next(iter(OPS["rms_norm"].samples(torch.float32, "cpu"))).args
    dx = next(iter(OPS["rms_norm_backward"].samples(torch.float32, "cpu"))).args
    q = next(iter(OPS["rope"].samples(torch.float32, "cpu"))).args
    with use_backend({"rms_norm": "torch"}):
        assert OPS["rms_norm"].choose(*x).name == "torch"
        assert OPS["rms_norm_backward"].choose(*dx).name == "torch"
        assert OPS["rope"].choose(*q).name == "cpu"
        with use_backend("reference"):
            assert OPS["rms_norm"].choose(*x).name == "reference"
        assert OPS["rms_norm"].choose(*x).name == "torch"
    assert OPS["rms_norm"].choose(*x).name == "cpu"


def test_a_forced_backend_that_cannot_says_why_and_does_not_fall_back():
    q = torch.zeros(1, 4, 1, 320)
    with use_backend("cpu"), pytest.raises(RuntimeError) as error:
        ceg_kernels.flash_attention(q, q, q)
    text = str(error.value)
    assert "backend cpu was forced but refuses: needs head_dim <= 256, got 320" in text
    assert "float32[1, 4, 1, 320] on cpu" in text  # the arguments
    assert "torch: runs these arguments" in text  # and who could instead
    assert ceg_kernels.flash_attention(q, q, q).shape == q.shape  # unforced, another one runs


def test_softcap_refuses_stock_torch():
    q = torch.zeros(1, 4, 1, 8)
    with use_backend("torch"), pytest.raises(RuntimeError, match="has no softcap"):
        ceg_kernels.flash_attention(q, q, q, softcap=1.0)


@pytest.mark.parametrize(
    ("backend", "match"),
    [
        ("cudnn", "backend must be one of cpu, .*, got 'cudnn'"),
        ({"rmsnorm": "cpu"}, "op must be one of .*, got 'rmsnorm'"),
        ({"rope": "cudnn"}, "backend of rope must be one of cpu, .*, got 'cudnn'"),
    ],
)
def test_an_unknown_name_is_refused_before_anything_runs(backend, match):
    with pytest.raises(ValueError, match=match), use_backend(backend):
        raise AssertionError("not reached")


def test_explain_has_one_line_per_backend_and_names_the_chosen_one():
    args = next(iter(OPS["rope"].samples(torch.float32, "cpu"))).args
    lines = explain("rope", *args).splitlines()
    assert len(lines) == 1 + len(OPS["rope"].backends)
    assert lines[1] == "  cpu: runs these arguments: chosen unless another is forced"
    assert "use_backend forces it" in lines[-1]
    with pytest.raises(ValueError, match="op must be one of"):
        explain("rotary", *args)


def test_the_extension_missing_is_a_reason(monkeypatch):
    monkeypatch.setattr(ceg_kernels.native, "MISSING", "the extension is not built (test)")
    args = next(iter(OPS["rope"].samples(torch.float32, "cpu"))).args
    assert "cpu: the extension is not built (test)" in explain("rope", *args)


def test_meta_tensors_are_refused_by_the_native_kernels():
    args = [
        a.to("meta") if isinstance(a, torch.Tensor) else a
        for a in next(iter(OPS["rope"].samples(torch.float32, "cpu"))).args
    ]
    assert OPS["rope"].backend("cpu").why_not(*args) == "needs tensors on cpu, got one on meta"


def test_the_choice_is_cached_and_the_cache_is_bounded(monkeypatch):
    asked = []
    op = OPS["moe_route"]
    counted = Backend("counted", lambda *a: None, lambda *a: asked.append(1) and None)
    monkeypatch.setattr(op, "backends", (counted, *op.backends))
    monkeypatch.setattr(op, "_chosen", {})
    logits = torch.zeros(4, 8)
    for _ in range(3):
        assert op.choose(logits, None, 2, "softmax", True) is counted
    assert len(asked) == 1
    monkeypatch.setattr("ceg_kernels.op._CACHE_LIMIT", 5)
    for k in range(40):
        op.choose(logits, None, k, "softmax", True)
        assert len(op._chosen) <= 5


def test_every_backend_is_known_by_name():
    assert ceg_kernels.backends()[0] == "cpu"
    assert {"torch", "reference"} <= set(ceg_kernels.backends())


# What a package may import of ours; the arrow goes one way (docs/design is the tree itself).
ALLOWED = {
    "ceg_kernels/op.py": set(),
    "ceg_kernels/build.py": {"ceg_kernels"},
    "ceg_kernels/native.py": {"ceg_kernels", "ceg_kernels.op"},
    "ceg_kernels/ops": {"ceg_kernels", "ceg_kernels.op", "ceg_kernels.native", "ceg_kernels.ops"},
    "ceg_kernels/triton": {"ceg_kernels.triton"},
}


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_go_one_way(place):
    path = ROOT / place
    for file in [path] if path.suffix else path.rglob("*.py"):
        for module in _imports(file):
            allowed = any(
                module == a or (a.count(".") and module.startswith(a + ".")) for a in ALLOWED[place]
            )
            assert allowed, f"{file.relative_to(ROOT)} imports {module}"


def test_ceg_kernels_never_imports_the_model():
    for file in (ROOT / "ceg_kernels").rglob("*.py"):
        assert not [m for m in _imports(file) if m.startswith(("ceg_model", "bench", "tests"))], (
            file
        )


def _imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from [node.module] if node.module.startswith(("ceg", "bench", "tests")) else []
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith(("ceg", "bench", "tests")))


def test_without_torch_the_package_imports_and_says_what_is_missing():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)\n"
        "import ceg_kernels; assert ceg_kernels.build_info()\n"
        "try: ceg_kernels.flash_attention\n"
        "except ImportError as e: assert 'needs torch >= 2.10' in str(e), e\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("import ceg_kernels; print(loaded())", "set()"),
        ("import ceg_kernels; ceg_kernels.rope; print('rms_norm' in ceg_kernels.OPS)", "True"),
        ("import torch, ceg_kernels; print(torch.ops.ceg.rms_norm.default._schema.name)",
         "ceg::rms_norm"),
        # As native.py tells, torch's libgomp has to be the first one.
        ("from ceg_kernels import _C; print(sorted(loaded()))", "['ceg_kernels._C', 'torch']"),
    ],
    ids=["the package", "an op", "torch first", "the extension"],
)  # fmt: skip
def test_what_loads_torch(code, printed):
    pytest.importorskip("ceg_kernels._C")
    helper = "import sys; loaded = lambda: {'torch', 'ceg_kernels._C'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", helper + code], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == printed


def test_what_a_call_costs_is_said_for_every_public_op_with_and_without_gradients():
    done = subprocess.run(
        [sys.executable, "tools/call_overhead.py", "--json"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    public = {name for name in ceg_kernels.__all__ if name in OPS} | {"flash_attention"}
    assert {(row["call"], row["gradients"]) for row in rows} == {
        (op, wanted) for op in public for wanted in (False, True)
    }
    # Of all calls together: one alone may have met another process.
    plain, differentiable = (
        sum(row["host_us"] for row in rows if row["gradients"] is wanted)
        for wanted in (False, True)
    )
    assert 0 < plain < differentiable
