"""What a plan was made for is saved with it, and what it was not made for is told."""

import copy
import json
import logging

import pytest
import torch
from benchmarks.planner.models import PlainGPT, llama, llama_batch, plain_batch, plain_loss

from shoestring.errors import ConfigError, OutOfBudget, StackError
from shoestring.meter import Meter
from shoestring.planner import Plan, plan, planner
from shoestring.planner.made_for import in_parts, outgrows


def big():
    torch.manual_seed(0)
    return llama(depth=2, width=32, vocabulary=64)


BATCH = llama_batch(4, 32, 64)


@pytest.fixture(scope="module")
def plans():
    return planner(big(), BATCH, seconds=False, allow=["recompute", "chunked_loss"])


@pytest.fixture(scope="module")
def chosen(plans):
    return plans(plans.smallest_bytes)


def hooks(model):
    return [h for m in model.modules() for h in m._forward_pre_hooks.values()]


def train(model, batch):
    model(**batch).loss.backward()
    model.zero_grad()


def test_a_plan_knows_its_model_and_batch_and_saves_them(chosen):
    made_for = chosen.made_for
    assert made_for.batch == {"input_ids": (4, 32), "labels": (4, 32)}
    assert made_for.parameters == made_for.trained == sum(p.numel() for p in big().parameters())
    assert made_for.dtypes == {"float32": made_for.parameters}
    assert made_for.torch == torch.__version__
    assert Plan.from_json(chosen.to_json()).made_for == made_for


def test_what_is_given_by_place_is_known_by_its_name():
    model, batch = PlainGPT(depth=2, width=32, heads=2, vocabulary=64), plain_batch(2, 16, 64)
    made_for = plan(model, batch, loss=plain_loss, budget="1GiB", seconds=False).made_for
    assert made_for.batch == {"ids": (2, 16)}


def test_an_older_plan_without_it_is_read_and_applied(chosen):
    value = json.loads(chosen.to_json())
    del value["made_for"]
    older = Plan.from_json(json.dumps(value))
    assert older.made_for is None
    model = big()
    older.apply(model)
    assert not hooks(model)
    train(model, llama_batch(8, 64, 64))
    older.restore(model)


@pytest.mark.parametrize(
    "broken",
    [
        {"batch": {"input_ids": "x"}},
        {"parameters": None},
        {"dtypes": 3},
        {"batch": {"x": [1.5]}},
        None,
    ],
)
def test_what_is_broken_in_it_is_refused(chosen, broken):
    value = json.loads(chosen.to_json())
    value["made_for"] = {**value["made_for"], **broken} if broken else {}
    with pytest.raises(ConfigError, match=r"this plan's made_for cannot be read.*Plan.to_json"):
        Plan.from_json(json.dumps(value))


def test_another_model_is_refused_by_what_differs(chosen):
    with pytest.raises(StackError, match=r"with [\d,]+ parameters, this one has [\d,]+"):
        chosen.apply(llama(depth=2, width=32, vocabulary=128))
    half = big().to(torch.bfloat16)
    with pytest.raises(StackError, match="in float32, this one has them in bfloat16"):
        chosen.apply(half)
    half.model.layers[0].float()
    with pytest.raises(StackError, match=r"in float32, .* bfloat16 \([\d,]+\), float32 \([\d,]+\)"):
        chosen.apply(half)
    assert not hooks(half)
    frozen = big()
    frozen.lm_head.requires_grad_(False)
    chosen.apply(frozen)  # it needs less
    less = plan(frozen, BATCH, budget="1GiB", seconds=False, allow=["recompute"])
    with pytest.raises(StackError, match=r"parameters to train, this one trains"):
        less.apply(big())


def test_another_torch_is_told(chosen, caplog):
    value = json.loads(chosen.to_json())
    value["made_for"]["torch"] = "2.11.0"
    with caplog.at_level(logging.WARNING, logger="shoestring"):
        Plan.from_json(json.dumps(value)).apply(big())
    assert "made with torch 2.11.0, this is" in caplog.text


