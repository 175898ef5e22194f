"""AdamW in pieces: torch's bit for bit in 32 bits, bounded temporaries, states that come back."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoestring.errors import ConfigError
from shoestring.meter import Tracker
from shoestring.optim import ChunkedAdamW, step_one
from shoestring.optim.adamw import PIECE, TEMPORARY_BYTES, _mixed
from shoestring.planner.quick import QuickFakeMode

SHAPES = [(3,), (70, 70), (PIECE + 300,), (), (2, 3, 4), (300, 250)]
KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "8 bits, nearest": {"bits": 8, "rounding": "nearest"},
    "bf16": {"stochastic_weights": True},
    "bf16, 8 bits": {"stochastic_weights": True, "bits": 8},
    "bf16, 4 bits": {"stochastic_weights": True, "bits": 4},
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind.startswith("bf16") else torch.float32


def give_gradients(ps: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(stepping: torch.optim.Optimizer, ps: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(ps, step)
        stepping.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_in_32_bits_it_is_torchs_to_the_bit(kind: type[torch.optim.Adam], decay: float) -> None:
    plain, ours = parameters(), parameters()
    one = kind(plain, lr=3e-3, betas=(0.8, 0.95), weight_decay=decay, foreach=False)
    other = ChunkedAdamW.like(kind(ours, lr=3e-3, betas=(0.8, 0.95), weight_decay=decay))
    run(one, plain, range(4))
    run(other, ours, range(4))
    for a, b in zip(plain, ours, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(one.state[a]["exp_avg_sq"], other.state[b]["exp_avg_sq"])


def test_weights_that_lie_otherwise_in_memory_are_stepped_alike() -> None:
    values = torch.randn(90, 60)
    plain, turned = nn.Parameter(values.clone()), nn.Parameter(values.T.contiguous().T)
    gradient = torch.randn(90, 60)
    for bits in (32, 8):
        results: list[Tensor] = []
        for p in (nn.Parameter(plain.detach().clone()), nn.Parameter(turned.detach().clone())):
            stepping = ChunkedAdamW([p], bits=bits, rounding="nearest")
            assert p.stride() == (60, 1) or p.stride() == (1, 90)
            for _ in range(2):
                p.grad = gradient.clone()
                stepping.step()
            results.append(p.detach().clone())
        # Blocks are cut as the values lie, so that codes differ, by a part of a step.
        assert torch.equal(*results) if bits == 32 else torch.allclose(*results, atol=5e-4)


def test_what_has_gaps_is_refused() -> None:
    p = nn.Parameter(torch.randn(100, 100)[:, :50])
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigError, match="fills its memory without gaps"):
        ChunkedAdamW([p]).step()


@pytest.mark.parametrize("kind", KINDS)
def test_temporaries_are_bounded_and_predicted(kind: str) -> None:
    peaks = []
    for mode in (None, QuickFakeMode()):
        with mode if mode is not None else torch.enable_grad():
            # Its last piece has as many values as make the most of padding.
            p = nn.Parameter(torch.zeros(5 * PIECE - 127, dtype=dtype_of(kind)))
            stepping = ChunkedAdamW([p], **KINDS[kind])
            p.grad = torch.zeros_like(p)
            stepping.step()
            with Tracker() as tracker:
                tracker.assign("weights", (p, p.grad))
                tracker.assign("optimizer", [v for v in stepping.state[p].values()
                                             if isinstance(v, Tensor)])  # fmt: skip
                for coder in stepping._coders.values():
                    tracker.assign("other", [t for t in vars(coder).values()
                                             if isinstance(t, Tensor)])  # fmt: skip
                before = tracker.live_bytes
                stepping.step()
            peaks.append(tracker.ledger.peak - before)
    assert peaks[0] == peaks[1]
    assert TEMPORARY_BYTES / 4 < peaks[0] <= TEMPORARY_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_parameters_does_not_matter(kind: str) -> None:
    one, other = parameters(dtype_of(kind)), parameters(dtype_of(kind))
    together, apart = ChunkedAdamW(one, **KINDS[kind]), ChunkedAdamW(other, **KINDS[kind])
    run(together, one, range(3))
    for step in range(3):
        give_gradients(other, step)
        for p in reversed(other):
            step_one(apart, apart.param_groups[0], p)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_from_its_state_bit_for_bit(kind: str) -> None:
    whole, halves = parameters(dtype_of(kind)), parameters(dtype_of(kind))
    run(ChunkedAdamW(whole, **KINDS[kind]), whole, range(6))
    first = ChunkedAdamW(halves, **KINDS[kind])
    run(first, halves, range(3))
    saved = copy.deepcopy(first.state_dict())
    for entry in saved["state"].values():  # what a checkpoint of ours can hold
        assert all(isinstance(v, Tensor | int) for v in entry.values())
    second = ChunkedAdamW(halves, **KINDS[kind])
    second.load_state_dict(saved)
    for entry, again in zip(saved["state"].values(), second.state.values(), strict=True):
        assert all(v.dtype == again[k].dtype for k, v in entry.items() if isinstance(v, Tensor))
    run(second, halves, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_bytes_of_states() -> None:
    count = 300 * 1000
    sizes = {}
    for bits in (32, 8, 4):
        p = nn.Parameter(torch.zeros(300, 1000))
        stepping = ChunkedAdamW([p], bits=bits)
        p.grad = torch.ones_like(p)
        stepping.step()
        held = [v for v in stepping.state[p].values() if isinstance(v, Tensor)]
        sizes[bits] = sum(v.nbytes for v in held) / count
    assert sizes[32] == 8
    assert 2.03 <= sizes[8] <= 2.035
    assert 1.06 <= sizes[4] <= 1.065


def test_small_tensors_keep_float32_moments() -> None:
    small, large = nn.Parameter(torch.zeros(4095)), nn.Parameter(torch.zeros(4096))
    stepping = ChunkedAdamW([small, large], bits=8)
    run(stepping, [small, large], range(1))
    assert stepping.state[small]["exp_avg"].dtype == torch.float32
    assert stepping.state[large]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize(("saved", "loaded"), [(32, 8), (8, 32), (8, 4)])
def test_a_state_in_other_bits_is_refused_before_a_step(saved: int, loaded: int) -> None:
    p = nn.Parameter(torch.zeros(80, 80))
    first = ChunkedAdamW([p], bits=saved)
    run(first, [p], range(1))
    with pytest.raises(ConfigError, match=f"in {loaded} bits"):
        ChunkedAdamW([p], bits=loaded).load_state_dict(first.state_dict())


def test_torchs_state_is_taken_in_32_bits() -> None:
    plain, ours = parameters(), parameters()
    one = torch.optim.AdamW(plain, foreach=False)
    run(one, plain, range(3))
    for a, b in zip(plain, ours, strict=True):
        b.data.copy_(a.data)
    other = ChunkedAdamW.like(torch.optim.AdamW(ours, foreach=False))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    run(one, plain, range(3, 5))
    run(other, ours, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_nothing_is_drawn_from_the_generator_of_everybody() -> None:
    ps = parameters(torch.bfloat16)
    stepping = ChunkedAdamW(ps, bits=8, stochastic_weights=True)
    give_gradients(ps, 0)
    before = torch.get_rng_state()
    stepping.step()
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_of_neighbours_are_far_apart() -> None:
    seeds = {_mixed(*n) for n in itertools.product(range(3), range(20), range(20))}
    assert len(seeds) == 1200
    assert len({s % 1009 for s in seeds}) > 600


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_variants_of_adam_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"AdamW\\({option}=True\\)"):
        ChunkedAdamW.like(torch.optim.AdamW(parameters(), **{option: True}))


def test_other_optimizers_and_ones_that_have_begun_are_refused() -> None:
    with pytest.raises(ConfigError, match="the optimizer is a SGD"):
        ChunkedAdamW.like(torch.optim.SGD(parameters(), lr=0.1))
    ps = parameters()
    begun = torch.optim.AdamW(ps)
    run(begun, ps, range(1))
    with pytest.raises(ConfigError, match="has made steps already"):
        ChunkedAdamW.like(begun)


def test_float64_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a parameter of torch.float64"):
        ChunkedAdamW([nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    table = nn.Embedding(10, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse gradient"):
        ChunkedAdamW(table.parameters()).step()
