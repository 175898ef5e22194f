"""The page in Chromium: fits a phone, can be read, has no errors, loads nothing, opens in time.

Skipped where there is no Chromium (on Debian: apt-get install chromium).
"""

import json
from pathlib import Path

import pytest
from benchmarks.report.browser import Browser, find_browser

from shoestring.report import write_report

from .conftest import history, metrics, plan, receipt

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no chromium on this machine")

LOOKS = [(width, dark) for width in (1280, 390) for dark in (False, True)]
LONG = "a-directory-with-a-name-that-does-not-end-" * 2
# The text of an element against what lies behind it, by the formula of WCAG 2.
CONTRAST = """(() => {
  const light = (c) => c.map((v) => v / 255).map((v) =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = (c) => {
    const [r, g, b] = light(c);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parts(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    const a = luminance(parts(getComputedStyle(e).color)), b = luminance(behind(e).slice(0, 3));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found[walker.currentNode.data] = ratio;
  }
  return found;
})()"""
# What sticks out of the window and is not inside something that scrolls by itself.
OUTSIDE = """[...document.querySelectorAll("body *")].filter((e) =>
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
  && !e.closest(".scroll, pre")).map((e) => e.outerHTML.slice(0, 120))"""
# Words of an axis that lie over one another.
OVERLAPS = """[...document.querySelectorAll(".x, .y")].flatMap((axis) => {
  const boxes = [...axis.children].map((e) => [e.textContent, e.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
    .filter(([, q]) => p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom)
    .map(([b]) => `${a} over ${b}`));
})"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture
def hard(run) -> Path:
    """A run whose words are long: names, settings, samples and messages."""
    long_plan = plan()
    long_plan["patches"] = [{"method": "m" * 60, "config": {"key" * 10: "v" * 80}}]
    said = receipt() | {"error": "e" * 300}
    said["data"]["source"] = "/" + "deep/" * 40 + "file.txt"
    lines = [
        *metrics(400),
        {"event": "sample", "step": 400, "prompt": "p" * 500, "text": "t" * 999},
    ]
    return run(
        LONG,
        plan_json=json.dumps(long_plan),
        receipt_json=json.dumps(said),
        metrics_jsonl="".join(json.dumps(line) + "\n" for line in lines),
        memory_json=json.dumps({"measured": history(), "predicted": None}),
        config_toml=f'[{"section" * 8}]\n{"key" * 20} = "{"v" * 200}"\n',
    )


def check(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.look(width=width, dark=dark)
    browser.open(page)
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE) == []
    assert browser.evaluate(OVERLAPS) == []
    assert browser.evaluate(CONTRAST) == {}


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_page_fits_and_can_be_read(browser, run, width, dark):
    check(browser, write_report([run()]), width, dark)


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_long_words_stay_inside(browser, hard, width, dark):
    check(browser, write_report([hard]), width, dark)


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_several_runs_fit(browser, run, hard, tmp_path, width, dark):
    runs = [run("one"), run("two", receipt_json=None, plan_json=None), run("three"), hard]
    check(browser, write_report(runs, tmp_path / "all.html"), width, dark)


def test_the_last_number_of_an_axis_ends_with_it(browser, run):
    lines = "".join(json.dumps(line) + "\n" for line in metrics(5000))
    browser.look(width=390)
    browser.open(write_report([run(metrics_jsonl=lines)]))
    ends = browser.evaluate("""[...document.querySelectorAll("figure")].flatMap((figure) => {
      const last = figure.querySelector(".x span:last-child");
      const end = figure.querySelector(".area").getBoundingClientRect().right;
      return last ? [last.getBoundingClientRect().right - end] : [];
    })""")
    assert len(ends) >= 4
    assert all(end < 3 for end in ends), ends


@pytest.mark.parametrize("missing", ["receipt_json", "plan_json", "memory_json", "metrics_jsonl"])
def test_page_of_a_part_of_a_run_fits(browser, run, missing):
    check(browser, write_report([run(**{missing: None})]), 390, False)


def test_a_pointer_is_told_the_values(browser, run):
    browser.look(width=1280, height=900)
    browser.open(write_report([run()]))
    area = "document.querySelector('#memory [data-points]')"
    browser.evaluate(f"{area}.scrollIntoView({{block: 'center'}})")
    box = browser.evaluate(f"(() => {{ const b = {area}.getBoundingClientRect();"
                           " return [b.left, b.top, b.width, b.height]; })()")  # fmt: skip
    left, top, width, height = box
    browser.point_at(left + width * 4 / 9, top + height / 2)
    told = browser.evaluate(f"{area}.querySelector('.tip').innerText")
    lines = told.split("\n")
    assert lines[:2] == ["loss backward", "4"]
    assert dict(zip(lines[::2], lines[1::2], strict=True))["saved"] == "9.00 MiB"
    assert lines[-2:] == ["in all", "23.00 MiB"]
    browser.point_at(5, 5)
    assert browser.evaluate(f"{area}.querySelector('.tip').hidden")


def test_a_script_in_a_sample_does_not_run(browser, run):
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    line = json.dumps({"event": "sample", "step": 1, "prompt": evil, "text": evil})
    browser.look(width=1280)
    browser.open(write_report([run(metrics_jsonl=line)]))
    assert browser.evaluate("document.title") == "mine - Shoestring report"
    assert browser.errors == []


def test_page_opens_in_time(browser, run):
    """The bar is 2 s, for 100,000 updates: benchmarks/report holds the stored numbers."""
    lines = "".join(json.dumps(line) + "\n" for line in metrics(20_000))
    page = write_report([run(metrics_jsonl=lines)])
    browser.look(width=1280)
    assert min(browser.open(page) for _ in range(3)) < 2
