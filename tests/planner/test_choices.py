"""What the planner picks from: reversible stacks, methods of loss and modules, further settings,
any order of blocks; and what a plan does to a deep stack."""

import torch
from benchmarks.planner.models import PlainGPT, llama, llama_batch, plain_batch, plain_loss

import shoestring
from shoestring.methods import METHODS, Method, Promises
from shoestring.methods.chunked_loss import ChunkedLoss
from shoestring.planner import planner
from shoestring.planner.chain import Kept, Redone, evaluate
from shoestring.planner.choose import choice
from shoestring.planner.in_place import strip
from shoestring.planner.variants import spans_of
from shoestring.planner.ways import Offer, Way, allowed
from shoestring.stack import Stack

OFFER = Offer(kept=(Way("keep"), Way("recompute", {"save": "matmuls"})), redo=Way("recompute"))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_spans_join_neighbours_that_are_run_the_same_way():
    schedule = (Redone(0, 1), Redone(1, 2), Kept(2, 1), Kept(3, 0), Kept(4, 0))
    found = [(s.start, s.stop, s.method, dict(s.config)) for s in spans_of(schedule, OFFER)]
    assert found == [
        (0, 2, "recompute", {}),
        (2, 3, "recompute", {"save": "matmuls"}),
        (3, 5, "keep", {}),
    ]


def test_walks_are_told_relative_to_their_span():
    schedule = (Kept(0, 0), Redone(1, 5, ((1, 4, (3,)), (1, 2, ()))), Redone(5, 6))
    span = spans_of(schedule, OFFER)[1]
    assert (span.start, span.stop) == (1, 6)
    assert dict(span.config) == {"hold": [0, 4], "rebuild": [[0, 3, [2]]]}


def test_a_deep_stack_rebuilds_inputs_from_lower_ones_bit_for_bit():
    """Many thin blocks: held inputs cost more than one block's inside, so fewer are held."""
    model = PlainGPT(depth=12, width=16, heads=2, vocabulary=16)
    batch = plain_batch(8, 128, 16)
    plans = planner(
        model, batch, loss=plain_loss, allow=["keep", "recompute"], seconds=False, optimizer=sgd
    )
    chosen = plans(plans.smallest_bytes)
    held = [s.config["hold"] for s in chosen.spans if s.config.get("hold")]
    assert held
    assert all(len(h) < s.stop - s.start for h, s in zip(held, chosen.spans, strict=False))
    plain_loss(model, batch).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    chosen.apply(model)
    plain_loss(model, batch).backward()
    pairs = zip(expected, model.parameters(), strict=True)
    assert all(torch.equal(a, p.grad) for a, p in pairs)


def test_the_chain_model_is_near_the_simulation_and_not_under_it():
    model, batch = PlainGPT(depth=3, width=32, heads=2, vocabulary=64), plain_batch(2, 64, 64)
    plans = planner(model, batch, loss=plain_loss, allow=["keep", "recompute"], seconds=False)
    chosen = plans.planner
    variant = chosen.costs.variant(())
    schedule = (Redone(0, 2, ((0, 1, ()),)), Kept(2, 0))
    it = choice(variant, schedule)
    assert evaluate(variant.chain, schedule).peak_bytes + variant.resident == it.peak_bytes
    assert 0 <= it.peak_bytes / chosen.promise(it).peak_bytes - 1 <= 0.02


def test_a_reversible_stack_is_planned_by_its_kept_end_with_plain_schemes_beside():
    model = shoestring.reversible(llama(depth=2, width=32, vocabulary=64))
    plans = planner(model, llama_batch(2, 32, 64), seconds=False, allow=["reversible"])
    low = plans(plans.planner.smallest.peak_bytes + 8192)
    high = plans("1 GiB")
    (span,) = low.spans
    assert (span.start, span.stop, span.method) == (0, 2, "reversible")
    assert span.config["keep_top"] < 2
    assert high.spans[0].config["keep_top"] == 2
    assert low.peak_bytes < high.peak_bytes
    assert low.rows[0].name == "plain: keep everything"
    stack = Stack.of(model)
    assert all(e is not None for e in stack.executors)
    strip(model)
    assert not any(stack.executors)


def test_a_reversible_stack_may_hold_outputs_below_its_kept_end():
    torch.manual_seed(0)
    model = shoestring.reversible(llama(depth=4, width=64, vocabulary=64))
    batch = llama_batch(4, 64, 64)
    plans = planner(model, batch, seconds=False, allow=["reversible"], optimizer=sgd)
    held = [c for c in plans.planner.curve if c.spans[0].config.get("hold_outputs")]
    assert held
    assert all(c.spans[0].config["keep_top"] + c.spans[0].config["hold_outputs"] <= 4 for c in held)
    model(**batch).loss.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    for each in (held[0], held[-1]):
        chosen = plans._plan(each, 1 << 30)
        chosen.apply(model)
        optimizer = sgd(model.parameters())

        def step(optimizer=optimizer):
            model(**batch).loss.backward()
            optimizer.step()

        checked = chosen.verify(step, steps=1)
        assert checked.measured == checked.predicted
        assert abs(each.peak_bytes / checked.measured - 1) < 0.03
        pairs = zip(expected, model.parameters(), strict=True)
        assert all(torch.equal(a, p.grad) for a, p in pairs)
        model.zero_grad()


def test_a_big_vocabulary_brings_in_a_method_of_the_loss(monkeypatch):
    monkeypatch.setitem(METHODS, "chunked_loss", ChunkedLoss())
    model = llama(depth=2, width=16, heads=2, vocabulary=4000)
    batch = llama_batch(4, 64, 4000)
    plans = planner(model, batch, seconds=False)
    without = planner(model, batch, seconds=False, allow=["keep", "recompute"])
    assert plans.smallest_bytes < 0.8 * without.smallest_bytes
    chosen = plans(plans.smallest_bytes)
    kinds = {METHODS[w.method].promises.applies_to for w in chosen.patches}
    assert "loss" in kinds
    assert not plans("1 GiB").patches


def test_further_settings_of_a_method_are_on_offer(monkeypatch):
    monkeypatch.setattr(
        type(METHODS["recompute"]), "variants", ({"save": "matmuls"},), raising=False
    )
    model, batch = PlainGPT(depth=3, width=32, heads=2, vocabulary=64), plain_batch(2, 64, 64)
    plans = planner(model, batch, loss=plain_loss, allow=["keep", "recompute"], seconds=False)
    settings = [s.config for c in plans.planner.curve for s in c.spans]
    assert {"save": "matmuls"} in settings


def test_a_fidelity_lets_in_what_promises_as_much(monkeypatch):
    class Loose(Method):
        name = "loose"
        promises = Promises(fidelity="unbiased", applies_to="span", rebuilds="input")

    monkeypatch.setitem(METHODS, "loose", Loose())
    assert "loose" not in {m.name for m in allowed("exact")}
    assert "loose" in {m.name for m in allowed("unbiased")}
    assert {m.name for m in allowed(["loose"])} == {"loose", "keep"}
