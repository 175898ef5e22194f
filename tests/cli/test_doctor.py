"""`shoestring doctor` for people in trouble: scripts by subprocess, and other processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoestring.cli import main as command
from shoestring.doctor.process import process_totals
from shoestring.errors import ConfigError, ShoestringError

SOURCE = Path(command.__file__).parents[2]
TRAIN = """
import os, sys
import torch
from torch import nn
import beside

print("arguments", sys.argv[1:], __name__)
print("malloc", os.environ.get("MALLOC_MMAP_THRESHOLD_"), os.environ.get("SHOESTRING_RESTARTED"))
layers = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4)]
model = nn.Sequential(*layers)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(20):
    loss = model(torch.randn(256, 32)).square().mean()
    {in_step}
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print("step", step)
"""


def environment():
    names = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "SHOESTRING_RESTARTED"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def doctor(*args):
    return subprocess.run(
        [sys.executable, "-m", "shoestring", "doctor", *map(str, args)],
        env=environment(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("")

    def write(in_step="pass", text=TRAIN):
        path = tmp_path / "train.py"
        path.write_text(text.replace("{in_step}", in_step))
        return path

    return write


def test_a_script_is_watched_and_json_keeps_stdout_for_itself(script):
    done = doctor("--json", "--script", script(), "--json", "--lr", "3")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["status"], report["steps"]) == ("seen", 3)
    found = report["diagnosis"]
    assert found["peak_bytes"] == sum(found["parts"].values())
    assert (found["model"], found["steps"], len(found["blocks"])) == ("Sequential", 2, 4)
    assert found["leak"] is None
    assert "arguments ['--json', '--lr', '3'] __main__" in done.stderr
    assert "step 1" in done.stderr
    assert "step 3" not in done.stderr  # it was ended
    assert "malloc None None" in done.stderr  # in the environment that it is used to


def test_without_json_the_page_comes_after_what_the_script_says(script):
    done = doctor("--steps", "1", "--script", script())
    assert done.returncode == 0, done.stderr
    said, page = done.stdout.split("Sequential on cpu, 1 step watched")
    assert "step 0" in said
    assert "what the peak is made of" in page
    assert "what to do, cheapest first" in page


def test_a_script_that_runs_out_of_memory_is_diagnosed_until_then(script):
    done = doctor("--json", "--script", script("torch.empty(1 << 52)"))
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert "failed after 0 optimizer steps: RuntimeError" in report["error"]["message"]
    assert report["error"]["exit_code"] == 1
    failure = report["diagnosis"]["failure"]
    assert (failure["asked_bytes"], failure["operator"]) == (4 << 52, "empty")
    assert report["diagnosis"]["parts"]["weights"] == 4 * 4 * (32 * 128 * 2 + 128 + 32)
    assert "Traceback" in done.stderr  # the script's own
    assert "torch.empty(1 << 52)" in done.stderr
    assert "shoestring/doctor" not in done.stderr


@pytest.mark.slow
def test_a_script_that_fails_later_is_diagnosed_until_then(script):
    done = doctor("--script", script("assert step < 2, 'enough'"))
    assert done.returncode == 1
    assert "failed after 2 optimizer steps: AssertionError: enough" in done.stderr
    assert "AssertionError in the forward" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\ntorch.ones(5).sum()", "without a step of an optimizer"),
        pytest.param("print(1)", "without making a tensor of torch", marks=pytest.mark.slow),
        pytest.param("import sys\nsys.exit(3)", "exit code 3", marks=pytest.mark.slow),
        pytest.param("this is no python", "steps: SyntaxError", marks=pytest.mark.slow),
    ],
)
def test_a_script_with_nothing_to_watch_is_told_so(text, message, script):
    done = doctor("--json", "--script", script(text=text))
    assert done.returncode == 1
    assert message in json.loads(done.stdout)["error"]["message"]
    assert "shoestring/doctor" not in done.stderr


@pytest.mark.slow
def test_a_script_that_is_killed_is_told_by_what_was_last_alive(script):
    kill = "step and os.kill(os.getpid(), 9)"
    done = doctor("--json", "--script", script(kill))
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["status"] == "killed"
    assert "SIGKILL" in report["error"]["message"]
    assert "after 1 optimizer steps" in report["error"]["message"]
    assert "weights" in report["error"]["message"]


def test_ctrl_c_ends_with_130_and_what_was_seen(script):
    path = script("print('running', flush=True) or __import__('time').sleep(100)")
    child = subprocess.Popen(
        [sys.executable, "-m", "shoestring", "doctor", "--json", "--script", str(path)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert child.stderr is not None
    while "running" not in child.stderr.readline():
        assert child.poll() is None
    time.sleep(0.2)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    report = json.loads(out)
    assert report["error"]["exit_code"] == 130
    assert report["diagnosis"]["failure"]["kind"] == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--script", "no/such.py"], "there is no script 'no/such.py'"),
        (["--script", "."], "'.' is no file"),
        (["--script"], "--script"),
        (["--steps", "0", "--script", "x.py"], "--steps 0"),
        (["--pid", "1", "--script", "x.py"], "do not go together"),
        (["--pid", "0"], "--pid 0 is no process"),
        (["--pid", str(1 << 30)], f"there is no process {1 << 30}"),
    ],
)
def test_bad_usage_ends_with_2(args, message, capsys):
    assert command.main(["doctor", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_scripts_arguments_are_its_own():
    ours, script = command.split_script(["doctor", "--json", "--script", "x.py", "--json", "-h"])
    assert (ours, script) == (["doctor", "--json", "--script", "x.py"], ["--json", "-h"])
    assert command.split_script(["train", "--script", "x", "y"])[1] == ()


# ---- other processes -----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_totals_of_a_process(capsys):
    assert command.main(["doctor", "--pid", str(os.getpid()), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["rss_bytes"] >= found["anonymous_bytes"] > 0
    assert found["peak_bytes"] >= found["rss_bytes"] / 2
    assert "cannot be seen from outside" in found["explanation"]
    assert "resident now" in said.err


@pytest.fixture
def root(tmp_path):
    for pid in ("self", "7", "8", "9"):
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "status").write_text("Name:\tx\nVmRSS:\t 4 kB\nVmSwap:\t 1 kB\n")
    (tmp_path / "proc/7/cgroup").write_text("0::/box/inner\n")
    for path, limit, used in (("box", "10000", "4000"), ("box/inner", "max", "3000")):
        folder = tmp_path / "sys/fs/cgroup" / path
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(used)
        (folder / "memory.stat").write_text("inactive_file 500\n")
    (tmp_path / "proc/8/status").write_text("Name:\tkthreadd\n")
    (tmp_path / "proc/9/status").unlink()
    (tmp_path / "proc/9/status").mkdir()  # reading it is an OSError, as without permission
    return tmp_path


def test_a_processes_cgroups_tell_their_limit_and_what_is_left(root):
    found = process_totals(7, root)
    assert (found["rss_bytes"], found["swap_bytes"], found["file_bytes"]) == (4096, 1024, None)
    [group] = found["cgroups"]
    assert (group["path"], group["limit_bytes"]) == ("/box", 10000)
    assert (group["used_bytes"], group["left_bytes"]) == (4000, 6500)


def test_processes_that_cannot_be_read_are_told_apart(root):
    with pytest.raises(ConfigError, match="no memory of its own"):
        process_totals(8, root)
    with pytest.raises(ShoestringError, match="may not be read"):
        process_totals(9, root)
    with pytest.raises(ConfigError, match="there is no process 10"):
        process_totals(10, root)
    with pytest.raises(ShoestringError, match="no /proc"):
        process_totals(7, root / "proc")
