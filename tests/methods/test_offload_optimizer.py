"""States outside memory: the same numbers, not counted, not resident, and room for them or none."""

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from methods.optimizers import (
    adamw,
    batch,
    gpt,
    measured,
    predicted,
    put,
    same_weights,
    train,
)
from shoestring.errors import ConfigError, SpillError
from shoestring.meter import Meter
from shoestring.meter.outside import is_outside
from shoestring.rss import status_bytes

AWAY = [("offload_optimizer", {})]
PAGE = 4096
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw fused": adamw,
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, lr=3e-3, foreach=True),
    "adamw loop": lambda ps: torch.optim.AdamW(ps, lr=3e-3, foreach=False),
    "sgd momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "lr is a tensor": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(3e-3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_bit_for_bit_as_in_memory(name: str) -> None:
    make = OPTIMIZERS[name]
    plain, ours = gpt(dropout=0.1), gpt(dropout=0.1)
    one, other = put(plain, [], make), put(ours, AWAY, make)
    assert train(plain, one, 5) == train(ours, other, 5)
    assert same_weights(plain, ours)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        for key, value in one.state.get(theirs, {}).items():
            assert torch.equal(other.state[mine][key], value)
            assert is_outside(other.state[mine][key].untyped_storage()) == (value.nbytes >= PAGE)


def test_layouts_other_than_the_usual_are_kept() -> None:
    models = []
    for chain in ([], AWAY):
        torch.manual_seed(0)
        model = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
        stepping = put(model, chain)
        for _ in range(3):
            model(torch.ones(1, 16, 5, 5)).square().sum().backward()
            stepping.step()
            stepping.zero_grad()
        models.append(model)
    assert same_weights(*models)
    assert all(
        v.stride() == p.stride()
        for p, entry in stepping.state.items()
        for k, v in entry.items()
        if k != "step"
    )


@pytest.mark.parametrize("name", ["adamw fused", "adamw loop"])
def test_states_that_begin_as_zeros_are_never_in_memory(name: str) -> None:
    ours = measured(AWAY, OPTIMIZERS[name])
    assert ours.history is not None
    held = max(ours.history["bytes"].get("optimizer", [0]))
    small = sum(2 * p.nbytes for p in gpt().parameters() if p.nbytes < PAGE)
    assert held <= small + 4 * len(list(gpt().parameters()))


@pytest.mark.parametrize("name", ["adamw fused", "adamw loop", "sgd momentum"])
def test_states_of_one_parameter_at_a_time_are_counted_also_in_the_first_step(name: str) -> None:
    plain, ours = measured([], OPTIMIZERS[name]), measured(AWAY, OPTIMIZERS[name])
    states = [0, 0]
    for number, meter in enumerate((plain, ours)):
        assert meter.history is not None
        states[number] = max(meter.history["bytes"].get("optimizer", [0]))
    small = sum(2 * p.nbytes + 4 for p in gpt().parameters() if p.nbytes < PAGE)
    counts = 4 * len(list(gpt().parameters()))
    largest = max(2 * p.nbytes for p in gpt().parameters())
    assert states[0] > 8 * states[1]
    assert states[1] <= largest + small + counts
    assert plain.peak_bytes - ours.peak_bytes >= states[0] - largest - small - counts
    assert ours.by_category["optimizer"] <= largest + small + counts


def test_states_are_not_resident() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2048, 2048, bias=False)  # 16 MiB, and 32 of states
    stepping = put(model, AWAY)
    before = status_bytes("RssFile")
    for _ in range(2):
        model.weight.grad = torch.randn(2048, 2048)
        stepping.step()
    assert status_bytes("RssFile") - before < 2**21
    assert stepping.state[model.weight]["exp_avg"].abs().sum() > 0
    assert status_bytes("RssFile") - before >= 2**24 - 2**20  # reading fetched it


@pytest.mark.parametrize("name", ["adamw fused", "adamw loop", "sgd momentum"])
def test_prediction_is_the_measurement(name: str) -> None:
    meter = measured(AWAY, OPTIMIZERS[name])
    profile = predicted(AWAY, OPTIMIZERS[name])
    assert profile.peak_bytes == meter.peak_bytes
    assert profile.by_category == meter.by_category
    assert predicted(AWAY, OPTIMIZERS[name], steps=1, later=True).peak_bytes == meter.peak_bytes


def test_a_loaded_state_is_put_away_at_once() -> None:
    plain, ours = gpt(), gpt()
    one = adamw(list(plain.parameters()))
    losses = train(plain, one, 2)
    ours.load_state_dict(plain.state_dict())
    other = put(ours, AWAY)
    saved = copy.deepcopy(one.state_dict())
    with Meter(ours, other) as meter:
        other.load_state_dict(saved)
        del saved
    assert meter.end_bytes < sum(2 * p.nbytes for p in ours.parameters())
    assert train(ours, other, 4, start=2) == train(plain, one, 4, start=2)
    assert len(losses) == 2


def test_room_is_taken_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def full(fd: int, start: int, nbytes: int) -> None:
        asked.append(nbytes)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = gpt()
    with pytest.raises(SpillError, match=f"in {tmp_path} for a mapped file: No space left"):
        put(model, [("offload_optimizer", {"directory": str(tmp_path)})])
    states = sum(2 * p.nbytes for p in model.parameters() if p.nbytes >= PAGE)
    assert states <= asked[0] <= states + 2 * PAGE * len(list(model.parameters()))


def test_parameters_added_later_get_room_of_their_own() -> None:
    models = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    steppings = []
    for model, chain in zip(models, ([], AWAY), strict=True):
        stepping = put(model[0], chain)
        stepping.add_param_group({"params": list(model[1].parameters())})
        for _ in range(3):
            model(torch.ones(2, 64)).sum().backward()
            stepping.step()
            stepping.zero_grad()
        steppings.append(stepping)
    assert same_weights(*models)
    late = steppings[1].state[models[1][1].weight]["exp_avg"]
    assert is_outside(late.untyped_storage())


def test_an_optimizer_that_couples_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot step LBFGS one parameter at a time"):
        put(gpt(), AWAY, lambda ps: torch.optim.LBFGS(ps))


def test_a_directory_that_is_no_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="offload_optimizer: directory = 3"):
        put(gpt(), [("offload_optimizer", {"directory": 3})])


def test_a_model_is_evaluated_and_saved_as_before() -> None:
    model = gpt()
    stepping = put(model, AWAY)
    train(model, stepping, 2)
    state = stepping.state_dict()
    assert all(torch.isfinite(v).all() for entry in state["state"].values() for v in entry.values())
    assert float(model(**batch()).loss.detach()) > 0
