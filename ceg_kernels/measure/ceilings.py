"""The roofs of this machine, measured: FLOP/s per dtype and copy bandwidth.

Two numbers per dtype: the multiply-add rate of the registers (`fma`: a loop in the native core's
best level, vectors or AMX tiles for bf16; on a GPU, bf16 and fp16 by `mma.sync`, see gpu_roofs.py)
and the rate of a large torch matmul, which may use matrix units that the native core does not know,
or `wgmma`, which ours for sm_80 do not. The roof is the larger, and `Roofs.flops_source` says which
one that is. What could not be measured is None, never a number from a data sheet.

Measuring takes a few seconds, so the result is kept in the user's cache directory under the
device's name, the number of threads and the hash of the native build. Roofs that were measured
while other processes took CPU time are too low: they are used once, with a warning, and not kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ceg_kernels.measure import gpu_roofs
from ceg_kernels.measure.clock import time_interleaved

DTYPES = ("float64", "float32", "bfloat16", "float16")
_QUIET_SHARE = 0.9
# On a GPU; of its largest matmul, and where that takes long, of one.
_MATMUL_SIZES = {
    "bfloat16": (4096, 8192, 16384), "float16": (4096, 8192, 16384), "float32": (8192,),
    "float64": (4096,),
}  # fmt: skip
_FORMAT = 2  # of the cached file; a file of another format is measured again


@dataclasses.dataclass(frozen=True)
class Roofs:
    """What the device can do at most. FLOP/s and bytes/s (read + written); None is unknown."""

    device_name: str
    device: str
    threads: int
    flops: dict[str, float | None]
    flops_source: dict[str, str | None]  # "fma" | "mma.sync" | "matmul"
    copy_bytes_per_s: float | None
    copy_source: str | None  # "native" | "torch"
    fma_flops: dict[str, float | None]  # from registers; on a GPU 16-bit types by mma.sync
    matmul_flops: dict[str, float | None]
    cache_bytes: int | None  # last-level cache: what is smaller may be faster than the copy roof
    cpu_share: float | None  # of the threads' time that this process got; below 1: others ran too
    versions: dict[str, str]

    def ridge(self, dtype: str) -> float | None:
        """Intensity (FLOP per byte) from which on the compute roof is the lower one."""
        peak = self.flops.get(dtype)
        if peak is None or self.copy_bytes_per_s is None:
            return None
        return peak / self.copy_bytes_per_s


def measure(device: str = "cpu", refresh: bool = False, seconds: float = 0.2) -> Roofs:
    """The roofs of `device`, from the cache unless `refresh`.

    `seconds` is the time given to one number; the whole takes about 15 times that. Roofs in the
    cache that were measured in less time are measured again.
    """
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {device} must be a CUDA GPU that torch can use, got none")
    path = cache_path(device)
    if not refresh and (known := _load(path, seconds)) is not None:
        return known
    roofs = _measure_cpu(seconds) if kind == "cpu" else _measure_cuda(device, seconds)
    if roofs.cpu_share is not None and roofs.cpu_share < _QUIET_SHARE:
        warnings.warn(
            f"other processes left this one {roofs.cpu_share:.0%} of its threads' time while the"
            " roofs were measured: they are too low, and will be measured again next time",
            stacklevel=2,
        )
    else:
        _store(path, roofs, seconds)
    return roofs


def peak_flops(dtype: str, device: str = "cpu", seconds: float = 0.2) -> float:
    """FLOP/s of one dtype now, in about five times `seconds`: what a step beside may be held to.

    The larger of the two numbers of the module's docstring. Nothing is kept: a process with other
    threads, or beside others, asks for its own.
    """
    cuda = device.startswith("cuda")
    known = [_matmul_flops(getattr(torch, dtype), 8192 if cuda else 1024, device, seconds)]
    if cuda and gpu_roofs.why_not(device) is None:
        known.append(_register_flops(dtype, device, seconds))
    elif not cuda and (native := _native()) is not None:
        known.append(native.fma_flops(dtype, torch.get_num_threads(), seconds) or 0.0)
    return max(known)


def device_name(device: str = "cpu") -> str:
    """The name that the processor or the GPU gives itself, with what tells two of them apart."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    fields = dict.fromkeys(("model name", "cpu family", "model", "stepping"), "")
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in fields and not fields[key.strip()]:
                fields[key.strip()] = value.strip()
    except OSError:
        pass
    name = fields["model name"] or platform.processor() or platform.machine()
    # A virtual machine hides the product's name: "Intel(R) Xeon(R) Processor" is many machines.
    detail = "-".join(fields[key] for key in ("cpu family", "model", "stepping") if fields[key])
    return f"{name} ({detail})" if detail else name


def cache_path(device: str = "cpu") -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    build = _build_hash() or "no-native"
    threads = torch.get_num_threads() if device == "cpu" else 0
    key = f"{device_name(device)}-{threads}t-{build[:12]}-torch{torch.__version__}"
    return base / "ceg" / f"roofs-{re.sub(r'[^A-Za-z0-9.]+', '-', key).strip('-')}.json"


