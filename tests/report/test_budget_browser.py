"""The budget page in Chromium: fits, can be read, and a budget picks what it should."""

import pytest
from benchmarks.report.browser import Browser, find_browser

from shoestring.report.budget import write_budget_page

from .conftest import MIB
from .sweeps import point, spans, swept, untimed
from .test_browser import LOOKS, check

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture
def page(tmp_path, browser):
    browser.look(width=1280)
    out = write_budget_page(swept(), tmp_path / "plan.html")
    browser.open(out)
    return out


def hard():
    """Long names, and sixty plans of a deep model."""
    long = "name" * 30
    plans = [
        point(200 + n, 1.6 - n / 100, None, spans=[
            {"start": b, "stop": b + 1, "method": ("keep", "recompute")[b % 2], "config": {}}
            for b in range(96)
        ], patches=[{"method": long, "config": {long: long}}])
        for n in range(60)
    ]  # fmt: skip
    recipes = [point(210 + n, 1.4, None, name=f"{long} {n}", note=long) for n in range(12)]
    return swept(plans=plans, recipes=recipes, blocks=96, timed=False, allow=long, versions=long)


@pytest.mark.parametrize(("width", "dark"), LOOKS)
@pytest.mark.parametrize("data", [swept, untimed, hard])
def test_page_fits_and_can_be_read(browser, tmp_path, data, width, dark):
    check(browser, write_budget_page(data(), tmp_path / "plan.html"), width, dark)


@pytest.mark.parametrize("width", [1280, 390])
def test_where_nothing_fits_the_page_fits_the_window(browser, tmp_path, width):
    data = swept(budget_bytes=MIB)
    check(browser, write_budget_page(data, tmp_path / "plan.html"), width, False)
    assert visible(browser, "#nothing")
    assert browser.evaluate("document.getElementById('answer').innerText") == "nothing fits"


def visible(browser, what):
    return browser.evaluate(f"Boolean(document.querySelector({what!r}).offsetParent)")


def shown(browser):
    """Which plan is shown."""
    return browser.evaluate("[...document.querySelectorAll('.choice')]"
                            ".flatMap((e, i) => e.hidden ? [] : [i])")  # fmt: skip


def slide(browser, budget):
    browser.evaluate(
        f"(() => {{ const s = document.getElementById('slider'); s.value = {int(budget)};"
        " s.dispatchEvent(new Event('input')); })()"
    )


def answer(browser):
    return browser.evaluate("document.getElementById('answer').innerText")


def test_the_slider_moves_plan_numbers_and_lines(browser, page):
    assert visible(browser, "#control")
    assert shown(browser) == [1]
    assert answer(browser) == "250 ms a step, 1.25 \u00d7, peak 30.00 MiB"
    before = browser.evaluate("document.querySelector('.limit').getBoundingClientRect().left")
    slide(browser, 22 * MIB)
    assert shown(browser) == [0]
    assert answer(browser) == "300 ms a step, 1.50 \u00d7, peak 20.00 MiB"
    after = browser.evaluate("document.querySelector('.limit').getBoundingClientRect().left")
    assert after < before
    left = browser.evaluate("document.querySelector('.choice:not([hidden]) .left').innerText")
    assert left.startswith(("2.00", "1.99", "2.01"))
    fits = browser.evaluate("[...document.querySelectorAll('.recipes tbody tr')]"
                            ".map((e) => e.lastElementChild.innerText)")  # fmt: skip
    assert fits == ["too much", "too much"]
    assert browser.evaluate("document.querySelector('.plans .mine').dataset.peak") == str(20 * MIB)


def test_the_thumb_stands_over_the_budget_line(browser, page):
    for width in (1280, 390):
        browser.look(width=width)
        for budget in (21, 32, 43):
            slide(browser, budget * MIB)
            line, thumb = browser.evaluate(
                "(() => { const s = document.getElementById('slider'),"
                " b = s.getBoundingClientRect(),"
                " share = (s.value - s.min) / (s.max - s.min);"
                " return [document.querySelector('.limit').getBoundingClientRect().left + 1,"
                " b.left + 11 + share * (b.width - 22)]; })()"
            )
            assert abs(line - thumb) < 2


