"""The report page put together: what runs leave behind, section by section."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .charts import swatch
from .document import document
from .markup import Html, join, tag
from .memory import memory
from .plans import COLOURS, method_colours, plan
from .progress import TRAINING, Drawn, curves
from .receipts import DASH, at_the_peak, badge, facts, side_by_side, tiles
from .run import RunRecord, dig, mapping, number, text
from .summary import summary_of

_SAMPLES = 12
"""Most samples of a run that are shown: the latest."""
_HELD = 50_000
"""Most characters shown of any one text of a run."""


def page(runs: Sequence[RunRecord]) -> str:
    """The whole page for one run, or for several over one another."""
    drawn = _drawn(runs)
    title = drawn[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = join(_header(drawn, title), tag("main", *_sections(drawn)), _footer(runs))
    return document(f"{title} - Shoestring report", body)


def _sections(drawn: Sequence[Drawn]) -> Iterable[Html]:
    runs = [each.run for each in drawn]
    yield _receipt(drawn)
    yield _section("Progress", "progress", curves(drawn))
    yield _section("Memory of one update", "memory", tag("div", memory(drawn), cls="stack"))
    colours = method_colours(run.plan for run in runs)
    yield _section("Plan", "plan", *_each(drawn, lambda run: plan(run, colours)))
    yield _section("Samples", "samples", *_each(drawn, _samples))
    yield _section("Settings", "settings", _settings(drawn))
    yield _section("Versions and hardware", "versions", _environment(drawn))


def _section(title: str, name: str, *content: str) -> Html:
    return tag("section", tag("h2", title), *content, id=name)


def _each(drawn: Sequence[Drawn], show: Any) -> list[Html]:
    """Something of every run, under its name where there are several."""
    return [
        tag("div", Html() if each.alone else tag("h3", _named(each), cls="run"), show(each.run),
            cls="card")
        for each in drawn
    ]  # fmt: skip


def _drawn(runs: Sequence[RunRecord]) -> list[Drawn]:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # the same name in two places
        names = [f"{run.directory.parent.name}/{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{index}: {name}" for index, name in enumerate(names, start=1)]
    alone = len(runs) == 1
    return [
        Drawn(run, name, TRAINING if alone else COLOURS[index % len(COLOURS)], alone)
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def _named(each: Drawn) -> Html:
    return join(swatch(each.colour), each.name)


# ---- the top ------------------------------------------------------------------------------------


def _header(drawn: Sequence[Drawn], title: str) -> Html:
    brand = tag("p", "Shoestring run report", cls="brand")
    if not drawn[0].alone:
        names = [tag("li", _named(each)) for each in drawn]
        return tag("header", brand, tag("h1", title), tag("ul", *names, cls="legend"))
    run = drawn[0].run
    head = tag("h1", title, " ", badge(summary_of(run)))
    return tag("header", brand, head, tag("ul", *(tag("li", f) for f in facts(run)), cls="facts"))


def _receipt(drawn: Sequence[Drawn]) -> Html:
    summaries = [(each, summary_of(each.run)) for each in drawn]
    if drawn[0].alone:
        top = tiles(drawn[0].run)
    else:
        top = side_by_side([each.run for each in drawn], [_named(each) for each in drawn])
    named = [("" if each.alone else each.name, summary) for each, summary in summaries]
    errors = [
        tag("div", tag("b", f"{name}: " if name else "", summary.status), tag("p", summary.error),
            cls="notice bad")
        for name, summary in named
        if summary.error
    ]  # fmt: skip
    return _section("Receipt", "receipt", *errors, *map(_missing, drawn), top, at_the_peak(named))


def _missing(each: Drawn) -> Html:
    if not each.run.missing:
        return Html()
    head = "What is missing" if each.alone else f"What is missing of {each.name}"
    return tag("div", tag("b", head), tag("ul", *(tag("li", m) for m in each.run.missing)),
               cls="notice")  # fmt: skip


# ---- the rest -----------------------------------------------------------------------------------


def _samples(run: RunRecord) -> Html:
    if not run.samples:
        return tag("p", "No sample was recorded (evaluate.sample_tokens).", cls="nothing")
    shown = []
    for sample in reversed(run.samples[-_SAMPLES:]):  # the latest first
        prompt, new = text(sample, "prompt") or "", text(sample, "text") or ""
        head = tag("h4", f"after {number(sample, 'step'):,.0f} updates")
        said = tag("pre", tag("span", _cut(prompt), cls="prompt"), tag("span", _cut(new)))
        shown.append(tag("div", head, said, cls="sample"))
    earlier = shown[1:]
    if earlier:
        words = f"{len(earlier)} earlier" if len(earlier) > 1 else "an earlier one"
        earlier = [tag("details", tag("summary", words), *earlier)]
    key = tag("p", "The prompt is grey, what the model went on with is not.", cls="note")
    return join(key, shown[0], *earlier)


def _cut(text: str) -> str:
    left = len(text) - _HELD
    return text if left <= 0 else f"{text[:_HELD]} ... ({left:,} more characters)"


def _settings(drawn: Sequence[Drawn]) -> Html:
    if drawn[0].alone:
        return tag("div", _config(drawn[0].run), cls="card")
    parts = [
        tag("details", tag("summary", _named(each)), _config(each.run), cls="card")
        for each in drawn
    ]
    return join(_differences(drawn), *parts)


def _config(run: RunRecord) -> Html:
    if not run.config:
        return tag("p", "There are no settings.", cls="nothing")
    loose = {name: value for name, value in run.config.items() if not isinstance(value, Mapping)}
    sections = {name: value for name, value in run.config.items() if name not in loose}
    tables = [_config_section(*each) for each in [*sections.items(), ("", loose)] if each[1]]
    return tag("div", *tables, cls="columns")


def _config_section(name: str, section: Mapping[str, Any]) -> Html:
    rows = [tag("tr", tag("th", key), tag("td", _value(value))) for key, value in section.items()]
    return tag("div", tag("h4", name), tag("table", *rows, cls="settings"), cls="group")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or DASH
    return _cut(_words(value)) or DASH


def _words(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no integer of more than some thousands of digits
        return "a number too long to be written"


def _differences(drawn: Sequence[Drawn]) -> Html:
    """Only the settings that are not the same in all runs."""
    flat = [_flat(each.run.config) for each in drawn]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [
        tag("tr", tag("th", key), *(tag("td", settings.get(key, DASH)) for settings in flat))
        for key in keys
        if len({settings.get(key) for settings in flat}) > 1
    ]
    if not rows:
        return tag("p", "All settings are the same.", cls="nothing")
    head = tag("tr", tag("td"), *(tag("th", _named(each)) for each in drawn))
    table = tag("table", tag("thead", head), tag("tbody", *rows), cls="numbers receipts")
    return tag("div", tag("h3", "What differs"), tag("div", table, cls="scroll"), cls="card")


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{section}.{key}": _value(value)
        for section, settings in config.items()
        for key, value in mapping(settings).items()
    }


def _environment(drawn: Sequence[Drawn]) -> Html:
    columns = [_machine(each.run) for each in drawn]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not keys:
        return tag("p", "They are written into the receipt, which is not there.", cls="nothing")
    head = Html()
    if not drawn[0].alone:
        names = (tag("th", _named(each)) for each in drawn)
        head = tag("thead", tag("tr", tag("td"), *names))
    rows = [tag("tr", tag("th", k), *(tag("td", c.get(k) or DASH) for c in columns)) for k in keys]
    table = tag("table", head, tag("tbody", *rows), cls="settings machine")
    return tag("div", tag("div", table, cls="scroll"), cls="card")


def _machine(run: RunRecord) -> dict[str, str]:
    found: dict[str, str] = {}
    for section in ("hardware", "versions"):
        for key, value in mapping(run.receipt, section).items():
            if isinstance(value, Mapping):
                value = ", ".join(f"{k}={v}" for k, v in value.items())
            found[key] = "" if value is None else _cut(_words(value))
    for key in ("processes", "seed"):
        if (value := number(run.receipt, key)) is not None:
            found[key] = f"{value:.0f}"
    for key in ("digest", "tokenizer"):
        if (digest := dig(run.receipt, "data", key)) is not None:
            found[f"data: {key}"] = _cut(_words(digest))
    return found


# ---- the end ------------------------------------------------------------------------------------


def _footer(runs: Sequence[RunRecord]) -> Html:
    where = [tag("li", str(run.directory)) for run in runs]
    return tag("footer", tag("p", "Made by shoestring report from"), tag("ul", *where))
