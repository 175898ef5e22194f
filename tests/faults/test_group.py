"""Processes that train together end together, and go on together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoestring.checkpoint import Store

PROGRAM = """
import os, sys
from shoestring.errors import OutOfBudget, ShoestringError
from shoestring.training import guard
from shoestring.training.config import RunConfig
from shoestring.training.loop import resume, train
action, file, fails = sys.argv[1:]
check = guard.BudgetGuard._check_process
def over(self, where, rss_bytes):
    if where == "step 4":
        raise OutOfBudget("this process alone went over its budget")
    check(self, where, rss_bytes)
if fails == os.environ["RANK"]:
    guard.BudgetGuard._check_process = over  # resident bytes are each process's own
config = RunConfig.load(file)
try:
    train(config) if action == "train" else resume(config.run.directory)
except ShoestringError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def together(action: str, file: Path, *, fails: str = "none") -> list[tuple[int, str]]:
    """Exit code and messages of two processes, which have a minute."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, action, str(file), fails]
    ranks = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, said, strict=True)]


@pytest.mark.slow  # six processes that import torch
def test_one_process_over_its_budget_ends_both_and_both_go_on_bit_for_bit(settings, tmp_path):
    files = {}
    for name in ("whole", "broken"):
        files[name] = tmp_path / f"{name}.toml"
        # one saves at every step, the last one too; the other only when it has to
        config = settings(tmp_path / name, checkpoint={"every": int(name == "whole")})
        files[name].write_text(config.to_toml())
    assert [code for code, _ in together("train", files["whole"])] == [0, 0]
    codes = together("train", files["broken"], fails="1")
    assert [code for code, _ in codes] == [3, 3]
    assert "another process of the group" in codes[0][1]
    assert "this process alone" in codes[1][1]
    assert [code for code, _ in together("resume", files["broken"])] == [0, 0]
    whole, broken = (Store(tmp_path / name / "checkpoints").newest()[0] for name in files)
    assert whole.step == broken.step == 6
    for file in ("model", "optimizer", "random"):
        mine = dict(whole.tensors(f"{file}.safetensors"))
        for name, tensor in broken.tensors(f"{file}.safetensors"):
            assert torch.equal(tensor, mine[name]), name
    lines = [
        [
            (line["step"], line["loss"])
            for line in map(
                json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            )
            if line["event"] == "step"
        ]
        for name in files
    ]
    assert lines[0] == lines[1]
