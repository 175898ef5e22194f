"""Every budget at once: plans that are what `plan` promises, recipes by the same costs."""

import json

import pytest
import torch
from benchmarks.planner.models import PlainGPT, llama, llama_batch, plain_batch, plain_loss
from hypothesis import given
from hypothesis import strategies as st

import shoestring
from shoestring.planner import planner, sweep
from shoestring.planner.peers import recipes
from shoestring.planner.sweep import thinned
from shoestring.planner.ways import allowed


@pytest.fixture(scope="module")
def swept():
    torch.manual_seed(0)
    model, batch = PlainGPT(depth=4, width=32, heads=2, vocabulary=64), plain_batch(4, 64, 64)
    # Without offload, which widens the range so far that eight points leave gaps between recipes,
    # and whose order along the curve is not quite that of the simulated peaks.
    names = [m.name for m in allowed("bitwise") if m.name != "offload"]
    plans = planner(model, batch, loss=plain_loss, seconds=False, allow=names)
    budget = int(plans.smallest_bytes * 1.3)
    return model, batch, plans, budget, sweep(plans, budget, points=8)


def measured(model, batch, chosen):
    chosen.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        plain_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = chosen.verify(step).measured
    chosen.restore(model)
    return found


def test_plans_rise_in_peak_and_fall_in_time(swept):
    points = swept[4].plans
    assert 3 <= len(points) <= 10
    peaks, times = [p.peak_bytes for p in points], [p.factor for p in points]
    assert peaks == sorted(set(peaks))
    assert times == sorted(set(times), reverse=True)
    assert times[-1] == pytest.approx(1.0)


def test_the_smallest_budget_and_the_one_asked_for_are_among_them(swept):
    _, _, plans, budget, found = swept
    peaks = [p.peak_bytes for p in found.plans]
    assert peaks[0] == plans.smallest_bytes
    assert max(p for p in peaks if p <= budget) == plans(budget).peak_bytes


def test_every_peak_is_the_promise_that_a_measured_step_keeps(swept):
    model, batch, plans, _, found = swept
    for point in found.plans:
        chosen = plans(point.peak_bytes)
        assert sum(point.by_category.values()) == point.peak_bytes == chosen.peak_bytes
        assert point.peak_bytes * 0.97 <= measured(model, batch, chosen) <= point.peak_bytes


def test_recipes_are_simulated_and_a_measured_step_keeps_to_them(swept):
    model, batch, plans, _, found = swept
    peaks = {r.name: r.peak_bytes for r in found.recipes}
    assert set(peaks) >= {
        "plain", "checkpoint every block", "checkpoint every other block",
        "nested, segments of 2", "selective checkpoint, attention kept",
    }  # fmt: skip
    for recipe in recipes(plans.planner)[:4]:
        chosen = plans._plan(recipe.choice, 1 << 30)
        assert chosen.peak_bytes == peaks[recipe.name]
        assert peaks[recipe.name] * 0.97 <= measured(model, batch, chosen) <= peaks[recipe.name]


def test_recipes_do_not_depend_on_what_plans_are_allowed():
    model, batch = llama(depth=2, width=16, heads=2, vocabulary=2000), llama_batch(4, 64, 2000)
    plans = planner(model, batch, seconds=False, allow="bitwise")
    found = sweep(plans, points=2)
    peaks = {r.name: r.peak_bytes for r in found.recipes}
    notes = {r.name: r.note for r in found.recipes}
    assert notes["chunked loss"] == "more than these plans may do"
    assert peaks["checkpoint every block, chunked loss"] < peaks["checkpoint every block"]
    assert "chunked_loss" not in {p["method"] for x in found.plans for p in x.patches}


def test_recipes_cost_what_the_alternatives_of_a_plan_say(swept):
    _, _, plans, budget, found = swept
    said = {row.name: row.peak_bytes for row in plans(budget).rows}
    mine = {r.name: r.modelled_bytes for r in found.recipes}
    assert mine["plain"] == said["keep everything"]
    assert mine["checkpoint every block"] == said["recompute every block"]


def test_every_other_block_lies_between(swept):
    by_name = {r.name: r for r in swept[4].recipes}
    plain, every = by_name["plain"], by_name["checkpoint every block"]
    other = by_name["checkpoint every other block"]
    assert every.peak_bytes < other.peak_bytes < plain.peak_bytes
    assert plain.factor < other.factor < every.factor


def test_no_plan_loses_to_a_recipe_of_allowed_methods(swept):
    found = swept[4]
    may = [r for r in found.recipes if r.note != "more than these plans may do"]
    assert len(may) > 4
    for recipe in may:
        best = [p for p in found.plans if p.peak_bytes <= recipe.peak_bytes]
        assert not best or best[-1].factor <= recipe.factor * 1.02


def test_a_sweep_is_plain_data(swept):
    data = json.loads(json.dumps(swept[4].data()))
    assert data["format"] == 1
    assert data["plans"][0]["history"]["at"]
    assert data["parameters"] == sum(p.numel() for p in swept[0].parameters())
    assert data["plans"][0]["seconds"] is None


def test_a_budget_that_nothing_fits_still_has_a_sweep(swept):
    plans = swept[2]
    found = sweep(plans, 1000, points=3)
    assert found.plans[0].peak_bytes == plans.smallest_bytes


def test_recipes_of_a_reversible_stack_are_those_of_the_plain_one():
    model = shoestring.reversible(llama(depth=2, width=32, vocabulary=64))
    plans = planner(model, llama_batch(2, 32, 64), seconds=False)
    found = sweep(plans, points=3)
    assert {s["method"] for p in found.plans for s in p.spans} == {"reversible"}
    methods = {s["method"] for r in found.recipes for s in r.spans}
    assert methods == {"keep", "recompute"}
    plain = planner(llama(depth=2, width=32, vocabulary=64), llama_batch(2, 32, 64), seconds=False)
    expected = {r.name: r.peak_bytes for r in sweep(plain, points=2).recipes}
    assert {r.name: r.peak_bytes for r in found.recipes}["plain"] == expected["plain"]


def staircases():
    falling = st.lists(st.integers(1, 100), min_size=1, max_size=40)
    return falling.map(
        lambda drops: [(i * i, sum(drops) - sum(drops[:i])) for i in range(len(drops))]
    )


@given(staircases(), st.integers(2, 12))
def test_thinning_keeps_the_ends_and_the_order(curve, count):
    kept = thinned(curve, count)
    assert kept == sorted(set(kept))
    assert len(kept) == min(count, len(curve)) if len(curve) >= 2 else kept == [0]
    assert kept[0] == 0
    assert kept[-1] == len(curve) - 1


def test_thinning_drops_what_loses_least():
    curve = [(0, 10.0), (1, 9.9), (50, 5.0), (51, 4.9), (100, 1.0)]
    assert [curve[i] for i in thinned(curve, 3)] == [(0, 10.0), (50, 5.0), (100, 1.0)]
