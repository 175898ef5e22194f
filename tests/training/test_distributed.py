"""Two processes are one with twice the rows: same losses, same weights, one writer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shoestring.errors import ConfigError
from shoestring.training.config import RunConfig
from shoestring.training.distributed import World, pick_device
from shoestring.training.loop import train

EPS = torch.finfo(torch.float32).eps
PROGRAM = """
import sys
from shoestring.training.config import RunConfig
from shoestring.training.loop import train
train(RunConfig.load(sys.argv[1]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_in_processes(config: RunConfig, count: int, folder: Path) -> None:
    """As torchrun starts them: one process a rank, told by the environment."""
    file = folder / "run.toml"
    file.write_text(config.to_toml())
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(file)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


def losses(config: RunConfig) -> list[float]:
    lines = (Path(config.run.directory) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["event"] == "step"]


@pytest.mark.slow  # two processes that import torch
def test_two_processes_equal_one_with_twice_the_rows(settings, tmp_path):
    shared = {"model": {"rule": "feistel"}, "evaluate": {"batches": 3}}
    one = settings(run={"directory": str(tmp_path / "one")}, data={"batch_size": 8}, **shared)
    two = settings(
        run={"directory": str(tmp_path / "two")},
        data={"batch_size": 2},
        optim={"accumulate": 2},
        **shared,
    )
    alone = train(one)
    train_in_processes(two, 2, tmp_path)
    # 6 updates, each from gradients that were summed in another order
    assert losses(two) == pytest.approx(losses(one), rel=100 * EPS)
    weights = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for name, tensor in alone.model.state_dict().items():
        if name in weights:
            # AdamW divides by the root of small squares, so an update of lr may be off by more
            # than the gradient's rounding: 1e-3 of one update is allowed for.
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    receipt = json.loads((tmp_path / "two" / "receipt.json").read_text())
    assert receipt["processes"] == 2
    assert receipt["status"] == "finished"


def test_alone_everything_is_the_identity():
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    model = torch.nn.Linear(1, 1)
    assert alone.sum([1.5, 2]) == [1.5, 2]
    assert alone.share("plan") == "plan"
    assert alone.wrap(model) is model
    assert alone.is_first


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that is asked for")
def test_a_device_that_is_not_there_is_refused():
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="there is no CUDA device 1"):
        pick_device("cuda:1")
