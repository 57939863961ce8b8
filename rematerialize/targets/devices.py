"""``--device``: here, or in the table of devices that costs can be computed for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from rematerialize.device_table import DEVICES, DeviceSpec
from rematerialize.errors import TargetError, did_you_mean


@dataclass(frozen=True, slots=True)
class Device:
    """Where a step is to run.

    Attributes
    ----------
    here : str or None
        "cpu" or "cuda" (with an index, if one was given); None when the device isn't here.
    spec : DeviceSpec or None
        The figures of a device that isn't here: costs are computed from them, on fake tensors.
    """

    here: str | None
    spec: DeviceSpec | None = None


def find_device(text: str | None) -> Device:
    """Read ``--device``; None is wherever the target puts its tensors, on the CPU as a rule.

    Raises
    ------
    TargetError
        If it is neither here nor in the table; names the closest.
    """
    if text is None:
        return Device("cpu")
    by_fold = {name.casefold(): spec for name, spec in DEVICES.items()}
    spec = by_fold.get(" ".join(text.split()).casefold())
    if spec is not None:
        return Device("cuda") if _is_here(spec) else Device(None, spec)
    kind, colon, index = text.partition(":")
    if kind == "cpu" and not colon:
        return Device("cpu")
    if kind == "cuda" and (not colon or index.isdigit()):
        return Device(_cuda(text, int(index or 0)))
    known = ["cpu", "cuda", *DEVICES]
    near = did_you_mean(text, known) or _named_in_part(text)
    raise TargetError(f"expected --device as one of {', '.join(known)}, got {text!r}{near}")


def _named_in_part(text: str) -> str:
    """``; did you mean ...?`` for the devices of the table whose names hold every word of a text: "h100"."""
    words = text.casefold().split()
    close = [name for name in DEVICES if words and all(word in name.casefold() for word in words)]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _cuda(text: str, index: int) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise TargetError(
            "CUDA was asked for, but torch finds no CUDA device here; for computed costs name one of "
            f"{', '.join(name for name in DEVICES if 'CPU' not in name)}"
        )
    if index >= count:
        raise TargetError(f"expected a CUDA device below {count}, got {text!r}")
    return text


def _is_here(spec: DeviceSpec) -> bool:
    """Is it the first GPU: "NVIDIA A100 80GB" is what torch calls "NVIDIA A100-SXM4-80GB", of about that memory."""
    if not torch.cuda.is_available():
        return False
    words = set(re.split(r"[^A-Za-z0-9]+", torch.cuda.get_device_name(0)))
    memory = torch.cuda.get_device_properties(0).total_memory
    alike = abs(memory - spec.memory_bytes) < 0.15 * spec.memory_bytes
    return alike and set(spec.name.split()[:-1]) <= words
