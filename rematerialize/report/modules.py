"""Where a step's time and memory go: a table per module, and the tensors that are live at a moment.

What an op costs belongs to the module that was being called when it ran, and a backward op to that of its forward op.
Every figure adds up: the rows' times to the step's time, their bytes at the peak to its peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from rematerialize.ir import Op
from rematerialize.report.timeline import Timeline
from rematerialize.simulate import Instance

NO_LINE = "(no line of yours)"  # for the source "": autograd's own work, or a layer of torch's that a container calls
WHOLE = "(model)"  # what a reader sees for the module "", the model itself


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """What one module costs.

    Attributes
    ----------
    module : str
        Its qualified name, cut to the depth that was asked for; "" is the model itself.
    forward_s, backward_s : float
        Predicted time of the first run of its forward ops, and of its backward ops.
    recompute_s : float
        Predicted time of all further runs of its forward ops.
    stored_bytes : int
        What it made in the forward and the backward still finds in memory when it begins.
    peak_bytes : int
        What is live at the step's peak: tensors that it made, and the workspace of the op that reaches the peak. What
        the caller passes into the backward counts for the model itself.
    """

    module: str
    forward_s: float = 0.0
    backward_s: float = 0.0
    recompute_s: float = 0.0
    stored_bytes: int = 0
    peak_bytes: int = 0

    @property
    def time_s(self) -> float:
        """All three times together."""
        return self.forward_s + self.backward_s + self.recompute_s

    @property
    def title(self) -> str:
        """The name for readers: "(model)" where the module is the model itself."""
        return self.module or WHOLE


_COLUMNS = tuple(column.name for column in fields(ModuleRow) if column.name != "module")


@dataclass(frozen=True, slots=True)
class ModuleNode:
    """A module in the tree of modules, with what it and everything below it cost.

    Attributes
    ----------
    total : ModuleRow
        The sum over the module and all modules below it.
    depth : int
        Number of names in its path: 0 for the model itself.
    parent : int
        Position of its parent in the tree; -1 for the model itself.
    has_children : bool
    """

    total: ModuleRow
    depth: int
    parent: int
    has_children: bool


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor that is live at some moment.

    Attributes
    ----------
    label : str
        What people call it: the storage's label in the graph, or its name.
    size_bytes : int
    op : str
        Name of the op that made it; "" for what the caller passes into the backward.
    module, source : str
        Of that op.
    birth, death : int
        The first and the last execution during which it is live, both inclusive.
    """

    label: str
    size_bytes: int
    op: str
    module: str
    source: str
    birth: int
    death: int


def module_rows(timeline: Timeline, *, depth: int | None = None) -> tuple[ModuleRow, ...]:
    """What each module costs, in the order in which they first run. O(executions + instances).

    Parameters
    ----------
    timeline : Timeline
    depth : int, optional
        How many names of a module's path to keep: 1 makes "layers" of "layers.3.attention", 2 makes "layers.3", 0 makes
        one row of everything. By default each module has a row of its own.

    Examples
    --------
    >>> from rematerialize.ir import Op, TrainingGraph
    >>> from rematerialize.report.timeline import store_all
    >>> graph = TrainingGraph(
    ...     (Op("f", "forward", 1.0, ("x",), ("y",), module="layers.0"), Op("b", "backward", 2.0, ("y",), ("dx",))),
    ...     {"x": 8, "y": 8, "dx": 8}, frozenset({"x"}), (), (), ("dx",)).verify()
    >>> [(row.title, row.forward_s, row.backward_s, row.stored_bytes, row.peak_bytes)
    ...  for row in module_rows(store_all(graph))]
    [('layers.0', 1.0, 0.0, 8, 8), ('(model)', 0.0, 2.0, 0, 8)]
    """
    costs = ((op.module if op else "", column, amount) for op, column, amount in _costs(timeline))
    if depth is None:
        return _add_up(costs)
    return _add_up((_cut(module, depth), column, amount) for module, column, amount in costs)


