"""Where a backward of the objective may stop: below the traced layers that come first in the graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch.autograd.graph import GradientEdge, Node


def first_edges(edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """Those of the traced outputs that depend on no other traced output.

    A gradient taken with respect to them passes through every other one, too, since each of those depends on
    one of these; it needs no weight's gradient. Nodes hold no activations but those that autograd saved.
    """
    traced = {edge.node for edge in edges}
    explored: set[Node] = set()  # nodes on which no traced output lies further up
    return [edge for edge in edges if not _depends_on(edge.node, traced, explored)]


def _depends_on(start: Node, traced: set[Node], explored: set[Node]) -> bool:
    """Whether a traced node lies upstream of `start`; adds to `explored` where none does."""
    seen: set[Node] = set()
    waiting = [node for node, _ in start.next_functions if node is not None]
    while waiting:
        node = waiting.pop()
        if node in traced:
            return True
        if node in seen or node in explored:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions if parent is not None]
    explored |= seen
    return False
