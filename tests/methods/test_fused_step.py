"""The step within backward: as the plain one, one gradient at a time, refused where it lies."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from methods.optimizers import adamw, batch, gpt, made, measured, put, same_weights, train
from shoestring.errors import ConfigError, StackError
from shoestring.methods import method
from shoestring.planner import simulate

FUSED = [("fused_step", {})]
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw fused": adamw,
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, lr=3e-3, foreach=True),
    "adamw loop": lambda ps: torch.optim.AdamW(ps, lr=3e-3, foreach=False),
    "adam amsgrad": lambda ps: torch.optim.Adam(ps, lr=3e-3, amsgrad=True),
    "sgd momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "sgd fused": lambda ps: torch.optim.SGD(ps, lr=0.1, fused=True),
    "rmsprop foreach": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, foreach=True),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "groups": lambda ps: torch.optim.AdamW(
        [
            {"params": [p for p in ps if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in ps if p.ndim < 2], "lr": 1e-2, "weight_decay": 0.0},
        ],
        lr=3e-3,
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_bit_for_bit_as_by_itself(name: str, tied: bool) -> None:
    make = OPTIMIZERS[name]
    plain, ours = gpt(dropout=0.1, tied=tied), gpt(dropout=0.1, tied=tied)
    assert train(plain, put(plain, [], make), 5) == train(ours, put(ours, FUSED, make), 5)
    assert same_weights(plain, ours)


def test_gradients_are_never_there_together() -> None:
    plain, ours = measured([], adamw), measured(FUSED, adamw)
    largest = max(p.nbytes for p in gpt().parameters())
    assert plain.history is not None
    assert ours.history is not None
    assert max(plain.history["bytes"]["gradients"]) == sum(p.nbytes for p in gpt().parameters())
    assert max(ours.history["bytes"]["gradients"]) == largest
    assert ours.peak_bytes < plain.peak_bytes


class Shared(nn.Module):
    """One weight used four times: twice plainly, once within a region that is run again, and
    once through a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.weight) @ self.weight.T
        x = checkpoint(lambda y: torch.tanh(y @ self.weight), x, use_reentrant=False)
        return (x + self.weight[0]).square().mean()


def test_a_weight_used_in_many_places_is_stepped_once_when_all_is_summed() -> None:
    calls = []
    plain, ours = Shared(), Shared()
    one, other = adamw(list(plain.parameters())), put(ours, FUSED)
    inner = other.inner
    inner.register_step_pre_hook(lambda *_: calls.append(len(inner.param_groups[0]["params"])))
    x = torch.randn(5, 6)
    for _ in range(3):
        for model, stepping in ((plain, one), (ours, other)):
            model(x).backward()
            stepping.step()
            stepping.zero_grad()
    assert same_weights(plain, ours)
    assert calls == [1, 1, 1]
    assert ours.unused not in other.state


def test_a_parameter_that_is_thawed_later_and_gradients_set_by_hand_are_stepped() -> None:
    models = [nn.Linear(3, 3), nn.Linear(3, 3)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.bias.requires_grad_(False)
    steppings = [adamw(list(models[0].parameters())), put(models[1], FUSED)]
    for model, stepping in zip(models, steppings, strict=True):
        model.bias.requires_grad_(True)
        model(torch.ones(2, 3)).sum().backward()
        stepping.step()
        stepping.zero_grad()
        model.weight.grad = torch.full((3, 3), 0.3)
        stepping.step()
        assert model.weight.grad is None or stepping is steppings[0]
    assert same_weights(*models)


def test_a_closure_is_evaluated_and_its_loss_returned() -> None:
    plain, ours = gpt(), gpt()
    losses = []
    for model, stepping in ((plain, adamw(list(plain.parameters()))), (ours, put(ours, FUSED))):

        def closure(model: nn.Module = model, stepping: Any = stepping) -> Tensor:
            stepping.zero_grad()
            loss: Tensor = model(**batch()).loss
            loss.backward()
            return loss

        losses += [float(stepping.step(closure).detach()) for _ in range(2)]
    assert losses[:2] == losses[2:]
    assert same_weights(plain, ours)


def test_clipping_by_parameter_is_torchs_for_each_of_them() -> None:
    plain, ours = gpt(), gpt()
    one = adamw(list(plain.parameters()))
    other = put(ours, [("fused_step", {"clip": "parameter", "max_norm": 0.05})])
    for step in range(3):
        for model in (plain, ours):
            model(**batch(seed=step)).loss.backward()
        norms = [float(nn.utils.clip_grad_norm_([p], 0.05)) for p in plain.parameters()]
        assert min(norms) < 0.05 < max(norms)
        for stepping in (one, other):
            stepping.step()
            stepping.zero_grad()
    assert same_weights(plain, ours)


# ---- refused -----------------------------------------------------------------------------------


class ByNormOfAll(torch.optim.SGD):
    """Steps by the gradient over the norm of all gradients."""

    def step(self, closure: Any = None) -> Any:
        every = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in every]).norm()
        for parameter in every:
            parameter.grad = parameter.grad / norm
        return super().step(closure)


