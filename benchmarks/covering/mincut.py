"""An independent lower bound: the fewest bytes per sample that any cut of a forward could keep."""

from __future__ import annotations

import networkx as nx

from covering.recording import Recording, Value


def minimum_bytes(two: Recording, three: Recording, boundary: str) -> int | None:
    """Fewest bytes per sample that let everything from ``boundary``'s first call on be computed.

    Whatever a forward of two samples and one of three made before that call may be kept where exactly one dimension
    grows with the batch; raw inputs too. What takes neither parameters nor FLOPs may be computed again for nothing.

    Returns:
        None where the two recordings are not one graph, or where no values with a batch dimension are a cut.
    """
    start = two.starts.get(boundary)
    if start is None or len(two.values) != len(three.values) or start != three.starts[boundary]:
        return None
    early = {i for i, value in enumerate(two.values) if value.op <= start}
    needed = {v for time, read in two.reads.items() if time > start for v in read if v in early}
    needed |= {v for v in two.results if v in early}
    graph = nx.DiGraph()
    graph.add_nodes_from(["made", "used"])
    todo, seen = list(needed), set(needed)
    for number in needed:
        graph.add_edge((number, "out"), "used")
    while todo:
        number = todo.pop()
        value = two.values[number]
        size = _bytes_per_sample(value, three.values[number])
        graph.add_edge((number, "in"), (number, "out"), **({} if size is None else {"capacity": size}))
        if not value.recomputable:
            graph.add_edge("made", (number, "in"))
            continue
        for source in value.inputs:
            graph.add_edge((source, "out"), (number, "in"))
            if source not in seen:
                seen.add(source)
                todo.append(source)
    try:
        return int(nx.minimum_cut_value(graph, "made", "used"))
    except nx.NetworkXUnbounded:
        return None


def _bytes_per_sample(two: Value, three: Value) -> int | None:
    """None where no dimension, or more than one, grows from two samples to three."""
    if len(two.shape) != len(three.shape):
        return None
    moving = [(a, b) for a, b in zip(two.shape, three.shape, strict=True) if a != b]
    if len(moving) != 1 or moving[0][0] * 3 != moving[0][1] * 2:
        return None
    return two.bytes // 2
