"""Text files as UTF-8 documents, in pieces, with the exact place of what is wrong.

Files are read in pieces of about a megabyte, cut at line ends, so that a file of any size can be
encoded without being held. Bytes are kept as they are: no newline is translated.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .documents import Document, content_key

PIECE_BYTES = 1 << 20
_HEAD_BYTES = 8192
_EXPECTED = "UTF-8 text"


def check_head(path: Path) -> None:
    """DataError when the file is missing, unreadable, empty or binary by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error})",
            expected="a readable file",
            hint="Check the path and its permissions.",
        ) from error
    if not head:
        raise DataError(
            f"{path} is empty",
            expected=_EXPECTED,
            hint="Look whether the file was written completely, or name another source.",
        )
    _check_binary(head, path, 0)


def _check_binary(block: bytes, path: Path, offset: int) -> None:
    zero = block.find(b"\0")
    if zero < 0:
        return
    is_utf16 = offset == 0 and block[:2] in (b"\xff\xfe", b"\xfe\xff")
    raise DataError(
        f"{path} is {'UTF-16' if is_utf16 else 'binary'} (a zero byte at byte {offset + zero})",
        expected=_EXPECTED,
        hint="Save it as UTF-8." if is_utf16 else "Convert it to text, or leave it out.",
    )


def decode(block: bytes, path: Path, offset: int) -> str:
    """`block`, which begins at byte `offset` of the file, as text."""
    _check_binary(block, path, offset)
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{path} is not UTF-8: byte {at} is 0x{block[error.start]:02x} ({error.reason})",
            expected=_EXPECTED,
            hint="Save it as UTF-8, or leave it out.",
        ) from None


def file_key(path: Path) -> bytes:
    """Hash of a file's bytes; equal to `content_key` of its text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest()


def read_text(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[Document]:
    """Bytes start..stop of a file as pieces; all but the last have `ends` False.

    The whole file's pieces share one key, a part's pieces have their own.
    """
    check_head(path)
    is_whole = start == 0 and stop is None
    stop = path.stat().st_size if stop is None else stop
    key = file_key(path) if is_whole else None
    for offset, block in _blocks(path, start, stop):
        text = decode(block, path, offset)
        ends = offset + len(block) >= stop
        yield Document(str(path), text, key=key or content_key(block), ends=ends)


def _blocks(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes), cut at line ends, or between characters where a line is too long."""
    rest = b""
    with path.open("rb") as file:
        file.seek(start)
        while start + len(rest) < stop:
            read = file.read(min(PIECE_BYTES, stop - start - len(rest)))
            block = rest + read
            cut = len(block) if start + len(block) >= stop or not read else _cut(block)
            yield start, block[:cut]
            start += cut
            rest = block[cut:]
            if not read:  # the file became shorter while it was read
                return


def _cut(block: bytes) -> int:
    line = block.rfind(b"\n") + 1
    if line:
        return line
    cut = len(block)
    while cut > len(block) - 4 and block[cut - 1] & 0xC0 == 0x80:
        cut -= 1  # a continuation byte: its character may go on
    return cut - 1 if block[cut - 1] >= 0xC0 else len(block)


def tail_start(path: Path, held_out: float) -> int:
    """The byte at which the held-out tail begins: the first line end past the train share.

    A file without a line end there is cut between characters.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = int(size * (1 - held_out))
        file.seek(start)
        line = file.readline(PIECE_BYTES)
        if line.endswith(b"\n") and start + len(line) < size:
            return start + len(line)
        skip = 0
        while skip < min(4, len(line)) and line[skip] & 0xC0 == 0x80:
            skip += 1
        return start + skip
