"""The quick fake mode answers as torch's own does."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from shoestring.planner import fake
from shoestring.planner.quick import QuickFakeMode

from .test_fake import CASES, simulate, text


@pytest.mark.parametrize("case", ["gpt2", "gemma3, padded", "mixtral", "autocast", "bf16"])
def test_a_simulated_step_is_the_same_point_by_point(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape, settings = CASES[case]
    model, batch = make(), text(**shape)
    simulate(model, batch, **settings)  # so that every operator was seen before
    quick = simulate(model, batch, **settings)
    monkeypatch.setattr(fake, "QuickFakeMode", FakeTensorMode)
    assert simulate(model, batch, **settings) == quick


def operators(x: torch.Tensor, y: torch.Tensor) -> list[Any]:
    """Every sort of outcome: new tensors, views, in-place writes, several outputs, scalars."""
    out: list[Any] = [
        x + y, x + 1, x + 1.0, x.t(), x.t()[1:], x.expand(2, *x.shape), x.sum(), x.sum(1),
        x.to(torch.bfloat16), x > y, x.split(2), torch.cat([x, y]), torch.cat([x, y], 1),
        x[:, ::2].contiguous(), F.layer_norm(x, x.shape[1:]), x.max(0), x.argmax(1),
        torch.empty_like(x), x.new_zeros(3), torch.where(x > 0, x, y), x.detach(),
        F.scaled_dot_product_attention(*[x.view(1, 1, *x.shape)] * 3), x.unbind(), x.t().clone(),
    ]  # fmt: skip
    z = x.clone()
    z.add_(y).mul_(2)
    z[0].zero_()
    return [*out, z, z.view(-1)]


def described(values: list[Any]) -> list[Any]:
    return [
        (type(v), v.shape, v.stride(), v.storage_offset(), v.dtype, v.device,
         v.untyped_storage().nbytes()) if isinstance(v, torch.Tensor) else v
        for v in tree_leaves(values)
    ]  # fmt: skip


def test_every_sort_of_operator_gives_the_same_layout() -> None:
    shapes = [(4, 6), (6, 4), (4, 6)]
    found = []
    for mode in (QuickFakeMode(), QuickFakeMode(), FakeTensorMode()):
        with mode:
            found.append([described(operators(torch.ones(s), torch.ones(s))) for s in shapes])
    assert found[0] == found[1] == found[2]


def test_a_view_shares_its_base_and_a_write_gives_back_its_target() -> None:
    for _ in range(2):
        with QuickFakeMode():
            x = torch.ones(4, 6)
            assert x.t().untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.add_(1) is x
            assert x.clone().untyped_storage()._cdata != x.untyped_storage()._cdata


def test_numbers_of_another_type_are_another_operator() -> None:
    with QuickFakeMode():
        x = torch.ones(3, dtype=torch.int64)
        dtypes = [(x + value).dtype for value in (1, True, 1.0, 1, 1.0)]
    assert dtypes == [torch.int64, torch.int64, torch.float32, torch.int64, torch.float32]
