"""Verdicts and bars of the study of block-wise training, on made-up numbers for each outcome."""

import pytest

from shoestring.studies.diffusion_blocks import claims
from shoestring.studies.diffusion_blocks.size import (
    ENDS,
    GREEDY,
    LOG,
    LONG,
    RECOMPUTED,
    SHALLOW,
    TOTAL,
    UNIFORM,
)


def arm(name, scores, part="text", **more):
    """Rows of an arm, one for each seed."""
    return [
        {"part": part, "name": name, "seed": seed, "score": score, "peak_bytes": None, **more}
        for seed, score in enumerate(scores)
    ]


def judged(word, *arms):
    result = {"rows": [row for rows in arms for row in rows]}
    return next(v for v in claims.verdicts(result) if word in v.claim)


WHOLE = arm(ENDS, [4.0, 5.0, 6.0])


def test_nothing_is_claimed_without_rows():
    found = claims.verdicts({"rows": []})
    assert {each.verdict for each in found} == {claims.UNKNOWN}
    assert claims.bars({"rows": []}) == []


@pytest.mark.parametrize(
    ("three", "four", "verdict"),
    [
        ([4.1, 5.1, 6.1], [4.0, 5.0, 6.0], claims.HELD),
        ([4.1, 5.1, 6.1], [4.4, 5.5, 6.6], claims.ONLY),
        ([4.2, 5.2, 6.2], [4.4, 5.5, 6.6], claims.NOT),
    ],
)
def test_as_good_is_judged_by_the_mean_ratio_seed_by_seed(three, four, verdict):
    found = judged("equal updates of each", WHOLE, arm("3 blocks", three), arm("4 blocks", four))
    assert found.verdict == verdict
    assert "bits per character, 3 blocks: 1.0" in found.because


def test_a_seed_without_its_pair_is_not_compared():
    found = judged("equal updates of each", WHOLE[:1], arm("3 blocks", [4.0, 50.0]))
    assert found.verdict == claims.HELD


def test_means_are_over_the_seeds_that_all_arms_have():
    rows = [arm(ENDS, [4.0, 9.0]), arm("2 blocks", [5.0]), arm("3 blocks", [5.5, 1.0]),
            arm("4 blocks", [6.0, 1.0])]  # fmt: skip
    found = judged("2 or 3", *rows)
    assert "end to end 4.0000, 2 blocks 5.0000" in found.because
    assert found.verdict == claims.NOT


def test_equal_total_is_judged_of_its_own_arm():
    near, far = arm(TOTAL, [4.0, 5.0, 6.1]), arm(TOTAL, [5.0, 6.0, 7.0])
    assert judged("in all", WHOLE, near).verdict == claims.HELD
    assert judged("in all", WHOLE, far).verdict == claims.NOT
    assert judged("in all", WHOLE, arm("3 blocks", [4.0, 5.0, 6.0])).verdict == claims.UNKNOWN


@pytest.mark.parametrize(
    ("one", "two", "three", "four", "verdict"),
    [
        ([4.0, 4.0], [3.0, 3.0], [3.5, 3.5], [3.9, 3.9], claims.HELD),
        ([4.0, 4.0], [3.6, 3.6], [3.5, 3.5], [3.4, 3.4], claims.NOT),
        ([3.0, 4.0], [3.1, 3.1], [3.5, 3.5], [3.9, 3.9], claims.NOT),  # not in every seed
    ],
)
def test_the_best_number_of_blocks(one, two, three, four, verdict):
    rows = [arm(ENDS, one), arm("2 blocks", two), arm("3 blocks", three), arm("4 blocks", four)]
    assert judged("2 or 3", *rows).verdict == verdict
    assert judged("2 or 3", *rows[:3]).verdict == claims.UNKNOWN


@pytest.mark.parametrize(
    ("word", "others"),
    [
        ("edges", (UNIFORM, LOG)),
        ("layers of one", (SHALLOW,)),
        ("as long as all", (LONG,)),
        ("greedy", (GREEDY,)),
    ],
)
def test_better_is_lower_in_every_seed(word, others):
    ours = arm("3 blocks", [1.0, 2.0, 3.0])
    behind = [arm(name, [1.1, 2.2, 3.3]) for name in others]
    mixed = [arm(name, [1.1, 1.9, 3.3]) for name in others]
    assert judged(word, ours, *behind).verdict == claims.HELD
    assert judged(word, ours, *mixed).verdict == claims.NOT
    assert judged(word, ours).verdict == claims.UNKNOWN
    if len(others) > 1:
        assert judged(word, ours, behind[0], mixed[1]).verdict == claims.ONLY


def peaks(name, size, part="text"):
    return [{"part": part, "name": name, "seed": 0, "score": 1.0, "peak_bytes": size}]


