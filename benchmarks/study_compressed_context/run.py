"""What does a compressed context lose, in words, needles, copies and in steps?

Runs `shoestring study compressed-context` whole (three quarters of an hour on one core) and stores
its result and the table made of it. A study that was ended goes on where it was.

    python benchmarks/study_compressed_context/run.py [--smoke | --table | --again]
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from shoestring.studies.compressed_context import page, study
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the tiny form; nothing is stored")
    parser.add_argument("--directory", default="runs/study-compressed-context")
    parser.add_argument("--table", action="store_true", help="only the table, of what is stored")
    parser.add_argument("--again", action="store_true", help="measure ours again, not the others")
    given = parser.parse_args()
    path = RESULTS / "study_compressed_context.json"
    if given.table:
        result = json.loads(path.read_text())
    elif given.smoke:
        with tempfile.TemporaryDirectory() as folder:
            print(page.table(study.run_study(Path(folder), study.TINY, told=print)))
        return
    else:
        stored = Path(given.directory) / study.RESULT
        if given.again and stored.exists():
            known = json.loads(stored.read_text())
            known["rows"] = [row for row in known["rows"] if row["kind"] != "ours"]
            stored.write_text(json.dumps(known, indent=1) + "\n")
        result = study.run_study(Path(given.directory), study.FULL, told=print)
        result["question"] = (__doc__ or "").splitlines()[0]
        result["environment"] = environment(torch.device("cpu"))
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(page.write_page(result, Path(given.directory) / "study.html"))
    rows, judged = page.tables(result)
    (RESULTS / "study_compressed_context.md").write_text(rows)
    (RESULTS / "verdicts.md").write_text(judged)
    print(rows, judged, sep="\n")


if __name__ == "__main__":
    main()
