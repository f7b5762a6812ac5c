"""What nvcc made of the CUDA kernels: read from the built extension, no GPU takes part.

Occupancy and what the driver makes of a kernel need a GPU: `_C.cuda.kernel_attributes()`.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest

from ceg_kernels import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
STATIC_SHARED_LIMIT = 48 << 10  # more has to be dynamic, on every GPU

pytestmark = pytest.mark.skipif(
    not hasattr(native._C, "cuda"), reason="the extension was built without CUDA"
)


def cuobjdump() -> str:
    """The one in Triton's wheel, or the toolkit's."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0], "backends/nvidia/bin/cuobjdump")
        if path.exists():
            return str(path)
    found = shutil.which("cuobjdump")
    if found is None:
        pytest.skip("needs cuobjdump")
    return found


@dataclass(frozen=True)
class Usage:
    arch: str
    symbol: str
    registers: int
    spill_bytes: int  # a thread's stack and local memory
    shared_bytes: int

    @property
    def wrong(self) -> str | None:
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes a thread"
        if self.shared_bytes > STATIC_SHARED_LIMIT:
            return f"has {self.shared_bytes} bytes of static shared memory"
        return None


def usages(binary: Path | str) -> list[Usage]:
    dump = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", str(binary)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found, arch = [], ""
    for line in dump.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            symbol = line.split()[1].rstrip(":")
        elif "REG:" in line:
            number = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            spills = number["STACK"] + number["LOCAL"]
            found.append(Usage(arch, symbol, number["REG"], spills, number["SHARED"]))
    return found


@functools.cache
def shipped() -> list[Usage]:
    assert native._C is not None
    return usages(native._C.__file__)


