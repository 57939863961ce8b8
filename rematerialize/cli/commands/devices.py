"""``devices``: the table of devices that costs can be computed for, and where its figures come from."""

from __future__ import annotations

from rematerialize.cli.app import command
from rematerialize.cli.console import Console


@command
def devices(console: Console) -> None:
    """List the devices that --device knows without their being here, with the source of each figure."""
    from rematerialize.device_table import DEVICES

    if console.as_json:
        console.data("devices", {"devices": [spec.to_dict() for spec in DEVICES.values()]})
        return
    figures = [spec.to_dict() for spec in DEVICES.values()]
    rows = [
        [
            figure["name"],
            console.size(figure["memory_bytes"]),
            f"{console.size(round(figure['bandwidth']))}/s",
            *(f"{figure['peak_flops'][dtype] / 1e12:,.4g}" for dtype in ("float64", "float32", "bfloat16")),
            figure["source"],
        ]
        for figure in figures
    ]
    headers = ["device", "memory", "bandwidth", "float64 Tflop/s", "float32", "bfloat16", "source"]
    console.table("", headers, rows, "<>>>>><")
