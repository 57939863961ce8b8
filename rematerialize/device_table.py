"""The devices that costs can be computed for without their being here, and where each figure comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rematerialize.errors import RematerializeError, did_you_mean


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What a roofline needs to know of a device.

    Attributes
    ----------
    name : str
    memory_bytes : int
    bandwidth : float
        Bytes per second between the device's memory and its cores.
    peak_flops : mapping of str to float
        By torch's name of a type, such as "bfloat16": floating-point operations per second of a matrix product (a
        multiply-add is two); other types run at float32's rate.
    launch_s : float
        Seconds that a call takes at least.
    source : str
        Where each figure comes from.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    peak_flops: Mapping[str, float]
    launch_s: float
    source: str = ""

    def flops_per_s(self, dtype: str) -> float:
        """The rate of a type."""
        return self.peak_flops.get(dtype, self.peak_flops["float32"])

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready data."""
        return {
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "bandwidth": self.bandwidth,
            "peak_flops": dict(self.peak_flops),
            "launch_s": self.launch_s,
            "source": self.source,
        }


def _peaks(double: float, single: float, half: float, brain: float | None = None) -> Mapping[str, float]:
    """Rates in 10^12 per second; bfloat16 has that of float16 unless given."""
    rates = {"float64": double, "float32": single, "float16": half, "bfloat16": brain or half}
    return {dtype: rate * 1e12 for dtype, rate in rates.items()}


_LAUNCH_S = 3e-6
_SHEET = "NVIDIA {} data sheet, dense{}; launch: assumed"
_TENSOR_CORES = ", tensor cores for half types and float64 (no TF32)"
_HALF_ONLY = ", tensor cores for half types (no TF32); float64: {} of float32"
_NO_BRAIN = ", tensor cores for float16; bfloat16 as float32, for want of a unit"


def _gpu(
    name: str, memory_gb: int, bandwidth_gb_s: float, peaks: Mapping[str, float], sheet: str, more: str = ""
) -> DeviceSpec:
    return DeviceSpec(name, memory_gb * 10**9, bandwidth_gb_s * 1e9, peaks, _LAUNCH_S, _SHEET.format(sheet, more))


DEVICES: Mapping[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        DeviceSpec(
            "2-core CPU",
            8 * 2**30,
            20e9,
            _peaks(0.08, 0.16, 0.16),
            4e-6,
            "assumed: two cores at 2.5 GHz, two 256-bit multiply-add units each; a share of a server's memory channels",
        ),
        _gpu("NVIDIA A100 40GB", 40, 1555, _peaks(19.5, 19.5, 312), "A100 (SXM)", _TENSOR_CORES),
        _gpu("NVIDIA A100 80GB", 80, 2039, _peaks(19.5, 19.5, 312), "A100 (SXM)", _TENSOR_CORES),
        _gpu("NVIDIA H100 80GB", 80, 3350, _peaks(67, 67, 989), "H100 (SXM)", _TENSOR_CORES),
        _gpu("NVIDIA H100 PCIe 80GB", 80, 2000, _peaks(51, 51, 756), "H100 (PCIe)", _TENSOR_CORES),
        _gpu("NVIDIA H200 141GB", 141, 4800, _peaks(67, 67, 989), "H200 (SXM)", _TENSOR_CORES),
        _gpu("NVIDIA L4 24GB", 24, 300, _peaks(0.49, 30.3, 121), "L4", _HALF_ONLY.format("a 64th")),
        _gpu("NVIDIA L40S 48GB", 48, 864, _peaks(1.43, 91.6, 362), "L40S", _HALF_ONLY.format("a 64th")),
        _gpu("NVIDIA T4 16GB", 16, 320, _peaks(0.25, 8.1, 65, 8.1), "T4", _NO_BRAIN + "; float64: a 32nd of float32"),
        _gpu(
            "NVIDIA V100 32GB",
            32,
            900,
            _peaks(7.8, 15.7, 125, 15.7),
            "V100 (SXM2)",
            _NO_BRAIN,
        ),
    )
}


def device_spec(name: str) -> DeviceSpec:
    """Look a device up by name.

    Raises
    ------
    RematerializeError
        If the table lacks it.
    """
    if name not in DEVICES:
        near = did_you_mean(name, DEVICES)
        raise RematerializeError(f"no figures for a device named {name!r}: known are {', '.join(DEVICES)}{near}")
    return DEVICES[name]
