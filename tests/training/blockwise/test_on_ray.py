"""Blocks as jobs of Ray: a killed worker costs its own block's last updates, and no bit."""

import json
import os
import random
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from shoestring.errors import CheckpointError, ConfigError, DataError
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.on_ray import ATTEMPTS, train_on_ray

from .conftest import changed, elsewhere
from .test_jobs import call, equal, state_of


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=80 << 20,
    )  # fmt: skip
    yield ray
    ray.shutdown()


def attempts(config, block):
    path = Path(config.run.directory) / f"block-{block}" / ATTEMPTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill(config, block):
    """The worker of a block, as soon as a checkpoint is there; true if it was."""
    checkpoints = Path(config.run.directory) / f"block-{block}" / "checkpoints"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if any(checkpoints.glob("step-*")):
            os.kill(attempts(config, block)[-1]["process"], signal.SIGKILL)
            return
        time.sleep(0.005)


def killer(config, block):
    thread = threading.Thread(target=kill, args=(config, block))
    thread.start()
    return thread


def longer(config, folder):
    """Long enough to be killed in."""
    return elsewhere(config, folder, run={"steps": 150, "save_every": 10, "threads": 1})


def test_a_worker_killed_at_random_changes_no_bit(ray, images, folder):
    config, alone = longer(images, folder / "ray"), longer(images, folder / "alone")
    victim = random.Random(time.time_ns()).choice((1, 2))
    thread = killer(config, victim)
    done = train_on_ray(config)
    thread.join()
    assert [(each.block, each.status, each.updates) for each in done] == [
        (1, "finished", 150),
        (2, "finished", 150),
    ]
    assert len(attempts(config, victim)) == 2
    assert len(attempts(config, 3 - victim)) == 1
    train_every_block(alone)
    for block in (1, 2):
        assert equal(state_of(config, block), state_of(alone, block))
    # what a job held was its own block: its weights, gradients and states, and no other's
    for each in done:
        own = 4 * each.receipt["parameters"]
        peak = each.receipt["peak"]["by_category"]
        assert peak["weights"] == own
        assert peak["gradients"] <= own


def test_blocks_on_top_of_each_other_run_one_after_the_other(ray, images, folder):
    switches = {"objective": "labels", "sequential": True, "chain_steps": 4}
    config = changed(images, blockwise=switches, run={"threads": 1})
    done = train_on_ray(elsewhere(config, folder / "ray"))
    assert [(each.block, each.status, each.updates) for each in done] == [
        (1, "finished", 10),
        (2, "finished", 10),
    ]
    train_every_block(elsewhere(config, folder / "alone"))
    for block in (1, 2):
        one, other = (state_of(elsewhere(config, folder / d), block) for d in ("ray", "alone"))
        assert equal(one, other)


def test_blocks_of_a_text_from_left_to_right_are_jobs_too(ray, text, folder):
    config = changed(text, blockwise={"objective": "tokens"}, run={"threads": 1})
    config, alone = elsewhere(config, folder / "ray"), elsewhere(config, folder / "alone")
    train_on_ray(config)
    train_every_block(alone)
    for block in (1, 2):
        assert equal(state_of(config, block), state_of(alone, block))


def test_a_job_that_loses_its_worker_too_often_is_told_and_gone_on_with(ray, images, folder):
    config = longer(images, folder / "ray")
    thread = killer(config, 2)
    with pytest.raises(CheckpointError, match=r"block 2 lost its worker.*goes on"):
        train_on_ray(config, restarts=0)
    thread.join()
    assert [each.status for each in train_on_ray(config)] == ["finished", "finished"]
    assert [len(attempts(config, block)) for block in (1, 2)] == [2, 2]


def test_errors_of_a_job_are_its_own_kind(ray, images, folder):
    config = elsewhere(images, folder / "ray")
    train_on_ray(config)
    with pytest.raises(ConfigError, match=r"block \d: partition.overlap is 0.1 now"):
        train_on_ray(changed(config, blockwise={"overlap": 0.1}))
    replaced = train_on_ray(changed(config, blockwise={"overlap": 0.1}, run={"replace": True}))
    assert [each.updates for each in replaced] == [6, 6]
    (folder / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match=r"block \d: Cannot write"):
        train_on_ray(elsewhere(images, folder / "taken"))
    with pytest.raises(DataError, match="there is no file"):
        train_on_ray(changed(config, data={"source": "nowhere"}))


def test_ray_that_is_missing_or_does_not_answer_is_told(monkeypatch, images, folder, capsys):
    def refuse(address, **settings):
        raise ConnectionError("nobody there")

    silent = types.SimpleNamespace(is_initialized=lambda: False, init=refuse)
    monkeypatch.setitem(sys.modules, "ray", silent)
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at '10.0.0.1:6379'"):
        train_on_ray(images, address="10.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "ray", None)
    code, line = call(capsys, "train", folder / "blocks.toml", "--ray", "local")
    assert code == 2
    assert "shoestring[ray]" in line["error"]["message"]
    code, line = call(capsys, "train", folder / "blocks.toml", "--ray", "local", "--block", "1")
    assert code == 2
    assert "one of the two" in line["error"]["message"]
