"""Every functional op of ATen on drawn arguments: does its fake kernel report the layout that the real one returns?

Torch's own samples (`layouts`) have few tensors of four dimensions, and none for ops that it tests by other means.

python -m benchmarks.conformance.generated              # all of them, some minutes; prints what is misreported
python -m benchmarks.conformance.generated roll poisson # the overloads of these
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.cases import SEED
from benchmarks.conformance.layouts import misreports

aten = torch.ops.aten

SECONDS = 2.0  # per op
_STUCK_S = 20  # some kernels don't return from arguments that make no sense
_SHAPES = ((3, 4, 6, 6), (3, 4, 6), (2, 3, 4, 4, 4), (6, 6), (2, 8, 1, 1), (1, 4, 4, 4), (2, 1, 4, 4))
_LISTS = ([1], [0], [1, 2], [2, 3], [2, 2], [1, 1, 1], [6, 6], [0, 1, 2, 3], [3, 4, 6, 6])
# Of other devices and libraries, or reading past the ends of what they are given.
_LEFT_OUT = (
    *("cuda", "cudnn", "miopen", "mps", "mkldnn", "mkl", "nnpack", "fbgemm", "quantize", "weight_int", "scaled_mm"),
    *("sparse", "nested", "jagged", "padded_dense", "_pack", "sym_con", "sobol", "from_file", "resize", "_validate"),
    *("segment_reduce", "histogram", "_cslt", "int_mm", "adaptive_max", "unpool", "fractional"),
)
# Not met in a trace: it holds other ops in their place, or eager gives them other arguments.
KNOWN = {
    "_foreach_": "optimizers' ops",
    "hacked_twin": "of TorchScript",
    "fft_fftshift": "made of roll",
    "fft_ifftshift": "made of roll",
    "ldexp": "made of mul and pow",
    "rrelu.": "made of rrelu_with_noise",
    **dict.fromkeys(
        ("uniform.", "cauchy.", "exponential.", "geometric.", "log_normal."),
        "what a trace has for a draw in place: given the layout of its argument (`capture/layout.py`)",
    ),
    "conj_physical": "of real numbers, which a trace never asks for",
    "isinf.": "made of abs and eq",
    "_add_relu": "of quantized models",
    "_chunk_cat": "of sharded optimizers",
    "_unsafe_index": "of compiled interpolation",
    "_prelu_kernel.": "of a weight that has more dimensions than its input",
    "huber_loss.": "of inputs that are broadcast: the functional form expands them first",
    "rrelu_with_noise_backward": "of noise that is broadcast",
    "native_dropout": "of other devices: on CPUs dropout is made of other ops",
    "one_hot": "made of a comparison in a trace: given eager's layout where it is called",
    "log_sigmoid_backward": "a gradient that is broadcast: autograd gives whole ones",
    "_loss_backward": "a gradient that is broadcast: autograd gives whole ones",
    "_slow_conv2d": "chosen for convolutions that no library takes",
    "lanczos": "not reached from Python",
    "_weight_norm_interface": "of a magnitude that has another shape",
}


def calls(op: Any, seed: int = SEED) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield calls of an op without end, most of which its kernel refuses."""
    draw = random.Random(f"{op} {seed}")
    while True:
        shape = draw.choice(_SHAPES)
        dtype = draw.choice(
            (*[torch.float32] * 4, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool)
        )

        def tensor(shape: Sequence[int] = shape, dtype: torch.dtype = dtype) -> Tensor:
            sizes = [1 if draw.random() < 0.05 else size for size in shape]
            values = torch.randint(0, 2, sizes) if not dtype.is_floating_point else torch.rand(sizes)
            return values.to(dtype)

        positional = [item for item in op._schema.arguments if not item.kwarg_only]
        given = [item for item in positional if not item.has_default_value() or draw.random() < 0.6]
        try:
            yield op, tuple(_value(str(item.type), draw, tensor) for item in given), {}
        except KeyError:  # of a type that nothing is drawn for
            return


def _value(kind: str, draw: random.Random, tensor: Callable[[], Tensor]) -> Any:
    if kind.startswith("Optional["):
        return _value(kind[len("Optional[") : -1], draw, tensor) if draw.random() < 0.5 else None
    drawn: dict[str, Callable[[], Any]] = {
        "Tensor": tensor,
        "List[Tensor]": lambda: [tensor(), tensor()],
        "List[Optional[Tensor]]": lambda: [draw.choice((None, torch.randint(0, 2, (3, 2, 4)))) for _ in range(2)],
        "float": lambda: 0.5,
        "number": lambda: 0.5,
        "int": lambda: draw.choice((1, 1, 2, 0, -1)),
        "SymInt": lambda: draw.choice((1, 1, 2, 0, -1)),
        "bool": lambda: draw.random() < 0.5,
        "List[int]": lambda: draw.choice(_LISTS),
        "List[SymInt]": lambda: draw.choice(_LISTS),
    }
    return drawn[kind]()


def operators(names: Sequence[str] = ()) -> Iterator[Any]:
    """Yield the overloads that return new tensors, of some names or of all that can run here."""
    for name in names or [name for name in sorted(dir(aten)) if not any(part in name for part in _LEFT_OUT)]:
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            if not op._schema.is_mutable and not any(item.alias_info for item in op._schema.returns):
                yield op


def first_misreport(op: Any, seconds: float = SECONDS) -> str:
    """Return what is misreported of an op, "" if nothing was within some seconds."""
    end = time.perf_counter() + seconds
    for call in calls(op):
        for told in misreports(call):
            return told
        if time.perf_counter() > end:
            break
    return ""


def main(names: Sequence[str]) -> int:
    """Run every op in a process of its own, since kernels may crash; return 1 when a misreport isn't `KNOWN`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong = 0
    for op in operators(names):
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            wrong += os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1
            continue
        signal.alarm(_STUCK_S)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        told = first_misreport(op)
        known = next((why for part, why in KNOWN.items() if part in f"{op}"), "")
        if told:
            print(told, f"(known: {known})" if known else "", flush=True)
        os._exit(int(bool(told) and not known))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
