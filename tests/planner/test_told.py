"""A plan in words: every kind of patch is named, and many spans stay a few lines."""

import pytest

from shoestring.planner import Plan
from shoestring.planner.ways import Way
from shoestring.stack import Span


def made(spans, patches=(), **more):
    known = {
        "budget_bytes": 6 << 30, "peak_bytes": 5 << 30, "by_category": {}, "blocks": 96,
        "instant": "loss backward", "step_seconds": None, "rows": (), "model": "GPT",
    }  # fmt: skip
    return Plan(spans=tuple(spans), patches=tuple(patches), **(known | more))


def alternating(blocks):
    ways = [("keep", {}), ("recompute", {}), ("recompute", {"save": "attention"})]
    return [Span(i, i + 1, *ways[i % 3]) for i in range(blocks)]


def test_many_spans_take_a_line_for_every_way_to_run_a_block():
    lines = str(made(alternating(96))).splitlines()
    assert lines[0] == "Plan for GPT, 96 blocks, within 6.0 GiB:"
    assert lines[1] == "  blocks  keep, 32 blocks: 0, 3, 6, 9, 12, 15, 18, 21, ..."
    assert lines[2].startswith("          recompute, 32 blocks: 1, 4, 7")
    assert lines[3].startswith("          recompute, attention, 32 blocks: 2, 5")
    assert lines[4] == "  peak    5.0 GiB, reached in the loss backward"
    assert len(lines) == 5
    assert max(map(len, lines)) < 100


def test_neighbours_are_a_range_and_one_block_is_not():
    text = str(made([Span(0, 95, "recompute"), Span(95, 96, "keep")], step_seconds=1.5))
    assert "recompute, 95 blocks: 0-94" in text
    assert "keep, 1 block: 95" in text
    assert text.splitlines()[-1] == "  a step  1.5 s"


@pytest.mark.parametrize(
    ("name", "config", "line"),
    [
        ("chunked_loss", {}, "loss    chunked_loss"),
        ("chunked_mlp", {}, "module  chunked_mlp"),
        ("microbatch", {"parts": 4}, "batch   microbatch, parts=4"),
        ("stream_weights", {}, "weights  stream_weights"),
    ],
)
def test_every_patch_is_named_with_what_it_is_done_to(name, config, line):
    assert f"  {line}" in str(made([Span(0, 96, "keep")], [Way(name, config)])).splitlines()


def test_long_settings_are_told_by_their_length():
    config = {"hold": list(range(0, 90, 6)), "rebuild": [[0, 5, []]]}
    line = str(made([Span(0, 90, "recompute", config), Span(90, 96, "keep")])).splitlines()[1]
    assert line == "  blocks  recompute, 90 blocks: 0-89, hold: 15 entries, rebuild: 1 entries"
    short = {"keep_top": 3}
    assert "reversible, 96 blocks: 0-95, keep_top=3" in str(
        made([Span(0, 96, "reversible", short)])
    )
