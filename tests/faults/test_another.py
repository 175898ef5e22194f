"""Going on with another model than the one that was saved, or on another machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.checkpoint.manifest import write_manifest
from shoestring.data import open_source, train_tokenizer
from shoestring.errors import ConfigError
from shoestring.training.loop import resume, train

from .conftest import TEXT
from .test_resume import CutError, assert_same_run, cut_at
from .victims import small


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, cache) -> Path:
    """Llama in `base`, and in `run` a run that tunes it and was cut off in step 3."""
    place = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOESTRING_CACHE", str(cache))
        tokenizer = train_tokenizer(open_source(str(TEXT)).split(0.2)[0], 320)
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        ))  # fmt: skip
        for part in (model, tokenizer):
            part.save_pretrained(place / "base")
        for name in ("run", "whole"):
            config = small(place / name, TEXT, model=named(place / "base"))
            if name == "whole":
                train(config)
                continue
            with pytest.raises(CutError):
                train(config, progress=cut_at(3))
    return place


def named(base: Path) -> dict[str, Any]:
    shape = dict.fromkeys(("hidden_size", "num_hidden_layers"))
    return {"name": str(base), "rule": "residual", "dropout": 0.0, **shape}


@pytest.fixture
def tuning(stopped, tmp_path, settings) -> Path:
    """A copy of both, to do with as one likes."""
    place = shutil.copytree(stopped, tmp_path / "place")
    config = settings(place / "run", model=named(place / "base"))
    (place / "run" / "config.toml").write_text(config.to_toml())
    return place


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def state_file(run: Path) -> Path:
    return run / "checkpoints" / "step-2" / "state.json"


@pytest.mark.parametrize(
    ("fields", "named_field"),
    [
        ({"rms_norm_eps": 1e-3}, r"model\.config\.rms_norm_eps is 0\.001 now, and was 1e-06"),
        ({"num_hidden_layers": 3}, r"model\.config\.num_hidden_layers is 3 now, and was 2"),
        ({"attention_dropout": 0.5}, r"model\.config\.attention_dropout is 0\.5 now"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
         r"model\.config\.rope_parameters\.rope_theta is 5\.0 now, and was 10000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_edited_config_of_the_model_is_named_by_its_field(tuning, fields, named_field):
    change(tuning / "base" / "config.json", **fields)
    with pytest.raises(ConfigError, match=named_field):
        resume(tuning / "run")


def test_other_weights_under_the_same_name_are_noticed(tuning):
    file = tuning / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] += 1e-4
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.name \(its weights\) is '\w+' now, and was"):
        resume(tuning / "run")


@pytest.mark.parametrize("way", ["as it was", "another name for dtype", "weights gone"])
def test_what_does_not_change_the_model_does_not_stop_it(tuning, way):
    if way == "another name for dtype":
        change(tuning / "base" / "config.json", dtype="bfloat16", architectures=["Other"])
    if way == "weights gone":  # they were read once, and are in the checkpoint since
        (tuning / "base" / "model.safetensors").unlink()
    resume(tuning / "run")
    assert_same_run(tuning / "whole", tuning / "run")


def test_a_state_without_the_fields_of_the_model_is_still_read(tuning):
    file = state_file(tuning / "run")
    facts = json.loads(file.read_text())
    assert facts["format"] == 2
    new = {n for n in facts["identity"] if n.startswith("model.config.") or "weights" in n}
    assert len(new) > 10
    identity = {n: value for n, value in facts["identity"].items() if n not in new}
    facts = {n: value for n, value in facts.items() if n != "machine"}
    file.write_text(json.dumps({**facts, "format": 1, "identity": identity}))
    write_manifest(file.parent)
    resume(tuning / "run")
    assert_same_run(tuning / "whole", tuning / "run")


def test_a_field_that_only_one_version_of_transformers_has_says_nothing(tuning):
    file = state_file(tuning / "run")
    facts = json.loads(file.read_text())
    del facts["identity"]["model.config.mlp_bias"]
    file.write_text(json.dumps(facts))
    write_manifest(file.parent)
    with pytest.raises(ConfigError, match=r"model\.config\.mlp_bias is False now, and was None"):
        resume(tuning / "run")
    facts["machine"]["transformers"] = "5.0.0"
    file.write_text(json.dumps(facts))
    write_manifest(file.parent)
    assert resume(tuning / "run").receipt["steps"] == 6


def told(run: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == "other machine"]


def test_on_the_same_machine_nothing_is_said(tuning):
    resume(tuning / "run")
    assert told(tuning / "run") == []


def test_other_threads_are_told_and_the_run_goes_on(tuning):
    file = tuning / "run" / "config.toml"
    file.write_text(file.read_text().replace("threads = 1", "threads = 2"))
    try:
        events: list[dict[str, Any]] = []
        assert resume(tuning / "run", progress=events.append).receipt["steps"] == 6
    finally:
        torch.set_num_threads(1)
    (line,) = told(tuning / "run")
    assert line["changed"] == {"threads": [1, 2]}
    assert line["message"] == "threads 1 then, 2 now"
    assert any(event["event"] == "other machine" for event in events)


def test_another_device_is_told(tuning):
    file = state_file(tuning / "run")
    facts = json.loads(file.read_text())
    facts["machine"]["device"] = "NVIDIA H100"
    file.write_text(json.dumps(facts))
    write_manifest(file.parent)
    resume(tuning / "run")
    (line,) = told(tuning / "run")
    assert line["changed"]["device"][0] == "NVIDIA H100"
