"""Whole runs on real text: what they leave behind, and how they end."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from shoestring.checkpoint import verify
from shoestring.errors import ConfigError, OutOfBudget, TrainingDiverged
from shoestring.planner import Plan
from shoestring.stack import Span
from shoestring.training.config import RunConfig
from shoestring.training.load import load
from shoestring.training.loop import train


def metrics(run_directory: str | Path, event: str = "step") -> list[dict]:
    lines = (Path(run_directory) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in metrics(config.run.directory)]


def plan_file(path: Path, *, budget: int, blocks: int, keep_top: int | None = None) -> str:
    """A plan made by hand: everything kept, or a reversible stack with its top kept."""
    spans = ()
    if keep_top is not None:
        spans = (Span(0, blocks, "reversible", {"keep_top": keep_top}),)
    made = Plan(
        budget_bytes=budget,
        peak_bytes=budget,
        by_category={},
        instant="backward",
        step_seconds=None,
        spans=spans,
        patches=(),
        rows=(),
        blocks=blocks,
        model="GPT",
    )
    path.write_text(made.to_json())
    return str(path)


def test_a_budgeted_run_keeps_its_promise_and_leaves_a_whole_directory(settings):
    config = settings(
        run={"budget": "8MiB", "steps": 40},
        model={"rule": "feistel", "num_hidden_layers": 2},
        evaluate={"every": 20, "sample_tokens": 4},
        optim={"lr": 1e-2, "accumulate": 2},
        plan={"only": ("reversible",)},
    )
    events = []
    run = train(config, progress=lambda event: events.append(event["event"]))
    left = {path.name for path in run.directory.iterdir()}
    files = {"config.toml", "plan.json", "metrics.jsonl", "receipt.json", ".lock"}
    files |= {"memory.json", "report.html"}
    assert left == files | {"model", "checkpoints"}
    kept = RunConfig.load(run.directory / "config.toml")
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, replace=False))
    assert kept == again  # what repeats a run must not remove it
    plan = Plan.from_json((run.directory / "plan.json").read_text())

    memory = run.receipt["memory"]
    assert memory["promised_bytes"] == plan.peak_bytes
    assert memory["measured_bytes"] <= memory["promised_bytes"] <= memory["budget_bytes"] == 2**23
    assert 0 <= memory["error"] <= 0.03
    assert sum(memory["measured_by_category"].values()) == memory["measured_bytes"]
    assert json.loads((run.directory / "receipt.json").read_text()) == run.receipt

    steps = metrics(run.directory)
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert [line["step"] for line in steps if line["peak_bytes"]] == [1, 2]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    held_out = metrics(run.directory, "evaluation")
    assert [line["step"] for line in held_out] == [0, 20, 40]
    quality = run.receipt["quality"]
    assert quality["after"]["bits_per_byte"] < quality["before"]["bits_per_byte"] - 0.5
    # A uniform guess over the vocabulary, as an untrained model makes it.
    assert quality["before"]["nats_per_token"] == pytest.approx(5.77, abs=0.05)
    assert events[:5] == ["data", "plan", "model", "before", "evaluation"]
    assert events.count("sample") == 3
    assert events[-1] == "saved"

    assert verify(run.directory / "model")
    model, tokenizer = load(run.directory)
    ids = tokenizer("import email", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, run.model.eval()(ids).logits)


def test_two_runs_with_one_seed_are_bit_equal_and_another_seed_is_not(settings, tmp_path):
    changes = {"model": {"rule": "feistel", "dropout": 0.1}}
    weights, sequences = [], []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        config = settings(run={"directory": str(tmp_path / name), "seed": seed}, **changes)
        weights.append(train(config).model.state_dict())
        sequences.append(losses(config))
    assert sequences[0] == sequences[1] != sequences[2]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_evaluating_and_sampling_does_not_change_what_is_learned(settings, tmp_path):
    changes = {"model": {"rule": "feistel", "dropout": 0.1}}
    quiet = settings(run={"directory": str(tmp_path / "quiet")}, **changes)
    busy = settings(evaluate={"every": 1, "sample_tokens": 3}, **changes)
    train(quiet)
    train(busy)
    assert losses(quiet) == losses(busy)


def test_reversible_and_stored_losses_are_equal_over_fifty_steps_with_dropout(settings, tmp_path):
    sequences, weights, saved = [], [], []
    for keep_top in (0, 3):
        config = settings(
            run={"directory": str(tmp_path / str(keep_top)), "steps": 50},
            model={"rule": "feistel", "dropout": 0.1},
            optim={"lr": 1e-2},
            plan={
                "file": plan_file(
                    tmp_path / f"plan-{keep_top}.json", budget=2**30, blocks=3, keep_top=keep_top
                )
            },
        )
        run = train(config)
        sequences.append(losses(config))
        weights.append(run.model.state_dict())
        saved.append(metrics(config.run.directory)[1]["by_category"]["saved"])
    assert len(sequences[0]) == 50
    assert 2 * saved[0] < saved[1]  # the two are run in different ways
    assert sequences[0] == sequences[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_ctrl_c_ends_after_the_step_with_a_saved_model(settings):
    config = settings(run={"steps": 1000})

    def interrupt(event):
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = train(config, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert run.receipt["status"] == "interrupted"
    assert run.receipt["steps"] == len(metrics(config.run.directory)) == 3
    assert verify(run.directory / "model")


def test_a_second_ctrl_c_does_not_wait(settings):
    def interrupt(event):
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(settings(run={"steps": 1000}), progress=interrupt)


def test_a_run_by_the_clock_ends_with_evaluation(settings):
    run = train(settings(run={"steps": 10**6, "minutes": 0.005}))
    assert run.receipt["status"] == "finished"
    assert 1 <= run.receipt["steps"] < 10**6
    assert run.receipt["quality"]["after"] is not None


def test_a_diverged_run_keeps_its_last_sound_weights(settings):
    config = settings(
        run={"steps": 50}, optim={"lr": 1e18, "grad_clip": 0.0}, schedule={"kind": "constant"}
    )
    with pytest.raises(TrainingDiverged, match=r"step \d+: the (loss|gradient|norm)"):
        train(config)
    receipt = json.loads((Path(config.run.directory) / "receipt.json").read_text())
    assert receipt["status"] == "diverged"
    assert receipt["error"].startswith(f"step {receipt['steps'] + 1}: ")
    model, _ = load(config.run.directory)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_step_over_the_budget_stops_the_run_and_says_what_was_promised(settings, tmp_path):
    # Enough to evaluate, not enough to train with everything kept.
    file = plan_file(tmp_path / "plan.json", budget=1_500_000, blocks=3)
    config = settings(plan={"file": file})
    with pytest.raises(OutOfBudget, match=r"step \d: live tensors peaked at .* promised 1\.4 MiB"):
        train(config)
    unguarded = settings(plan={"file": file, "guard": False})
    assert train(unguarded).receipt["memory"]["error"] < 0


def test_an_evaluation_that_cannot_fit_is_refused_before_weights_are_made(settings, tmp_path):
    file = plan_file(tmp_path / "plan.json", budget=200_000, blocks=3)
    events = []
    with pytest.raises(OutOfBudget, match="scoring one held-out row"):
        train(settings(plan={"file": file}), progress=lambda event: events.append(event["event"]))
    assert events == ["data"]


def test_conversations_are_learned_by_their_answers(settings, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} and one?"},
                {"role": "assistant", "content": f"It is {n + 1}."},
            ]
        }
        for n in range(40)
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(data={"source": str(chats), "batch_size": 2})
    train(config)
    answered = metrics(config.run.directory)[0]["tokens"]
    assert 0 < answered < 2 * 31 / 2


@pytest.mark.parametrize("method", ["lora", "quantized_base"])
def test_a_plan_that_trains_other_weights_is_refused_before_anything_is_lost(
    settings, tmp_path, method
):
    file = Path(plan_file(tmp_path / "plan.json", budget=1 << 30, blocks=3))
    plan = json.loads(file.read_text())
    plan["patches"].append({"method": method, "config": {}})
    file.write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=f"has '{method}': a run saves the model"):
        train(settings(plan={"file": str(file)}))
    asked = {"allow": "structural", "budget": "64MiB"}
    with pytest.raises(ConfigError, match=r"plan\.only names 'lora'"):
        train(settings(run=asked, plan={"only": ("keep", "lora")}))
