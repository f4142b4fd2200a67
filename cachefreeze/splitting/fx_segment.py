"""The segment between two traced splits: one graph of what lies between their cuts, told by content."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from cachefreeze.errors import SplitError
from cachefreeze.isolation import eval_mode
from cachefreeze.splitting.boundary import Site, Uncopied, as_returned
from cachefreeze.splitting.fx_recipe import copy_into
from cachefreeze.splitting.fx_tracing import Tracing
from cachefreeze.tracing import Example


class FxSegment(Uncopied, nn.Module):
    """Rows of the shallower boundary -> rows of the deeper one, in eval mode and without gradients."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *rows: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run what lies between; rows may be written into."""
        with torch.no_grad(), eval_mode(self.graph):
            values: tuple[Tensor, ...] = self.graph(*rows)
        return as_returned(values)


def fx_segment(site: Site, end: Site, example: Example, rows: list[Tensor], deeper_rows: list[Tensor]) -> FxSegment:
    """Trace the model with both cuts open, and take what leads from the values that are rows to those that become rows.

    Args:
        site: The shallower cut.
        end: The deeper one.
        example: Two samples.
        rows: What the shallower prefix makes of them.
        deeper_rows: What the deeper prefix makes of them.

    Raises:
        SplitError: The model cannot be traced, or rows there need more than rows here hold.
    """
    tracing = Tracing(end, example)
    tracing.opened = list(dict.fromkeys((*tracing.opened, *Tracing(site, example).opened)))
    with end.mode(train=False), torch.no_grad():
        graph = tracing.graph()
        values = _Values(fx.GraphModule(end.model, graph))
        some = example.fresh()
        values.run(*some.args, *some.kwargs.values())
    nodes = list(graph.nodes)
    arriving = [[at for at, node in enumerate(nodes) if values.equal(node, row)] for row in rows]
    leaving = [next((at for at, node in enumerate(nodes) if values.equal(node, row)), None) for row in deeper_rows]
    if None in leaving or not all(arriving):
        raise SplitError(f"the rows at {site.name!r} or {end.name!r} are no values of the traced forward")
    made = fx.Graph()
    copies = {
        nodes[at]: row for i, found in enumerate(arriving) for row in [made.placeholder(f"row_{i}")] for at in found
    }

    refusal = f"is needed for a row at {end.name!r}, and rows here do not hold it"
    outputs = [nodes[at] for at in leaving if at is not None]
    # in their own order, since one may write into what another reads; what came before the rows only where it is needed
    for node in nodes[max(found[0] for found in arriving) : max(at for at in leaving if at is not None) + 1]:
        if node in outputs or (node.op != "placeholder" and all(n in copies for n in node.all_input_nodes)):
            copy_into(made, node, copies, refusal)
    made.output(tuple(copy_into(made, node, copies, refusal) for node in outputs))
    made.lint()
    return FxSegment(fx.GraphModule(end.model, made, "SegmentGraph"))


class _Values(fx.Interpreter):
    """Runs a graph and keeps the tensor that every node made, as it was then."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._made: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._made[n] = value.clone()
        return value

    def equal(self, node: fx.Node, row: Tensor) -> bool:
        """Whether a node made this very row."""
        made = self._made.get(node)
        return made is not None and made.shape == row.shape and made.dtype == row.dtype and torch.equal(made, row)
