"""Documents, and sources that can be read again and again.

A source is a name and a function that starts a fresh reading, so nothing is held in memory and
every pass gives the same documents in the same order. Splitting and sampling go by a hash of the
content: the same documents fall on the same side on every machine, and two copies of one document
never fall on different sides.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ..errors import ConfigError, DataError

Message = Mapping[str, Any]

# Up to this many documents the held-out share is counted out exactly, so that a small source
# still has a held-out document; beyond it a threshold on the hash is as good and needs no list.
_COUNTED = 1000


@dataclass(frozen=True, slots=True)
class Document:
    """One text or one conversation."""

    name: str
    """Where it came from: a path, or a path and a line."""
    text: str = ""
    """The text; empty for a conversation."""
    messages: tuple[Message, ...] | None = None
    """The turns of a conversation; None for plain text."""
    key: bytes = b""
    """Hash of the whole document's content; pieces of one file share it."""
    ends: bool = True
    """False for a piece of a long text that the next document continues."""

    def content(self) -> bytes:
        """The bytes that count: UTF-8 of the text, or canonical JSON of the conversation."""
        if self.messages is None:
            return self.text.encode()
        return json.dumps(self.messages, sort_keys=True, default=str).encode()


def content_key(content: bytes) -> bytes:
    """8 bytes that stand for a document's content."""
    return hashlib.blake2b(content, digest_size=8).digest()


class Source:
    """Documents that can be read any number of times, always the same and in the same order."""

    def __init__(self, name: str, read: Callable[[], Iterator[Document]]) -> None:
        self.name = name
        self._read = read

    def __iter__(self) -> Iterator[Document]:
        """A fresh reading from the start. DataError when it gives no document at all."""
        empty = True
        for document in self._read():
            empty = False
            yield document
        if empty:
            raise DataError(
                f"{self.name} holds no text",
                expected="at least one document that is not empty",
                hint="Look whether the file was written completely, or name another source.",
            )

    def digest(self) -> str:
        """Hex hash of everything this source gives; reads it once."""
        digest = hashlib.blake2b(digest_size=16)
        for document in self:
            content = document.content()
            head = (len(content), document.ends, document.messages is not None)
            digest.update(repr(head).encode() + content)
        return digest.hexdigest()

    def split(self, held_out: float = 0.05) -> tuple["Source", "Source"]:
        """(train, held out): whole documents, chosen by the hash of their content.

        held_out: share of the documents, between 0 and 1. DataError when one side stays empty.
        """
        check_share(held_out)
        cutoff: bytes | None = None

        def side(is_held_out: bool) -> Iterator[Document]:
            nonlocal cutoff
            if cutoff is None:
                cutoff = self._cutoff(held_out)
            for document in self:
                if (document.key <= cutoff) is is_held_out:
                    yield document

        return (
            Source(f"{self.name} (train)", lambda: side(False)),
            Source(f"{self.name} (held out)", lambda: side(True)),
        )

    def _cutoff(self, held_out: float) -> bytes:
        """The largest key that is held out."""
        keys = sorted(islice(self._distinct_keys(), _COUNTED + 1))
        if len(keys) > _COUNTED:
            return int(held_out * 2**64).to_bytes(8, "big")
        if len(keys) < 2:
            raise DataError(
                f"{self.name} holds only one distinct document, so nothing can be held out",
                expected="two documents or more",
                hint="A single text file is split at its tail; or name held-out data of its own.",
            )
        count = min(max(1, round(held_out * len(keys))), len(keys) - 1)
        return keys[count - 1]

    def _distinct_keys(self) -> Iterator[bytes]:
        seen = set()
        for document in self:
            if document.key not in seen:
                seen.add(document.key)
                yield document.key

    def sample(self, max_bytes: int, seed: int = 0) -> "Source":
        """About `max_bytes` of this source: documents drawn by hash, given in source order.

        The last text drawn is cut at a line end; a conversation is never cut.
        """
        if max_bytes < 1:
            raise ConfigError(f"a sample of {max_bytes} bytes is empty", expected="1 or more")
        chosen: dict[int, int] | None = None  # index -> bytes to take

        def read() -> Iterator[Document]:
            nonlocal chosen
            if chosen is None:
                chosen = self._draw(max_bytes, seed)
            for index, document in enumerate(self):
                if index in chosen:
                    yield _head(document, chosen[index])

        return Source(f"{self.name} (sample of {max_bytes} bytes)", read)

    def _draw(self, max_bytes: int, seed: int) -> dict[int, int]:
        drawn = []
        for index, document in enumerate(self):
            order = content_key(b"%d %d " % (seed, index) + document.key)
            drawn.append((order, index, len(document.content())))
        chosen, left = {}, max_bytes
        for _, index, size in sorted(drawn):
            if left <= 0:
                break
            chosen[index] = min(size, left)
            left -= size
        return chosen


def check_share(held_out: float) -> None:
    """ConfigError unless `held_out` is a share of something."""
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out = {held_out} is not a share", expected="between 0 and 1")


def _head(document: Document, num_bytes: int) -> Document:
    """The first `num_bytes` of a text, cut back to a line end where there is one."""
    content = document.content()
    text = document.text
    if document.messages is None and num_bytes < len(content):
        text = content[:num_bytes].decode(errors="ignore")
        text = text[: text.rfind("\n") + 1] or text
    return replace(document, text=text, ends=True)  # what continued a piece may not be drawn
