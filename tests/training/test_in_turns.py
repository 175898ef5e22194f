"""A run whose plan trains one block at a time: only where it is allowed, and within its promise."""

import json
from pathlib import Path

from shoestring.training.loop import train

BUDGET = "2 MiB"
ONLY = ("block_coordinate", "keep")


def test_a_run_in_turns_keeps_its_promise_and_says_what_it_did(settings):
    run = train(settings(run={"budget": BUDGET, "allow": "structural"}, plan={"only": ONLY}))
    memory = run.receipt["memory"]
    assert run.receipt["status"] == "finished"
    assert memory["measured_bytes"] <= memory["promised_bytes"] <= 2**21
    weights = sum(p.nbytes for p in run.model.parameters())
    assert memory["measured_by_category"]["optimizer"] < 2 * weights / 3
    assert "block_coordinate" in {entry["method"] for entry in run.receipt["methods"]}
    plan = json.loads((Path(run.directory) / "plan.json").read_text(encoding="utf-8"))
    assert [w["method"] for w in plan["patches"]] == ["block_coordinate"]