def test_a_longer_batch_is_told_once_and_a_still_longer_one_again(chosen, caplog):
    model = big()
    chosen.apply(model)
    with caplog.at_level(logging.WARNING, logger="shoestring"):
        train(model, BATCH)
        train(model, llama_batch(8, 16, 64))  # as many tokens in shorter rows
        assert not caplog.records
        for _ in range(2):
            train(model, llama_batch(4, 40, 64))
    told = [r.message for r in caplog.records]
    assert len(told) == 2  # input_ids and labels
    assert "input_ids of 4 x 40, larger than planned for; expected at most 4 x 32" in told[0]
    train(model, llama_batch(4, 48, 64))
    assert len(caplog.records) == 4


def test_as_an_error_it_comes_before_anything_is_allocated(chosen):
    model, longer = big(), llama_batch(4, 33, 64)
    chosen.apply(model, larger="error")
    with Meter(model) as meter, pytest.raises(OutOfBudget, match="input_ids of 4 x 33"):
        train(model, longer)
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert meter.peak_bytes <= weights + sum(t.nbytes for t in longer.values())
    with pytest.raises(OutOfBudget):
        model(longer["input_ids"])
    with torch.no_grad():
        model(**longer)  # evaluation is another matter
    train(model, BATCH)


def test_it_may_be_ignored_and_misspelt(chosen):
    model = big()
    chosen.apply(model, larger="ignore")
    assert not hooks(model)
    with pytest.raises(ConfigError, match="larger = 'loud'"):
        chosen.apply(model, larger="loud")


def test_it_comes_and_goes_with_the_plan_in_copies_too(chosen, plans):
    model = big()
    chosen.apply(model, larger="error")
    twin = copy.deepcopy(model)
    assert len(hooks(model)) == len(hooks(twin)) == 1
    with pytest.raises(OutOfBudget):
        train(twin, llama_batch(4, 40, 64))
    plans("1 GiB").apply(twin)  # replaces: only warns
    assert len(hooks(twin)) == 1
    train(twin, llama_batch(4, 40, 64))
    chosen.restore(model)
    assert not hooks(model)
    train(model, llama_batch(4, 40, 64))


def test_a_refused_plan_leaves_the_guard_of_the_one_that_is_in(chosen):
    model = big()
    chosen.apply(model, larger="error")
    value = json.loads(chosen.to_json())
    value["spans"][0]["config"] = {"no such setting": 1}
    with pytest.raises(ConfigError):
        Plan.from_json(json.dumps(value)).apply(model)
    assert len(hooks(model)) == 1
    with pytest.raises(OutOfBudget):
        train(model, llama_batch(4, 40, 64))


def test_a_planned_model_is_planned_for_a_larger_batch_without_complaint(chosen, caplog):
    model = big()
    chosen.apply(model, larger="error")
    again = plan(model, llama_batch(8, 64, 64), budget="1GiB", seconds=False, allow=["recompute"])
    again.apply(model, larger="error")
    train(model, llama_batch(8, 64, 64))
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_wrapped_afterwards_is_guarded(chosen):
    peft = pytest.importorskip("peft")
    model = big()
    chosen.apply(model, larger="error")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    wrapped(**BATCH).loss.backward()
    with pytest.raises(OutOfBudget, match="input_ids of 4 x 40"):
        wrapped(**llama_batch(4, 40, 64))


def test_what_outgrows_what():
    assert not outgrows((4, 32), (4, 32))
    assert not outgrows((8, 16), (4, 32))
    assert not outgrows((2, 32), (4, 32))
    assert outgrows((1, 33), (4, 32))
    assert outgrows((5, 32), (4, 32))
    assert outgrows((4, 32, 2), (4, 32))
    assert not outgrows((), ())


def test_parts_are_as_large_as_their_largest():
    shapes = {"ids": (5, 7), "scale": (), "table": (3, 5)}
    assert in_parts(shapes, 2) == {"ids": (3, 7), "scale": (), "table": (3, 5)}
    assert in_parts(shapes, 1) == shapes