def test_memory_by_the_factor():
    whole = peaks(ENDS, 1000)
    assert judged("factor", whole, peaks("2 blocks", 540)).verdict == claims.HELD
    assert judged("factor", whole, peaks("2 blocks", 560)).verdict == claims.NOT
    both = judged("factor", whole, peaks("2 blocks", 540), peaks("4 blocks", 300))
    assert both.verdict == claims.ONLY
    assert "0.300 of 1/4" in both.because


def recomputed(size, **more):
    return [{
        "part": "text", "name": RECOMPUTED, "seed": 0, "peak_bytes": size, "equal": True,
        "seconds_ratio": 1.3, "compared": 5, **more,
    }]  # fmt: skip


def test_recomputing_is_the_rival_in_memory():
    whole = peaks(ENDS, 1000)
    less = judged("less memory than recomputing acti", whole, recomputed(600),
                  peaks("2 blocks", 540))  # fmt: skip
    more = judged("less memory than recomputing acti", whole, recomputed(500),
                  peaks("2 blocks", 540))  # fmt: skip
    assert (less.verdict, more.verdict) == (claims.HELD, claims.NOT)


def test_the_front_asks_for_quality_and_memory_at_once():
    def front(score, peak):
        ours = [{"part": "text", "name": "2 blocks", "seed": 0, "score": score,
                 "peak_bytes": peak}]  # fmt: skip
        return judged("no worse than", peaks(ENDS, 1000), recomputed(600), ours).verdict

    assert front(0.99, 540) == claims.HELD
    assert front(1.01, 540) == claims.NOT
    assert front(0.99, 640) == claims.NOT


def reads(*shares):
    read = [{"right": 1.0, "other": 1 + share} for share in shares]
    return arm("2 blocks", [1.0, 1.0], read=read)


def test_a_block_reads_its_condition_where_anothers_is_worse():
    assert judged("reads", reads(0.5, 0.02)).verdict == claims.HELD
    only = judged("reads", reads(0.5, 0.001))
    assert only.verdict == claims.ONLY
    assert "block 2 of 2: +0.1%" in only.because
    assert judged("reads", reads(0.0, -0.01)).verdict == claims.NOT


def test_bars_are_met_or_missed_and_name_the_arm_that_wins():
    rows = [*WHOLE, *arm("3 blocks", [4.2, 5.25, 6.3]), *arm(SHALLOW, [4.3, 5.3, 6.2])]
    found = claims.bars({"rows": rows})
    assert [each.status for each in found] == ["missed", "missed"]
    assert {each.best for each in found} == {ENDS}
    near = [*WHOLE, *arm("3 blocks", [3.9, 4.9, 5.9]), *arm(SHALLOW, [4.3, 5.3, 6.2])]
    found = claims.bars({"rows": near})
    assert [each.status for each in found] == ["met", "met"]
    assert {each.best for each in found} == {"3 blocks"}


def test_a_front_asks_for_three_seeds_of_every_number_of_blocks():
    def status(*seeds):
        rows = [row for count, of in zip((2, 3, 4), seeds, strict=True)
                for row in arm(f"{count} blocks", [1.0] * of)]  # fmt: skip
        return [each.status for each in claims.bars({"rows": rows}) if "front" in each.bar]

    assert status(3, 3, 3) == ["measured"]
    assert status(3, 1, 3) == ["not all seeds"]
    assert status(3, 0, 3) == []


def test_where_it_is_the_wrong_tool_is_said_from_the_numbers():
    whole = [{**row, "peak_bytes": 1000} for row in WHOLE]
    rows = [
        *whole, *recomputed(500), *arm(TOTAL, [8.0, 9.0, 10.0]), *arm("3 blocks", [4.5, 5.5, 6.5]),
        *reads(0.5, 0.0),
    ]  # fmt: skip
    said = " ".join(claims.wrong_tool({"rows": rows}))
    assert "shared out among 3 blocks" in said
    assert "recomputing takes 0.50 of the memory in 1.30 of the time" in said
    assert "block 2 of 2 (text)" in said
    better = [*whole, *arm("3 blocks", [3.0, 4.0, 5.0])]
    assert claims.wrong_tool({"rows": better}) == [
        "Nothing that was measured here does better than blocks."
    ]


def test_a_shallow_network_that_wins_with_as_much_work_is_named_first():
    behind, ahead = arm(LONG, [3.0, 4.0, 5.0]), arm(LONG, [5.0, 6.0, 7.0])
    ours = arm("3 blocks", [3.5, 4.5, 5.5])
    said = claims.wrong_tool({"rows": [*WHOLE, *ours, *behind]})
    assert "Where one machine does all the work" in said[0]
    assert "1.1" in said[0]
    assert len(said) == 1
    assert "one machine" not in " ".join(claims.wrong_tool({"rows": [*WHOLE, *ours, *ahead]}))


def test_end_to_end_wins_by_name_where_it_does():
    rows = [*WHOLE, *arm("3 blocks", [4.5, 5.5, 6.5])]
    said = " ".join(claims.wrong_tool({"rows": rows}))
    assert "end to end is the best, and 3 blocks have 1.1" in said
