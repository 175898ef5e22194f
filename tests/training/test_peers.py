"""A process that is gone ends its group within seconds, by name, and nothing is lost."""

import json
import time
from pathlib import Path

import pytest
import torch

from shoestring.checkpoint import Store
from training.group import Group, run

FULL = {"sharding": "full"}


def newest(directory: Path) -> dict[str, torch.Tensor]:
    saved, wrong = Store(directory / "checkpoints").newest()
    assert saved is not None
    assert not wrong
    files = ("model", "optimizer", "random")
    return {f"{f} {name}": t for f in files for name, t in saved.tensors(f"{f}.safetensors")}


def assert_equal(one: Path, other: Path) -> None:
    mine, theirs = newest(one), newest(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def steps(directory: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


SLOW = pytest.mark.slow  # three groups of processes each


@pytest.mark.parametrize(
    ("sharding", "victim"),
    [
        pytest.param("none", 0, marks=SLOW),
        pytest.param("none", 1, marks=SLOW),
        pytest.param("full", 0, marks=SLOW),
        ("full", 1),
    ],
)
def test_killed_process_ends_the_others_by_name_and_resume_is_exact(
    settings, tmp_path, sharding, victim
):
    def at(name: str):
        return settings(
            run={"directory": str(tmp_path / name), "sharding": sharding},
            checkpoint={"every": 2},
        )

    run("train", at("whole"), 2, tmp_path / "logs")
    group = Group("train", at("broken"), 2, tmp_path / "logs", "killed_in_update", victim, 4)
    group.processes[victim].join(60)
    died = time.monotonic()
    codes = group.wait(10)
    assert time.monotonic() - died < 10
    assert codes[victim] == -9
    assert codes[1 - victim] == 1
    assert f"rank {victim} of 2 is gone: it was killed" in group.said[1 - victim]
    assert "shoestring resume" in group.said[1 - victim]
    run("resume", at("broken"), 2, tmp_path / "logs")
    assert_equal(tmp_path / "whole", tmp_path / "broken")
    assert steps(tmp_path / "whole") == steps(tmp_path / "broken")


@pytest.mark.slow
def test_who_waits_for_the_dead_forever_is_ended(settings, tmp_path):
    group = Group("train", settings(run=FULL), 2, tmp_path / "logs", "stuck_when_killed", 1, 2)
    group.processes[1].join(60)
    assert group.wait(10) == [1, -9]
    assert "rank 1 of 2 is gone" in group.said[0]


@pytest.mark.slow
def test_error_of_one_process_is_told_by_the_others(settings, tmp_path):
    group = Group("train", settings(run=FULL), 3, tmp_path / "logs", "fails_alone", 1)
    codes = group.wait(30)
    assert codes[0] == codes[2] == 1
    for said in (group.said[0], group.said[2]):
        assert "rank 1 of 3 is gone" in said
        assert "ZeroDivisionError: on this machine alone" in said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_peer_killed_in_the_checkpoint_of_a_signal_leaves_the_one_before(
    settings, tmp_path, victim
):
    config = settings(run=FULL, checkpoint={"every": 2})
    group = Group("train", config, 2, tmp_path / "logs", "killed_in_checkpoint", victim, 3)
    codes = group.wait(30)
    assert codes[victim] == -9
    assert codes[1 - victim] == 1
    assert f"rank {victim} of 2 is gone" in group.said[1 - victim]
    saved, wrong = Store(tmp_path / "run" / "checkpoints").newest()
    assert (saved.step, wrong) == (2, [])
    run("resume", config, 2, tmp_path / "logs")
    run(
        "train",
        settings(run={**FULL, "directory": str(tmp_path / "whole")}, checkpoint={"every": 2}),
        2,
        tmp_path / "logs",
    )
    assert_equal(tmp_path / "whole", tmp_path / "run")
