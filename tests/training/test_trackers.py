"""Trackers get the numbers of the run, and a broken one breaks nothing."""

import builtins

import pytest

from shoestring.errors import ConfigError
from shoestring.training import trackers
from shoestring.training.config import TrackConfig
from shoestring.training.loop import train


def test_tensorboard_holds_the_losses_of_metrics_jsonl(settings):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = []
    run = train(
        settings(track={"to": ("tensorboard",)}),
        progress=lambda event: steps.append(event) if event["event"] == "step" else None,
    )
    found = EventAccumulator(str(run.directory / "tensorboard"))
    found.Reload()
    scalars = found.Scalars("train/loss")
    assert [each.step for each in scalars] == [event["step"] for event in steps]
    assert [each.value for each in scalars] == pytest.approx([event["loss"] for event in steps])
    assert len(found.Scalars("held_out/bits_per_byte")) == 2


def test_trackio_takes_a_run(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    failed = []
    train(
        settings(track={"to": ("trackio",)}),
        progress=lambda event: failed.append(event) if event["event"] == "tracker failed" else None,
    )
    assert not failed
    assert list((tmp_path / "trackio").rglob("*.db"))


def test_wandb_takes_a_run_offline(settings, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train(settings(track={"to": ("wandb",)}))
    assert list(run.directory.rglob("*.wandb"))


def test_a_tracker_that_is_not_installed_is_named_with_what_to_install(settings, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"'wandb', which is not installed.*shoestring\[wandb\]"):
        train(settings(track={"to": ("wandb",)}))


def test_a_tracker_that_fails_is_told_once_and_left_out(settings, monkeypatch):
    class Broken:
        def __init__(self, config, directory):
            self.calls = 0

        def log(self, numbers, step):
            raise OSError("the network is gone")

        def close(self):
            pytest.fail("it was left out before")

    monkeypatch.setitem(trackers.KINDS, "trackio", Broken)
    told = []
    run = train(
        settings(track={"to": ("trackio",)}),
        progress=lambda event: told.append(event) if event["event"] == "tracker failed" else None,
    )
    assert run.receipt["status"] == "finished"
    assert [(each["tracker"], each["message"]) for each in told] == [
        ("trackio", "the network is gone")
    ]


def test_a_tracker_that_cannot_start_is_told_and_left_out(settings, monkeypatch, tmp_path):
    def unreachable(config, directory):
        raise OSError("no network")

    monkeypatch.setitem(trackers.KINDS, "wandb", unreachable)
    told = []
    config = settings(track={"to": ("wandb",)})
    found = trackers.Trackers(config, tmp_path, lambda event, **facts: told.append((event, facts)))
    found.event("step", {"step": 1, "loss": 1.0})
    found.close()
    assert told == [("tracker failed", {"tracker": "wandb", "message": "no network"})]


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match=r"track.to = 'mlflow'.*tensorboard, trackio, wandb"):
        TrackConfig(to=("mlflow",))
