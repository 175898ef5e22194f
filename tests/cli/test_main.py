"""The command as a whole: dispatch, help, errors, exit codes, speed of the help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.cli import main as command
from shoestring.cli.terminal import Terminal
from shoestring.errors import OutOfBudget

SOURCE = Path(command.__file__).parents[2]


@pytest.mark.parametrize("verb", ["", *command.VERBS])
def test_help_succeeds_and_names_the_verb(verb, capsys):
    args = [verb, "--help"] if verb else ["--help"]
    try:
        code = command.main(args)
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    assert (verb or "usage: shoestring VERB") in capsys.readouterr().out


def test_help_names_every_verb_and_exit_code():
    text = command.usage()
    assert all(verb in text for verb in ("plan", "train", "generate", "doctor", "demo"))
    assert all(f"  {code}" in text for code in (0, 1, 2, 3, 130))


def test_no_verb_is_bad_usage(capsys):
    assert command.main([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_unknown_verb_names_the_nearest(capsys):
    assert command.main(["trian", "x.toml"]) == 2
    assert "'trian' is not a verb" in (said := capsys.readouterr().err)
    assert "Did you mean 'train'?" in said


def test_unknown_flag_names_the_nearest_and_keeps_stdout_for_json(capsys):
    assert command.main(["doctor", "--jsn", "--json"]) == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["kind"] == "ConfigError"
    assert error["exit_code"] == 2
    assert "--jsn" in error["message"]
    assert "--json" in said.err


def fail_with(monkeypatch, error):
    def run(arguments, terminal):
        raise error

    monkeypatch.setattr("shoestring.cli.doctor.run", run)


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (OutOfBudget("too small", smallest_bytes=5, instant="loss backward"), 3, "OutOfBudget"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (RuntimeError("odd"), 1, "RuntimeError"),
    ],
)
def test_errors_become_messages_and_codes(error, code, kind, monkeypatch, capsys):
    fail_with(monkeypatch, error)
    assert command.main(["doctor", "--json"]) == code
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["kind"] == kind
    assert json.loads(said.out)["error"]["exit_code"] == code
    assert "Traceback" not in said.err


def test_debug_shows_the_traceback(monkeypatch, capsys):
    fail_with(monkeypatch, RuntimeError("odd"))
    assert command.main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_out_of_budget_says_what_would_do(capsys):
    error = OutOfBudget("x", smallest_bytes=2**20, instant="loss", changes=["batch_size 1"])
    Terminal(json=True).error(error, code=3)
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["changes"] == ["batch_size 1"]
    assert "smallest budget that works: 1.0 MiB" in said.err
    assert "would help: batch_size 1" in said.err


def test_json_never_holds_nan(capsys):
    Terminal(json=True).emit({"loss": float("nan"), "all": [1.0, float("inf")]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "all": [1.0, None]}


def run_command(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "shoestring", *args],
        env={**os.environ, "PYTHONPATH": str(SOURCE), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_takes_little_time():
    def cpu_seconds():
        before = os.times()
        assert run_command("--help").returncode == 0
        after = os.times()
        return (
            after.children_user
            + after.children_system
            - (before.children_user + before.children_system)
        )

    assert min(cpu_seconds() for _ in range(3)) < 0.3


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["plan", "--nonsense"]])
def test_help_and_bad_usage_do_not_import_torch(args):
    code = (
        f"import sys; from shoestring.cli.main import main\n"
        f"try: main({args!r})\nexcept SystemExit: pass\n"
        "sys.exit(3 * ('torch' in sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0
    )


def test_reader_that_goes_away_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "shoestring", "--help"],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""
