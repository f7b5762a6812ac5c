"""The portable level of the CPU kernels, compiled for aarch64 and run there, or by qemu.

Needs a compiler for aarch64 and qemu's user emulation (Debian: g++-aarch64-linux-gnu, qemu-user);
skipped without them. Left out: backwards but attention's, and the mixture, which have no vectors
of another kind than those here; fp64 and fp16, which take the same loops.
"""

import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from numerics import as_tuple, compare

from ceg_kernels import OPS

CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
CSRC = Path(__file__).resolve().parent.parent / "csrc"
LAUNCHERS = ("attention_inputs", "check", "cpu/attention", "cpu/isa", "cpu/rms_norm", "cpu/rope")
KERNELS = ("attention_bwd", "attention_fwd", "rms_norm", "rope")
NAMES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3,
         torch.int32: 4, torch.int64: 5}  # fmt: skip

pytestmark = pytest.mark.skipif(
    not shutil.which(CXX) or not shutil.which(QEMU), reason=f"needs {CXX} and {QEMU}"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aarch64")
    # The table of kernels asks for all of them: those that are left out do nothing.
    (folder / "others.cpp").write_text(
        '#include "kernels.h"\nnamespace ceg::portable {\n#define STUB(kernel, Args) '
        "__attribute__((weak)) void kernel##_kernel(const Args&) {}\n"
        "CEG_FOR_EACH_KERNEL(STUB)\n}\n"
    )
    flags = ["-std=gnu++20", "-O2", "-fno-math-errno", "-fopenmp",
             "-ffp-contract=fast", "-fno-trapping-math", "-DCEG_ISA=portable",
             "-DCEG_HAS_portable", f"-I{CSRC}/cpu"]  # fmt: skip
    sources = [CSRC / f"{name}.cpp" for name in LAUNCHERS]
    sources += [CSRC / f"cpu/{name}_kernel.cpp" for name in KERNELS]
    sources += [folder / "others.cpp", Path(__file__).with_name("aarch64_main.cpp")]

    def compiled(source):
        out = folder / f"{source.stem}.o"
        subprocess.run([CXX, *flags, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([CXX, "-static", "-fopenmp", *objects, "-o", folder / "run"], check=True)
    return folder / "run"


def written(value):
    if value is None:
        return b"n"
    if isinstance(value, bool | int):
        return b"i" + struct.pack("<q", value)
    if isinstance(value, float):
        return b"f" + struct.pack("<d", value)
    head = struct.pack(f"<{2 + value.ndim}q", NAMES[value.dtype], value.ndim, *value.shape)
    return b"t" + head + raw(value)


def raw(tensor):
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["attention", "attention_backward", "rms_norm", "rope"])
def test_accuracy(name, dtype, program, tmp_path):
    op = OPS[name]
    samples = [s for s in op.samples(dtype, "cpu") if op.backend("cpu").why_not(*s.args) is None]
    outs = [as_tuple(op.fake(*sample.args)) for sample in samples]
    call = struct.pack("<q", len(name)) + name.encode()
    with (tmp_path / "in").open("wb") as file:
        for sample, out in zip(samples, outs, strict=True):
            args = list(sample.args)
            if name == "rms_norm" and args[1] is not None:
                args[1] = args[1].float()  # as the op hands the weight over
            file.write(call + b"".join(map(written, args)))
            file.write(b"".join(written(torch.zeros(t.shape, dtype=t.dtype)) for t in out))
    subprocess.run([QEMU, program, tmp_path / "in", tmp_path / "out"], check=True)
    got = (tmp_path / "out").read_bytes()
    for sample, out in zip(samples, outs, strict=True):
        results = []
        for like in out:
            size = like.numel() * like.element_size()
            data, got = bytearray(got[:size]), got[size:]
            one = torch.frombuffer(data, dtype=like.dtype) if size else torch.empty(0)
            results.append(one.to(like.dtype).view(like.shape))
        worst = compare(op, tuple(results), sample.args)
        assert worst <= 1, f"{sample.name}: error is {worst:.2f} times what the rule allows"
    assert not got
