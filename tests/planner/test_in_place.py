"""A plan in a model: replaced, refused, copied, and planned over, as if it had never been there."""

import copy
import gc
import weakref

import pytest
import torch
from benchmarks.planner.models import llama, llama_batch
from torch import nn

import shoestring
from shoestring.errors import StackError
from shoestring.methods import apply_spans
from shoestring.planner import planner, simulate
from shoestring.stack import Span, Stack


def big(**changes):
    torch.manual_seed(0)
    return llama(depth=2, width=32, vocabulary=1000, **changes)


FEW = ["keep", "recompute", "reversible", "chunked_loss"]
BATCH = llama_batch(2, 32, 1000)


def forwards(model):
    return {name: vars(m).get("forward") for name, m in model.named_modules()}


@pytest.fixture(scope="module")
def plans():
    return planner(big(), BATCH, seconds=False, allow=FEW)


@pytest.fixture(scope="module")
def sliced(plans):
    """A plan that cuts the loss."""
    chosen = plans(plans.smallest_bytes)
    assert any(w.method == "chunked_loss" for w in chosen.patches)
    return chosen


@pytest.fixture(scope="module")
def keeping(plans):
    """A plan that keeps everything as it is."""
    chosen = plans("1 GiB")
    assert not chosen.patches
    return chosen


def test_a_plan_without_patches_takes_those_of_the_last_one_out(sliced, keeping):
    model = big()
    sliced.apply(model)
    assert model(**BATCH).logits is None
    keeping.apply(model)
    assert model(**BATCH).logits is not None
    keeping.restore(model)
    assert not any(forwards(model).values())


def test_a_plan_with_the_same_patches_takes_the_place_of_another(plans, sliced):
    model, another = big(), plans(plans.smallest_bytes + 1000)
    sliced.apply(model)
    another.apply(model)
    with pytest.raises(StackError, match="not applied"):
        sliced.restore(model)
    another.restore(model)
    assert not any(forwards(model).values())


def test_a_model_with_a_plan_is_planned_as_without(plans, sliced):
    model = big()
    sliced.apply(model)
    before = forwards(model)
    again = planner(model, BATCH, seconds=False, allow=FEW)
    assert again.smallest_bytes == plans.smallest_bytes
    assert again("1 GiB").peak_bytes == plans("1 GiB").peak_bytes
    assert forwards(model) == before
    assert simulate(model, BATCH, later=True, steps=1).peak_bytes == sliced.peak_bytes


def test_a_refused_plan_changes_nothing(sliced):
    reversible = shoestring.reversible(big())
    plans = planner(reversible, BATCH, seconds=False, allow=FEW)
    chosen = plans(plans.smallest_bytes)
    assert chosen.patches
    for model in (big(), big()):
        with pytest.raises(StackError, match="cannot run"):
            chosen.apply(model)
        assert not any(forwards(model).values())
    sliced.apply(model)
    before = forwards(model)
    with pytest.raises(StackError, match="cannot run"):
        chosen.apply(model)
    assert forwards(model) == before
    sliced.restore(model)
    assert not any(forwards(model).values())


def test_a_reversible_model_stays_reversible_under_plans_that_come_and_go():
    model = shoestring.reversible(big())
    before = forwards(model)
    plans = planner(model, BATCH, seconds=False, allow=["reversible"])
    small, large = plans(plans.smallest_bytes), plans("1 GiB")
    small.apply(model)
    large.apply(model)
    again = planner(model, BATCH, seconds=False, allow=["reversible"])
    assert again.smallest_bytes == plans.smallest_bytes
    large.restore(model)
    assert forwards(model) == before


def test_a_copy_has_the_plan_and_loses_it_on_its_own(sliced, keeping):
    model = big()
    sliced.apply(model)
    twin = copy.deepcopy(model)
    keeping.apply(twin)
    assert twin(**BATCH).logits is not None
    assert model(**BATCH).logits is None


def test_runners_that_took_the_place_of_a_plan_are_not_taken_out_with_it(keeping):
    model = big()
    keeping.apply(model)
    apply_spans(Stack.of(model), [Span(0, 2, "recompute")])
    before = forwards(model)
    keeping.restore(model)
    assert forwards(model) == before
    assert any(Stack.of(model).executors)


def test_what_stands_over_a_plan_is_not_torn_out(sliced):
    model = big()
    sliced.apply(model)
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(StackError, match="was replaced after"):
        sliced.restore(model)


def test_a_plan_keeps_no_model_alive(sliced):
    model: nn.Module | None = big()
    gone = weakref.ref(model)
    sliced.apply(model)
    model = None
    gc.collect()
    assert gone() is None
