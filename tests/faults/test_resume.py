"""A run that was stopped and goes on is the run that was not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shoestring.checkpoint import Store
from shoestring.errors import CheckpointError, ConfigError, DataError, OutOfBudget
from shoestring.training.loop import resume, train
from shoestring.training.snapshot import MODEL, OPTIMIZER

from .conftest import TEXT
from .victims import Victim, small

CLOCKS = ("seconds", "tokens_per_s")


class CutError(Exception):
    """The power goes."""


def cut_at(step: int, event: str = "step"):
    def progress(told: dict[str, Any]) -> None:
        if told["event"] == event and told["step"] == step:
            raise CutError

    return progress


def lines(directory: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of steps and evaluations, clocks left out."""
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if name not in CLOCKS}
        for line in found
        if line["event"] in ("step", "evaluation", "skipped")
    ]


def state(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of the newest checkpoint."""
    saved, wrong = Store(directory / "checkpoints").newest()
    assert saved is not None
    assert not wrong
    return {
        f"{file}:{name}": tensor
        for file in (MODEL, OPTIMIZER)
        for name, tensor in load_file(saved.path / file).items()
    }


def assert_same_run(a: Path, b: Path) -> None:
    mine, other = state(a), state(b)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name
    assert lines(a) == lines(b)


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory, cache) -> Path:
    """A run whose power went in step 3, and its checkpoint of step 2."""
    directory = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOESTRING_CACHE", str(cache))
        with pytest.raises(CutError):
            train(small(directory, TEXT), progress=cut_at(3))
    return directory


@pytest.fixture
def broken(cut_off, tmp_path) -> Path:
    """A copy of it, to do with as one likes."""
    return shutil.copytree(cut_off, tmp_path / "run")


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"rule": "residual"}, "precision": {"compute": "bf16"}},
        {
            "model": {"rule": "feistel"},
            "run": {"budget": "24MiB"},
            "plan": {"only": ("reversible",)},
        },
        {"model": {"rule": "bdia"}, "checkpoint": {"every": 2, "background": True}},
        {"model": {"rule": "random_sign"}, "checkpoint": {"every": 3}},
    ],
    ids=lambda sections: json.dumps(sections)[1:-1],
)
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(settings, tmp_path, sections):
    sections = {"model": {}, **sections}
    sections["model"] = {"dropout": 0.1, **sections["model"]}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(settings(whole, **sections))
    with pytest.raises(CutError):
        train(settings(broken, **sections), progress=cut_at(3))
    with pytest.raises(CutError):
        resume(broken, progress=cut_at(5))
    run = resume(broken)
    assert (run.receipt["status"], run.receipt["steps"]) == ("finished", 6)
    assert_same_run(whole, broken)


def test_a_run_directory_can_be_moved_and_renamed(settings, tmp_path):
    train(settings(tmp_path / "whole"))
    with pytest.raises(CutError):
        train(settings(tmp_path / "before"), progress=cut_at(3))
    odd = tmp_path / "über dir's [x] %20 #1"
    (tmp_path / "before").rename(odd)
    resume(odd)
    assert_same_run(tmp_path / "whole", odd)


def test_a_lost_config_is_taken_from_the_checkpoint(settings, broken):
    (broken / "config.toml").unlink()
    assert resume(broken, steps=3).receipt["steps"] == 3


def test_a_run_that_never_saved_starts_again(settings, tmp_path):
    config = settings(checkpoint={"every": 0}, run={"steps": 2})
    with pytest.raises(CutError):
        train(config, progress=cut_at(2))
    assert not (tmp_path / "run" / "checkpoints").exists()
    cut = lines(tmp_path / "run")
    resume(tmp_path / "run")
    assert lines(tmp_path / "run")[: len(cut)] == cut


def test_a_finished_run_can_be_made_longer(settings, tmp_path):
    train(settings(run={"steps": 2}))
    assert resume(tmp_path / "run").receipt["steps"] == 2  # nothing left to do is no error
    longer = resume(tmp_path / "run", steps=4)
    assert longer.receipt["steps"] == 4
    steps = [line["step"] for line in lines(tmp_path / "run") if line["event"] == "step"]
    assert steps == [1, 2, 3, 4]


def test_training_over_a_run_asks_for_resume(settings, broken):
    before = (broken / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run .*shoestring resume"):
        train(settings(run={"steps": 1}))
    assert (broken / "metrics.jsonl").read_bytes() == before
    train(settings(run={"steps": 1, "replace": True}))


def test_a_directory_without_a_run_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        resume(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        resume(tmp_path / "absent")


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("model", {"num_hidden_layers": 4}, "model.num_hidden_layers is 4 now, and was 3"),
        ("model", {"rule": "residual"}, "model.rule is 'residual' now, and was 'bdia'"),
        ("model", {"dropout": 0.2}, "model.dropout"),
        ("data", {"vocabulary": 330}, "data.source .its text. is|data.tokenizer is"),
        ("data", {"sequence_length": 16}, "data.sequence_length is 16 now, and was 32"),
        ("run", {"seed": 5}, "run.seed is 5 now, and was 0"),
        ("precision", {"compute": "bf16"}, "precision.compute"),
    ],
)
def test_what_may_not_change_is_named(settings, broken, section, change, named):
    file = broken / "config.toml"
    before = state(broken)
    file.write_text(settings(**{section: change}).to_toml())
    with pytest.raises(ConfigError, match=named):
        resume(broken)
    after = state(broken)  # nothing was lost by trying
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_refused_resume_touches_nothing(settings, broken):
    (broken / "config.toml").write_text(settings(model={"dropout": 0.3}).to_toml() + "# mine\n")
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"model\.dropout"):
        resume(broken, steps=9)
    after = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} <= {broken / ".lock"}


def test_a_replaced_run_that_cannot_start_leaves_the_old_one(settings, broken):
    with pytest.raises(DataError):
        train(settings(run={"replace": True}, data={"source": str(broken / "absent")}))
    assert state(broken)
    assert lines(broken)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(settings, tmp_path):
    train(settings(run={"steps": 1}))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoints of .* are gone.*--run.replace"):
        resume(tmp_path / "run", steps=2)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_larger_updates_after_a_resume_are_planned_again(settings, tmp_path):
    only = {"only": ("reversible",)}
    config = settings(run={"budget": "24MiB"}, model={"rule": "feistel", "dropout": 0.0}, plan=only)
    with pytest.raises(CutError):
        train(config, progress=cut_at(3))
    file = tmp_path / "run" / "config.toml"
    first = json.loads((tmp_path / "run" / "plan.json").read_text())["peak_bytes"]
    file.write_text(file.read_text().replace("batch_size = 4", "batch_size = 8"))
    memory = resume(tmp_path / "run").receipt["memory"]
    assert first < memory["promised_bytes"]
    assert 0 <= memory["promised_bytes"] / memory["measured_bytes"] - 1 <= 0.03


def test_what_may_change_does(settings, broken):
    lr = [line["lr"] for line in lines(broken) if line["event"] == "step"][:2]
    (broken / "config.toml").write_text(settings(optim={"lr": 5e-4}).to_toml())
    resume(broken)
    steps = [line for line in lines(broken) if line["event"] == "step"]
    assert [line["lr"] for line in steps][:2] == lr
    assert steps[-1]["lr"] == pytest.approx(5e-5)


def test_a_smaller_budget_than_the_plan_is_refused(settings, tmp_path):
    only = {"only": ("reversible",)}
    config = settings(run={"budget": "24MiB"}, model={"rule": "feistel"}, plan=only)
    with pytest.raises(CutError):
        train(config, progress=cut_at(3))
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text().replace("24MiB", "100KiB"))
    with pytest.raises(OutOfBudget, match="the plan needs"):
        resume(tmp_path / "run")


def test_data_that_changed_or_went_is_named(settings, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"line {number} of a text that will change\n" * 60)
    with pytest.raises(CutError):
        train(settings(data={"source": str(text)}), progress=cut_at(3))
    saved = (text / "3.txt").read_text()
    (text / "3.txt").write_text(saved + "!")
    with pytest.raises(ConfigError, match=r"data\.(source \(its text\)|tokenizer) is"):
        resume(tmp_path / "run")
    (text / "3.txt").write_text(saved)
    text.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="text"):
        resume(tmp_path / "run")
    (tmp_path / "elsewhere").rename(text)
    assert resume(tmp_path / "run", steps=3).receipt["steps"] == 3


def test_the_clock_of_the_wall_decides_nothing(settings, tmp_path):
    config = settings(checkpoint={"every": 0, "minutes": 5.0})
    victim = Victim("train", config, tmp_path / "log", "clock_jumps")
    assert victim.wait() == 0
    assert len(victim.events("checkpoint")) == 1  # that of the end


def test_a_copy_written_in_the_background_is_in_the_plan(settings, tmp_path):
    shape = {
        "run": {"budget": "24MiB", "steps": 3}, "plan": {"only": ("reversible",)},
        "model": {"rule": "feistel", "dropout": 0.0},
    }  # fmt: skip
    plain = train(settings(tmp_path / "plain", **shape)).receipt["memory"]
    run = train(settings(**shape, checkpoint={"every": 1, "background": True}))
    memory = run.receipt["memory"]
    saved, _ = Store(tmp_path / "run" / "checkpoints").newest()
    copied = sum(
        tensor.nbytes
        for file in ("model", "optimizer", "random")
        for _, tensor in saved.tensors(f"{file}.safetensors")
    )
    assert memory["promised_bytes"] - plain["promised_bytes"] == copied
    assert memory["measured_bytes"] <= memory["promised_bytes"]
