"""Batches in parts: the gradients of the whole, and plans that cut."""

import pytest
import torch
from benchmarks.planner.models import llama, llama_batch
from torch import nn

import shoestring
from shoestring.errors import ConfigError, DataError, OutOfBudget
from shoestring.methods import method
from shoestring.planner import Plan, planner
from shoestring.planner.ways import Way, allowed
from shoestring.rows import cut, rows_of
from shoestring.stack import Span

ONLY = ["keep", "microbatch"]


def padded_batch(rows=4, tokens=32):
    """Rows of other lengths: the parts have other numbers of targets."""
    batch = llama_batch(rows, tokens, 64)
    labels = batch["labels"].clone()
    for row in range(rows):
        labels[row, : 6 * row] = -100
    return {**batch, "labels": labels}


def small():
    torch.manual_seed(0)
    return llama(depth=2, width=32, vocabulary=64)


def cutting(parts, **more):
    """A plan that only cuts."""
    return Plan(
        budget_bytes=1, peak_bytes=1, by_category={}, instant="", step_seconds=None,
        spans=(Span(0, 2, "keep"),), patches=(Way("microbatch", {"parts": parts}),), rows=(),
        blocks=2, model="", **more,
    )  # fmt: skip


def gradients(model):
    found = [p.grad.double() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_gradients_are_those_of_the_whole_batch(parts):
    model, batch = small(), padded_batch()
    whole = model(**batch).loss
    whole.backward()
    expected = gradients(model)
    loss = cutting(parts).backward(model, batch)
    bound = method("microbatch").promises.bound_eps * torch.finfo(torch.float32).eps
    assert abs(loss - whole) <= bound * whole
    for a, b in zip(expected, gradients(model), strict=True):
        assert (a - b).norm() <= bound * a.norm()


def test_a_part_without_targets_adds_nothing():
    model, batch = small(), padded_batch()
    batch["labels"][2:] = -100
    model(**batch).loss.backward()
    expected = gradients(model)
    cutting(2).backward(model, batch)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, gradients(model), strict=True)
    )
    with pytest.raises(DataError, match="no target"):
        cutting(2).backward(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_a_mean_over_rows_is_weighted_by_rows():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    plan = cutting(2, loss=lambda m, b: m(b["x"]).square().mean())
    plan.backward(model, {"x": x})
    parts = gradients(model)
    model(x).square().mean().backward()
    assert all(torch.allclose(a, b) for a, b in zip(gradients(model), parts, strict=True))


def test_parts_are_views_the_largest_first_and_scalars_are_in_each():
    batch = {"ids": torch.arange(10).view(5, 2), "scale": torch.tensor(2.0), "name": "x"}
    first, second = cut(batch, 2)
    assert (rows_of(first), rows_of(second)) == (3, 2)
    assert first["ids"].data_ptr() == batch["ids"][2:].data_ptr()
    assert first["scale"] is batch["scale"] is second["scale"]
    assert len(cut(batch, 99)) == 5
    with pytest.raises(ConfigError, match="no tensor with rows"):
        rows_of({"scale": torch.tensor(2.0)})


def test_plans_cut_only_where_the_loop_lets_them():
    names = [m.name for m in allowed("exact")]
    assert "microbatch" not in names
    assert "microbatch" in [m.name for m in allowed("exact", hands_over=["batch"])]
    assert "microbatch" in [m.name for m in allowed(ONLY)]


def test_a_plan_that_cuts_keeps_its_promise():
    model, batch = small(), llama_batch(8, 64, 64)
    plans = planner(model, batch, seconds=False, allow=ONLY)
    chosen = plans(plans.smallest_bytes)
    assert [w.label for w in chosen.patches] == ["microbatch(parts=8)"]
    whole = planner(model, batch, seconds=False, allow=["keep"])
    assert chosen.peak_bytes < 0.7 * whole.smallest_bytes
    with pytest.raises(OutOfBudget):
        whole(chosen.peak_bytes)
    again = Plan.from_json(chosen.to_json())
    assert again == chosen
    chosen.apply(model)
    optimizer = chosen.optimizer(model)

    def step():
        chosen.backward(model, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    checked = chosen.verify(step)
    assert 0 <= checked.error <= 0.03, checked


def test_more_parts_take_longer_in_the_plan():
    plans = planner(small(), llama_batch(4, 32, 64), allow=ONLY)
    seconds = [c.seconds for c in plans.planner.curve]
    assert seconds == sorted(seconds, reverse=True)
    assert len(plans.planner.curve) > 1


def test_a_model_with_batch_statistics_is_not_cut():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    with pytest.raises(shoestring.ShoestringError, match="statistics of the whole batch"):
        method("microbatch").apply(model, method("microbatch").configure())
