"""Moments in few bits: how near to float32, with what bytes, through checkpoints."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.optimizers import Chain, adamw, gpt, measured, predicted, put, same_weights, train
from shoestring.errors import ConfigError

SETTINGS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "4 bits": {"bits": 4},
    "8 bits, nearest": {"rounding": "nearest"},
}


def plain_losses(steps: int) -> list[float]:
    model = gpt()
    return train(model, adamw(list(model.parameters())), steps)


@pytest.mark.parametrize("name", SETTINGS)
def test_thirty_steps_end_where_float32_does(name: str) -> None:
    model = gpt()
    losses = train(model, put(model, [("low_bit_states", SETTINGS[name])]), 30)
    ends = [sum(x[-10:]) / 10 for x in (losses, plain_losses(30))]
    assert abs(ends[0] - ends[1]) <= (0.03 if "4" in name else 0.01)


@pytest.mark.parametrize("name", SETTINGS)
def test_states_are_as_small_as_promised(name: str) -> None:
    model = gpt()
    stepping = put(model, [("low_bit_states", SETTINGS[name])])
    train(model, stepping, 1)
    large = [p for p in model.parameters() if p.numel() >= 4096]
    held = sum(v.nbytes for p in large for v in stepping.state[p].values() if isinstance(v, Tensor))
    bound = 1.0626 if "4" in name else 2.0313
    assert held / sum(p.numel() for p in large) <= bound


COMPOSED: dict[str, Chain] = {
    "8 bits": [("low_bit_states", {})],
    "4 bits": [("low_bit_states", {"bits": 4})],
    "fused": [("low_bit_states", {}), ("fused_step", {})],
    "bf16": [("bf16_stochastic", {})],
    "bf16, 8 bits": [("bf16_stochastic", {}), ("low_bit_states", {})],
    "8 bits, bf16": [("low_bit_states", {}), ("bf16_stochastic", {})],
    "bf16, 4 bits, fused": [
        ("bf16_stochastic", {}), ("low_bit_states", {"bits": 4}), ("fused_step", {}),
    ],
    "offloaded, fused": [("offload_optimizer", {}), ("fused_step", {})],
    "8 bits, offloaded, fused": [
        ("low_bit_states", {}), ("offload_optimizer", {}), ("fused_step", {}),
    ],
    "everything": [
        ("bf16_stochastic", {}), ("low_bit_states", {}), ("offload_optimizer", {}),
        ("fused_step", {}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("tokens", [4, 48])
@pytest.mark.parametrize("name", COMPOSED)
def test_one_around_another_prediction_is_the_measurement(name: str, tokens: int) -> None:
    chain = COMPOSED[name]
    meter, profile = measured(chain, adamw, tokens), predicted(chain, adamw, tokens)
    assert profile.peak_bytes == meter.peak_bytes
    assert profile.by_category == meter.by_category
    later = predicted(chain, adamw, tokens, steps=1, later=True)
    assert later.peak_bytes == meter.peak_bytes


@pytest.mark.parametrize("outer", [[("fused_step", {})], [("offload_optimizer", {})],
                                   [("offload_optimizer", {}), ("fused_step", {})]])  # fmt: skip
@pytest.mark.parametrize("name", ["8 bits", "4 bits", "bf16, 8 bits"])
def test_exact_methods_around_it_change_no_bit(name: str, outer: Chain) -> None:
    plain, ours = gpt(dropout=0.1), gpt(dropout=0.1)
    one, other = put(plain, COMPOSED[name]), put(ours, [*COMPOSED[name], *outer])
    assert train(plain, one, 4) == train(ours, other, 4)
    assert same_weights(plain, ours)


@pytest.mark.parametrize("name", COMPOSED)
def test_every_chain_goes_on_bit_for_bit(name: str) -> None:
    whole, first = gpt(dropout=0.1), gpt(dropout=0.1)
    losses = train(whole, put(whole, COMPOSED[name]), 6)
    stepping = put(first, COMPOSED[name])
    begun = train(first, stepping, 3)
    second = gpt(dropout=0.1)
    again = put(second, COMPOSED[name])
    second.load_state_dict(first.state_dict())
    again.load_state_dict(copy.deepcopy(stepping.state_dict()))
    assert begun + train(second, again, 6, start=3) == losses
    assert same_weights(whole, second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits = 5; expected 8 or 4"),
        ({"bits": True}, "bits = True"),
        ({"rounding": "up"}, "rounding = 'up'"),
        ({"seed": 0.5}, "seed = 0.5"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        put(gpt(), [("low_bit_states", settings)])


def test_an_optimizer_without_two_moments_is_refused() -> None:
    with pytest.raises(ConfigError, match="the optimizer is a SGD"):
        put(gpt(), [("low_bit_states", {})], lambda ps: torch.optim.SGD(ps, lr=0.1))
