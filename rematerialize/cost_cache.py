"""Measured costs on disk, one file per environment: what was timed once needn't be timed by the next command.

An environment is everything besides the kernel itself that its time depends on: devices, torch, threads, numeric
settings. A file that can't be read is taken as empty and replaced; two processes that write at once both keep what
they measured (the file is read again and renamed into place).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rematerialize import torch_private as private
from rematerialize.capture.lower import KernelCost

_FORMAT = "rematerialize.costs/9"


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """A kernel's cost, and whether its time comes from warm runs or from the first run alone."""

    cost: KernelCost
    warm: bool


def default_folder() -> Path:
    """Where the command line keeps costs: the user's cache folder by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "rematerialize"


class CostCache:
    """The costs measured in this environment, in a folder.

    Parameters
    ----------
    folder : Path
        Made when there is something to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def path(self) -> Path:
        """The file of the environment as it is now: threads and settings may change between calls."""
        text = json.dumps(environment(), sort_keys=True)
        return self.folder / f"costs-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def load(self) -> dict[str, MeasuredCost]:
        """Costs by kernel signature's digest."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                return {}
            return {key: _read(entry) for key, entry in data["costs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def save(self, costs: Mapping[str, MeasuredCost]) -> None:
        """Add costs to the file; a warm time is never replaced by a cold one. What can't be written is lost."""
        merged = self.load()
        for key, measured in costs.items():
            if measured.warm or key not in merged:
                merged[key] = measured
        content = {
            "format": _FORMAT,
            "environment": environment(),
            "costs": {key: _entry(measured) for key, measured in sorted(merged.items())},
        }
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(name, self.path)


def digest(signature: str) -> str:
    """A kernel signature as the key of a file."""
    return hashlib.sha256(signature.encode()).hexdigest()[:32]


def environment() -> dict[str, Any]:
    """What times depend on, besides the kernel."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if private.cuda_started() else []
    return {
        "torch": str(torch.__version__),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "settings": {name: str(value) for name, value in private.numeric_settings().items()},
    }


def device_name(device: torch.device) -> str:
    """What people call a device: the GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _entry(measured: MeasuredCost) -> list[Any]:
    cost = measured.cost
    sizes = {str(index): size for index, size in cost.output_bytes.items()}
    return [cost.time_s, cost.transient_bytes, sizes, measured.warm]


def _read(entry: Any) -> MeasuredCost:
    time_s, transient, sizes, warm = entry
    return MeasuredCost(
        KernelCost(float(time_s), int(transient), {int(key): int(size) for key, size in sizes.items()}), bool(warm)
    )
