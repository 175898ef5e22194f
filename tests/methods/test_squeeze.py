"""squeeze: what is rounded and what is not, and that no generator moves."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.errors import ConfigError
from shoestring.meter import Meter
from shoestring.methods import apply_spans, method
from shoestring.methods.squeeze import is_activation
from shoestring.ops import group_quant
from shoestring.stack import Span, Stack

WIDTH, TOKENS = 64, 128


class Block(nn.Module):
    """Norm, attention with a mask, gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = (p.view(*x.shape[:2], 4, -1) for p in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k, v = (p.transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        z = self.norm2(x)
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


class Net(nn.Module):
    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if self.masked else None
        for block in self.blocks:
            x = block(x, mask)
        return x.square().mean()


def squeezed(model: nn.Module, **settings: int | str) -> nn.Module:
    stack = Stack.of(model)
    apply_spans(stack, [Span(0, len(stack), "squeeze", settings)])
    return model


def data() -> Tensor:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    return x.requires_grad_()


def gradient(model: nn.Module, x: Tensor | None = None, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    model.zero_grad()
    model(data() if x is None else x).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The storages that were rounded, in order."""
    seen: list[Tensor] = []
    original = group_quant.quantize

    def note(x: Tensor, *rest: object) -> group_quant.Packed:
        seen.append(x.detach().clone())
        return original(x, *rest)

    monkeypatch.setattr(group_quant, "quantize", note)
    return seen


@pytest.fixture
def rounded_bits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """To how many bits storages were rounded, in order."""
    seen: list[int] = []
    original = group_quant.quantize

    def note(x: Tensor, bits: int, *rest: object) -> group_quant.Packed:
        seen.append(bits)
        return original(x, bits, *rest)

    monkeypatch.setattr(group_quant, "quantize", note)
    return seen


def test_every_activation_is_rounded_once_and_nothing_else(rounded):
    gradient(squeezed(Net(masked=True)), data() * 1)  # not a leaf, as in a model
    unit = 2 * TOKENS * WIDTH
    # Input, norm, queries keys and values as one, attention's output; the sum, twice the norm that
    # is made of parts; gate, its activation, up, their product.
    assert [x.numel() // unit for x in rounded] == [1, 1, 3, 1, 1, 1, 1, 2, 2, 2, 2] * 3
    assert all(x.isfinite().all() for x in rounded)  # no mask was


@pytest.mark.parametrize("masked", [False, True])
def test_four_bits_are_off_by_seventeen_times_as_much_as_eight(masked):
    exact = gradient(Net(masked))
    eight, four = (error(gradient(squeezed(Net(masked), bits=b)), exact) for b in (8, 4))
    assert 0 < eight < 0.01
    assert 12 < four / eight < 22


def test_mixed_keeps_the_inside_of_the_mlp_at_four_bits_and_the_rest_at_eight(rounded_bits):
    exact = gradient(Net())
    found = [error(gradient(squeezed(Net(), bits=b)), exact) for b in (8, "mixed", 4)]
    assert sorted(found) == found
    rounded_bits.clear()
    gradient(squeezed(Net(), bits="mixed"), data() * 1)
    assert rounded_bits == [8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4] * 3


def test_smaller_groups_are_closer():
    exact = gradient(Net())
    found = [error(gradient(squeezed(Net(), bits=4, group=g)), exact) for g in (16, 64, 256)]
    assert sorted(found) == found


def test_no_generator_moves():
    model = squeezed(Net())
    before = torch.get_rng_state()
    model(data()).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_draw_follows_the_seeds_and_the_content_and_nothing_else():
    model = squeezed(Net())
    first = gradient(model)
    assert torch.equal(gradient(model), first)
    assert torch.equal(gradient(copy.deepcopy(model)), first)
    assert not torch.equal(gradient(model, seed=1), first)
    assert not torch.equal(gradient(squeezed(Net(), seed=1)), first)
    torch.manual_seed(0)
    torch.rand(5)  # how far the generator went does not matter, only how it was seeded
    model.zero_grad()
    model(data()).backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), first)


def test_a_second_backward_is_that_of_the_same_draw():
    model, x = squeezed(Net()), data()
    loss = model(x)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)


def _tied(x: Tensor, weight: Tensor) -> Tensor:
    return weight.t().to(torch.bfloat16).contiguous().view(-1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x, w: x * 2, True),
        (lambda x, w: (x * 2).transpose(0, 1).reshape(-1, TOKENS), True),
        (lambda x, w: (x * w), True),
        (lambda x, w: w, False),
        (_tied, False),
        (lambda x, w: (x * 2).sum(-1, keepdim=True), False),
        (lambda x, w: (x * 2).detach(), False),
        (lambda x, w: torch.full((9, 9), -torch.inf), False),
        (lambda x, w: torch.arange(9), False),
    ],
)  # fmt: skip
def test_what_is_an_activation(make: Callable[[Tensor, Tensor], Tensor], expected: bool):
    x = torch.randn(WIDTH, TOKENS, requires_grad=True)
    weight = nn.Parameter(torch.randn(WIDTH, TOKENS))
    assert is_activation(make(x, weight)) == expected


def test_copies_of_weights_that_autocast_makes_are_not_rounded(rounded):
    model = squeezed(Net())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(data())
    loss.backward()
    weights = [p.detach().flatten() for p in model.parameters() if p.dim() == 2]
    assert rounded
    for x in rounded:
        assert not any(x.numel() == w.numel() and torch.equal(x, w.to(x.dtype)) for w in weights)


def test_eight_and_four_bits_hold_what_they_say():
    held = {}
    for name, settings in (("keep", None), ("8", {"bits": 8}), ("4", {"bits": 4})):
        model, x = Net(), data()
        if settings is not None:
            squeezed(model, **settings)
        with Meter(model) as meter:
            model(x).backward()
        held[name] = meter.retained_bytes
    exact = held["keep"] - (held["keep"] - held["8"]) / (1 - 8.25 / 32)
    assert 0 <= exact < 0.12 * held["keep"]  # statistics, the log-sum-exp, the loss
    assert held["4"] - exact == pytest.approx((held["8"] - exact) * 4.25 / 8.25, rel=0.01)


def test_frozen_blocks_and_a_frozen_model():
    pair = Net(), squeezed(Net())
    for model in pair:
        model.blocks[0].requires_grad_(False)
        model.blocks[2].requires_grad_(False)
    exact, found = (gradient(m, data().detach()) for m in pair)
    assert exact.shape == found.shape
    assert 0 < error(found, exact) < 0.01


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bits": 2}, "squeeze: bits = 2; expected 8, 4 or 'mixed'"),
        ({"bits": True}, "squeeze: bits = True"),
        ({"group": 7}, "squeeze: group = 7; expected an even number"),
        ({"seed": -1}, "squeeze: seed = -1"),
        ({"seed": True}, "squeeze: seed = True"),
    ],
)
def test_wrong_settings_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        method("squeeze").configure(settings)


@pytest.mark.gpu
def test_on_cuda_the_draw_is_that_of_the_cpu():
    x = torch.randn(10_000)
    key = group_quant.key_of(group_quant.digest(x), 0, 1)
    here = group_quant.quantize(x, 4, 256, key)
    there = group_quant.quantize(x.cuda(), 4, 256, group_quant.key_of(
        group_quant.digest(x.cuda()), 0, 1))  # fmt: skip
    assert torch.equal(there.key.cpu(), key)
    same = (group_quant.dequantize(there).cpu() - group_quant.dequantize(here)).abs() < 1e-5
    assert same.float().mean() > 0.999