def last_level_cache_bytes() -> int | None:
    """Size of the CPU's largest cache as the kernel reports it; None where it does not."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=None)


def _measure_cpu(seconds: float) -> Roofs:
    threads = torch.get_num_threads()
    native = _native()
    fma: dict[str, float | None] = {
        name: native.fma_flops(name, threads, seconds) if native is not None else None
        for name in DTYPES
    }
    matmul: dict[str, float | None] = {
        name: _matmul_flops(getattr(torch, name), 2048, "cpu", seconds) for name in DTYPES
    }
    cache = last_level_cache_bytes()
    share = _cpu_share(threads, seconds)
    # Source and target are four times the last-level cache: next to nothing is found there again.
    size = min(max(2 * (cache or 0), 128 << 20), 512 << 20)
    copies = {"torch": _copy_bytes_per_s(size, "cpu", seconds)}
    if native is not None:
        copies["native"] = native.copy_bandwidth(size, threads, seconds)
    share = min(share, _cpu_share(threads, seconds))
    return _roofs("cpu", threads, fma, matmul, copies, cache, share)


def _measure_cuda(device: str, seconds: float) -> Roofs:
    with torch.cuda.device(device), _full_precision():
        matmul: dict[str, float | None] = {
            name: max(_matmul_flops(getattr(torch, name), n, device, seconds) for n in sizes)
            for name, sizes in _MATMUL_SIZES.items()
        }
        size = 2 << 30  # of each; caches hold 30 to 130 MB
        copies = {"torch": _copy_bytes_per_s(size, device, seconds)}
        fma: dict[str, float | None] = dict.fromkeys(DTYPES)
        if gpu_roofs.why_not(device) is None:
            fma = {name: _register_flops(name, device, seconds) for name in DTYPES}
            copies["native"] = _copy_bytes_per_s(size, device, seconds, gpu_roofs.copy)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return _roofs(device, 0, fma, matmul, copies, cache)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Whatever the process allows itself, a roof named float32 is not one of TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _roofs(
    device: str,
    threads: int,
    fma: dict[str, float | None],
    matmul: dict[str, float | None],
    copies: dict[str, float],
    cache: int | None,
    share: float | None = None,
) -> Roofs:
    flops: dict[str, float | None] = {}
    source: dict[str, str | None] = {}
    for name in DTYPES:
        registers = "fma" if device == "cpu" else gpu_roofs.SOURCE[name]
        known = {registers: fma.get(name), "matmul": matmul.get(name)}
        best = max((key for key in known if known[key]), key=lambda k: known[k] or 0, default=None)
        flops[name], source[name] = (known[best] if best else None), best
    copy_source = max(copies, key=lambda key: copies[key], default=None)
    return Roofs(
        device_name=device_name(device), device=device, threads=threads,
        flops=flops, flops_source=source, fma_flops=fma, matmul_flops=matmul,
        copy_bytes_per_s=copies[copy_source] if copy_source else None, copy_source=copy_source,
        cache_bytes=cache, cpu_share=share, versions=_versions(),
    )  # fmt: skip


def _matmul_flops(dtype: torch.dtype, n: int, device: str, seconds: float) -> float:
    # Random data: zeros draw less power, and the clocks of a GPU rise with it.
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device, seconds)


def _register_flops(dtype: str, device: str, seconds: float) -> float:
    call = gpu_roofs.multiply(dtype, device)
    return call() / _best_seconds(call, device, seconds)


def _copy_bytes_per_s(
    size: int, device: str, seconds: float, copier: Callable[..., Callable] | None = None
) -> float:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    if device != "cpu":
        source.uniform_()  # for the clocks, as above
    target = torch.zeros_like(source)
    call = (lambda: target.copy_(source)) if copier is None else copier(source, target)
    return 2 * source.nbytes / _best_seconds(call, device, seconds)


def _cpu_share(threads: int, seconds: float) -> float:
    """CPU seconds over thread seconds of a loop on all threads: 1 on a quiet machine."""
    a = torch.ones(1024, 1024)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        torch.mm(a, a, out=out)
    spent = time.process_time() - cpu
    return spent / ((time.perf_counter() - wall) * threads)


def _best_seconds(call: Callable[[], Any], device: str, seconds: float) -> float:
    """The fastest of several samples: a roof is what the machine can do."""
    timing = time_interleaved({"call": call}, device=device, min_time_s=seconds)["call"]
    return min(timing.samples)


def _native() -> Any:
    """The native core, or None where it is not built."""
    try:
        from ceg_kernels import _C
    except ImportError:
        return None
    return _C


def _build_hash() -> str | None:
    from ceg_kernels.build import build_info

    found = build_info().get("source_hash")
    return str(found) if found else None


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"torch": str(torch.__version__)}
    for package in ("ceg-kernels", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if build := _build_hash():
        found["build"] = build[:12]
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks and temperature of the GPUs as nvidia-smi has them now; None without it."""
    asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu")
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return {
        name: "; ".join(values) for name, values in zip(asked, zip(*rows, strict=True), strict=True)
    }


def _load(path: Path, seconds: float) -> Roofs | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        return None
    if content.pop("seconds") < seconds:
        return None
    return Roofs(**content)


def _store(path: Path, roofs: Roofs, seconds: float) -> None:
    content = {"format": _FORMAT, "seconds": seconds, **dataclasses.asdict(roofs)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, suffix=".part", delete=False
        ) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"the roofs could not be kept in {path.parent}: {error}", stacklevel=3)
