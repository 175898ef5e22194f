"""A page as one file that loads nothing and needs no script to be read.

Styles and scripts stand in it as they are; a content policy names the scripts by their hashes, so
that nothing else in the page can run, and forbids every load.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from .markup import Html, escaped


def document(
    title: str, body: Html, *, styles: Sequence[str] = (), scripts: Sequence[str] = (),
    images: bool = False,
) -> str:  # fmt: skip
    """The whole file. styles, scripts: files of this package beside those of every page.
    images: whether the body holds some, as data."""
    style = "".join(_file(name) for name in ("style.css", *styles))
    texts = [_file(name) for name in ("page.js", *scripts)]
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {' '.join(map(_hash, texts))}; "
        f"{'img-src data:; ' if images else ''}base-uri 'none'; form-action 'none'"
    )
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{style}</style>"
    )
    run = "\n".join(f"<script>{text}</script>" for text in texts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n'
        f"{run}\n</body>\n</html>\n"
    )


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
