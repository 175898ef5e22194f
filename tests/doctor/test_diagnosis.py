"""What the doctor sees: instants, parts, blocks, tensors, leaks, and work that ends early."""

import json

import pytest
import torch
from torch import nn

import shoestring
from doctor import patients
from shoestring import Doctor, Meter
from shoestring.doctor import Diagnosis
from shoestring.errors import ConfigError


def examined(step, model=None, optimizer=None, times=1, **settings):
    with Doctor(model, optimizer, **settings) as doctor:
        for _ in range(times):
            step()
    return doctor.diagnosis


def plain(**settings):
    torch.manual_seed(0)
    model = patients.Plain(**settings)
    optimizer = patients.adamw(model)
    return model, optimizer, patients.loop_loss(model, optimizer, patients.ids(2, 64, 96))


def hugging():
    model = patients.llama()
    optimizer = patients.adamw(model)
    return model, optimizer, patients.own_loss(model, optimizer, patients.ids(2, 32, 96))


@pytest.mark.parametrize("make", [plain, hugging])
def test_parts_blocks_and_instant_agree_with_the_meter_to_the_byte(make):
    model, optimizer, step = make()
    step()
    with Meter(model, optimizer) as meter:
        step()
    found = examined(step, model, optimizer)
    assert found.peak_bytes == meter.peak_bytes == sum(found.parts.values())
    assert found.instant == meter.instant
    assert found.baseline_bytes == meter.baseline_bytes
    assert found.end_bytes == meter.end_bytes
    for name in ("weights", "gradients", "optimizer"):
        assert found.parts[name] == meter.by_category[name]
    saved = sum(row["retained_bytes"] for row in (*found.blocks, *found.outside))
    assert saved == found.retained_bytes == meter.retained_bytes
    assert len({row["retained_bytes"] for row in found.blocks[:-1]}) == 1
    assert found.blocks[0]["retained_bytes"] > 0


def test_phases_are_there_highest_first_and_the_winner_is_the_peak():
    model, optimizer, step = plain()
    found = examined(step, model, optimizer, times=2)
    names = [row["phase"] for row in found.phases]
    peaks = [row["peak_bytes"] for row in found.phases]
    assert {"forward", "loss", "loss backward", "backward", "optimizer step"} <= {*names}
    assert peaks == sorted(peaks, reverse=True)
    assert (names[0], peaks[0]) == (found.instant, found.peak_bytes)
    assert found.steps == 2


def test_model_and_optimizer_are_found_when_they_run():
    model, optimizer, step = plain()
    step()
    given, alone = examined(step, model, optimizer), examined(step)
    assert (alone.model, alone.peak_bytes) == ("Plain", given.peak_bytes)
    assert alone.parts == given.parts
    assert alone.blocks == given.blocks


def test_the_largest_tensors_tell_what_made_them():
    model, optimizer, _ = plain()
    step = patients.loop_loss(model, optimizer, patients.ids(4, 128, 96))
    found = examined(step, model, optimizer)
    up = next(row for row in found.largest if row["shape"] == [512, 256])
    assert (up["operator"], up["module"], up["category"]) == ("addmm", "blocks.0.up", "saved")
    assert up["count"] == 6
    weight = next(row for row in found.largest if row["category"] == "weights")
    assert weight["name"] == "blocks.0.up.weight"


def test_the_backward_belongs_to_the_module_of_its_forward():
    with Doctor(*plain()[:1]) as doctor:
        model = doctor.watch.model
        patients.loop_loss(model, patients.adamw(model), patients.ids(2, 64, 96))()
    made = {(life.operator, life.module) for life in doctor.watch.lives}
    assert {("gelu_backward", "blocks.3"), ("mm", "blocks.3.down"), ("mm", "head")} <= made


def test_a_model_without_a_stack_is_told_so():
    model = patients.Stackless()

    def step():
        model(torch.randn(4, 16)).square().mean().backward()

    found = examined(step, model)
    assert found.blocks is None
    assert "no stack of blocks" in found.blocks_message
    assert "saved by block: not known" in str(found)
    assert found.outside
    assert found.steps == 0


def failing(model, optimizer, tokens, fail):
    loss = model(input_ids=tokens, labels=tokens).loss
    fail()
    loss.backward()


def test_an_allocation_that_fails_is_told_with_what_was_there_until_then():
    model, optimizer, step = hugging()
    with pytest.raises(RuntimeError, match="allocate"), Doctor(model, optimizer) as doctor:
        failing(model, optimizer, patients.ids(2, 32, 96), lambda: torch.empty(1 << 52))
    found = doctor.diagnosis
    assert found.failure["asked_bytes"] == 4 << 52
    assert found.failure["operator"] == "empty"
    assert found.failure["phase"] == "loss"
    assert found.failure["live_bytes"] > found.parts["weights"] > 0
    assert found.parts["saved"] + found.parts["logits"] > 0
    # The rest of the step is known from its simulation.
    assert found.step_bytes > found.peak_bytes
    step()
    with Meter(model, optimizer) as meter:
        step()
    assert found.step_bytes == pytest.approx(meter.peak_bytes, rel=0.03)
    assert "asking for" in str(found).splitlines()[0]


