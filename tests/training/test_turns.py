"""A run that trains blocks in turns, with and without denoising: one block at a time, as promised,
and the decoder that comes out is the plain one."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import shoestring
from shoestring.errors import ConfigError, OutOfBudget
from shoestring.objectives.scaffolding import NAME
from shoestring.stack import Stack
from shoestring.training import loop
from shoestring.training.config import DenoiseConfig, RunConfig, TurnsConfig
from shoestring.training.loop import resume, train
from shoestring.training.turns import Objective

LAYERS = {"num_hidden_layers": 4}
MIXED = {"mode": "mixed", "condition_size": 8}


def config(settings: Any, **sections: Any) -> RunConfig:
    turns = sections.pop("turns", {"blocks": 2, "steps": 3})
    return settings(model=LAYERS, turns=turns, **sections)


def lines(run: Any, event: str = "step") -> list[dict[str, Any]]:
    text = (Path(run.directory) / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def blocks_moved(monkeypatch: pytest.MonkeyPatch, whole: RunConfig) -> tuple[list[set[int]], Any]:
    """Which blocks of two layers each update changed; what is outside of them counts as -1."""
    moved: list[set[int]] = []
    update = loop.update

    def watched(step: int, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        places = {
            id(p): place // 2 for place, layer in enumerate(Stack.of(model).blocks)
            for p in layer.parameters()
        }  # fmt: skip
        before = copy.deepcopy([p.detach() for p in model.parameters()])
        found = update(step, model, optimizer, *args, **kwargs)
        pairs = list(zip(model.parameters(), before, strict=True))
        layers = [
            any(not torch.equal(p, was) for p, was in pairs if any(p is q for q in inside))
            for inside in (list(layer.parameters()) for layer in Stack.of(model).blocks)
        ]
        assert sum(layers) == 2  # all of the block's
        moved.append({places.get(id(p), -1) for p, was in pairs if not torch.equal(p, was)})
        states = {places.get(id(p), -1) for p in optimizer.state}
        assert states <= moved[-1]
        return found

    monkeypatch.setattr(loop, "update", watched)
    return moved, train(whole)


@pytest.mark.parametrize("mode", ["off", "mixed", "both", "pure"])
def test_only_the_block_whose_turn_it_is_moves_or_has_states(settings, monkeypatch, mode):
    whole = config(
        settings, denoise={**MIXED, "mode": mode}, optim={"weight_decay": 0.5, "lr": 1e-2},
        run={"steps": 9},
    )  # fmt: skip
    moved, run = blocks_moved(monkeypatch, whole)
    assert all(len(each) == 1 for each in moved)
    assert moved[0] == moved[1] == moved[2] != moved[3] == moved[4] == moved[5]
    assert run.receipt["status"] == "finished"


def test_updates_take_turns_between_the_two_objectives(settings):
    run = train(config(settings, denoise={**MIXED, "every": 3}, run={"steps": 7}))
    told = [line["objective"] for line in lines(run)]
    assert told == ["denoise", "denoise", "next token"] * 2 + ["denoise"]
    plain = train(config(settings))
    assert "objective" not in lines(plain)[0]


def test_the_model_that_is_saved_is_the_plain_decoder(settings):
    run = train(config(settings, denoise=MIXED))
    model, _ = shoestring.load(run.directory)
    plain, _ = shoestring.load(train(settings(model=LAYERS)).directory)
    assert list(model.state_dict()) == list(plain.state_dict())
    with safe_open(Path(run.directory) / "model" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if NAME in name]
    assert run.receipt["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name
    assert not any(hasattr(layer, NAME) for layer in Stack.of(model).blocks)
    assert any(NAME in name for name in run.model.state_dict())  # goes on in checkpoints


def interrupted(whole: RunConfig, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stops after `at` updates, as by a signal."""
    vote = loop._vote

    def votes(job: Any, *args: Any) -> Any:
        found = vote(job, *args)
        return type(found)(found.failed, found.to_save, job.updates == at, found.late)

    monkeypatch.setattr(loop, "_vote", votes)
    assert train(whole).receipt["status"] == "interrupted"
    monkeypatch.setattr(loop, "_vote", vote)


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_run_that_is_resumed_is_the_same_bit_for_bit(settings, monkeypatch, tmp_path, at):
    whole = config(settings, denoise=MIXED, optim={"accumulate": 2}, run={"steps": 7})
    ref = train(whole).model.state_dict()
    interrupted(whole, at, monkeypatch)
    found = resume(whole.run.directory).model.state_dict()
    assert list(found) == list(ref)
    for name, value in ref.items():
        assert torch.equal(found[name], value), name


