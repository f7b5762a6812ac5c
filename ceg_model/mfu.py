"""MFU, PaLM's FLOP formula, and the dense peaks that an MFU may be taken of.

MFU = model FLOPs / (seconds x devices x peak). Model FLOPs: `ceg_model.flops.model_flops`, or
PaLM's formula where a published number is to be met.
"""

from __future__ import annotations

from dataclasses import dataclass


class AbovePeakError(ValueError):
    """More FLOP/s than the peak: one of the two is wrong."""


@dataclass(frozen=True)
class Peak:
    """A device's dense peak for one dtype, in FLOP/s."""

    flops: float
    source: str


_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet, half of the figure with sparsity"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet, half of the figure with sparsity"

# By words of torch.cuda.get_device_name. The first row whose words are all in the name counts.
_PEAKS: tuple[tuple[tuple[str, ...], dict[str, Peak]], ...] = (
    (("A100",), {"bfloat16": Peak(312e12, _A100), "float32": Peak(19.5e12, _A100)}),
    (("H100", "PCIe"), {"bfloat16": Peak(756e12, _H100), "float32": Peak(51e12, _H100)}),
    (("H100", "HBM3"), {"bfloat16": Peak(989e12, _H100), "float32": Peak(67e12, _H100)}),
    (("H200",), {"bfloat16": Peak(989e12, _H200), "float32": Peak(67e12, _H200)}),
    (("TPU", "v3"), {"bfloat16": Peak(123e12, "Google Cloud TPU v3 system architecture")}),
    (("TPU", "v4"), {"bfloat16": Peak(275e12, "Google Cloud TPU v4 system architecture")}),
)

# Printed on data sheets for matrices of which half the entries are zero: no dense matmul reaches
# them.
_SPARSE_BF16 = {
    624e12: "A100",
    1513e12: "H100 PCIe",
    1979e12: "H100 SXM and H200",
}


def dense_peak(device_name: str, dtype: str = "bfloat16") -> Peak | None:
    """The cited dense peak of a device by its name, or None where none is on record.

    float16 has bfloat16's. float32 is without TF32.
    """
    dtype = "bfloat16" if dtype == "float16" else dtype
    for words, peaks in _PEAKS:
        if all(word.lower() in device_name.lower() for word in words):
            return peaks.get(dtype)
    return None


def check_dense(peak: float, dtype: str = "bfloat16") -> None:
    """Refuse a peak that is known to be the sparse figure of that dtype."""
    if not peak > 0:
        raise ValueError(f"peak must be above 0 FLOP/s, got {peak}")
    if dtype not in ("bfloat16", "float16"):
        return
    for sparse, device in _SPARSE_BF16.items():
        if abs(peak / sparse - 1) < 1e-3:
            raise ValueError(
                f"peak must be dense, got {peak:.4g}: the {dtype} figure of the {device}"
                f" with sparsity; dense is {sparse / 2:.4g}"
            )


def mfu(
    flops: float, seconds: float, *, peak: float, devices: int = 1, dtype: str = "bfloat16"
) -> float:
    """flops / (seconds x devices x peak). Raises AbovePeakError above 1, ValueError for a sparse
    peak and for arguments that cannot be.
    """
    check_dense(peak, dtype)
    if not seconds > 0 or devices < 1 or flops < 0:
        raise ValueError(
            "seconds must be above 0, devices at least 1 and flops 0 or above,"
            f" got {seconds}, {devices} and {flops}"
        )
    value = flops / (seconds * devices * peak)
    if value > 1:
        raise AbovePeakError(
            f"MFU must be at most 1, got {value:.3f} ({flops:.4g} FLOP in {seconds:.4g} s"
            f" on {devices} x {peak:.4g} FLOP/s):"
            " the peak is too low, the time too short or the FLOPs too many"
        )
    return value


def palm_flops_per_token(
    n_params: int, n_layer: int, n_head: int, head_dim: int, seq_len: int
) -> int:
    """6 N + 12 L H Q T of PaLM, appendix B: training FLOPs a token, every T x T pair counted.

    H Q is heads times head size, which need not be d_model (PaLM 540B: 12288 of 18432).
    """
    return 6 * n_params + 12 * n_layer * n_head * head_dim * seq_len
