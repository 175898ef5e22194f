"""What was saved comes back: ours, Hugging Face's, reversible or plain; damage is named."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shoestring.checkpoint import read_manifest
from shoestring.data import open_source, train_tokenizer
from shoestring.errors import CheckpointError, ConfigError, DataError
from shoestring.methods.reversible import is_reversible, reversible
from shoestring.training.load import load, load_model
from shoestring.training.loop import train

from .conftest import TEXT


@pytest.fixture
def llama(tmp_path, cache) -> str:
    """A directory with a small Llama of random weights and its tokenizer."""
    tokenizer = train_tokenizer(open_source(TEXT), 320, cache=cache)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            dtype="bfloat16",
        )
    )
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model.eval()(ids).logits


def of_llama(settings, name: str, **changes):
    sections = {"model": {"name": name, **dict.fromkeys(("num_hidden_layers", "hidden_size"))}}
    for section, fields in changes.items():
        sections[section] = {**sections.get(section, {}), **fields}
    return settings(**sections)


def test_a_fine_tuned_llama_is_an_ordinary_hugging_face_directory(settings, llama):
    run = train(of_llama(settings, llama))
    directory = run.directory / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model) is LlamaForCausalLM
    assert torch.equal(logits(model), logits(run.model))
    assert AutoTokenizer.from_pretrained(directory).vocab_size == run.tokenizer.vocab_size
    assert "Trained by Shoestring" in (directory / "README.md").read_text()
    names = {path.name for path in directory.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json", "manifest.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_a_model_carries_the_receipt_and_the_card_of_its_run_under_its_manifest(settings, tmp_path):
    run = train(settings(run={"steps": 2}))
    model = shutil.copytree(run.directory / "model", tmp_path / "given away")
    assert json.loads((model / "receipt.json").read_text()) == run.receipt
    assert (model / "receipt.json").read_bytes() == (run.directory / "receipt.json").read_bytes()
    assert "for 2 updates (finished)" in (model / "README.md").read_text()
    assert {"receipt.json", "README.md"} <= set(read_manifest(model))
    assert torch.equal(logits(load(model)[0]), logits(run.model))
    (model / "receipt.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"receipt\.json has 2 bytes"):
        load(model)


def test_training_starts_from_the_weights_or_from_scratch(settings, llama):
    start = AutoModelForCausalLM.from_pretrained(llama, dtype="float32")
    tuned = train(of_llama(settings, llama, optim={"lr": 1e-6}, run={"steps": 1})).model
    fresh = train(
        of_llama(
            settings,
            llama,
            optim={"lr": 1e-6},
            run={"steps": 1, "seed": 5},
            model={"from_scratch": True},
        )
    ).model
    distance = {
        name: max(
            float((a - b).detach().abs().max())
            for a, b in zip(start.parameters(), model.parameters(), strict=True)
        )
        for name, model in (("tuned", tuned), ("fresh", fresh))
    }
    assert distance["tuned"] < 3e-6
    assert distance["fresh"] > 1e-2
    assert all(p.dtype == torch.float32 for p in (*tuned.parameters(), *fresh.parameters()))


def test_a_reversible_llama_comes_back_reversible_and_serves_as_plain(settings, llama):
    run = train(of_llama(settings, llama, model={"rule": "bdia"}, run={"allow": "structural"}))
    model, _ = load(run.directory)
    assert is_reversible(model)
    assert model.config.shoestring["rule"] == "bdia"
    plain = AutoModelForCausalLM.from_pretrained(run.directory / "model")
    assert not is_reversible(plain)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("rule", ["residual", "feistel"])
def test_our_gpt_comes_back_and_generates(settings, rule):
    run = train(settings(model={"rule": rule}, run={"steps": 2}))
    model, tokenizer = load(run.directory / "model")
    assert is_reversible(model) == (rule != "residual")
    assert torch.equal(logits(model), logits(run.model))
    ids = tokenizer("def ", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 5


def test_a_flipped_bit_is_found_before_anything_is_loaded(settings):
    run = train(settings(run={"steps": 1}))
    weights = run.directory / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 16
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match its checksum"):
        load(run.directory)


def test_a_directory_without_a_manifest_is_loaded_as_it_is(llama):
    model, tokenizer = load(llama)
    assert type(model) is LlamaForCausalLM
    assert tokenizer is not None


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match="there is no model in"):
        load(tmp_path / "run")


def test_a_model_that_cannot_be_had_is_a_config_error(settings, tmp_path, cache):
    tokenizer = train_tokenizer(open_source(TEXT), 320, cache=cache)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = of_llama(
        settings, str(tmp_path / "missing"), data={"tokenizer": str(tmp_path / "tokenizer")}
    )
    with pytest.raises(ConfigError, match="no model can be had from"):
        train(config)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(settings, llama, tmp_path, cache):
    train_tokenizer(open_source(TEXT), 400, cache=cache).save_pretrained(tmp_path / "other")
    config = of_llama(settings, llama, data={"tokenizer": str(tmp_path / "other")})
    with pytest.raises(DataError, match="the tokenizer has ids up to 399 and the model 320"):
        train(config)


def test_rows_longer_than_the_models_positions_are_refused(settings, llama):
    with pytest.raises(ConfigError, match="longer than the model's 64 positions"):
        train(of_llama(settings, llama, data={"sequence_length": 65}))


def test_dropout_beside_a_named_model_is_refused(settings, llama):
    with pytest.raises(ConfigError, match="a named model brings its own dropout"):
        train(of_llama(settings, llama, model={"dropout": 0.1}))


def test_held_out_loss_of_a_model_that_knows_nothing_is_log_vocabulary(settings):
    run = train(settings(run={"steps": 1}))
    before = run.receipt["quality"]["before"]
    assert before["nats_per_token"] == pytest.approx(math.log(320), rel=0.01)
    bits = before["nats_per_token"] * before["tokens"] / math.log(2) / before["bytes"]
    assert before["bits_per_byte"] == pytest.approx(bits)
    assert Path(run.directory).is_dir()


@pytest.mark.slow  # three runs, two of them planned
def test_a_saved_reversible_llama_is_planned_as_what_it_is(settings, llama):
    """Trained further with the default rule: its config says that it is reversible."""
    once = of_llama(
        settings, llama, model={"rule": "feistel", "from_scratch": True}, run={"steps": 1}
    )
    saved = str(train(once).directory / "model")
    for budget in ("200MiB", "1MiB"):
        changes = {"steps": 2, "budget": budget, "directory": f"{once.run.directory}-{budget}"}
        run = train(of_llama(settings, saved, run=changes))
        assert is_reversible(run.model)
        assert {entry["method"] for entry in run.receipt["methods"]} >= {"reversible"}
        memory = run.receipt["memory"]
        assert memory["measured_bytes"] == memory["promised_bytes"]


@pytest.mark.parametrize("rule", ["midpoint", "leapfrog", "bdia", "feistel"])
def test_what_was_made_reversible_in_16_bits_comes_back_as_the_same_function(rule, tmp_path, llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="bfloat16")
    reversible(model, rule=rule)
    assert model.config.shoestring["branches"]
    model.float().save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.config.shoestring == model.config.shoestring
    assert torch.equal(logits(again), logits(model))
    sketch = load_model(tmp_path / "saved", from_scratch=True)
    assert sketch.config.shoestring == model.config.shoestring
