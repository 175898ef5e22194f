"""Is every known mistake of block-wise training caught by a test?

`bugs.py` lists mistakes that implementations of DiffusionBlocks made, or could make, by kind. Each
is planted into a copy of the source, a text in the place of another, and the tests named beside it
are run: it is caught when they fail, and they must pass on the copy as it is. Writes
results/bugs.json and results/bugs.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from bugs import BUGS, LEFT_OUT, Bug

from shoestring.training.receipt import environment

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
SECONDS = 300  # for the tests of one bug


def copied(folder: Path) -> Path:
    """What tests need, in a place where it may be spoilt."""
    for name in ("src", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def tested(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """(all pass, the first that does not) of some tests of a copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider",
               *(f"tests/{each}" for each in tests)]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(f"{tests} did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, re.MULTILINE)
    return done.returncode == 0, found[1] if found else ""


def planted(bug: Bug, folder: Path) -> dict[str, Any]:
    """What the tests say of one bug; the copy is as before afterwards."""
    place = folder / "src" / "shoestring" / bug.file
    right = place.read_text(encoding="utf-8")
    if right.count(bug.right) != 1:
        raise SystemExit(f"{bug.what}: {bug.file} has {bug.right!r} {right.count(bug.right)} times")
    try:
        place.write_text(right.replace(bug.right, bug.wrong), encoding="utf-8")
        passed, test = tested(folder, bug.tests)
    finally:
        place.write_text(right, encoding="utf-8")
    return {"kind": bug.kind, "what": bug.what, "file": bug.file, "caught": not passed,
            "by": test}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    by_kind = defaultdict(list)
    for row in result["bugs"]:
        by_kind[row["kind"]].append(row)
    lines = ["| kind of mistake | planted | caught | what was planted |", "|---|---|---|---|"]
    for kind, rows in by_kind.items():
        caught = sum(row["caught"] for row in rows)
        lines.append(f"| {kind} | {len(rows)} | {caught} | {'; '.join(r['what'] for r in rows)} |")
    lines += [f"| {kind} | 0 | | {why} |" for kind, why in result["left_out"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the first two bugs, nothing written")
    parser.add_argument(
        "--only",
        default="",
        help="bugs with this in their description; the stored results of the others stay",
    )
    arguments = parser.parse_args()
    chosen = [bug for bug in BUGS if arguments.only in bug.what][: 2 if arguments.smoke else None]
    rows, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = copied(Path(name))
        tests = tuple(dict.fromkeys(test for bug in chosen for test in bug.tests))
        passed, test = tested(folder, tests)
        if not passed:
            raise SystemExit(f"{test} fails without any bug")
        for bug in chosen:
            rows.append(planted(bug, folder))
            print(json.dumps(rows[-1]), flush=True)
    missed = [row["what"] for row in rows if not row["caught"]]
    result = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        **environment(torch.device("cpu")),
        "seconds": time.monotonic() - started,
        "bugs": rows,
        "left_out": LEFT_OUT,
    }
    if arguments.only and (RESULTS / "bugs.json").is_file():
        again = {row["what"]: row for row in rows}
        known = json.loads((RESULTS / "bugs.json").read_text())
        result["bugs"] = [again.get(row["what"], row) for row in known["bugs"]]
    if not arguments.smoke and len(result["bugs"]) == len(BUGS):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "bugs.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "bugs.md").write_text(table(result))
    if missed:
        raise SystemExit(f"not caught: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
