"""Put the tables that benchmarks wrote into the pages that show them.

A page says where a table comes from with `<!-- table: PATH -->` ... `<!-- end -->`; what stands
between is replaced by the file. `--check` only compares, and exits 1 when a page is behind.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """README and every page under docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """The page with every table as its file has it now."""

    def table(match: re.Match[str]) -> str:
        body = (ROOT / match[2]).read_text().strip()
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return MARK.sub(table, text)


def main() -> int:
    behind = 0
    for page in pages():
        text = page.read_text()
        new = filled(text)
        if new == text:
            continue
        behind += 1
        if "--check" in sys.argv:
            print(f"{page.relative_to(ROOT)} is behind its results; run benchmarks/readme.py")
        else:
            page.write_text(new)
            print(f"{page.relative_to(ROOT)} updated")
    return behind if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
