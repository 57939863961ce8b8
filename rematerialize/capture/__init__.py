"""torch -> ir: trace a training step, normalize it, group it into kernels, lower it to a training graph."""

from rematerialize.capture.flat import FlatInputs, Hole, flatten_inputs, tensor_slots
from rematerialize.capture.kernels import Kernel, KernelGraph, group_kernels
from rematerialize.capture.lower import KernelCost, lower
from rematerialize.capture.normalize import normalize
from rematerialize.capture.step import CapturedStep, capture

__all__ = [
    "CapturedStep",
    "FlatInputs",
    "Hole",
    "Kernel",
    "KernelCost",
    "KernelGraph",
    "capture",
    "flatten_inputs",
    "group_kernels",
    "lower",
    "normalize",
    "tensor_slots",
]
