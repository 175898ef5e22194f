"""Flags of `shoestring train`: the list of them, and how they override the file."""

import re
from pathlib import Path

import pytest

from shoestring.cli import train
from shoestring.cli.arguments import parse
from shoestring.errors import ConfigError

FLAGS = Path(__file__).with_name("flags.txt")


def flags(capsys, monkeypatch):
    """Every flag that `shoestring train --help` shows."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        arguments("--help")
    heads = re.findall(r"^\W (-.*?)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    return sorted({flag for head in heads for flag in re.findall(r"--?[a-z][\w.-]*", head)})


def test_list_of_flags_is_a_decision(capsys, monkeypatch):
    """A new setting is a new flag: add it to flags.txt, or keep it out of RunConfig."""
    assert flags(capsys, monkeypatch) == FLAGS.read_text().split()


def arguments(*args):
    return parse(train.Arguments, "train", args, train.defaults(args))


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[optim]\nlr = 0.5\ngrad_clip = 2.0\n[model]\ntie_word_embeddings = false\n")
    return str(path)


def test_flags_override_the_file_and_the_file_the_defaults(run_file):
    config = arguments(run_file, "--optim.lr", "1e-3", "--model.hidden-size", "64").config
    assert config.optim.lr == 1e-3
    assert config.optim.grad_clip == 2.0
    assert config.model.hidden_size == 64
    assert config.model.tie_word_embeddings is False


def test_file_may_follow_flags(run_file):
    given = arguments("--json", "--optim.lr", "0.25", run_file)
    assert given.config.optim.lr == 0.25
    assert given.json
    assert given.file == run_file


@pytest.mark.parametrize(
    ("before", "section", "field", "value"),
    [
        (["--optim.lr=1e-3"], "optim", "lr", 1e-3),
        (["--model.no-tie-word-embeddings"], "model", "tie_word_embeddings", False),
        (["--model.tie-word-embeddings"], "model", "tie_word_embeddings", True),
        (["--run.replace"], "run", "replace", True),
        (["--optim.betas", "0.9", "0.95"], "optim", "betas", (0.9, 0.95)),
        (["--run.directory", "old.toml"], "run", "directory", "old.toml"),
        (["--plan.only", "keep", "--debug"], "plan", "only", ("keep",)),
        (["--data.source", __file__], "data", "source", __file__),
        (["--debug"], "optim", "lr", 0.5),
    ],
)
def test_file_is_found_after_any_flag(run_file, before, section, field, value):
    given = arguments(*before, run_file)
    assert given.file == run_file
    assert getattr(getattr(given.config, section), field) == value
    assert given.config.optim.grad_clip == 2.0


def test_file_after_a_flag_that_takes_all_is_refused(run_file):
    with pytest.raises(ConfigError, match=r"after --plan.only, which takes all that follows"):
        arguments("--plan.only", "keep", run_file)


def test_file_needs_no_ending(run_file):
    plain = Path(run_file).rename(Path(run_file).with_suffix(""))
    given = arguments("--optim.betas", "0.9", "0.95", str(plain))
    assert given.config.optim.grad_clip == 2.0


def test_missing_file_after_flags_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
        arguments("--optim.betas", "0.9", "0.95", str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.lrr", "1"], "--optim.lr"),
        (["--optim.lr", "fast"], "could not convert string to float: 'fast'"),
        (["--optim.lr", "-1"], "optim.lr = -1.0 cannot be used; expected more than 0"),
        (["--model.rule", "feistle"], "feistel"),
        (["--run.budget", "6 cats"], "'6 cats' is not an amount of memory"),
    ],
)
def test_overrides_that_cannot_be_used_are_refused(run_file, args, message):
    with pytest.raises(ConfigError) as caught:
        arguments(run_file, *args)
    assert message in " ".join(str(caught.value).split())


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
        arguments(str(tmp_path / "none.toml"))


def test_no_file_is_bad_usage():
    with pytest.raises(ConfigError, match="expected shoestring train RUN"):
        arguments("--json")
