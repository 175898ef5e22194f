"""What is noted in forward so that backward repeats it: modes, and random states of devices."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoestring.errors import StackError
from shoestring.methods import apply_spans, method
from shoestring.methods.reversible import ReversibleStack
from shoestring.stack import Span, Stack
from shoestring.tape import RandomState

WIDTH = 16


class Block(nn.Module):
    """A residual MLP with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(0.3),
            nn.Linear(32, WIDTH),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def gradients(model: nn.Module, *, switch: bool) -> list[Tensor]:
    """Of one step in train mode; with `switch`, eval() is called before backward."""
    x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model.train()
    torch.manual_seed(3)
    out = model(x) if not isinstance(model, ReversibleStack) else model(x, x)[1]
    if switch:
        model.eval()
    out.square().sum().backward()
    assert all(m.training != switch for m in model.modules())  # left as the user set it
    return [p.grad.clone() for p in model.parameters()]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(4)])


@pytest.mark.parametrize("settings", [{}, {"hold": (0, 2)}, {"save": "matmuls"}])
def test_a_switch_to_eval_before_backward_changes_nothing_under_recompute(settings: Any) -> None:
    model = layers()
    apply_spans(Stack.of(model), [Span(0, 4, "recompute", settings)])
    expected = gradients(model, switch=False)
    switched = gradients(model, switch=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, switched, strict=True))


def test_a_switch_to_eval_before_backward_changes_nothing_under_chunked_mlp() -> None:
    model, how = layers(), method("chunked_mlp")
    how.apply(model, how.configure())
    expected = gradients(model, switch=False)
    switched = gradients(model, switch=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, switched, strict=True))


@pytest.mark.parametrize("rule", ["feistel", "bdia"])
def test_a_switch_to_eval_before_backward_changes_nothing_in_a_reversible_stack(rule: str) -> None:
    model = ReversibleStack([block.mlp for block in layers()], rule)
    gradients(model, switch=False)  # calibrates
    expected = gradients(model, switch=False)
    switched = gradients(model, switch=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, switched, strict=True))


# ---- devices -------------------------------------------------------------------------------


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """An mps device whose one generator is a tensor."""
    held = {"state": torch.zeros(4, dtype=torch.uint8)}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: held["state"].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda s: held.update(state=s.clone()))
    return held


def on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


def test_the_random_state_of_mps_is_seen_restored_and_left(mps: dict[str, Tensor]) -> None:
    before = RandomState(on("mps"))
    assert not before.was_used()
    mps["state"] += 1
    assert before.was_used()
    with before.restored():
        assert mps["state"].sum() == 0
    assert mps["state"].sum() == 4


def test_a_device_whose_random_state_cannot_be_read_is_refused() -> None:
    with pytest.raises(StackError, match=r"random state of device vulkan cannot be read.*'keep'"):
        RandomState(on("vulkan"))


def test_devices_that_draw_nothing_of_their_own_need_nothing() -> None:
    for device in ("cpu", "meta"):
        assert RandomState(on(device)).device is None
