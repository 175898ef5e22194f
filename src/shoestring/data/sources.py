"""Where documents come from, by one short word: `open_source(spec)`.

    stdlib                    the Python standard library's own source on this machine
    notes.txt                 a text file (its tail is what gets held out)
    folder/                   every file with a declared suffix, in order of path
    rows.jsonl, rows.parquet  a field of each row, or conversations (`messages`)
    hf:NAME[:config][:split]  a Hugging Face data set

Nothing is read until the source is iterated, and nothing is kept. What cannot be read is an error
that names the file and the place, never a document silently left out; the one exception is the
standard library, whose few files in other encodings are fixtures of its own tests.
"""

import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import ConfigError, DataError, closest
from .documents import Document, Source, check_share
from .records import TEXT, hub_source, read_jsonl, read_parquet
from .text import read_text, tail_start

STDLIB = "stdlib"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".csv", ".tsv")
CODE_SUFFIXES = tuple(
    ".py .pyi .c .h .cc .cpp .hpp .cu .js .ts .java .go .rs .rb .sh .sql .jl .r .lua .kt".split()
)
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + CODE_SUFFIXES + JSONL_SUFFIXES[:2] + PARQUET_SUFFIXES
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


def open_source(
    spec: str | Path, *, field: str | None = None, suffixes: Sequence[str] = SUFFIXES
) -> Source:
    """The documents that `spec` names (see above).

    field: the field of a row to read; by default `text`, or `messages` where there is no `text`.
    suffixes: which files of a folder are read.  DataError when the source cannot be used.
    """
    text, field = str(spec).strip(), field or TEXT
    if text == STDLIB:
        return stdlib_source()
    if text.startswith("hf:"):
        return hub_source(text, field)
    path = Path(text).expanduser()
    if not text or not path.exists():
        raise _missing(text, path)
    if path.is_dir():
        return _folder_source(path, field, _checked(suffixes))
    return _file_source(path, field)


class TextFile(Source):
    """One text file; its tail is held out, since it is a single document."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), lambda: read_text(path))
        self._path = path

    def split(self, held_out: float = 0.05) -> tuple[Source, Source]:
        """(train, held out): the file up to a line end, and the rest. DataError if one is empty."""
        check_share(held_out)
        path = self._path

        def part(is_tail: bool) -> Callable[[], Iterator[Document]]:
            def read() -> Iterator[Document]:
                next(read_text(path))  # says what is wrong with the file before it is cut
                cut = tail_start(path, held_out)
                if not 0 < cut < path.stat().st_size:
                    raise DataError(
                        f"{path} is too short to hold out {held_out:.1%} of it",
                        expected="a file with text on both sides of the cut",
                        hint="Name held-out data of its own.",
                    )
                size = path.stat().st_size
                return read_text(path, start=cut if is_tail else 0, stop=size if is_tail else cut)

            return read

        return (
            Source(f"{path} (train)", part(False)),
            Source(f"{path} (held out)", part(True)),
        )


def stdlib_source() -> Source:
    """Every `.py` file of the running Python's standard library that is not empty and is UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def read() -> Iterator[Document]:
        for path in _files(root, (".py",), leave_out=_NOT_STDLIB):
            if path.stat().st_size and _is_utf8(path):
                yield from read_text(path)

    source = Source("the Python standard library", read)
    if next(_files(root, (".py",), leave_out=_NOT_STDLIB), None) is None:
        raise DataError(
            f"the standard library's source is not at {root}",
            expected="a Python whose library is installed as .py files",
            hint="Name a text file or a folder.",
        )
    return source


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _file_source(path: Path, field: str) -> Source:
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return Source(str(path), lambda: read_jsonl(path, field))
    if suffix in PARQUET_SUFFIXES:
        return Source(str(path), lambda: read_parquet(path, field))
    return TextFile(path)


def _folder_source(folder: Path, field: str, suffixes: tuple[str, ...]) -> Source:
    found = list(_files(folder, suffixes))
    if not found:
        raise DataError(
            f"{folder} holds no file with a suffix I read",
            expected=", ".join(suffixes),
            hint="Name the suffixes of your files, or another folder.",
        )
    if len(found) == 1:
        return _file_source(found[0], field)

    def read() -> Iterator[Document]:
        for path in _files(folder, suffixes):
            if path.stat().st_size:  # an empty file among others is ordinary (__init__.py)
                yield from _file_source(path, field)

    return Source(str(folder), read)


def _files(
    root: Path, suffixes: tuple[str, ...], leave_out: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Files below `root`, hidden ones left out, in an order that no file system decides."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(x for x in folders if x not in leave_out and not x.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(folder, name)


def _checked(suffixes: Sequence[str]) -> tuple[str, ...]:
    bad = [s for s in suffixes if not s.startswith(".")]
    if bad or not suffixes or isinstance(suffixes, str):
        raise ConfigError(
            f"suffixes = {suffixes!r} cannot be used",
            expected="one or more suffixes that begin with a dot, such as ('.txt', '.md')",
        )
    return tuple(s.lower() for s in suffixes)


def _missing(text: str, path: Path) -> DataError:
    hint = None
    if text and path.parent.is_dir():
        hint = closest(path.name, [STDLIB, *(x.name for x in path.parent.iterdir())])
    if hint is None:
        hint = f"For a Hugging Face data set write 'hf:{text or 'NAME'}'."
    return DataError(
        f"there is no data at {text!r}",
        expected="'stdlib', a file, a folder or 'hf:NAME'",
        hint=hint,
    )
