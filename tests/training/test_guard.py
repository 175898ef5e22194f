"""The guards name what is bad and what was promised."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from shoestring.errors import OutOfBudget, TrainingDiverged
from shoestring.rss import status_bytes
from shoestring.training.guard import BudgetGuard, FiniteGuard

MIB = 2**20


class Backwards(nn.Module):
    """Layers registered in another order than they run in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.middle, self.first = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


def network() -> tuple[nn.Module, FiniteGuard]:
    model = Backwards()
    finite = FiniteGuard(model)
    model(torch.ones(2, 4)).sum().backward()
    return model, finite


def test_finite_numbers_pass():
    network()[1].check(1, [2.0], 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_is_named_with_its_microbatch(bad):
    with pytest.raises(TrainingDiverged, match=rf"step 7: the loss is {bad} in microbatch 1"):
        network()[1].check(7, [2.0, bad], 1.0)


def test_a_bad_weight_behind_a_bad_loss_is_named():
    model, finite = network()
    model.middle.bias.data[2] = math.nan
    with pytest.raises(TrainingDiverged, match=r"middle\.bias already held"):
        finite.check(7, [math.nan], 1.0)


@pytest.mark.parametrize("first_bad", ["first", "middle", "last"])
def test_the_first_bad_gradient_on_the_way_back_is_named(first_bad):
    model, finite = network()
    finite.check(1, [2.0], 1.0)
    order = ["last", "middle", "first"]
    for name in order[order.index(first_bad) :]:
        getattr(model, name).weight.grad[1, 1] = math.inf
    with pytest.raises(TrainingDiverged, match=rf"the gradient of {first_bad}\.weight"):
        finite.check(3, [2.0], math.nan)


def test_finite_gradients_whose_norm_is_not_finite_are_told_apart():
    with pytest.raises(TrainingDiverged, match="step 3: the norm of all gradients is inf"):
        network()[1].check(3, [2.0], math.inf)


def test_the_hooks_are_gone_after_the_first_step():
    model, finite = network()
    finite.check(1, [2.0], 1.0)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def guard(**settings: object) -> BudgetGuard:
    defaults = {
        "limit_bytes": 100 * MIB,
        "promised_bytes": 90 * MIB,
        "base_bytes": 0,
        "slack": 0.1,
    }
    return BudgetGuard(torch.device("cpu"), **(defaults | settings))


def work(watch: BudgetGuard, num_bytes: int, *, tracked: bool) -> None:
    """A step that holds so many bytes at once."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with watch.watch("step 5", model, optimizer, tracked=tracked):
        torch.ones(num_bytes // 4).add_(1)


def test_tensors_over_the_budget_are_refused_with_promise_and_measure():
    watch = guard()
    with pytest.raises(OutOfBudget) as caught:
        work(watch, 101 * MIB, tracked=True)
    text = str(caught.value)
    assert "step 5: live tensors peaked at 101.0 MiB" in text
    assert "the plan promised 90.0 MiB" in text
    assert "the budget of 100.0 MiB" in text
    assert 101 * MIB <= caught.value.smallest_bytes < 102 * MIB
    assert caught.value.exit_code == 3


def test_tensors_within_the_budget_pass_and_the_peak_is_kept():
    watch = guard()
    work(watch, 99 * MIB, tracked=True)
    work(watch, 50 * MIB, tracked=True)
    assert 99 * MIB <= watch.peak_bytes < 100 * MIB
    assert sum(watch.by_category.values()) == watch.peak_bytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no resettable RSS mark")
def test_the_process_may_exceed_the_budget_by_its_base_and_the_slack_only():
    base = status_bytes("VmRSS")
    work(guard(base_bytes=base), 100 * MIB, tracked=False)
    with pytest.raises(OutOfBudget, match="resident memory of the process peaked at"):
        work(guard(base_bytes=base), 250 * MIB, tracked=False)
    work(watch := guard(base_bytes=base, slack=None), 250 * MIB, tracked=False)
    assert watch.rss_peak_bytes > 200 * MIB


def test_without_a_budget_peaks_are_only_kept():
    watch = guard(limit_bytes=None, promised_bytes=None)
    work(watch, 150 * MIB, tracked=True)
    assert watch.peak_bytes >= 150 * MIB


def test_an_error_in_the_step_is_not_hidden_by_the_guard():
    watch = guard(limit_bytes=1)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with (
        pytest.raises(ZeroDivisionError),
        watch.watch("step 5", model, optimizer, tracked=True),
    ):
        torch.ones(int(1 / 0))


def test_the_first_two_steps_and_one_in_a_hundred_are_tracked():
    tracked = [step for step in range(1, 301) if guard().tracks(step)]
    assert tracked == [1, 2, 100, 200, 300]
