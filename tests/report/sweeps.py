"""A sweep written by hand, as `Sweep.data()` gives it: three plans and two recipes."""

from typing import Any

from .conftest import MIB, history


def point(peak: float, factor: float, seconds: float | None = None, **more: Any) -> dict[str, Any]:
    """A plan of so many MiB; a saved part and weights make up its peak."""
    weights = 4 * MIB
    return {
        "name": "", "peak_bytes": int(peak * MIB), "modelled_bytes": int(peak * MIB * 1.01),
        "by_category": {"weights": weights, "saved": int(peak * MIB) - weights, "cache": 0},
        "instant": "loss backward", "seconds": seconds, "factor": factor,
        "spans": [{"start": 0, "stop": 8, "method": "keep", "config": {}}], "patches": [],
        "note": "", "fidelity": "exact", "history": history(), **more,
    }  # fmt: skip


def spans(redone: int, method: str = "recompute", **config: Any) -> list[dict[str, Any]]:
    return [
        {"start": 0, "stop": redone, "method": method, "config": config},
        {"start": redone, "stop": 8, "method": "keep", "config": {}},
    ]


def swept(**changed: Any) -> dict[str, Any]:
    """Plans of 20, 30 and 40 MiB, recipes of 25 and 44, asked for 32."""
    plans = [
        point(20, 1.5, 0.30, spans=spans(6), patches=[{"method": "chunked_loss", "config": {}}]),
        point(30, 1.25, 0.25, spans=spans(3, save="attention")),
        point(40, 1.0, 0.20),
    ]
    recipes = [
        point(25, 1.6, 0.32, name="checkpoint every block", note="as they do", spans=spans(7)),
        point(44, 1.0, 0.20, name="plain", fidelity="unbiased"),
    ]
    return {
        "format": 1, "model": "GPT", "blocks": 8, "parameters": 1_000_000, "trained": 1_000_000,
        "batch": {"input_ids": [4, 128]}, "device": "cpu", "allow": "exact", "timed": True,
        "budget_bytes": 32 * MIB, "plans": plans, "recipes": recipes, "choices": 57,
        "curve": [[20 * MIB, 1.5], [30 * MIB, 1.25], [40 * MIB, 1.0]], "versions": "torch 2",
    } | changed  # fmt: skip


def untimed() -> dict[str, Any]:
    """The same where nothing was timed."""
    data = swept(timed=False)
    for each in (*data["plans"], *data["recipes"]):
        each["seconds"] = None
    return data
