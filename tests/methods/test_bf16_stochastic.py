"""bfloat16 weights rounded by chance: they move as they should, where nearest rounding does not."""

import copy

import pytest
import torch
from benchmarks.planner.models import llama
from torch import nn

from methods.optimizers import adamw, batch, gpt, put, train
from shoestring.errors import StackError
from shoestring.methods import method
from shoestring.methods.reversible import reversible
from shoestring.optim import ChunkedAdamW

BF16 = [("bf16_stochastic", {})]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ten_thousand_small_updates_move_the_weight_as_in_float32(sign: float) -> None:
    """Each of 2^-12 of the weight; rounded to the nearest, nothing moves."""
    start, updates, count = 1.0, 10_000, 16
    moved = {}
    for by_chance in (True, False):
        weight = nn.Parameter(torch.full((count,), start * sign, dtype=torch.bfloat16))
        # With these settings AdamW's update is lr times the sign of the gradient.
        stepping = ChunkedAdamW(
            [weight], lr=start * 2**-12, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0,
            stochastic_weights=by_chance,
        )  # fmt: skip
        for _ in range(updates):
            weight.grad = torch.full_like(weight, -sign)
            stepping.step()
        moved[by_chance] = float(weight.detach().double().mean()) - start * sign
    expected = sign * updates * start * 2**-12
    assert moved[False] == 0
    assert abs(moved[True] - expected) <= 0.02 * abs(expected)


def test_weights_are_cast_in_place_and_back() -> None:
    model = gpt(tied=True)
    before = dict(model.named_parameters())
    buffers = {n: b.dtype for n, b in model.named_buffers()}
    values = copy.deepcopy(model.state_dict())
    how = method("bf16_stochastic")
    undo = how.apply(model, how.configure())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[n] for n, p in model.named_parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight  # type: ignore[operator]
    assert {n: b.dtype for n, b in model.named_buffers()} == buffers
    assert model(**batch()).loss.isfinite()
    undo()
    for name, value in model.state_dict().items():
        held = values[name].bfloat16().float() if name not in buffers else values[name]
        assert torch.equal(value, held)


def test_a_model_in_bfloat16_stays_as_it_is() -> None:
    model = gpt().to(torch.bfloat16)
    held = copy.deepcopy(model.state_dict())
    how = method("bf16_stochastic")
    undo = how.apply(model, how.configure())
    undo()
    assert all(torch.equal(v, held[n]) for n, v in model.state_dict().items())


def test_a_model_between_backward_and_step_is_refused() -> None:
    model = gpt()
    model(**batch()).loss.backward()
    how = method("bf16_stochastic")
    with pytest.raises(StackError, match="has gradients in float32"):
        how.apply(model, how.configure())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_model_with_nothing_to_cast_is_refused() -> None:
    how = method("bf16_stochastic")
    with pytest.raises(StackError, match="no weights to train"):
        how.apply(nn.Linear(3, 3, dtype=torch.float16), how.configure())


def test_thirty_steps_end_where_float32_does() -> None:
    plain, ours = gpt(), gpt()
    losses = train(plain, adamw(list(plain.parameters())), 30)
    rounded = train(ours, put(ours, BF16), 30)
    assert abs(sum(losses[-10:]) - sum(rounded[-10:])) / 10 <= 0.01


def test_seeds_give_other_roundings_of_the_same_run() -> None:
    ends = []
    for seed in (0, 0, 1):
        model = gpt()
        ends.append(train(model, put(model, [("bf16_stochastic", {"seed": seed})]), 5)[-1])
    assert ends[0] == ends[1] != ends[2]


def test_a_reversible_model_is_not_cast() -> None:
    model = reversible(llama(depth=2, width=16, vocabulary=16))
    with pytest.raises(StackError, match="it is reversible"):
        method("bf16_stochastic").apply(model, method("bf16_stochastic").configure())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
