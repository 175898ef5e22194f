"""What a block saves and what stays in memory: let go, and watched for changes."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoestring.methods import apply_spans
from shoestring.stack import Span, Stack

SPANS = ["keep", "offload", "squeeze"]


class Gated(nn.Linear):
    """Saves an output that is too small to leave."""

    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x).mean(-1, keepdim=True).sigmoid()


def node_of(loss: Tensor, kind: str) -> Any:
    """The first node of that kind below a loss."""
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop(0)
        if node is not None and node.name().startswith(kind):
            return node
        todo += [below for below, _ in node.next_functions] if node is not None else []
    raise AssertionError(kind)


def run(model: nn.Module, name: str) -> nn.Module:
    apply_spans(Stack.of(model), [Span(0, 2, name)])
    return model


@pytest.mark.parametrize("name", SPANS)
def test_a_graph_without_backward_goes_with_its_loss(name: str) -> None:
    model = run(nn.Sequential(Gated(64, 64), Gated(64, 64)), name)
    loss = model(torch.randn(32, 64)).sum()
    mark = {0}
    node_of(loss, "Sigmoid").metadata["mark"] = mark
    gone = weakref.ref(mark)
    del loss, mark
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", SPANS)
def test_a_weight_stepped_between_forward_and_backward_is_refused(name: str) -> None:
    model = run(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), name)
    loss = model(torch.randn(64, 64)).square().mean()
    with torch.no_grad():
        model[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"place"):
        loss.backward()