@pytest.mark.parametrize(
    ("text", "plan"),
    [("20", 0), ("0.05 GiB", 2), ("31,5", 1), ("29.99", 0), ("45 MB", 2), ("30MiB", 1)],
)
def test_a_budget_may_be_typed(browser, page, text, plan):
    browser.evaluate("document.getElementById('typed').focus()")
    browser.ask("Input.insertText", text=text)
    assert browser.evaluate("document.getElementById('typed').value") == text
    assert shown(browser) == [plan]


def test_what_is_no_budget_changes_nothing(browser, page):
    browser.evaluate("document.getElementById('typed').focus()")
    browser.ask("Input.insertText", text="6 cats")
    assert shown(browser) == [1]
    assert browser.evaluate("document.getElementById('typed').ariaInvalid") == "true"


def press(browser, key, code):
    for kind in ("keyDown", "keyUp"):
        browser.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                    windowsVirtualKeyCode=code)  # fmt: skip


def test_the_keyboard_moves_the_slider(browser, page):
    browser.evaluate("document.getElementById('slider').focus()")
    press(browser, "End", 35)
    assert shown(browser) == [2]
    press(browser, "Home", 36)
    assert shown(browser) == []
    assert visible(browser, "#nothing")
    value = "Number(document.getElementById('slider').value)"
    before = browser.evaluate(value)
    press(browser, "ArrowRight", 39)
    assert browser.evaluate(value) > before
    said = browser.evaluate("document.getElementById('slider').getAttribute('aria-valuetext')")
    assert said.endswith("MiB: nothing fits")


def test_buttons_go_from_plan_to_plan(browser, page):
    browser.evaluate("document.getElementById('more').click()")
    assert shown(browser) == [2]
    assert browser.evaluate("document.getElementById('more').disabled")
    browser.evaluate("document.getElementById('less').click()")
    browser.evaluate("document.getElementById('less').click()")
    assert shown(browser) == [0]
    assert browser.evaluate("document.getElementById('less').disabled")


def test_a_row_and_the_curve_set_the_budget(browser, page):
    browser.evaluate("document.querySelectorAll('.plans tbody tr')[2].click()")
    assert shown(browser) == [2]
    box = browser.evaluate("(() => { const b = document.querySelector('#curve .area')"
                           ".getBoundingClientRect(); return [b.left, b.top]; })()")  # fmt: skip
    for kind in ("mousePressed", "mouseReleased"):
        browser.ask("Input.dispatchMouseEvent", type=kind, x=box[0] + 2, y=box[1] + 40,
                    button="left", clickCount=1)  # fmt: skip
    assert shown(browser) == []


def test_the_control_stays_in_sight(browser, tmp_path):
    for width in (1280, 390):
        browser.look(width=width, height=700)
        browser.open(write_budget_page(swept(), tmp_path / "plan.html"))
        browser.evaluate("window.scrollTo(0, 900)")
        top = "document.getElementById('control').getBoundingClientRect().top"
        assert 0 <= browser.evaluate(top) < 20


def test_without_scripts_it_is_a_static_page(browser, tmp_path):
    browser.look(width=390)
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    browser._events.clear()
    try:
        browser.ask("Page.navigate",
                    url=write_budget_page(swept(), tmp_path / "p.html").as_uri())  # fmt: skip
        browser._wait_for("Page.loadEventFired")
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert shown(browser) == [1]
    assert not visible(browser, "#control")
    assert visible(browser, ".plans")


def test_spans_of_a_sweep_are_drawn_in_the_colour_of_their_way(browser, tmp_path):
    data = swept()
    data["plans"][0]["spans"] = spans(4, save="matmuls")
    browser.look(width=1280)
    browser.open(write_budget_page(data, tmp_path / "plan.html"))
    slide(browser, 21 * MIB)
    found = browser.evaluate(
        "[...document.querySelectorAll('.choice:not([hidden]) .strip i')]"
        ".map((e) => getComputedStyle(e).backgroundColor)"
    )
    assert len(found) == 8
    assert len(set(found)) == 2
    assert len(set(found[:4])) == len(set(found[4:])) == 1
