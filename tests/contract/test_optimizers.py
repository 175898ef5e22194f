"""The promises of methods of the optimizer: what the loop sees, and what comes out of it."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.subjects import (
    Subject,
    adamw,
    batch,
    every,
    every_pair,
    is_bitwise,
    is_default,
    is_exact,
    is_of_the_optimizer,
    optimizer,
    put,
    train,
)
from contract.test_promises import same_weights, text_batches
from shoestring.errors import ConfigError, StackError
from shoestring.methods import METHODS

STEPS = 30
LOSS_BOUND = 0.01  # nats, of the mean of the last ten of STEPS and of three seeds
UPDATE_BOUND = 0.1  # of an update, relative (L2) to the plain optimizer's
DRAWS = 16


def is_unbiased(subject: Subject) -> bool:
    return bool(subject.promises.fidelity == "unbiased")


def with_schedule(model: nn.Module, steps: int) -> tuple[list[float], torch.optim.Optimizer]:
    """Training under a schedule of the learning rate and of the betas."""
    stepping = optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(stepping, 3e-3, total_steps=steps + 1)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(**batch()).loss
        loss.backward()
        stepping.step()
        schedule.step()
        stepping.zero_grad()
        losses.append(float(loss.detach()))
    return losses, stepping


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{p}|{k}": v for p, entry in state["state"].items() for k, v in entry.items()}


@every_pair(is_of_the_optimizer, is_bitwise)
def test_steps_and_states_are_bit_equal_to_the_plain_ones(subject: Subject, kind: str) -> None:
    plain, ours = subject.network(kind, dropout=0.1), subject.applied(kind, dropout=0.1)
    expected, one = with_schedule(plain, 5)
    losses, other = with_schedule(ours, 5)
    assert losses == expected
    assert same_weights(plain, ours)
    mine, theirs = other.state_dict(), one.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    found, wanted = tensors(mine), tensors(theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], v) and found[n].dtype == v.dtype for n, v in wanted.items())


@pytest.mark.parametrize("first", ["without", "with"])
@every(is_of_the_optimizer, is_bitwise)
def test_checkpoints_cross_over(subject: Subject, first: str) -> None:
    """Three steps without the method, three with it, or the other way round."""
    expected, _ = train(subject.network(), 6, text_batches)
    start, end = subject.network(), subject.applied()
    if first == "with":
        start, end = end, start
    losses, stepping = train(start, 3, text_batches)
    end.load_state_dict(start.state_dict())
    rest, _ = train(end, 6, text_batches, start=3, state=stepping.state_dict())
    assert losses + rest == expected


@every(is_of_the_optimizer, is_unbiased)
def test_losses_are_within_the_stated_bound(subject: Subject) -> None:
    expected, _ = train(subject.network(), STEPS, text_batches)
    ends = []
    for seed in range(3):
        seeded = Subject(subject.method, {**subject.settings, "seed": seed})
        losses, _ = train(seeded.applied(), STEPS, text_batches)
        ends.append(sum(losses[-10:]) / 10)
    assert len(set(ends)) == 3  # chance has a part in it
    assert abs(sum(ends) / 3 - sum(expected[-10:]) / 10) <= LOSS_BOUND


@every(is_of_the_optimizer, is_unbiased)
def test_the_mean_update_is_the_plain_one(subject: Subject) -> None:
    """Under gradients that are given, over draws: no bias, so the error falls with their number."""
    updates = []
    for seed in range(DRAWS):
        seeded = Subject(subject.method, {**subject.settings, "seed": seed})
        model = seeded.applied()
        start = [p.detach().float().clone() for p in model.parameters()]
        if not updates:
            twins = [nn.Parameter(p.clone()) for p in start]
            expected = moved(twins, adamw(twins), start)
        updates.append(moved(list(model.parameters()), optimizer(model), start))
    errors = [float((u - expected).norm() / expected.norm()) for u in updates]
    mean = torch.stack(updates).mean(0)
    error = float((mean - expected).norm() / expected.norm())
    assert max(errors) <= UPDATE_BOUND
    assert error <= 1.2 * max(errors) / DRAWS**0.5


def moved(
    parameters: list[nn.Parameter], stepping: torch.optim.Optimizer, start: list[Tensor]
) -> Tensor:
    """How far three steps under fixed gradients move the parameters, as one vector."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        for parameter in parameters:
            # Ones that bfloat16 can hold, so that all are given the same.
            values = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = values.to(parameter.dtype)
        stepping.step()
    changes = [p.detach().float() - s for p, s in zip(parameters, start, strict=True)]
    return torch.cat([change.flatten() for change in changes])


