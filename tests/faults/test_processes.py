"""A run that is killed, and two that want one directory."""

import random
import time

import pytest

from shoestring.checkpoint import Lock, Store
from shoestring.errors import CheckpointError
from shoestring.training.loop import train

from .victims import Victim


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_killed_at_random_moments_it_goes_on_from_what_was_acknowledged(settings, tmp_path, seed):
    chance = random.Random(seed)
    acknowledged, action = 0, "train"
    for _ in range(3):
        config = settings(run={"steps": 100_000, "replace": action == "train"})
        victim = Victim(action, config, tmp_path / "log")
        victim.wait_for("step", chance.randint(1, 6))
        time.sleep(chance.random() * 0.05)  # anywhere in a step, a save or an evaluation
        victim.kill()
        assert victim.wait() == -9
        resumed = [event["step"] for event in victim.events("resumed")]
        if action == "resume":
            assert resumed[0] >= acknowledged
        told = [event["step"] for event in victim.events("checkpoint")]
        acknowledged = max([acknowledged, *told])
        saved, wrong = Store(tmp_path / "run" / "checkpoints").newest()
        assert wrong == []
        assert (saved.step if saved else 0) >= acknowledged
        action = "resume" if acknowledged else "train"


def test_a_second_process_is_told_who_has_the_directory(settings, tmp_path):
    first = Victim("train", settings(run={"steps": 100_000}), tmp_path / "first")
    first.wait_for("step", 2)
    for action in ("train", "resume"):
        second = Victim(action, settings(), tmp_path / "second")
        assert second.wait() == 1
        (error,) = second.events("error")
        assert "in use by another process (process " in error["message"]
    first.kill()
    first.wait()
    resumed = Victim("resume", settings(run={"steps": 100_000}), tmp_path / "third")
    resumed.wait_for("step", 1)  # the lock went with the process that was killed
    assert resumed.events("resumed")
    resumed.kill()
    resumed.wait()


def test_a_lock_is_let_go(tmp_path):
    for _ in range(2):
        with Lock(tmp_path), pytest.raises(CheckpointError, match="in use"), Lock(tmp_path):
            pass


def test_a_run_lets_go_of_its_directory_when_it_fails(settings, tmp_path):
    with pytest.raises(RuntimeError, match="from outside"):
        train(settings(), progress=_break)
    with Lock(tmp_path / "run"):
        pass


def _break(event):
    if event["event"] == "step":
        raise RuntimeError("from outside")