def test_memory_that_runs_out_in_the_first_forward_is_told_with_module_and_call():
    class Hungry(nn.Module):
        def forward(self, x):
            torch.empty(1 << 52)
            return x

    model = patients.llama()
    model.model.layers[2].mlp.act_fn = Hungry()
    tokens = patients.ids(2, 32, 96)
    with pytest.raises(RuntimeError), Doctor() as doctor:
        model(input_ids=tokens, labels=tokens)
    found = doctor.diagnosis
    assert found.failure["module"] == "model.layers.2.mlp.act_fn"
    assert found.parts["weights"] == sum(p.nbytes for p in model.parameters()) + sum(
        b.nbytes for b in model.buffers()
    )
    assert found.step_bytes > 4 << 52  # fake tensors take nothing, so the step comes to its end


@pytest.mark.parametrize("error", [MemoryError("no more"), KeyboardInterrupt()])
def test_any_exception_goes_on_and_everything_is_put_back(error):
    call = nn.Module.__call__

    def step():
        patients.Stackless()(torch.randn(4, 16))
        raise error

    with pytest.raises(type(error)), Doctor() as doctor:
        step()
    assert nn.Module.__call__ is call
    assert doctor.diagnosis.failure["kind"] == type(error).__name__
    assert shoestring.meter.active_tracker() is None


# ---- leaks -------------------------------------------------------------------------------------


def leaky(keep, steps=4):
    model, optimizer, _ = plain()
    tokens, kept = patients.ids(2, 64, 96), []
    with Doctor(model, optimizer) as doctor:
        for _ in range(steps):
            logits = model(tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            kept.append(keep(loss, logits))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return doctor.diagnosis


def test_a_leak_is_found_with_its_size_and_its_maker():
    found = leaky(lambda loss, logits: logits)
    assert found.leak["bytes_per_step"] == 2 * 64 * 96 * 4
    assert found.leak["tensors"][0]["module"] == "head"
    advice = found.advice[0]
    assert (advice.name, advice.saving_bytes) == ("leak", 2 * 64 * 96 * 4)
    assert "every step left 48.0 KiB behind (seen over 4 steps)" in str(found)


@pytest.mark.parametrize(
    "keep", [lambda loss, logits: loss.item(), lambda loss, logits: loss.detach()]
)
def test_a_healthy_run_gets_no_leak_claim(keep):
    found = leaky(keep)
    assert found.leak is None
    assert "leak" not in {advice.name for advice in found.advice}


def test_what_is_made_once_or_replaced_is_no_leak():
    model, optimizer, step = plain()
    mean = {}
    with Doctor(model, optimizer) as doctor:
        for _ in range(3):
            step()
            for name, p in model.named_parameters():
                p = p.detach()
                mean[name] = p * 0.1 + mean.get(name, p) * 0.9
    assert doctor.diagnosis.leak is None


def test_one_step_is_too_few_for_a_leak():
    assert leaky(lambda loss, logits: logits, steps=1).leak is None


# ---- the object --------------------------------------------------------------------------------


def test_a_diagnosis_is_json_and_comes_back_equal():
    model, optimizer, step = hugging()
    found = examined(step, model, optimizer, times=2)
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Diagnosis.from_json(json.loads(text))
    assert again == found
    assert str(again) == str(found)
    with pytest.raises(ConfigError, match="format 9"):
        Diagnosis.from_json({"format": 9})


def test_warm_up_lets_steps_pass():
    model, optimizer, step = plain()
    passed = examined(step, times=3, warm_up=1)
    given = examined(step, model, optimizer, times=2)
    assert passed.steps == 2
    assert passed.peak_bytes == pytest.approx(given.peak_bytes, rel=0.01)
    assert passed.blocks == given.blocks
    assert examined(step, times=1, warm_up=1).steps == 1  # there was nothing after it


def test_misuse_is_told():
    with pytest.raises(ConfigError, match="model is a int"):
        Doctor(3)
    doctor = Doctor()
    with pytest.raises(ConfigError, match="seen nothing yet"):
        _ = doctor.diagnosis
    with doctor, pytest.raises(ConfigError, match="watching already"), doctor:
        pass


def test_a_doctor_can_be_used_again():
    model, optimizer, step = plain()
    doctor = Doctor(model, optimizer)
    with doctor:
        step()
    first = doctor.diagnosis
    with doctor:
        step()
        step()
    assert (first.steps, doctor.diagnosis.steps) == (1, 2)


def test_allocator_facts_are_there():
    model, optimizer, step = plain()
    found = examined(step, model, optimizer).allocator
    assert isinstance(found["tuned"], bool)
    assert found["explanation"]
    if found["rss_peak_bytes"] is not None:
        assert found["rss_peak_bytes"] >= found["rss_start_bytes"] > 0
