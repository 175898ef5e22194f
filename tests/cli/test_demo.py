"""The demo: its words follow its numbers, and it runs whole (slow: several minutes)."""

import json

import pytest

from shoestring.cli import demo
from shoestring.cli.main import main
from shoestring.errors import ConfigError

MARKS = {"unigram": 4.6, "bigram": 3.5, "trigram": 2.6, "gzip -9": 2.0, "xz -9": 1.9}


def test_words_name_what_was_beaten_and_what_was_not():
    text = demo._reading(2.2, 3.4, MARKS, 1000)
    assert "Better than byte unigram, byte bigram, byte trigram; not better than gzip -9" in text
    assert "an untrained model, gives 3.40" in text
    assert "saw 1,000 tokens" in text


def test_words_do_not_claim_what_was_not_reached():
    text = demo._reading(5.0, 5.1, MARKS, 1000)
    assert text.startswith("Better than none of them; not better than byte unigram, byte bigram")


def test_demo_is_deep_reversible_and_inside_a_budget():
    config = demo._config(demo.Arguments())
    assert config.model.gpt_fields()["num_hidden_layers"] >= 32
    assert config.model.rule == "feistel"
    assert config.run.budget_bytes == 256 * 2**20
    assert config.data.source == "stdlib"


@pytest.mark.parametrize("args", [{"minutes": 0}, {"width": 100}, {"width": 0}])
def test_demo_refuses_what_it_cannot_use(args):
    with pytest.raises(ConfigError, match=f"--{next(iter(args))} "):
        demo.Arguments(**args)


@pytest.mark.demo
def test_demo_runs_whole(tmp_path, capsys):
    args = ["demo", "--blocks", "2", "--width", "32", "--minutes", "1.5", "--batch-size", "2"]
    assert main([*args, "--directory", str(tmp_path / "demo"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    done = lines[-1]
    memory = done["receipt"]["memory"]
    assert memory["measured_bytes"] <= memory["promised_bytes"] <= memory["budget_bytes"]
    after = done["receipt"]["quality"]["after"]
    assert after["bits_per_byte"] < done["receipt"]["quality"]["before"]["bits_per_byte"]
    assert after["bits_per_byte"] < done["bits_per_byte"]["bigram"]
    assert after["bytes"] > 50_000
