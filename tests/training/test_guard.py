"""The guards name what is bad and what was promised."""

import math

import pytest
import torch
from torch import nn

from shoestring.errors import OutOfBudget, TrainingDiverged
from shoestring.training.guard import BudgetGuard, check_finite

MIB = 2**20


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model(torch.randn(2, 4)).sum().backward()
    return model


def test_finite_numbers_pass():
    check_finite(network(), 1, [2.0], 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_is_named_with_its_microbatch(bad):
    with pytest.raises(TrainingDiverged, match=rf"step 7: the loss is {bad} in microbatch 1"):
        check_finite(network(), 7, [2.0, bad], 1.0)


def test_a_bad_weight_behind_a_bad_loss_is_named():
    model = network()
    model[1].bias.data[2] = math.nan
    with pytest.raises(TrainingDiverged, match=r"1\.bias already held"):
        check_finite(model, 7, [math.nan], 1.0)


def test_the_first_bad_gradient_on_the_way_back_is_named():
    model = network()
    model[0].weight.grad.fill_(math.nan)
    model[1].weight.grad[0, 0] = math.inf
    with pytest.raises(TrainingDiverged, match=r"step 3: the gradient of 1\.weight is not finite"):
        check_finite(model, 3, [2.0], math.nan)


def guard(**settings: object) -> BudgetGuard:
    defaults = {
        "limit_bytes": 100 * MIB,
        "promised_bytes": 90 * MIB,
        "base_bytes": 10 * MIB,
        "slack": 0.1,
    }
    return BudgetGuard(**(defaults | settings))


def test_tensors_over_the_budget_are_refused_with_promise_and_measure():
    with pytest.raises(OutOfBudget) as caught:
        guard().check_tensors("step 5", 101 * MIB)
    text = str(caught.value)
    assert "step 5: live tensors peaked at 101.0 MiB" in text
    assert "the plan promised 90.0 MiB" in text
    assert "the budget of 100.0 MiB" in text
    assert caught.value.smallest_bytes == 101 * MIB


def test_the_process_may_exceed_the_budget_by_its_base_and_the_slack_only():
    watch = guard()
    watch.check_process("step 5", 119 * MIB)
    assert watch.rss_peak_bytes == 109 * MIB
    with pytest.raises(OutOfBudget, match=r"resident memory of the process peaked at 111\.0 MiB"):
        watch.check_process("step 6", 121 * MIB)


def test_without_a_budget_peaks_are_only_kept():
    watch = guard(limit_bytes=None, promised_bytes=None)
    watch.check_tensors("step 1", 500 * MIB)
    watch.check_tensors("step 2", 400 * MIB)
    assert watch.peak_bytes == 500 * MIB


def test_the_first_two_steps_and_one_in_a_hundred_are_tracked():
    tracked = [step for step in range(1, 301) if guard().tracks(step)]
    assert tracked == [1, 2, 100, 200, 300]
