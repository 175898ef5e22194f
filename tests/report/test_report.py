"""The page of whole, broken and hostile runs."""

import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.errors import CheckpointError, ConfigError, ShoestringError
from shoestring.meter import CATEGORIES
from shoestring.report import memory_json, page, read_run, receipts, write_report

from .conftest import MIB, files, history, metrics, plan, receipt

VOID = {"meta"}


class Reader(HTMLParser):
    """Collects elements, attributes and words, and checks that what opens closes."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


def read(*directories: Path) -> Reader:
    return Reader(page([read_run(each) for each in directories]))


def test_page_holds_everything_in_order(run):
    found = read(run())
    heads = [e[1]["id"] for e in found.elements if e[0] == "section"]
    assert heads == ["receipt", "progress", "memory", "plan", "samples", "settings", "versions"]
    for words in (
        "mine", "finished", "23.0 MiB", "promised 24.0 MiB (+4.3 %)", "190 ms",
        "promised 200 ms (+5.3 %)", "77 % of the budget of 30.0 MiB", "bits a byte (-37.5 %)",
        "Measured: 23.0 MiB, in the loss backward", "Predicted: 23.0 MiB", "budget 30.0 MiB",
        "recompute 3 blocks: 0-2", "segments = 1", "chunked_loss", "keep everything", "too much",
        "def main(", "argv):", "betas 0.9, 0.95", "2.13.0", "a processor",
    ):  # fmt: skip
        assert words in found.text, words
    assert "What is missing" not in found.text


def test_page_loads_nothing_and_runs_its_own_script_only(run):
    found = read(run())
    loading = {"src", "href", "srcset", "action", "poster"}
    for name, attributes in found.elements:
        assert name not in {"link", "img", "iframe", "object", "embed", "base"}
        assert not loading & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
    assert [name for name, _ in found.elements].count("script") == 1
    policy = next(a["content"] for n, a in found.elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_write_report_goes_into_the_run_or_where_it_is_told(run, tmp_path, monkeypatch):
    first, second = run("a"), run("b")
    assert write_report([first]) == first / "report.html"
    assert write_report([first], tmp_path / "x.html").read_text().startswith("<!doctype html>")
    monkeypatch.chdir(tmp_path)
    assert write_report([first, second]) == Path("report.html")
    assert write_report([first]).read_text() == write_report([first]).read_text()


def test_several_runs_are_laid_over_one_another(run):
    slower = receipt() | {"seconds": {"promised_step": 0.4, "measured_step": 0.5, "total": 99.0}}
    config = files()["config.toml"].replace("lr = 0.001", "lr = 0.002")
    found = read(run("first"), run("second", receipt_json=json.dumps(slower), config_toml=config))
    assert "2 runs" in found.text
    assert "first, training" in json.dumps([a for _, a in found.elements])
    assert "500 ms" in found.text
    assert "optim.lr 0.001 0.002" in found.text
    assert "optim.betas" not in found.text
    curves = [a for n, a in found.elements if n == "path" and a.get("class") == "line"]
    assert {a["style"] for a in curves[:2]} == {"stroke:var(--s0)", "stroke:var(--s1)"}


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    found = read(run("x/same"), run("y/same"))
    assert "x/same" in found.text
    assert "y/same" in found.text


# ---- long runs ----------------------------------------------------------------------------------


def test_a_long_run_is_drawn_in_stretches_and_says_so(run):
    lines = metrics(20_000)
    lines[10_000]["loss"] = 99.0
    directory = run(metrics_jsonl="".join(json.dumps(line) + "\n" for line in lines))
    found = read(directory)
    assert "20,000 updates are drawn as 589 stretches of 34" in found.text
    assert "1 points lie above the axis" in found.text
    assert len(page([read_run(directory)])) < 500_000


def test_a_step_made_twice_counts_as_it_was_made_last(run):
    again = [{"event": "resumed", "step": 40}, *metrics()[42:]]
    again[1]["loss"] = 7.25
    lines = "".join(json.dumps(line) + "\n" for line in [*metrics(), *again])
    directory = run(metrics_jsonl=lines)
    record = read_run(directory)
    assert len(record.steps) == 50
    assert record.steps["loss"][40] == 7.25
    assert "update 40: resumed" in read(directory).text


# ---- what is missing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"receipt_json": None}, "There is no receipt.json: the run has not ended"),
        ({"plan_json": None}, "There is no plan.json: nothing was planned"),
        ({"config_toml": None}, "There is no config.toml"),
        ({"memory_json": None}, "There is no memory.json"),
        ({"metrics_jsonl": None}, "metrics.jsonl cannot be read"),
        ({"receipt_json": '{"status": "fin'}, "receipt.json cannot be read"),
        ({"receipt_json": "[1]"}, "receipt.json holds a list where an object was expected"),
        ({"plan_json": "[" * 100_000}, "plan.json cannot be read"),
        ({"config_toml": "= 3"}, "config.toml cannot be read"),
    ],
)
def test_what_is_missing_is_said(run, changed, said):
    assert said in read(run(**changed)).text


def test_a_killed_run_shows_what_it_measured_so_far(run):
    whole = files()["metrics.jsonl"]
    found = read(run(receipt_json=None, memory_json=None, metrics_jsonl=whole[:-30]))
    assert "no receipt" in found.text
    assert "The last line of metrics.jsonl was cut off" in found.text
    assert "23.0 MiB" in found.text
    assert "promised 24.0 MiB" in found.text
    assert "3.200" in found.text


def test_losses_that_are_no_numbers_leave_gaps(run):
    lines = metrics()
    for index, bad in ((10, None), (11, float("nan")), (12, float("inf")), (13, "low")):
        lines[index]["loss"] = bad
    found = read(run(metrics_jsonl="".join(json.dumps(line) + "\n" for line in lines)))
    assert "4 of the 50 steps have no finite loss" in found.text
    line = next(a["d"] for n, a in found.elements if n == "path" and a.get("class") == "line")
    assert line.count("M") == 2
    assert "nan" not in line


def test_lines_in_the_middle_that_cannot_be_read_are_counted(run):
    lines = files()["metrics.jsonl"].splitlines()
    lines[5:5] = ["{broken", "[]"]
    found = read(run(metrics_jsonl="\n".join(lines)))
    assert "2 of the 55 lines of metrics.jsonl cannot be read" in found.text
    assert "the first of them line 6" in found.text


def test_an_empty_run_is_a_page(run):
    found = read(run(receipt_json=None, plan_json=None, memory_json=None, metrics_jsonl=""))
    assert "No step and no evaluation was recorded" in found.text


@pytest.mark.parametrize(
    ("status", "kind"), [("finished", "good"), ("interrupted", "early"), ("diverged", "bad")]
)
def test_how_a_run_ended_is_a_badge(run, status, kind):
    ended = receipt() | {"status": status, "error": "step 7: the loss is nan"}
    found = read(run(receipt_json=json.dumps(ended)))
    assert f"badge {kind}" in [a.get("class") for _, a in found.elements]
    assert "step 7: the loss is nan" in found.text


def test_a_budget_far_above_is_named_and_not_drawn(run):
    rich = receipt()
    rich["memory"]["budget_bytes"] = 9000 * MIB
    found = read(run(receipt_json=json.dumps(rich)))
    assert "The budget of 8.79 GiB lies far above this picture." in found.text
    assert "level" not in [a.get("class") for _, a in found.elements]


def test_categories_of_the_meter_all_have_a_place_and_a_colour():
    assert set(receipts.CATEGORIES) == set(CATEGORIES)


def test_memory_json_is_what_the_page_reads(run):
    text = memory_json(history(), plan()["history"])
    assert read_run(run(memory_json=text)).memory["measured"] == history()
    assert (
        "There is no prediction"
        in read(run("unplanned", memory_json=memory_json(history(), None), plan_json=None)).text
    )


# ---- no run at all ------------------------------------------------------------------------------


def test_what_is_no_run_is_refused(run, tmp_path):
    directory = run()
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is no run.*expected a run directory.*Did you mean"):
        write_report([directory / "model"])
    with pytest.raises(CheckpointError, match=r"none does not exist.*expected a run directory"):
        write_report([tmp_path / "none"])
    with pytest.raises(CheckpointError, match=r"config.toml is no directory.*Did you mean .*mine"):
        write_report([directory / "config.toml"])
    with pytest.raises(CheckpointError, match=r"is no run.*Did you mean .*mine"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match="of no run"):
        write_report([])
    with pytest.raises(ConfigError, match="is a directory"):
        write_report([directory], tmp_path)


# ---- hostile runs -------------------------------------------------------------------------------

EVIL = "</span></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&lt;"


def test_text_of_a_run_never_becomes_markup(run):
    lines = [*metrics(), {"event": "sample", "step": 9, "prompt": EVIL, "text": EVIL},
             {"event": EVIL, "step": 3, "message": EVIL}]  # fmt: skip
    evil_plan = plan() | {"model": EVIL, "instant": EVIL}
    evil_plan["spans"] = [{"start": 0, "stop": 8, "method": EVIL, "config": {EVIL: EVIL}}]
    evil_plan["patches"] = [{"method": EVIL, "config": {EVIL: EVIL}}]
    evil_plan["rows"] = [{"name": EVIL, "peak_bytes": 1, "seconds": 1, "instant": EVIL}]
    evil = receipt() | {"status": EVIL, "error": EVIL, "versions": {EVIL: EVIL}}
    evil["memory"] |= {"measured_by_category": {EVIL: 5}}
    step = history() | {"phases": [[EVIL, 0]], "bytes": {EVIL: [1] * 10}}
    directory = run(
        "<b>bold<b>",
        metrics_jsonl="".join(json.dumps(line) + "\n" for line in lines),
        plan_json=json.dumps(evil_plan),
        receipt_json=json.dumps(evil),
        memory_json=json.dumps({"measured": step, "predicted": step}),
        config_toml="[run]\n" + f"{json.dumps(EVIL)} = {json.dumps(EVIL)}\n",
    )
    found = read(directory)
    names = [name for name, _ in found.elements]
    assert names.count("script") == 1
    assert "img" not in names
    assert not any(key.startswith("on") for _, attributes in found.elements for key in attributes)
    assert EVIL in "".join(found.words)
    assert "<b>bold<b>" in found.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([EVIL, 10**400, -1, 1e308, "\ud800", "\x00", "step", "evaluation"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)  # fmt: skip


def paths_of(value, before=()):
    """Every place inside nested objects and lists."""
    yield before
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, dict | list):
        for key, each in list(inner)[:12]:
            yield from (
                paths_of(each, (*before, key))
                if isinstance(each, dict | list)
                else [(*before, key)]
            )


def put(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


WHOLE = {
    "receipt.json": receipt(),
    "plan.json": plan(),
    "memory.json": {"measured": history(), "predicted": history()},
    "metrics.jsonl": metrics()[:6],
}
PLACES = [(name, path) for name, value in WHOLE.items() for path in paths_of(value)]


@given(st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=4))
def test_any_value_anywhere_still_makes_a_page(changes):
    whole = dict(WHOLE)
    for (name, path), new in changes:
        try:
            whole[name] = put(whole[name], path, new)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    with tempfile.TemporaryDirectory() as folder:
        for name, value in whole.items():
            lines = value if name == "metrics.jsonl" and isinstance(value, list) else [value]
            text = "\n".join(json.dumps(line) for line in lines)
            (Path(folder) / name).write_text(text, encoding="utf-8")
        path = write_report([Path(folder)])
        markup = path.read_text(encoding="utf-8")
    names = [name for name, _ in Reader(markup).elements]
    assert names.count("script") == 1
    assert "img" not in names


@given(st.binary(max_size=300), st.sampled_from(sorted(files())))
def test_any_bytes_in_any_file_still_make_a_page(content, name):
    with tempfile.TemporaryDirectory() as folder:
        for each, text in files().items():
            (Path(folder) / each).write_text(text)
        (Path(folder) / name).write_bytes(content)
        Reader(write_report([Path(folder)]).read_text(encoding="utf-8"))


@given(st.text())
def test_any_sample_is_shown_as_text(sample):
    with tempfile.TemporaryDirectory() as folder:
        line = json.dumps({"event": "sample", "step": 1, "prompt": "", "text": sample})
        (Path(folder) / "metrics.jsonl").write_text(line + "\n")
        markup = write_report([Path(folder)]).read_text(encoding="utf-8")
    shown = re.search(r"<pre>(.*?)</pre>", markup, re.DOTALL)[1]
    assert set(re.findall(r"<[^>]*>", shown)) <= {'<span class="prompt">', "<span>", "</span>"}


def test_a_run_that_cannot_be_written_to_says_so(run, tmp_path):
    with pytest.raises(ShoestringError, match=r"[Cc]annot .*write|cannot be written"):
        write_report([run()], tmp_path / "no" / "such" / "folder.html")


# ---- runs that went on, and settings that no page can hold --------------------------------------


def test_a_receipt_of_an_earlier_stop_is_not_the_end_of_the_run(run):
    earlier = receipt() | {"steps": 30}
    found = read(run(receipt_json=json.dumps(earlier)))
    assert "to update 50, and has not ended" in found.text
    assert "badge early" in [a.get("class") for _, a in found.elements]
    assert "went on after this receipt" in found.text
    assert "finished" not in found.text
    # Steps of an earlier life beyond the stop are no sign of it: the last line counts.
    lines = [*metrics(50), metrics(50)[31]]
    directory = run("back", receipt_json=json.dumps(earlier),
                    metrics_jsonl="".join(json.dumps(line) + "\n" for line in lines))  # fmt: skip
    assert not read_run(directory).went_on


def test_no_plan_is_a_budget_of_none_only_where_the_settings_say_so(run):
    config = files()["config.toml"]
    gone = {"plan_json": None, "receipt_json": None, "metrics_jsonl": None}
    found = read(run("planned", config_toml=config, **gone)).text
    assert "run.budget = none" not in found
    assert "There is no plan.json" in found
    free = config.replace('"30MiB"', '"none"')
    assert "run.budget = none" in read(run("free", config_toml=free, **gone)).text


@pytest.mark.parametrize("seed", ["9" * 5000, "0x" + "f" * 5000])
def test_a_seed_of_thousands_of_digits_still_makes_a_page(run, seed):
    directory = run(config_toml=f"[run]\nseed = {seed}\nlist = [{seed}]\ntable = {{a = {seed}}}\n")
    markup = write_report([directory]).read_text(encoding="utf-8")
    assert "config.toml cannot be read" in markup or "too long to be written" in markup
    write_report([directory, run("other")], directory / "both.html")


def test_a_value_error_of_the_page_is_a_checkpoint_error(run, monkeypatch):
    def broken(runs):
        raise ValueError("what nobody thought of")

    monkeypatch.setattr("shoestring.report.page", broken)
    with pytest.raises(CheckpointError, match="no page can be made of mine: what nobody"):
        write_report([run()])