def test_what_decides_the_blocks_may_not_change_in_between(settings, monkeypatch):
    whole = config(settings, denoise=MIXED)
    interrupted(whole, 2, monkeypatch)
    file = Path(whole.run.directory) / "config.toml"
    text = file.read_text(encoding="utf-8")
    for old, new, name in [
        ("blocks = 2", "blocks = 4", "turns.blocks"),
        ("sigma_max = 80.0", "sigma_max = 8.0", "denoise.sigma_max"),
    ]:
        file.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ConfigError, match=name):
            resume(whole.run.directory)


def test_draws_depend_on_seed_update_and_microbatch(settings):
    whole = config(settings, denoise={**MIXED, "mode": "pure"}, run={"steps": 2, "replace": True})
    losses = [line["loss"] for line in lines(train(whole))]
    assert [line["loss"] for line in lines(train(whole))] == losses
    assert losses[0] != losses[1]
    made = Objective(whole, lambda model, batch: torch.zeros(()), torch.device("cpu"))
    made._loss = lambda kind, draw: draw  # type: ignore[method-assign,assignment]
    drawn: list[torch.Tensor] = []
    for step in (1, 1, 2):
        draw: Any = made.at(step)
        drawn += [draw(1, 2, 3, 4).noise, draw(1, 2, 3, 4).noise]
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[4])


@pytest.mark.parametrize("mode", ["off", "pure", "both"])
def test_peaks_are_promised_and_budgets_kept(settings, mode):
    whole = {"denoise": {**MIXED, "mode": mode}, "run": {"steps": 3}}
    kept = train(config(settings, **whole)).receipt
    assert "recompute" not in {each["method"] for each in kept["methods"]}
    promised = kept["memory"]["promised_bytes"]
    assert 0 <= promised - kept["memory"]["measured_bytes"] < 64
    whole["run"] = {"steps": 3, "budget": str(promised - 1)}
    less = train(config(settings, **whole)).receipt
    assert less["memory"]["promised_bytes"] < promised
    assert less["memory"]["measured_bytes"] <= less["memory"]["promised_bytes"]
    after = [each["quality"]["after"]["nats_per_token"] for each in (kept, less)]
    assert after[0] == pytest.approx(after[1], rel=1e-5)


def test_frozen_weights_are_streamed_where_the_budget_is_small(settings):
    shape = {**LAYERS, "hidden_size": 96, "intermediate_size": 512}
    whole = {"turns": {"blocks": 4, "steps": 2}, "denoise": MIXED}
    with pytest.raises(OutOfBudget, match=r"More turns\.blocks") as smallest:
        train(settings(model=shape, run={"budget": "1MiB"}, **whole))
    budget = smallest.value.smallest_bytes
    loose = train(settings(model=shape, **whole)).receipt
    tight = train(settings(model=shape, run={"budget": str(budget)}, **whole)).receipt
    assert {"stream_weights", "recompute"} <= {each["method"] for each in tight["methods"]}
    assert tight["memory"]["measured_bytes"] <= tight["memory"]["promised_bytes"] <= budget
    assert budget < loose["memory"]["promised_bytes"]
    after = [each["quality"]["after"]["nats_per_token"] for each in (loose, tight)]
    assert after[0] == pytest.approx(after[1], rel=1e-5)


def test_settings_that_cannot_be_used_are_told_before_anything_is_made(settings):
    with pytest.raises(ConfigError, match=r"denoise\.mode = 'mixed' without turns\.blocks"):
        settings(denoise={"mode": "mixed"})
    with pytest.raises(ConfigError, match="nearest: 2 or 4"):
        config(settings, turns={"blocks": 3})
    with pytest.raises(ConfigError, match=r"model\.rule is set beside turns\.blocks"):
        settings(model={**LAYERS, "rule": "feistel"}, turns={"blocks": 2})
    with pytest.raises(ConfigError, match=r"plan\.file is set beside"):
        config(settings, plan={"file": "plan.json"})
    for wrong in ({"every": 1}, {"weight": 0.0}, {"sigma_min": 90.0}, {"overlap": 1.0},
                  {"sigma_std": 0.0}, {"condition_size": 0}):  # fmt: skip
        with pytest.raises(ConfigError, match=f"denoise.{next(iter(wrong))}"):
            DenoiseConfig(**wrong)
    for wrong in ({"blocks": -1}, {"steps": 0}):
        with pytest.raises(ConfigError, match=f"turns.{next(iter(wrong))}"):
            TurnsConfig(**wrong)


def test_the_tables_are_written_and_read_back(settings, tmp_path):
    whole = config(settings, denoise={**MIXED, "weight": 0.03})
    file = tmp_path / "run.toml"
    file.write_text(whole.to_toml(), encoding="utf-8")
    assert RunConfig.load(file) == whole