class CountsInItsGroup(torch.optim.SGD):
    """A learning rate that falls with every call of step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            group["lr"] = 0.1 / group["calls"]
        return super().step(closure)


@pytest.mark.parametrize("kind", [ByNormOfAll, CountsInItsGroup, torch.optim.LBFGS])
def test_an_optimizer_that_couples_parameters_is_refused(kind: type[Optimizer]) -> None:
    model = gpt()
    with pytest.raises(ConfigError, match=f"cannot step {kind.__name__} one parameter at a time"):
        put(model, FUSED, lambda ps: kind(ps, lr=0.1))
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # no hook was left


def test_a_second_backward_before_the_step_is_refused_before_it_steps() -> None:
    model = gpt()
    stepping = put(model, FUSED)
    model(**batch()).loss.backward()
    held = copy.deepcopy(model)
    with pytest.raises(StackError, match="second backward before step"):
        model(**batch()).loss.backward()
    assert same_weights(model, held)
    stepping.step()
    model.zero_grad()
    train(model, stepping, 1)


def test_a_checkpoint_that_runs_a_backward_of_its_own_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    stepping = put(model, FUSED)
    y = checkpoint(model[1], model[0](torch.randn(2, 4)), use_reentrant=True)
    with pytest.raises(StackError, match="use_reentrant=True"):
        y.sum().backward()
    assert stepping is not None


@pytest.mark.parametrize("name", ["adamw fused", "adamw foreach", "adamw loop", "sgd fused"])
def test_a_use_that_backward_does_not_wait_for_is_noticed(name: str) -> None:
    model = nn.Linear(4, 4, bias=False)
    stepping = put(model, FUSED, OPTIMIZERS[name])
    x = torch.randn(2, 4, requires_grad=True)
    y = model(x @ model.weight.detach())  # the first product's backward comes after the step
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert stepping is not None


def test_leaving_out_a_step_after_its_backward_is_refused() -> None:
    model = gpt()
    stepping = put(model, FUSED)
    stepping.zero_grad()
    model(**batch()).loss.backward()
    with pytest.raises(StackError, match="zero_grad\\(\\) after a backward that no step"):
        stepping.zero_grad()


def test_a_gradient_scaler_is_refused() -> None:
    model = gpt()
    stepping = put(model, FUSED)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**batch()).loss).backward()
    with pytest.raises(StackError, match="GradScaler"):
        scaler.step(stepping)


def test_a_group_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="group of processes"):
        put(gpt(), FUSED)


def test_clipping_to_the_norm_of_all_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="known only when all of them are there"):
        method("fused_step").configure({"clip": "global"})


def test_a_copy_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy.deepcopy(put(gpt(), FUSED))


# ---- hooks -------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("how", ["dropped", "released"])
def test_a_second_optimizer_is_refused_until_the_first_is_gone(how: str) -> None:
    plain, ours = gpt(), gpt()
    train(plain, adamw(list(plain.parameters())), 2)
    train(plain, adamw(list(plain.parameters())), 4, start=2)
    first = put(ours, FUSED)
    train(ours, first, 2)
    with pytest.raises(StackError, match="have an optimizer already"):
        put(ours, FUSED)
    if how == "released":
        first.release()
    else:
        del first
        gc.collect()
    assert hooks(ours) == 0
    train(ours, put(ours, FUSED), 4, start=2)
    assert same_weights(plain, ours)


def test_a_released_optimizer_goes_on_as_a_plain_one() -> None:
    plain, ours = gpt(), gpt()
    stepping = put(ours, FUSED)
    losses = train(ours, stepping, 2)
    stepping.release()
    losses += train(ours, stepping, 4, start=2)
    assert losses == train(plain, adamw(list(plain.parameters())), 4)


def test_a_copy_of_the_model_and_its_fake_twin_carry_no_hooks() -> None:
    model = gpt()
    stepping = put(model, FUSED)
    assert hooks(model) == len(list(model.parameters()))
    twin = copy.deepcopy(model)
    assert hooks(twin) == 0
    before = copy.deepcopy(twin)
    simulate(model, batch())
    assert same_weights(model, before)
    twin(**batch()).loss.backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert same_weights(model, before)
    assert stepping.state == {}


def test_parameters_added_later_are_stepped_in_backward() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    stepping = made(model, FUSED, adamw, list(model[0].parameters()))
    stepping.add_param_group({"params": list(model[1].parameters()), "lr": 1e-2})
    model(torch.ones(2, 3)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert len(stepping.state) == 4
