"""Compressed contexts on the command line: calibrated, generated with, and counted."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cli.test_verbs import call
from shoestring.data import open_source, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny Llama and a tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("caches")
    text = folder / "text.txt"
    text.write_text("".join(f"line {k} of a text, {k * k} in all\n" for k in range(2000)))
    tokenizer = train_tokenizer(open_source(text), 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=len(tokenizer), max_position_embeddings=1024,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def calibration(model):
    output = model.parent / "calibration"
    code, lines, _ = call(
        "calibrate", model, "--data", model.parent / "text.txt", "--output", output,
        "--texts", 2, "--tokens", 100,
    )  # fmt: skip
    assert code == 0, lines
    assert lines[0]["tokens"] == 200
    return output


def test_a_text_goes_on_with_a_small_context(model, calibration):
    args = ("generate", model, "--prompt", "line 3 of", "--tokens", 5, "--temperature", 0)
    code, lines, said = call(*args, "--cache", "6bits", "--calibration", calibration)
    assert code == 0
    assert lines[0]["cache_tokens"] > 5
    assert lines[0]["cache_bytes"] > 0
    assert "context:" in said
    assert call(*args, "--cache", "8/8")[1][0]["text"] == call(*args)[1][0]["text"]


def test_forms_are_counted_from_the_config_alone(model, calibration):
    code, lines, said = call(
        "context", model, "--cache", "4/2", "6bits", "--calibration", calibration, "--tokens",
        2000, "--budget", "1MB",
    )  # fmt: skip
    assert code == 0
    forms = {row["cache"]: row for row in lines[0]["forms"]}
    assert forms["float32"]["bytes_per_token"] == 2 * 2 * 16 * 4
    assert forms["float32"]["longest"] == 10**6 // 256
    assert forms["6bits"]["bytes_per_token"] <= 2 * 2 * 16 * 6 / 8
    assert forms["4/2"]["longest"] > forms["16 bits"]["longest"] > forms["float32"]["longest"]
    assert "longest in 1MB" in said
    assert call("context", model, "--budget", "10B")[0] == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--cache", "four"), "4/2"),
        (("--cache", "9/4"), "1 to 8"),
        (("--cache", "10B"), "or more"),
        (("--cache", "4/2", "--calibration", "there"), "without a budget"),
        (("--calibration", "there"), "without a budget"),
        (("--cache", "5bits", "--calibration", "nowhere"), "no calibration"),
    ],
)
def test_caches_that_cannot_be_are_refused(model, args, message):
    code, lines, _ = call("generate", model, "--prompt", "line", "--tokens", 2, *args)
    assert code in (1, 2)
    assert message in str(lines)


def test_text_that_is_too_short_to_calibrate_is_refused(model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    code, lines, _ = call("calibrate", model, "--data", text, "--output", tmp_path / "made")
    assert code == 2
    assert "for 8 texts of 768" in str(lines)
    assert not (tmp_path / "made").exists()
    code, lines, _ = call("calibrate", model, "--texts", 0)
    assert code == 2