def rows_at_most(timeline: Timeline, limit: int) -> tuple[ModuleRow, ...]:
    """The rows of the greatest depth that has at most `limit` of them; at least depth 1. For tables that stay short.

    A step of 24 layers of 10 modules each doesn't get 240 rows but 24, or a single one for all layers.
    """
    rows = module_rows(timeline)
    deepest = max((row.module.count(".") + 1 for row in rows), default=1)
    for depth in range(deepest, 0, -1):
        rows = module_rows(timeline, depth=depth)
        if len(rows) <= limit:
            break
    return rows


def module_tree(timeline: Timeline) -> tuple[ModuleNode, ...]:
    """Every module with the totals of all below it; parents before children, siblings in the order of their first run.

    The first node is the model itself, and its total that of the step. O(modules * depth of the deepest).
    """
    costs = [cost for row in module_rows(timeline) for cost in _every_module_above(row)]
    total = {"": ModuleRow("")} | {row.module: row for row in _add_up(costs)}
    children: dict[str, list[str]] = {name: [] for name in total}
    for name in filter(None, total):
        children[name.rpartition(".")[0]].append(name)
    nodes: list[ModuleNode] = []
    waiting = [("", -1)]
    while waiting:
        name, parent = waiting.pop()
        depth = nodes[parent].depth + 1 if parent >= 0 else 0
        nodes.append(ModuleNode(total[name], depth, parent, bool(children[name])))
        waiting += [(child, len(nodes) - 1) for child in reversed(children[name])]
    return tuple(nodes)


def top_tensors(timeline: Timeline, position: int, count: int | None = None) -> tuple[LiveTensor, ...]:
    """The largest tensors that are live while an execution runs, largest first. Linear in all instances.

    Parameters
    ----------
    timeline : Timeline
    position : int
        Of the execution. `timeline.peak_position` asks for the peak; -1, that of an empty step, gives nothing.
    count : int, optional
        At most so many; by default all.
    """
    return tuple(_describe(timeline, one) for one in timeline.live_at(position)[:count])


def maker(timeline: Timeline, instance: Instance) -> Op | None:
    """The op whose run made an instance; None for what the caller passes into the backward."""
    op = timeline.executions[instance.birth].op
    return op if instance.storage in op.outputs else None


def _describe(timeline: Timeline, one: Instance) -> LiveTensor:
    op = maker(timeline, one)
    return LiveTensor(
        label=timeline.label(one.storage),
        size_bytes=timeline.graph.storages[one.storage],
        op=op.name if op else "",
        module=op.module if op else "",
        source=op.source if op else "",
        birth=one.birth,
        death=one.death,
    )


def _costs(timeline: Timeline) -> Iterator[tuple[Op | None, str, float]]:
    """Every single cost of a step: whose, the column of a row that it counts in, and how much."""
    for run in timeline.executions:
        column = "backward_s" if run.op.phase == "backward" else "recompute_s" if run.recomputes else "forward_s"
        yield run.op, column, run.op.time_s
    for one in timeline.instances:
        size = timeline.graph.storages[one.storage]
        if one.birth < timeline.boundary <= one.death:
            yield maker(timeline, one), "stored_bytes", size
        if one.birth <= timeline.peak_position <= one.death:
            yield maker(timeline, one), "peak_bytes", size
    if timeline.peak_position >= 0:
        op = timeline.executions[timeline.peak_position].op
        yield op, "peak_bytes", op.transient_bytes


def _add_up(costs: Iterable[tuple[str, str, float]]) -> tuple[ModuleRow, ...]:
    sums: dict[str, dict[str, Any]] = {}
    for module, column, amount in costs:
        row = sums.setdefault(module, {})
        row[column] = row.get(column, 0) + amount
    return tuple(ModuleRow(module, **row) for module, row in sums.items())


def _cut(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])


def _every_module_above(row: ModuleRow) -> Iterator[tuple[str, str, float]]:
    """The costs of a row once for each module that holds it, itself included, the model first."""
    names = row.module.split(".") if row.module else []
    for depth in range(len(names) + 1):
        module = ".".join(names[:depth])
        for column in _COLUMNS:
            yield module, column, getattr(row, column)