def machine_code(binary: str, arch: str, symbols: Collection[str] = ()) -> dict[str, str]:
    """Of these functions, or of all."""
    only = ["-fun", ",".join(sorted(symbols))] if symbols else []
    dump = subprocess.run(
        [cuobjdump(), "-sass", "-arch", arch, *only, binary],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", dump, re.DOTALL))


def archs() -> list[str]:
    """Those with machine code; PTX (90-virtual) is compiled by the driver."""
    words = native._C.build_info()["cuda_archs"].split() if native._C is not None else []
    return [f"sm_{w.split('-')[0]}" for w in words if not w.endswith("-virtual")]


def declared() -> set[str]:
    """The names of all kernels in the sources."""
    names = set()
    for source in [*SOURCES.glob("*.cu"), *SOURCES.glob("*.h")]:
        heads = re.findall(r"__global__\s+void\s(.*?)\(const|__global__\s+void\s(.*?)\{",
                           source.read_text(), re.DOTALL)  # fmt: skip
        for head in heads:
            names.update(re.findall(r"\w+_kernel\b", "".join(head)))
    return names


def test_every_kernel_of_the_sources_is_in_the_build_for_every_architecture():
    assert {"rms_norm_fwd_kernel", "rms_norm_bwd_kernel", "rope_kernel"} <= declared()
    for arch in archs():
        symbols = " ".join(u.symbol for u in shipped() if u.arch == arch)
        missing = [name for name in declared() if name not in symbols]
        assert not missing, f"{arch} lacks {missing}"


def test_no_kernel_spills():
    assert shipped()
    wrong = [f"{u.arch} {u.symbol}: {u.wrong}" for u in shipped() if u.wrong]
    assert not wrong, "\n".join(wrong)


def test_rows_move_in_vectors_of_16_bytes():
    """The instances for vectors of four fp32 or eight 16-bit elements, in machine code."""
    wide = {
        u.symbol
        for u in shipped()
        if re.search(r"_kernelI(fLi4|6__halfLi8|13__nv_bfloat16Li8|5uint4)E", u.symbol)
    }
    assert len(wide) > 10
    bodies = machine_code(str(native._C.__file__), archs()[0], wide)
    assert set(bodies) == wide
    for symbol, body in bodies.items():
        for access in ("LDG", "STG"):
            assert re.search(rf"\b{access}\.E\S*\.128", body), f"{symbol} has no 16-byte {access}"


def test_nothing_but_counts_of_tokens_is_added_atomically():
    """Sums of floats would depend on the order of blocks; those of integers do not."""
    found = {
        (re.sub(r".*?([a-z_]+_kernel).*", r"\1", symbol), instruction)
        for symbol, body in machine_code(str(native._C.__file__), archs()[0]).items()
        for instruction in re.findall(r"\b(?:RED|ATOM)[GS]?\.\S+", body)
    }
    adds = {
        "moe_route_kernel": r"RED\w*\.E\.ADD\.STRONG\.GPU",
        "moe_route_few_kernel": r"ATOMS\.POPC\.INC\.32",
    }
    assert {name for name, _ in found} == set(adds)
    assert all(re.fullmatch(adds[name], i) for name, i in found), found


def test_the_roofs_multiply_as_often_as_they_say():
    """Nothing dropped, joined or hoisted: 16 rounds of 16 chains or of 8 products in the loop."""
    wanted = {
        "If": ("FFMA", 256), "Id": ("DFMA", 256), "I6__half": ("HMMA.16816.F32", 128),
        "I13__nv_bfloat16": ("HMMA.16816.F32.BF16", 128), "": ("LDG.E.EF.128", 4),
    }  # fmt: skip
    ours = {u.symbol for u in shipped() if re.search(r"roofs_(fma|mma|copy)_kernel", u.symbol)}
    assert len(ours) == len(wanted)
    for arch in archs():
        for symbol, body in machine_code(str(native._C.__file__), arch, ours).items():
            kind = re.search(r"roofs_\w+?_kernel(I(?:f|d|6__half|13__nv_bfloat16)|)", symbol)[1]
            instruction, count = wanted[kind]
            found = re.findall(rf"\b{re.escape(instruction)}\s", body)
            assert len(found) == count, f"{arch} {symbol}: {len(found)} {instruction}"
            assert kind or len(re.findall(r"\bSTG\.E\.EF\.128\s", body)) == count


def test_attention_multiplies_on_tensor_cores_what_asynchronous_copies_bring():
    """mma.sync, ldmatrix and cp.async, in the machine code of every instance."""
    wanted = r"attention_(fwd|decode|bwd_dkdv|bwd_dq)_kernel"
    symbols = {u.symbol for u in shipped() if re.search(wanted, u.symbol)}
    assert len(symbols) == 48  # four kernels, two types, three head_dims, plain logits or any
    bodies = machine_code(str(native._C.__file__), archs()[0], symbols)
    assert set(bodies) == symbols
    for symbol, body in bodies.items():
        for instruction in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E"):
            assert instruction in body, f"{symbol} has no {instruction}"


def test_decoding_waits_for_its_oldest_copies_alone():
    """A wait for Q, for keys and for values, that leave the others under way; one for all."""
    symbols = {u.symbol for u in shipped() if "attention_decode_kernel" in u.symbol}
    assert len(symbols) == 12  # two types, three head_dims, plain logits or any
    bodies = machine_code(str(native._C.__file__), archs()[0], symbols)
    for symbol, body in bodies.items():
        slots = 5 if "Li64E" in symbol else 3
        left = [int(n) for n in re.findall(r"\bDEPBAR\.LE SB0, 0x(\d+)", body)]
        assert left == [slots - 1, slots - 2, slots - 2, 0], f"{symbol}: {left}"


def test_attention_for_hopper_multiplies_by_warpgroups_what_the_copy_engine_brings():
    """wgmma, TMA, setmaxnreg; a wait that leaves a group of products running, or one wait for many
    products, is what the compiler did not make serial. dQ in one pass has both operands transposed,
    and sums that move in vectors."""
    if "sm_90a" not in archs():
        pytest.skip("built without sm_90a")
    names = r"attention_sm90_(fwd|bwd|bwd_dkdv|bwd_dq)_kernel"
    ours = [u for u in shipped() if re.search(names, u.symbol) and u.arch == "sm_90a"]
    # Two types, plain logits or any: three kernels of three head_dims, one of two.
    assert len(ours) == 2 * 2 * (3 * 3 + 2)
    assert all(u.registers == 65536 // 384 // 8 * 8 for u in ours)
    bodies = machine_code(str(native._C.__file__), "sm_90a", {u.symbol for u in ours})
    for symbol, body in bodies.items():
        forward, of_keys, one_pass = ("_fwd_" in symbol, "_dkdv_" in symbol, "_bwd_k" in symbol)
        head_dim = int(re.search(r"Li(\d+)E", symbol)[1])
        dots = 64 if of_keys or one_pass or head_dim > 128 else 128
        wanted = [f"HGMMA.64x{n}x16.F32" for n in (dots, head_dim)]
        wanted += ["UTMALDG.4D", "USETMAXREG.TRY_ALLOC", "SYNCS.PHASECHK"]
        if one_pass:
            wanted += ["tnspA.tnspB", "LDG.E.128", "STG.E.128", "SHFL.BFLY"]
        if forward:
            wanted += ["WARPGROUP.DEPBAR.LE gsb0, 0x1"]
        for instruction in wanted:
            assert instruction in body, f"{symbol} has no {instruction}"
        # A wait for each of the loop's groups, and for the one behind the loop.
        if not forward:
            waits = 2 if of_keys else 4 if one_pass else 3
            assert body.count("WARPGROUP.DEPBAR") == waits, f"{symbol} is serial"
        assert " HMMA." not in body, f"{symbol} multiplies by warps"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_a_kernel_that_spills_is_seen(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(float* p) {\n"
        "  float v[64];\n"
        "  for (int i = 0; i < 64; ++i) v[i] = p[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = v[i] * v[63 - i];\n}\n"
    )
    cubin = tmp_path / "spills.cubin"
    command = ["nvcc", "-cubin", "-arch=sm_80", "-o", str(cubin), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (usage,) = usages(cubin)
    assert usage.wrong is not None
    assert usage.wrong.startswith("spills ")
