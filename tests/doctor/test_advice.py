"""What the doctor prescribes: the winner's cure, with a saving that comes true when applied."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from doctor import patients
from shoestring import Doctor, Meter, Span, Stack
from shoestring.methods import apply_spans, method
from shoestring.ops.chunked_loss import linear_cross_entropy

CLOSE = 0.03


def examined(step, model, optimizer, times=1, **settings):
    step()  # the optimizer's states appear in the first
    with Doctor(model, optimizer, **settings) as doctor:
        for _ in range(times):
            step()
    return doctor.diagnosis


def measured(step, model, optimizer, times=1):
    step()
    with Meter(model, optimizer) as meter:
        for _ in range(times):
            step()
    return meter.peak_bytes


def advice_of(found, name):
    named = {advice.name: advice for advice in found.advice}
    assert name in named, f"{[*named]}, {found.notes}"
    return named[name]


def test_a_loss_that_wins_gets_chunks_and_they_save_what_was_said():
    tokens = patients.ids(2, 256, 8192)
    model = patients.llama(vocabulary=8192, layers=2)
    optimizer = patients.adamw(model)
    step = patients.own_loss(model, optimizer, tokens)
    found = examined(step, model, optimizer)
    assert found.instant == "loss backward"
    assert max(found.parts, key=found.parts.get) == "logits"
    advice = advice_of(found, "chunked_loss")
    assert found.advice[0] is advice
    how = method("chunked_loss")
    how.apply(model, how.configure())
    after = measured(step, model, optimizer)
    saved = found.peak_bytes - after
    assert advice.saving_bytes == pytest.approx(saved, rel=CLOSE)
    assert saved > found.peak_bytes / 4
    assert advice.peak_bytes == pytest.approx(after, rel=CLOSE)


def test_a_loss_of_the_loop_that_wins_gets_the_function_and_it_saves_at_least_that():
    torch.manual_seed(0)
    model, ids = patients.Plain(vocabulary=8192, blocks=2), patients.ids(2, 512, 8192)
    optimizer = patients.adamw(model)
    found = examined(patients.loop_loss(model, optimizer, ids), model, optimizer)
    assert found.instant == "loss backward"
    advice = advice_of(found, "linear_cross_entropy")
    assert found.advice[0] is advice

    def step():
        hidden = model.embed(ids)
        for block in model.blocks:
            hidden = block(hidden)
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.head.weight, ids.flatten())
        del hidden
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    saved = found.peak_bytes - measured(step, model, optimizer)
    assert advice.saving_bytes <= saved
    assert advice.saving_bytes == pytest.approx(saved, rel=CLOSE)


@pytest.mark.parametrize("has_own_loss", [True, False])
def test_an_optimizer_that_wins_gets_fused_and_it_saves_what_was_said(has_own_loss):
    tokens = patients.ids(1, 4, 96)
    if has_own_loss:
        model, loop = patients.llama(width=64), patients.own_loss
    else:
        model, loop = patients.Plain(), patients.loop_loss
    optimizer = patients.adamw(model, foreach=True)
    found = examined(loop(model, optimizer, tokens), model, optimizer)
    assert found.instant == "optimizer step"
    advice = advice_of(found, "fused")
    assert found.advice[0] is advice
    assert "recompute" not in {each.name for each in found.advice}
    fused = patients.adamw(model, fused=True)
    saved = found.peak_bytes - measured(loop(model, fused, tokens), model, fused)
    assert advice.saving_bytes == pytest.approx(saved, rel=CLOSE)
    assert saved > found.peak_bytes / 10


@pytest.mark.parametrize("has_own_loss", [True, False])
def test_activations_that_win_get_early_blocks_run_again(has_own_loss):
    tokens = patients.ids(4, 128, 96)
    if has_own_loss:
        model, loop = patients.llama(layers=6), patients.own_loss
    else:
        model, loop = patients.Plain(), patients.loop_loss
    optimizer = patients.adamw(model)
    step = loop(model, optimizer, tokens)
    found = examined(step, model, optimizer)
    assert max(found.parts, key=found.parts.get) == "saved"
    advice = advice_of(found, "recompute")
    assert advice.basis == ("simulated" if has_own_loss else "measured")
    count = int(advice.cost.split()[0])
    assert 0 < count < 6  # the last block is worth nothing
    apply_spans(Stack.of(model), [Span(0, count, "recompute")])
    after = measured(step, model, optimizer)
    saved = found.peak_bytes - after
    assert advice.saving_bytes == pytest.approx(saved, rel=CLOSE)
    assert saved > found.peak_bytes / 3


def test_a_loss_of_the_loop_can_be_told_and_is_then_simulated():
    torch.manual_seed(0)
    model, tokens = patients.Plain(), patients.ids(4, 128, 96)
    optimizer = patients.adamw(model)

    def loss(model, batch):
        return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["ids"].flatten())

    found = examined(
        patients.loop_loss(model, optimizer, tokens), model, optimizer,
        batch={"ids": tokens}, loss=loss,
    )  # fmt: skip
    assert advice_of(found, "recompute").basis == "simulated"
    assert found.step_bytes == pytest.approx(found.peak_bytes, rel=CLOSE)
    assert not found.notes


@pytest.mark.parametrize("has_own_loss", [True, False])
def test_gradients_that_live_through_the_forward_are_told(has_own_loss):
    tokens = patients.ids(2, 64, 96)
    if has_own_loss:
        model, loop = patients.llama(width=64), patients.own_loss
    else:
        model, loop = patients.Plain(), patients.loop_loss
    optimizer = patients.adamw(model)
    found = examined(loop(model, optimizer, tokens, none=False), model, optimizer)
    advice = advice_of(found, "set_to_none")
    assert found.advice[0] is advice
    optimizer.zero_grad()
    after = measured(loop(model, optimizer, tokens), model, optimizer)
    assert advice.saving_bytes == pytest.approx(found.peak_bytes - after, rel=CLOSE)
    clean = examined(loop(model, optimizer, tokens), model, optimizer)
    assert "set_to_none" not in {each.name for each in clean.advice}


def test_an_output_that_is_held_is_told():
    tokens = patients.ids(2, 128, 2048)
    model = patients.llama(vocabulary=2048, layers=2)
    optimizer = patients.adamw(model)

    def step():
        out = model(input_ids=tokens, labels=tokens)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = examined(step, model, optimizer)
    advice = advice_of(found, "output")
    after = measured(patients.own_loss(model, optimizer, tokens), model, optimizer)
    assert advice.saving_bytes == pytest.approx(found.peak_bytes - after, rel=CLOSE)
    let_go = examined(patients.own_loss(model, optimizer, tokens), model, optimizer)
    assert "output" not in {each.name for each in let_go.advice}


@pytest.mark.parametrize("careful", [True, False])
def test_evaluation_with_gradients_on_is_told(careful):
    tokens = patients.ids(2, 128, 96)
    model = patients.llama()
    optimizer = patients.adamw(model)
    train = patients.own_loss(model, optimizer, tokens)

    def step():
        train()
        model.eval()
        with torch.set_grad_enabled(not careful):
            value = model(input_ids=tokens, labels=tokens).loss.item()
        model.train()
        return value

    found = examined(step, model, optimizer)
    assert "evaluation" in {row["phase"] for row in found.phases}
    assert ("no_grad" in {each.name for each in found.advice}) is not careful
    if not careful:
        advice = advice_of(found, "no_grad")
        with Meter(model) as meter:
            model.eval()
            loss = model(input_ids=tokens, labels=tokens).loss
        assert loss.grad_fn is not None
        # Held by autograd at the end of the forward; logits and loss are the caller's own.
        assert 0 < advice.saving_bytes <= meter.retained_bytes


def test_what_a_cache_costs_is_told_where_it_is_held():
    tokens = patients.ids(4, 256, 96)
    model = patients.llama()
    model.config.use_cache = True
    optimizer = patients.adamw(model)
    outputs = []

    def step():
        outputs[:] = [model(input_ids=tokens, labels=tokens)]
        outputs[0].loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # Two steps: the cache of the first is there in the forward of the second.
    found = examined(step, model, optimizer, times=2)
    advice = advice_of(found, "use_cache")
    model.config.use_cache = False
    after = measured(step, model, optimizer, times=2)
    assert advice.saving_bytes == pytest.approx(found.peak_bytes - after, rel=CLOSE)


def test_two_passes_save_what_was_said():
    tokens = patients.ids(4, 128, 96)
    model = patients.llama()
    optimizer = patients.adamw(model)
    found = examined(patients.own_loss(model, optimizer, tokens), model, optimizer)
    advice = advice_of(found, "accumulate")

    def step():
        for half in tokens.split(2):
            (model(input_ids=half, labels=half).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    after = measured(step, model, optimizer)
    assert advice.saving_bytes == pytest.approx(found.peak_bytes - after, rel=CLOSE)


def test_states_are_told_by_their_bytes():
    model = patients.llama(width=64)
    optimizer = patients.adamw(model)
    found = examined(patients.own_loss(model, optimizer, patients.ids(1, 8, 96)), model, optimizer)
    advice = advice_of(found, "bf16_states")
    assert advice.saving_bytes == pytest.approx(found.parts["optimizer"] / 2, rel=CLOSE)


def test_every_advice_has_a_number_and_a_way_and_all_together_are_tried():
    tokens = patients.ids(4, 128, 2048)
    model = patients.llama(vocabulary=2048)
    optimizer = patients.adamw(model)
    found = examined(patients.own_loss(model, optimizer, tokens), model, optimizer)
    assert len(found.advice) > 2
    for advice in found.advice:
        assert advice.saving_bytes * 100 >= found.peak_bytes
        assert advice.how
        assert advice.cost
        assert advice.basis in ("simulated", "measured")
    least = min(each.peak_bytes for each in found.advice if each.basis == "simulated")
    assert found.together_bytes < least
    assert json.loads(json.dumps(found.to_json()))["advice"]


def test_blocks_that_a_plan_runs_get_no_advice_about_them():
    tokens = patients.ids(4, 128, 96)
    model = patients.llama()
    apply_spans(Stack.of(model), [Span(0, 3, "recompute")])
    optimizer = patients.adamw(model)
    found = examined(patients.own_loss(model, optimizer, tokens), model, optimizer)
    assert "recompute" not in {each.name for each in found.advice}
    assert any("already" in note for note in found.notes)
    assert len(found.blocks) == 4
    assert found.blocks[0]["retained_bytes"] < found.blocks[3]["retained_bytes"] / 4


def test_a_model_that_cannot_be_simulated_is_diagnosed_all_the_same():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

        def forward(self, x, labels=None):
            for layer in self.layers:
                x = layer(x).relu()
            return x.square().mean() if x.sum().item() > 0 else x.mean()

    torch.manual_seed(0)
    model = Branching()
    optimizer = patients.adamw(model)

    def step():
        model(torch.randn(256, 32)).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = examined(step, model, optimizer)
    assert found.step_bytes is None
    assert any("decides by the values" in note for note in found.notes)
    assert found.peak_bytes == sum(found.parts.values())
