"""The page with a budget slider as text: what stands in it without a script."""

import re
from html.parser import HTMLParser

import pytest

from shoestring.errors import ConfigError
from shoestring.report.budget import budget_page, write_budget_page
from shoestring.report.sheet import in_seconds, picked, sheet_of

from .conftest import MIB
from .sweeps import point, swept, untimed

VOID = {"meta", "input", "br", "img"}


class Reader(HTMLParser):
    """Visible text by the id or class of what it stands in; refuses tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.seen: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, "hidden" in dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        silent = any(hidden or tag in ("style", "script") for tag, hidden in self.open)
        if not silent and data.strip():
            self.seen.append(data.strip())


def read(**changed):
    return Reader(budget_page(swept(**changed)))


def test_without_a_script_the_plan_of_the_budget_is_shown_and_no_other():
    seen = read().seen
    assert "30.0 MiB" in seen
    assert "for budgets from 30.0 MiB to 40.0 MiB" in seen
    assert "2.0 MiB of the budget is left" in seen
    assert seen.count("One step: 23.0 MiB, in the loss backward") == 1
    assert "Budget" not in seen


def test_every_plan_is_in_the_table():
    page = budget_page(swept())
    table = page[page.index('<section id="plans">') :]
    rows = re.findall(r"<tr[^>]*data-peak=\"(\d+)\">(.*?)</tr>", table)
    assert [int(peak) for peak, _ in rows] == [20 * MIB, 30 * MIB, 40 * MIB]
    assert "chunked_loss" in rows[0][1]
    assert "6 recompute; 2 keep" in rows[0][1]
    assert "3 recompute, attention; 5 keep" in rows[1][1]
    assert "1.25 \u00d7" in rows[1][1]


def test_recipes_are_held_against_the_plan_of_their_peak_and_of_their_time():
    page = budget_page(swept())
    every = page[page.index(">A</b>checkpoint every block") :]
    words = re.sub("<[^>]+>", "|", every[: every.index("</tr>")])
    assert "25.0 MiB" in words
    assert "300 ms |-6.2" in words  # 1.5 against 1.6
    assert "20.0 MiB |-20.0" in words  # 20 MiB against 25
    assert "fits" in words
    plain = page[page.index(">B</b>plain") :]
    assert "too much" in plain[: plain.index("</tr>")]
    assert "unbiased" in plain[: plain.index("</tr>")]


def test_a_recipe_below_the_smallest_plan_has_a_dash():
    data = swept(recipes=[point(10, 0.9, 0.1, name="magic")])
    magic = budget_page(data)
    row = magic[magic.index(">A</b>magic") :]
    assert row[: row.index("</tr>")].count("&ndash;") == 2


def test_nothing_fits_is_said_where_nothing_does():
    seen = read(budget_bytes=10 * MIB).seen
    assert "Nothing fits" in seen
    assert "The smallest plan needs 20.0 MiB" in seen
    assert "The plan" not in seen
    assert "Nothing fits" not in read().seen


def test_without_a_budget_the_fastest_plan_is_shown():
    assert "for budgets from 40.0 MiB on" in read(budget_bytes=None).seen


def test_where_nothing_was_timed_no_seconds_are_told():
    page = Reader(budget_page(untimed()))
    text = " ".join(page.seen)
    assert "nothing was timed" in text
    assert not re.search(r"\d m?s\b", text)
    assert "work, keeping everything = 1" in text


def test_page_loads_nothing_and_names_its_scripts():
    page = budget_page(swept())
    tags = Reader(page).tags
    assert all(tag not in ("link", "img", "iframe") and "src" not in at for tag, at in tags)
    assert "http" not in page.replace("http-equiv", "")
    policy = next(at["content"] for _, at in tags if at.get("http-equiv"))
    assert policy.count("'sha256-") == page.count("<script>") == 2
    assert "default-src 'none'" in policy


def test_names_are_text_and_not_markup():
    evil = "<script>alert(1)</script>"
    data = swept(model=evil, recipes=[point(25, 1.6, 0.32, name=evil, note=evil)])
    data["plans"][0]["patches"] = [{"method": evil, "config": {evil: evil}}]
    page = budget_page(data, title=evil)
    assert evil not in page
    assert page.count("&lt;script&gt;") > 5


def test_only_what_fits_is_picked():
    plans = swept()["plans"]
    assert [picked(plans, n * MIB) for n in (19.9, 20, 29.9, 30, 40, 99)] == [None, 0, 0, 1, 2, 2]


def test_axes_hold_every_plan_and_recipe():
    sheet = sheet_of(swept())
    assert sheet.unit == "MiB"
    assert sheet.budgets.low < 20
    assert sheet.budgets.high > 44
    assert sheet.memory.low == 0 < 40 < sheet.memory.high


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5.00 s"), (0.25, "250 ms"), (12.34, "12.3 s"), (0.0042, "4.20 ms"), (90, "1 min 30 s")],
)
def test_seconds_keep_their_zeros(seconds, text):
    assert in_seconds(seconds) == text


def test_a_plan_without_instants_has_no_picture():
    data = swept()
    data["plans"][1]["history"] = None
    assert "One step: " not in " ".join(Reader(budget_page(data)).seen)


def test_page_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "plan.html"
    assert write_budget_page(swept(), out) == out
    assert out.read_text() == budget_page(swept())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    with pytest.raises(ConfigError, match="is a directory"):
        write_budget_page(swept(), tmp_path)