@every(is_of_the_optimizer)
def test_hooks_fire_once_a_step_and_count_it(subject: Subject) -> None:
    model = subject.applied()
    stepping = optimizer(model)
    seen: list[str] = []
    stepping.register_step_pre_hook(lambda *_: seen.append("before"))
    stepping.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(2):
        model(**batch()).loss.backward()
        stepping.step()
        stepping.zero_grad()
    assert seen == ["before", "after"] * 2
    assert {int(entry["step"]) for entry in stepping.state_dict()["state"].values()} == {2}


@every(is_of_the_optimizer, is_default)
def test_frozen_unused_and_tied_parameters_are_treated_as_before(subject: Subject) -> None:
    def trained(model: nn.Module) -> nn.Module:
        model.extra = nn.Parameter(torch.ones(70, 70))  # type: ignore[assignment]
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        next(blocks[0].parameters()).requires_grad_(False)
        model.lm_head.weight = model.get_input_embeddings().weight  # type: ignore[operator]
        train(model, 3, lambda step: batch())
        return model

    plain, ours = trained(subject.network()), trained(subject.applied())
    assert torch.equal(ours.extra.detach().float(), plain.extra.detach())  # type: ignore[operator,union-attr]
    assert len(list(ours.parameters())) == len(list(plain.parameters()))
    if is_exact(subject):
        assert same_weights(plain, ours)


WITHIN_BACKWARD = [m for m in METHODS.values() if m.promises.frees_gradients]


@every(lambda s: s.promises.applies_to not in ("optimizer", "batch"))
@pytest.mark.parametrize("outer", WITHIN_BACKWARD)
def test_steps_within_backward_change_nothing_under_any_method(
    subject: Subject, outer: Any
) -> None:
    """Blocks that are run again in backward must find the weights that forward used."""
    plain, ours = subject.applied(dropout=0.1), subject.applied(dropout=0.1)
    expected, _ = train(plain, 4, lambda step: batch())
    put(outer, ours, {})
    losses, _ = train(ours, 4, lambda step: batch())
    assert losses == expected
    assert same_weights(plain, ours)


@every(is_default, lambda s: s.promises.applies_to == "batch")
@pytest.mark.parametrize("outer", WITHIN_BACKWARD)
def test_steps_within_backward_refuse_a_step_of_several_backwards(
    subject: Subject, outer: Any
) -> None:
    model = subject.applied()
    put(outer, model, {})
    with pytest.raises(StackError, match="second backward before step"):
        train(model, 1, lambda step: batch(rows=4))


@every(is_of_the_optimizer, is_default)
def test_an_optimizer_that_needs_more_than_gradients_is_refused(subject: Subject) -> None:
    model = subject.applied()
    make = functools.partial(torch.optim.LBFGS, lr=0.1)
    with pytest.raises(ConfigError, match="LBFGS"):
        subject.method.optimizer(model, list(model.parameters()), make, subject.method.configure())


@every(is_of_the_optimizer)
def test_a_wrong_setting_is_refused_before_anything_is_done(subject: Subject) -> None:
    config = subject.method.configure(subject.settings)
    for name in type(config).__dataclass_fields__:
        with pytest.raises(ConfigError, match=f"{subject.method.name}: {name} = "):
            subject.method.configure({name: object()})


@every(is_default, lambda s: not is_of_the_optimizer(s))
def test_other_methods_make_no_optimizer(subject: Subject) -> None:
    model = subject.network()
    with pytest.raises(ConfigError, match=f"method '{subject.method.name}' makes no optimizer"):
        subject.method.optimizer(model, list(model.parameters()), adamw, subject.method.configure())


@every(is_of_the_optimizer, is_default)
def test_a_state_that_was_saved_is_left_alone_by_later_steps(subject: Subject) -> None:
    model = subject.applied()
    _, stepping = train(model, 2, lambda step: batch())
    saved = copy.deepcopy(stepping.state_dict())
    again = copy.deepcopy(saved)
    model(**batch()).loss.backward()
    stepping.step()
    found, wanted = tensors(saved), tensors(again)
    assert all(
        torch.equal(found[n], v) if isinstance(v, Tensor) else found[n] == v
        for n, v in wanted.items()
    )
