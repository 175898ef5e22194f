"""docs/budget-page.png: the page of the stored sweep, as Chromium shows it on a laptop.

python benchmarks/planning_time/picture.py
"""

import json
import tempfile
from pathlib import Path

from benchmarks.report.browser import Browser

from shoestring.report.budget import write_budget_page

STORED = Path(__file__).parent / "results" / "sweep.json"
PICTURE = Path(__file__).parents[2] / "docs" / "budget-page.png"
LIMIT = 200_000


def main() -> None:
    data = json.loads(STORED.read_text())
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = write_budget_page(data, Path(folder) / "plan.html", title="Llama, 12 blocks")
        browser.look(width=1100, height=1340)
        browser.open(page)
        browser.picture(PICTURE, whole=False)
    size = PICTURE.stat().st_size
    assert size <= LIMIT, f"{PICTURE} has {size:,} bytes"
    print(f"{PICTURE} ({size:,} bytes)")


if __name__ == "__main__":
    main()
