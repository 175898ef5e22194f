"""What autograd saves, handed out and taken back: sharing, layout, second backwards."""

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.saved import SMALLEST_BYTES, Handle, SavedTensors, restored
from shoestring.stack import BlockCall

SIZE = 64 * SMALLEST_BYTES // 4


@dataclass
class Shelf:
    """Keeps copies, and counts."""

    kept: list[int] = field(default_factory=list)
    fetched: int = 0

    def __call__(self, flat: Tensor, tensor: Tensor) -> Any:
        self.kept.append(flat.numel())
        shelf, copy = self, flat.clone()

        class Copy:
            def back(self) -> Tensor:
                shelf.fetched += 1
                return copy.clone()

        return Copy()


def call(*args: Tensor, **kwargs: Tensor) -> BlockCall:
    return BlockCall(lambda x: x, (None, *args), kwargs, 0, None)


def test_views_of_one_storage_are_kept_once_and_come_back_as_they_lay():
    shelf, saved = Shelf(), SavedTensors()
    x = torch.randn(64, 256)
    views = [x[:, :128], x.t(), x[3:], x[:, ::2]]
    handles = [saved.put(v, shelf) for v in views]
    assert shelf.kept == [x.numel()]
    for view, handle in zip(views, handles, strict=True):
        back = restored(handle)
        assert torch.equal(back, view)
        assert back.stride() == view.stride()
    assert shelf.fetched == 1  # all were asked once
    restored(handles[0])
    assert shelf.fetched == 2


def test_a_freed_address_is_not_taken_for_the_tensor_that_was_there():
    shelf, saved = Shelf(), SavedTensors()
    wrong = 0
    for number in range(50):
        x = torch.full((SIZE,), float(number))
        handle = saved.put(x, shelf)
        del x
        wrong += not torch.equal(restored(handle), torch.full((SIZE,), float(number)))
    assert wrong == 0
    assert len(shelf.kept) == 50


def test_a_tensor_changed_in_place_is_kept_anew():
    shelf, saved = Shelf(), SavedTensors()
    x = torch.zeros(SIZE)
    before = saved.put(x, shelf)
    x.add_(1)
    after = saved.put(x, shelf)
    assert torch.equal(restored(before), torch.zeros(SIZE))
    assert torch.equal(restored(after), torch.ones(SIZE))


def test_a_small_part_of_something_large_goes_alone():
    shelf, saved = Shelf(), SavedTensors()
    x = torch.randn(64, SIZE)
    part = x[7, 10:]
    back = restored(saved.put(part, shelf))
    assert shelf.kept == [part.numel()]
    assert torch.equal(back, part)


def test_what_is_small_or_of_another_kind_stays():
    saved, shelf = SavedTensors(), Shelf()
    stay = [
        torch.ones(SMALLEST_BYTES // 4 - 1),
        torch.ones(0),
        torch.ones(1).expand(SIZE),  # one element in memory
        torch.eye(64).to_sparse(),
        torch.randn(SIZE, dtype=torch.complex64).conj(),
    ]
    assert all(saved.put(t, shelf) is t for t in stay)
    assert isinstance(saved.put(torch.ones(SMALLEST_BYTES // 4), shelf), Handle)


def test_handles_that_die_unasked_do_not_hold_what_came_back():
    shelf, saved = Shelf(), SavedTensors()
    x = torch.randn(SIZE)
    first, second = saved.put(x, shelf), saved.put(x, shelf)
    assert isinstance(first, Handle)
    restored(first)
    assert first.slot.held is not None  # for the other one
    del second
    assert first.slot.held is None


def test_parameters_their_views_and_what_blocks_share_stay():
    block, shared = nn.Linear(128, 128), torch.randn(64, 128)
    block.register_buffer("table", torch.randn(64, 128))
    shelf, saved = Shelf(), SavedTensors()
    x = torch.randn(64, 128, requires_grad=True)
    with saved.of(block, call(shared), shelf):
        y = block(x) * shared * block.table
    assert shelf.kept == [64 * 128]  # x alone
    y.sum().backward()
    assert block.weight.grad is not None


def test_nothing_lives_on_when_the_graph_is_gone():
    shelf, saved = Shelf(), SavedTensors()
    block = nn.Linear(128, 128)
    with saved.of(block, call(), shelf):
        y = block(torch.randn(64, 128, requires_grad=True)).exp()
    slots = [slot for _, slot in saved._kept.values()]
    assert [slot() is not None for slot in slots] == [True, True]
    del y
    gc.collect()
    assert len(saved._kept) == 0
    assert [slot() for slot in slots] == [None, None]


def test_a_second_backward_gives_the_same_gradients():
    shelf, saved = Shelf(), SavedTensors()
    block, x = nn.Linear(128, 128), torch.randn(64, 128, requires_grad=True)
    with saved.of(block, call(), shelf):
        y = block(x).exp().sum()
    first = torch.autograd.grad(y, [x, block.weight], retain_graph=True)
    fetched = shelf.fetched
    second = torch.autograd.grad(y, [x, block.weight], create_graph=True)
    assert shelf.fetched == 2 * fetched
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    second[0].square().sum().backward()  # through the gradient itself
    assert x.grad is not None
