"""Frozen weights in codes: beside adapters, in plans, and where there is nothing to do."""

import copy

import pytest
import torch
from benchmarks.planner.models import llama, llama_batch
from torch import nn

from shoestring.errors import ConfigError, StackError
from shoestring.methods import method
from shoestring.methods.lora import merge
from shoestring.ops.weight_codes import is_coded
from shoestring.planner import planner
from shoestring.planner.timing import Timer
from shoestring.planner.ways import Way, allowed, apply_ways, patches_for, takes

CODES = method("quantized_base")
BATCH = llama_batch(2, 32, 64)
BASES = ["int8", "nf4"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return llama(depth=2, width=96, vocabulary=64).train()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def both(base: str, **settings) -> list[Way]:
    return [Way("quantized_base", {"base": base}), Way("lora", {"rank": 4, **settings})]


def learned(it, steps=20):
    optimizer = adamw([p for p in it.parameters() if p.requires_grad])
    losses = []
    for _ in range(steps):
        loss = it(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("base", BASES)
def test_beside_adapters_it_is_what_lora_does_with_such_a_base(base):
    one, other = model(), model()
    apply_ways(one, both(base), ())
    apply_ways(other, [Way("lora", {"rank": 4, "base": base})], ())
    assert [*one.state_dict()] == [*other.state_dict()]
    assert learned(one) == learned(other)


@pytest.mark.parametrize("base", BASES)
def test_what_was_merged_stays_when_all_is_taken_out(base):
    it = model()
    undo = apply_ways(it, both(base), ())
    losses = learned(it)
    assert losses[-1] < 0.9 * losses[0]
    it.eval()
    adapted = it(**BATCH).logits
    assert merge(it) == 14
    undo()
    assert [n for n, _ in it.named_parameters()] == [n for n, _ in model().named_parameters()]
    assert all(p.requires_grad and p.is_floating_point() for p in it.parameters())
    torch.testing.assert_close(it(**BATCH).logits, adapted, rtol=1e-4, atol=1e-4)


def test_weights_that_are_trained_are_refused_with_what_to_do():
    it = model()
    with pytest.raises(StackError, match=r'14 of its 14 .*allow=\["lora", "quantized_base"\]'):
        CODES.apply(it, CODES.configure())
    assert not any(map(is_coded, it.modules()))
    assert not takes(it, [Way("quantized_base")])


def test_weights_that_are_trained_stay_as_they_are_beside_frozen_ones():
    it = model()
    for layer in it.model.layers:
        layer.self_attn.requires_grad_(False)
    CODES.apply(it, CODES.configure())
    for layer in it.model.layers:
        assert all(is_coded(m) for m in layer.self_attn.children() if isinstance(m, nn.Linear))
        assert not any(map(is_coded, layer.mlp.modules()))
    losses = learned(it)
    assert losses[-1] < losses[0]


def test_it_is_applied_once_and_not_beside_a_base_in_codes():
    it = model()
    undo = apply_ways(it, [Way("lora", {"base": "int8"})], ())
    with pytest.raises(StackError, match="in codes already"):
        CODES.apply(it, CODES.configure())
    undo()


def test_plans_use_both_and_keep_their_promise():
    it = model()
    assert "quantized_base" not in {m.name for m in allowed("unbiased")}
    plans = planner(
        it, BATCH, optimizer=adamw, allow=["lora", "quantized_base", "recompute"], seconds=False
    )
    floats = planner(it, BATCH, optimizer=adamw, allow=["recompute"], seconds=False)
    plan = plans(plans.smallest_bytes)
    assert plan.peak_bytes < 0.6 * floats.smallest_bytes
    plan.apply(it)
    optimizer = plan.optimizer(it)

    def step():
        it(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    assert plan.verify(step).error == pytest.approx(0, abs=1e-6)
    plan.restore(it)
    assert all(p.requires_grad and p.is_floating_point() for p in it.parameters())
    assert [*it.state_dict()] == [*model().state_dict()]


@pytest.mark.parametrize("base", BASES)
def test_it_is_offered_beside_adapters_and_not_twice(base):
    methods = allowed(["lora", "quantized_base"])
    offered = patches_for(model(), methods, adamw, keeps_gradients=False)
    found = [{w.method: w.config.get("base") for w in patches} for patches in offered]
    assert found.count({"quantized_base": base, "lora": None}) == 1
    assert {"quantized_base": base} not in found  # nothing is frozen then
    assert {"lora": None} in found


def test_the_optimizer_of_adapters_is_timed_on_them(monkeypatch):
    timed = []
    original = Timer.optimizer

    def noting(self, base, ways=()):
        timed.append(sum(p.numel() for p in base.model.parameters() if p.requires_grad))
        return original(self, base, ways)

    monkeypatch.setattr(Timer, "optimizer", noting)
    it = model()
    planner(it, BATCH, optimizer=adamw, allow=["lora"])(1 << 30)
    adapted = model()
    apply_ways(adapted, [Way("lora")], ())
    counts = {sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (it, adapted)}
    assert {*timed} == counts


@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_of_several_kinds_are_timed(frozen):
    it = model()
    narrow = copy.deepcopy(it.config)
    narrow.intermediate_size = 160
    it.model.layers[1].mlp = type(it)(narrow).model.layers[0].mlp
    if frozen:
        it.model.layers.requires_grad_(False)
    allow = ["quantized_base"] if frozen else ["lora", "quantized_base"]
    plan = planner(it, BATCH, optimizer=adamw, allow=allow)("2 GiB")
    assert plan.step_seconds > 0


@pytest.mark.parametrize("base", ["fp4", "", None])
def test_a_base_that_cannot_be_is_refused(base):
    with pytest.raises(ConfigError, match="expected one of"):
        CODES.configure({"base": base})
