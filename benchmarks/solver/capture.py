"""Capture the models of `models.py` and `held_out.py` on fake tensors and write their graphs for `suite.py`.

python -m benchmarks.solver.capture [small | held_out | large | NAME ...]

Costs are the roofline's, to six digits. The same torch and library versions give the same bytes.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace

from benchmarks.solver.held_out import HELD_OUT
from benchmarks.solver.models import LARGE, SMALL, Factory
from benchmarks.solver.suite import DATA, write
from rematerialize.analytic import analytic_graph, on_fake_tensors
from rematerialize.device_table import device_spec
from rematerialize.ir import TrainingGraph

DEVICE = "NVIDIA A100 80GB"


def captured(factory: Factory) -> TrainingGraph:
    """The training step of a model, its LSTMs split over time, with rounded costs."""
    model, inputs = on_fake_tensors(factory)
    graph = analytic_graph(model, inputs, device_spec(DEVICE), split_recurrences=True)
    ops = tuple(replace(op, time_s=float(f"{op.time_s:.6g}")) for op in graph.ops)
    return replace(graph, ops=ops).verify()


def main(wanted: list[str]) -> None:
    """Capture what is asked for, one line per graph."""
    suites = {"small": SMALL, "held_out": HELD_OUT, "large": LARGE}
    names = [name for suite in suites.values() for name in suite]
    unknown = [name for name in wanted if name not in suites and name not in names]
    if unknown:
        sys.exit(f"no such graph: {', '.join(unknown)}; there are {', '.join(suites)}, {', '.join(names)}")
    print(f"{'graph':24s}{'ops':>8s}{'forward':>9s}{'step s':>10s}{'capture s':>11s}{'file KB':>9s}{'GiB so far':>12s}")
    for suite, factories in suites.items():
        for name, factory in factories.items():
            if wanted and name not in wanted and suite not in wanted:
                continue
            start = time.perf_counter()
            graph = captured(factory)
            seconds = time.perf_counter() - start
            path = DATA / suite / f"{name}.json.gz"
            write(graph, path)
            forward = sum(op.phase == "forward" for op in graph.ops)
            resident_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{name:24s}{len(graph.ops):8d}{forward:9d}{sum(op.time_s for op in graph.ops):10.4g}{seconds:11.1f}"
                f"{path.stat().st_size / 1000:9.1f}{resident_gib:12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
