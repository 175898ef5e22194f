"""Memory, disk and numbers that run out in the middle of a run. Nothing here is a mock: limits,
mounts and not-a-numbers are real."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from shoestring.checkpoint import Store
from shoestring.errors import CheckpointError, StreamOverflow, TrainingDiverged
from shoestring.training.loop import resume, train

from .test_resume import CutError, assert_same_run, cut_at, lines, state
from .victims import Victim

MIB = 1 << 20
# About 190 MiB in a step and half of that in one that is split; an evaluation takes 30.
BIG = {
    "model": {"rule": "residual", "hidden_size": 64, "num_hidden_layers": 4, "dropout": 0.0},
    "data": {"sequence_length": 128, "batch_size": 48},
    "optim": {"accumulate": 1},
    "run": {"steps": 3},
    "checkpoint": {"every": 1},
    "evaluate": {"every": 0, "batches": 1},
}


# ---- memory ------------------------------------------------------------------------------------


def test_a_step_without_memory_is_split_and_the_run_goes_on(settings, tmp_path):
    victim = Victim("train", settings(**BIG), tmp_path / "log", "little_memory", 150 * MIB)
    assert victim.wait() == 0, victim.text()
    (told,) = victim.events("out of memory")
    assert (told["step"], told["split"]) == (1, 2)
    assert told["held"]["weights"] > 0
    train(settings(tmp_path / "whole", **BIG))
    starved, whole = lines(tmp_path / "run"), lines(tmp_path / "whole")
    for mine, other in zip(starved, whole, strict=True):
        # the effective batch is the same; only the order of sums is another
        if mine["event"] == "step":
            assert mine["tokens"] == other["tokens"]
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert mine["norm"] == pytest.approx(other["norm"], rel=1e-4)


def test_a_second_time_without_memory_stops_with_a_report_and_nothing_lost(settings, tmp_path):
    config = settings(**{**BIG, "run": {"steps": 6}})
    fate = ("little_memory", 40 * MIB, 2, 8 * MIB)  # half of the step takes 95
    victim = Victim("train", config, tmp_path / "log", *fate)
    assert victim.wait() == 3, victim.text()
    (error,) = victim.events("error")
    assert "step 3: the system had no more memory" in error["message"]
    assert "weights" in error["message"]
    assert "optimizer" in error["message"]
    saved, _ = Store(tmp_path / "run" / "checkpoints").newest()
    assert saved.step == 2
    assert not (tmp_path / "run" / "model").exists()  # who writes it dies without memory
    assert resume(tmp_path / "run", steps=3).receipt["steps"] == 3
    assert (tmp_path / "run" / "model").is_dir()


# Weights of 12 MiB in tensors that the allocator maps one by one, and little else.
WIDE = {
    **BIG,
    "model": {**BIG["model"], "hidden_size": 256, "dropout": 0.1},
    "data": {"sequence_length": 32, "batch_size": 4},
    "run": {"steps": 5},
}
# The same updates when their microbatches are cut in half.
HALVED = {
    **WIDE,
    "data": {"sequence_length": 32, "batch_size": 2},
    "optim": {"accumulate": 2},
    "evaluate": {"every": 0, "batches": 2},
}


def assert_same_learning(a: Path, b: Path) -> None:
    """The same weights, states, losses and norms by `torch.equal`, in however much memory."""
    mine, other = state(a), state(b)
    assert mine.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    assert len(lines(a)) == len(lines(b))
    for one, two in zip(lines(a), lines(b), strict=True):
        assert (one["event"], one["step"]) == (two["event"], two["step"])
        if one["event"] == "step":
            assert (one["loss"], one["norm"]) == (two["loss"], two["norm"])
        else:  # scored in other batches, so summed in another order
            assert one["nats_per_token"] == pytest.approx(two["nats_per_token"], rel=1e-6)


def test_without_memory_for_the_first_update_a_run_begins_again_and_is_split(settings, tmp_path):
    fate = ("starved_optimizer", 1, False)
    victim = Victim("train", settings(**WIDE), tmp_path / "log", *fate)
    assert victim.wait() == 0, victim.text()
    (told,) = victim.events("out of memory")
    assert (told["step"], told["split"], told["back_to"]) == (1, 2, 0)
    train(settings(tmp_path / "whole", **HALVED))
    assert_same_learning(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("every", [1, 2])
def test_a_half_made_update_goes_back_to_the_checkpoint_as_a_resume_would(
    settings, tmp_path, every
):
    # saved after step 2; with every=2 step 3 is lost as well, and made again
    wide = {**WIDE, "checkpoint": {"every": every}, "evaluate": {"every": 2, "batches": 1}}
    halved = {**HALVED, "evaluate": {"every": 2, "batches": 2}}
    failing = 3 if every == 1 else 4
    fate = ("starved_optimizer", failing, True)
    victim = Victim("train", settings(**wide), tmp_path / "log", *fate)
    assert victim.wait() == 0, victim.text()
    (told,) = victim.events("out of memory")
    assert (told["step"], told["back_to"]) == (failing, 2)
    with pytest.raises(CutError):
        train(settings(tmp_path / "fresh", **wide), progress=cut_at(3))
    text = settings(tmp_path / "fresh", **halved).to_toml()
    (tmp_path / "fresh" / "config.toml").write_text(text)
    resume(tmp_path / "fresh")
    assert_same_learning(tmp_path / "fresh", tmp_path / "run")


def test_a_second_half_made_update_stops_with_what_holds_the_memory(settings, tmp_path):
    fate = ("starved_optimizer", 3, True, 2)
    victim = Victim("train", settings(**WIDE), tmp_path / "log", *fate)
    assert victim.wait() == 3, victim.text()
    assert len(victim.events("out of memory")) == 1
    (error,) = victim.events("error")
    assert "the optimizer's part of step 3: the system had no more memory" in error["message"]
    assert "though it was split already" in error["message"]
    assert re.search(r"weights 12\.\d MiB, optimizer 25\.\d MiB", error["message"])
    saved, wrong = Store(tmp_path / "run" / "checkpoints").newest()
    assert (saved.step, wrong) == (2, [])
    assert resume(tmp_path / "run").receipt["steps"] == 5


@pytest.fixture
def third_update_fails():
    """Once, after the weights are new: there never was that much memory."""
    calls = iter(range(1, 1000))
    hook = register_optimizer_step_post_hook(
        lambda *arguments: bytearray(1 << 62) if next(calls) == 3 else None
    )
    yield
    hook.remove()


@pytest.mark.usefixtures("third_update_fails")
def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(settings, tmp_path):
    seen: dict[str, dict[str, Any]] = {}

    def damage(event: dict[str, Any]) -> None:
        seen[event["event"]] = event
        is_second = event["event"] == "checkpoint" and event["step"] == 2
        if is_second and "resumed" not in seen:
            (Path(event["path"]) / "model.safetensors").write_bytes(b"")

    train(settings(), progress=damage)
    assert "model.safetensors has 0 bytes" in seen["checkpoint passed over"]["message"]
    assert seen["out of memory"]["back_to"] == 1
    assert (tmp_path / "run" / "checkpoints" / "damaged-step-2").is_dir()
    steps = [line["step"] for line in lines(tmp_path / "run") if line["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("third_update_fails")
def test_without_its_checkpoints_a_half_made_run_is_not_begun_again_in_silence(settings):
    def lose(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 2:
            shutil.rmtree(Path(event["path"]).parent)

    with pytest.raises(CheckpointError, match=r"checkpoints of .* are gone"):
        train(settings(), progress=lose)


# ---- disk --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_disk")
@pytest.mark.parametrize(
    "seed", [0, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 5, 6, 7))]
)
def test_a_disk_that_fills_up_leaves_a_checkpoint_that_verifies(settings, tmp_path, seed):
    config = settings(run={"steps": 30}, evaluate={"every": 10})
    victim = Victim("train", config, tmp_path / "log", "full_disk", 3 * MIB, seed)
    code = victim.wait()
    (left,) = victim.events("left")
    assert left["wrong"] == []
    acknowledged = [event["step"] for event in victim.events("checkpoint")]
    assert left["step"] == max(acknowledged, default=0)
    if code:
        (error,) = victim.events("error")
        assert code == 1
        assert "o room to write" in error["message"] or "No space left" in error["message"]


@pytest.mark.usefixtures("own_disk")
def test_a_directory_that_cannot_be_written_is_named_before_anything_is_made(settings, tmp_path):
    train(settings(run={"steps": 1}))
    for action in ("train", "resume"):
        victim = Victim(action, settings(run={"steps": 2}), tmp_path / "log", "read_only")
        assert victim.wait() == 1, victim.text()
        (error,) = victim.events("error")
        assert "Read-only file system" in error["message"]
        assert not victim.events("model")


# ---- numbers -----------------------------------------------------------------------------------


def test_a_weight_that_is_no_number_stops_before_the_update_and_is_named(settings, tmp_path):
    victim = Victim("train", settings(), tmp_path / "log", "poison", 3, "weight", 1)
    assert victim.wait() == 1
    (error,) = victim.events("error")
    assert error["kind"] == "TrainingDiverged"
    assert "step 3: the loss is nan" in error["message"]
    assert "embed_tokens.weight already held a number that is not finite" in error["message"]
    saved, _ = Store(tmp_path / "run" / "checkpoints").newest()
    assert saved.step == 1  # that of step 2 would have held it


def test_a_step_that_failed_is_made_with_its_own_data_after_a_resume(settings, tmp_path):
    train(settings(tmp_path / "whole"))
    config = settings(checkpoint={"every": 0})
    victim = Victim("train", config, tmp_path / "log", "poison", 4, "loss", 1)
    assert victim.wait() == 1
    (checkpoint,) = victim.events("checkpoint")
    assert checkpoint["step"] == 3
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_state_with_a_bad_weight_pushes_no_good_one_out(settings, tmp_path):
    config = settings(checkpoint={"every": 2, "keep": 1})
    victim = Victim("train", config, tmp_path / "log", "poison", 4, "weight", 1)
    assert victim.wait() == 1
    (failed,) = victim.events("checkpoint failed")
    assert "embed_tokens.weight is not finite" in failed["message"]
    saved, _ = Store(tmp_path / "run" / "checkpoints").newest()
    assert saved.step == 2
    assert resume(tmp_path / "run").receipt["steps"] == 6


def test_a_loss_that_is_no_number_can_be_skipped(settings, tmp_path):
    config = settings(run={"nonfinite": "skip"})
    victim = Victim("train", config, tmp_path / "log", "poison", 2, "loss", 2)
    assert victim.wait() == 0, victim.text()
    assert [event["step"] for event in victim.events("skipped")] == [2, 3]
    assert [event["step"] for event in victim.events("step")] == [1, 4, 5, 6]
    saved, _ = Store(tmp_path / "run" / "checkpoints").newest()
    for _, tensor in saved.tensors("model.safetensors"):
        assert torch.isfinite(tensor.float()).all()


def test_ten_skips_in_a_row_stop_all_the_same(settings, tmp_path):
    config = settings(run={"nonfinite": "skip", "steps": 30}, checkpoint={"every": 0})
    victim = Victim("train", config, tmp_path / "log", "poison", 3, "loss", 100)
    assert victim.wait() == 1
    assert len(victim.events("skipped")) == 10
    assert "step 13" in victim.events("error")[0]["message"]


def test_a_step_over_its_budget_saves_what_it_made(settings, tmp_path):
    from shoestring.errors import OutOfBudget
    from shoestring.planner import Plan

    config = settings(
        run={"budget": "24MiB"},
        model={"rule": "residual", "dropout": 0.0},
        plan={"only": ("keep",)},
    )
    train(config)
    text = (tmp_path / "run" / "plan.json").read_text()
    plan = json.loads(text)
    # a plan that promises half of what it takes: a budget is then broken
    plan["peak_bytes"] //= 2
    plan["budget_bytes"] = plan["peak_bytes"] + 1000
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    Plan.from_json(file.read_text())
    config = settings(
        run={"budget": f"{plan['budget_bytes']}B", "replace": True},
        model={"rule": "residual", "dropout": 0.0}, plan={"file": str(file)},
    )  # fmt: skip
    with pytest.raises(OutOfBudget, match="peaked at"):
        train(config)
    saved, _ = Store(tmp_path / "run" / "checkpoints").newest()
    assert saved.step == 1
    assert json.loads((Path(saved.path) / "state.json").read_text())["step"] == 1


def test_divergence_keeps_the_run_resumable(settings, tmp_path):
    config = settings(optim={"lr": 1e9, "grad_clip": 0.0}, run={"steps": 50})
    with pytest.raises((TrainingDiverged, StreamOverflow)):
        train(config)
    saved, wrong = Store(tmp_path / "run" / "checkpoints").newest()
    assert saved is not None
    assert not wrong
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert receipt["status"] == "diverged"
