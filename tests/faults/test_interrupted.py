"""Signals: before training begins they end the run at once, during it after the step."""

import os
import signal
import subprocess
import sys

import pytest

from shoestring.errors import CheckpointError
from shoestring.training.loop import resume, train

from .test_resume import CutError, assert_same_run, cut_at, lines
from .victims import Victim

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_says_so(settings, tmp_path, number):
    config = settings(run={"steps": 100_000}, checkpoint={"every": 0})
    victim = Victim("train", config, tmp_path / "log")
    victim.wait_for("step", 3)
    victim.kill(number)
    assert victim.wait() == 130
    assert len(victim.events("checkpoint")) == 1
    done = victim.events("step")[-1]["step"]
    assert resume(tmp_path / "run", steps=done + 1).receipt["steps"] == done + 1


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", ["reading", "data", "plan", "model", "before"])
def test_before_training_a_signal_loses_nothing_and_says_how_to_start(
    settings, tmp_path, monkeypatch, moment, number
):
    if moment == "reading":  # with nothing in the cache it takes long enough to be caught at it
        monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    config = settings(data={"vocabulary": 3000 if moment == "reading" else 320})
    victim = Victim("train", config, tmp_path / "log", "signalled", moment, number)
    assert victim.wait() == 130, victim.text()
    assert not victim.events("step")
    assert moment != "reading" or not victim.events("data")
    (told,) = victim.events("interrupted")
    has_begun = moment in ("model", "before")
    again = f"shoestring resume {tmp_path / 'run'} goes on" if has_begun else "the same command"
    assert f"nothing was lost: {again}" in told["message"]
    resume(tmp_path / "run") if has_begun else train(config)
    train(settings(tmp_path / "whole", data={"vocabulary": config.data.vocabulary}))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("moment", ["data", "plan", "model"])
def test_a_resume_that_is_interrupted_before_it_trains_can_be_resumed(settings, tmp_path, moment):
    with pytest.raises(CutError):
        train(settings(), progress=cut_at(4))
    fate = ("signalled", moment, signal.SIGTERM)
    victim = Victim("resume", settings(), tmp_path / "log", *fate)
    assert victim.wait() == 130, victim.text()
    (told,) = victim.events("interrupted")
    assert f"nothing was lost: shoestring resume {tmp_path / 'run'}" in told["message"]
    resume(tmp_path / "run")
    train(settings(tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_signal_in_the_first_evaluation_leaves_a_run_to_resume(settings, tmp_path):
    def interrupt(event):
        if event["event"] == "evaluation" and event["step"] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match=r"nothing was lost: shoestring resume"):
        train(settings(), progress=interrupt)
    assert not (tmp_path / "run" / "receipt.json").exists()
    resume(tmp_path / "run")
    train(settings(tmp_path / "whole"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")


def test_a_second_signal_says_what_is_made_again(settings, tmp_path):
    def interrupt(event):
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match=r"3 updates .* again: shoestring resume"):
        train(settings(checkpoint={"every": 0}), progress=interrupt)


def test_a_run_without_time_for_an_update_can_be_resumed(settings, tmp_path):
    train(settings(run={"minutes": 1e-9}))
    assert resume(tmp_path / "run", minutes=0, steps=1).receipt["steps"] == 1
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="are gone"):
        resume(tmp_path / "run", steps=2)


def test_the_command_ends_with_130_and_a_sentence(settings, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(settings(run={"budget": "24MiB"}, model={"rule": "feistel"}).to_toml())
    process = subprocess.Popen(
        [sys.executable, "-m", "shoestring", "train", str(file), "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert any(line.startswith("planning: ") for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "nothing was lost" in err
    assert '"exit_code": 130' in out
