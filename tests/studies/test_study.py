"""The study as a whole at its smallest: resuming, verdicts, table, page, and the verb."""

import contextlib
import dataclasses
import io
import json

import pytest

from shoestring.checkpoint import Lock
from shoestring.cli.main import main
from shoestring.errors import CheckpointError
from shoestring.studies.compressed_context import claims, measure, page, peers, study

SIZE = dataclasses.replace(study.TINY, names=("float32", "ours 2/2", "KIVI 2", "hqq 2"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "_is_there", lambda name: name != "hqq")
        return folder, study.run_study(folder, SIZE)


def test_every_peer_has_a_row_and_a_missing_one_says_so(ran):
    _, result = ran
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [*SIZE.names[:2], "hqq 2", "KIVI 2"]
    assert rows["hqq 2"]["missing"] == "not installed: hqq"
    assert 0 <= rows["ours 2/2"]["hops_4"] <= 1
    assert rows["float32"]["share_of_16_bits"] == 2.0
    assert result["versions"]["torch"]


def test_a_study_goes_on_where_it_was(ran, monkeypatch):
    folder, result = ran
    stored = json.loads((folder / "result.json").read_text())
    assert stored["rows"] == result["rows"]
    del stored["rows"][1]
    (folder / "result.json").write_text(json.dumps(stored))
    followed = []
    once = measure.follow
    monkeypatch.setattr(measure, "follow", lambda *a: followed.append(a) or once(*a))
    monkeypatch.setattr(study.task, "train", lambda *_: pytest.fail("it was trained already"))
    again = study.run_study(folder, SIZE)
    assert len(followed) == 1
    last = again["rows"][1]
    same = {k: v for k, v in result["rows"][1].items() if k != "seconds"}
    assert {k: v for k, v in last.items() if k != "seconds"} == same


def test_what_is_of_another_study_is_refused(ran):
    folder, _ = ran
    with pytest.raises(CheckpointError, match="of another size"):
        study.run_study(folder, dataclasses.replace(SIZE, rows=5))
    with Lock(folder), pytest.raises(CheckpointError):
        study.run_study(folder, SIZE)


def test_a_damaged_result_is_refused(tmp_path):
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        study.run_study(tmp_path, SIZE)


def test_table_and_page_show_every_row_and_verdict(ran):
    _, result = ran
    table, html = page.table(result), page.page(result)
    for name in SIZE.names:
        assert f"| {name} |" in table
        assert name in html
    assert "not installed: hqq" in table
    assert table.count("**not measured**") == len(claims.verdicts(result))  # nobody was right
    assert "<svg" in html


def call(*args):
    """(exit code, JSON lines, text for people)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, args), "--json"])
    return code, [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()


def test_the_verb_runs_the_smallest_form(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TINY", SIZE)
    code, lines, said = call("study", "compressed-context", "--tiny", "--directory", tmp_path)
    assert code == 0
    assert {row["name"] for row in lines[0]["result"]["rows"]} == set(SIZE.names)
    assert len(lines[0]["verdicts"]) == 7
    assert "KIVI 2" in said
    assert "<svg" in (tmp_path / "study.html").read_text()


def test_the_verb_alone_lists_what_there_is():
    code, lines, said = call("study")
    assert code == 0
    assert "compressed-context" in lines[0]["studies"]
    assert "compressed-context" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [(["compresed-context"], "Did you mean"), (["compressed-context", "--quick", "--tiny"], "one")],
)
def test_mistakes_are_answered_before_anything_runs(args, message):
    code, lines, _ = call("study", *args)
    assert code == 2
    assert message in lines[0]["error"]["message"]


# ---- claims ------------------------------------------------------------------------------------


def row(name, seed=0, part="english", **numbers):
    kinds = {"ours": "ours", "float32": "control"}
    kind = kinds.get(name.split()[0], "simulated")
    return {"part": part, "name": name, "kind": kind, "seed": seed, **numbers}


def judged(*rows):
    return {v.claim.split()[0]: v for v in claims.verdicts({"rows": list(rows)})}


def chain(name, one, four, share=0.3):
    return row(name, part="chains", hops_1=one, hops_4=four, share_of_16_bits=share)


def test_steps_that_fall_with_needles_kept_hold_the_claim():
    plain = chain("float32", 1.0, 0.95, 2.0)
    fell, kept, lost = chain("a", 0.99, 0.5), chain("b", 1.0, 0.95), chain("c", 0.4, 0.0)
    assert judged(plain, fell, lost)["Needles"].verdict == claims.HELD
    assert judged(plain, kept, lost)["Needles"].verdict == claims.NOT
    both = judged(plain, fell, kept, lost)["Needles"]
    assert both.verdict == claims.ONLY
    assert "a (50.0%)" in both.because
    assert judged(plain, lost)["Needles"].verdict == claims.UNKNOWN
    assert judged(chain("float32", 0.1, 0.0, 2.0), chain("a", 0.1, 0.0))["Needles"].verdict == (
        claims.UNKNOWN
    )


def test_the_worst_seed_decides_what_is_neutral():
    seeds = [row("ours 4/2", i, kl=kl) for i, kl in enumerate((0.008, 0.009, 0.012))]
    assert judged(*seeds[:2])["Rotated"].verdict == claims.HELD
    assert judged(*seeds)["Rotated"].verdict == claims.NOT
    assert judged(*seeds, row("ours 4/4", kl=0.003))["Rotated"].verdict == claims.ONLY


def test_ours_is_behind_who_loses_less_in_as_many_bytes():
    ours = row("ours 2/2", kl=0.05, bytes_per_token=3250)
    worse = row("KIVI 2", kl=0.2, bytes_per_token=3000)
    larger = row("fp8", kl=0.01, bytes_per_token=9000)
    assert judged(ours, worse, larger)["Ours"].verdict == claims.HELD
    better = row("KVTC 14.1%", kl=0.04, bytes_per_token=3250)
    assert judged(ours, worse, better)["Ours"].verdict == claims.NOT
    assert "KVTC 14.1% 0.0400" in judged(ours, better)["Ours"].because


def test_a_rotation_that_does_little_does_not_hold():
    with_it = row("rotated 2/2", kl=0.05)
    assert judged(with_it, row("no rotation 2/2", kl=0.2))["The"].verdict == claims.HELD
    assert judged(with_it, row("no rotation 2/2", kl=0.06))["The"].verdict == claims.NOT


def test_scores_must_beat_chance_and_seeds_must_agree():
    scored = row("KVzip 20.4%, 4 bits", kl=0.1)
    chance = [row("random eviction 20.4%, 4 bits", i, kl=kl) for i, kl in enumerate((0.5, 0.15))]
    assert judged(scored, chance[0])["Pairs"].verdict == claims.HELD
    assert judged(scored, *chance)["Pairs"].verdict == claims.NOT
    near = [row("ours 2/2", i, kl=kl) for i, kl in enumerate((0.050, 0.051))]
    far = [row("ours 4/2", i, kl=kl) for i, kl in enumerate((0.010, 0.020))]
    assert judged(*near)["It"].verdict == claims.HELD
    assert judged(*near, *far)["It"].verdict == claims.ONLY


def test_a_needle_test_that_sees_the_loss_does_not_hold_the_claim():
    plain = row("float32", kl=0.0, needles=0.8)
    assert judged(plain, row("a", kl=0.5, needles=0.8))["A"].verdict == claims.HELD
    assert judged(plain, row("a", kl=0.5, needles=0.1))["A"].verdict == claims.NOT
    assert judged(row("float32", kl=0.0, needles=0.0))["A"].verdict == claims.UNKNOWN
