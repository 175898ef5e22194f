"""The learning rate as a function of the step, against the schedules' own definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.training.config import ScheduleConfig
from shoestring.training.schedule import learning_rate

KINDS = ("cosine", "wsd", "constant")


def rates(steps: int = 100, **settings: object) -> list[float]:
    config = ScheduleConfig(**settings)
    return [learning_rate(config, step, peak=2.0, steps=steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_climbs_in_equal_steps_to_the_peak(kind):
    climb = rates(kind=kind, warmup_share=0.1, decay_share=0.2)[:10]
    assert climb == pytest.approx([0.2 * step for step in range(1, 11)])


def test_cosine_follows_the_formula_and_ends_at_the_final_share():
    lrs = rates(kind="cosine", warmup_share=0.1, final_share=0.25)
    for step in range(11, 101):
        cosine = (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert lrs[step - 1] == pytest.approx(2.0 * (0.25 + 0.75 * cosine))
    assert lrs[-1] == pytest.approx(0.5)


def test_wsd_stays_at_the_peak_then_falls_in_equal_steps():
    lrs = rates(kind="wsd", warmup_share=0.1, decay_share=0.2, final_share=0.0)
    assert lrs[10:80] == [2.0] * 70
    assert lrs[80:] == pytest.approx([2.0 * (1 - k / 20) for k in range(1, 21)], abs=1e-12)


def test_constant_stays_at_the_peak():
    assert rates(kind="constant", warmup_share=0.0) == [2.0] * 100


@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 400),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    final=st.floats(0, 1),
)
def test_every_rate_is_positive_up_to_the_end_and_never_above_the_peak(
    kind, steps, warmup, decay, final
):
    shares = {"warmup_share": warmup, "decay_share": decay, "final_share": final}
    lrs = rates(steps, kind=kind, **shares)
    assert all(0 < lr <= 2.0 for lr in lrs[:-1])
    assert 0 <= lrs[-1] <= 2.0
