"""Every kernel compiled for every target, on any machine: no GPU takes part.

A kernel family declares the calls that matter (`compiled()` in its module). They run on meta
tensors while `launch.record` catches what Triton would have been given, so that what is compiled
here is what a launcher launches, constants and alignments included. Pointers count as 16-byte
aligned, which torch's allocator ensures.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ceg_kernels.triton.launch import Gpu, Launch, record

# Modules beside this one that have `compiled()`.
FAMILIES = (
    "rms_norm", "rope", "moe_route", "moe_index", "moe", "attention", "attention_backward",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    gpu: Gpu
    triton: GPUTarget
    shared_limit: int  # bytes of shared memory (LDS) that one program may have
    every_case: tuple[str, ...] = FAMILIES  # families; of the others each kernel once


def _nvidia(
    capability: int, processors: int, shared_kib: int, every_case: tuple[str, ...] = FAMILIES
) -> Target:
    gpu = Gpu(f"sm_{capability}", 32, processors)
    return Target(gpu, GPUTarget("cuda", capability, 32), shared_kib * 1024, every_case)


# Shared memory per block: CUDA programming guide, table of technical specifications per compute
# capability; the CDNA 3 ISA guide for gfx942. Processors: A100, RTX 3090, RTX 4090, H200, B200,
# RTX 5090, MI300X. sm_86 and sm_89 have the instructions of sm_80 and less shared memory, on which
# attention's tiles alone depend; sm_89 takes sm_86's rows. All cases of all three would compile
# what is the same three times but for the assembler.
TARGETS = {
    "sm_80": _nvidia(80, 108, 163),
    "sm_86": _nvidia(86, 82, 99, ("attention", "attention_backward")),
    "sm_89": _nvidia(89, 128, 99, ("attention",)),
    "sm_90": _nvidia(90, 132, 227),
    "sm_100": _nvidia(100, 148, 227),
    "sm_120": _nvidia(120, 170, 99),
    "gfx942": Target(Gpu("gfx942", 64, 304), GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Facts:
    """What one kernel became on one target."""

    target: str
    family: str
    case: str
    kernel: str
    warps: int
    registers: int  # of a thread
    spill_bytes: int  # of a thread, in local memory
    shared_bytes: int
    shared_limit: int
    tensor_core: str | None  # the matrix instruction, None where the kernel has none

    @property
    def wrong(self) -> str | None:
        """Why this configuration may not stay in the table, or None."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes a thread"
        if self.shared_bytes > self.shared_limit:
            return f"shared memory must be <= {self.shared_limit} bytes, got {self.shared_bytes}"
        if re.search("[tx]f32", self.tensor_core or ""):
            return f"products must be in fp32, not rounded to tf32, got {self.tensor_core}"
        return None


def report(
    targets: Iterable[str] = tuple(TARGETS),
    every_case: bool = True,
    families: Iterable[str] = FAMILIES,
) -> Iterator[Facts]:
    """Compile and describe, one kernel at a time (0.3 to 5 s each; Triton's cache remembers).

    A kernel that two cases share appears once; without `every_case`, each kernel in its first case
    only, as in families that a target's `every_case` leaves out. Raises ValueError for an unknown
    target, RuntimeError in a process that interprets kernels, and whatever Triton raises for a
    kernel that does not compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels must be compiled, got TRITON_INTERPRET=1: unset it")
    for name in targets:
        if name not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
        target = TARGETS[name]
        seen: set[Any] = set()
        for family, case, one in _launches(target, families):
            if one.kernel in seen and not (every_case and family in target.every_case):
                continue
            built = build(one, target)
            if built.hash not in seen:
                seen |= {one.kernel, built.hash}
                yield describe(built, target, family, case)


def _launches(
    target: Target, families: Iterable[str] = FAMILIES
) -> Iterator[tuple[str, str, Launch]]:
    for family in families:
        for case, call in importlib.import_module(f"ceg_kernels.triton.{family}").compiled():
            with record(target.gpu) as launches:
                call()
            yield from ((family, case, one) for one in launches)


def build(one: Launch, target: Target) -> Any:
    """The compiled kernel of a launch, specialised as Triton itself does it when launching."""
    kernel: JITFunction = one.kernel
    backend = make_backend(target.triton)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": one.warps, "num_stages": one.stages}
    bound, specialization, extra = bind(*one.args, **one.constants, **options)
    parsed, signature, constants, attrs = kernel._pack_args(
        backend, extra, bound, specialization, extra
    )
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=target.triton, options=parsed.__dict__)


def describe(built: Any, target: Target, family: str, case: str) -> Facts:
    """Registers and spills from the binary, the matrix instruction from the assembly."""
    if target.triton.backend == "hip":
        text = built.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spills = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
        matrix = re.search(r"\bv_(?:s?mfmac?|wmma)\w+", text)
    else:
        usage = _cuobjdump("--dump-resource-usage", built.asm["cubin"])
        registers = _number(r"REG:(\d+)", usage)
        # Spilled registers live on the stack; LOCAL counts arrays that are indexed at run time.
        spills = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
        # In kernels with descriptors triton 3.6 clears 8 bytes on sm_120, which nothing reads.
        if spills and "LDL" not in _cuobjdump("-sass", built.asm["cubin"]):
            spills = 0
        matrix = re.search(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\S+", built.asm["ptx"])
    return Facts(
        target=target.gpu.arch, family=family, case=case, kernel=built.metadata.name,
        warps=built.metadata.num_warps, registers=registers, spill_bytes=spills,
        shared_bytes=built.metadata.shared, shared_limit=target.shared_limit,
        tensor_core=matrix and matrix.group(0),
    )  # fmt: skip


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report must match {pattern}, got {text[:200]!r}")
    return int(found.group(1))
