"""What a model has to beat: byte n-grams and general compressors, in bits per byte.

The n-gram models are fitted on the training documents and scored on the held-out ones; xz and
gzip see only the held-out bytes, as one stream. Documents are joined as they are, in order.

Witten-Bell smoothing (Witten and Bell 1991), from the empty context up, with no constant to tune:

    P0(c)   = 1 / 256
    P(c|h)  = (count(h c) + kinds(h) * P(c|h')) / (count(h) + kinds(h))

where h' is h without its first byte and kinds(h) is how many different bytes followed h. A context
never seen leaves the shorter one's probability. The counts take 4 * 256**n bytes at order n, 64 MiB
for trigrams.
"""

import gzip
import lzma
import math
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import ConfigError, DataError
from .documents import Document

NAMES = ("unigram", "bigram", "trigram")
COMPRESSORS = ("gzip -9", "xz -9")
_BLOCK_BYTES = 1 << 20


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A sum of losses in nats over `num_bytes` bytes of text, in bits per byte."""
    if num_bytes < 1:
        raise DataError(f"bits per byte of {num_bytes} bytes", expected="1 byte or more")
    return nats / math.log(2) / num_bytes


class ByteNgrams:
    """Unigram, bigram and trigram models of bytes, fitted once, scored together."""

    def __init__(self, documents: Iterable[Document], order: int = 3) -> None:
        if order not in (1, 2, 3):
            raise ConfigError(f"order = {order} is not an n-gram I fit", expected="1, 2 or 3")
        self.order = order
        self.num_bytes = 0
        # uint32: 4 GiB of one n-gram fit, and the trigrams take 64 MiB instead of 128.
        self._counts = [np.zeros(256**n, dtype=np.uint32) for n in range(1, order + 1)]
        for block, known in _blocks(documents, order - 1):
            self.num_bytes += len(block) - known
            for n in range(1, order + 1):
                codes, counts = np.unique(_codes(block, n, known), return_counts=True)
                self._counts[n - 1][codes] += counts.astype(np.uint32)
        if not self.num_bytes:
            raise DataError("no bytes to fit an n-gram model on", expected="training text")
        self._totals = [_per_context(c, np.sum) for c in self._counts]
        self._kinds = [_per_context(c, np.count_nonzero) for c in self._counts]

    def bits(self, documents: Iterable[Document]) -> dict[str, float]:
        """{"unigram": bits per byte, ...} of the documents, up to this order."""
        nats = [0.0] * self.order
        num_bytes = 0
        for block, known in _blocks(documents, self.order - 1):
            num_bytes += len(block) - known
            for n, value in enumerate(self._nats(block, known)):
                nats[n] += value
        return {name: bits_per_byte(x, num_bytes) for name, x in zip(NAMES, nats, strict=False)}

    def _nats(self, block: np.ndarray, known: int) -> Iterator[float]:
        """Nats of block[known:] under each order; the bytes before are context only."""
        below = np.full(len(block), 1 / 256)  # P of each byte under the order below
        for n in range(1, self.order + 1):
            codes = _codes(block, n, 0)
            contexts = codes >> 8
            total, kinds = self._totals[n - 1][contexts], self._kinds[n - 1][contexts]
            seen = total > 0
            # The first n - 1 bytes of the stream have no context of this length: P stays below's.
            shorter = below[n - 1 :]
            mixed = (self._counts[n - 1][codes] + kinds * shorter) / np.maximum(total + kinds, 1)
            below[n - 1 :] = np.where(seen, mixed, shorter)
            yield float(-np.log(below[known:]).sum())


def _per_context(counts: np.ndarray, reduce: object) -> np.ndarray:
    """Sum or number of non-zeros over the last byte, (256**(n-1),) float64."""
    return np.asarray(reduce(counts.reshape(-1, 256), axis=1), dtype=np.float64)  # type: ignore[operator]


def _codes(block: np.ndarray, n: int, known: int) -> np.ndarray:
    """Each n-gram ending at or after block[known], as one number with its last byte lowest."""
    block = block[max(known - (n - 1), 0) :].astype(np.uint32)
    length = max(len(block) - (n - 1), 0)
    codes = np.zeros(length, dtype=np.uint32)
    for i in range(n):
        codes = codes << np.uint32(8) | block[i : i + length]
    return codes


def _blocks(documents: Iterable[Document], context: int) -> Iterator[tuple[np.ndarray, int]]:
    """(bytes, known): the joined documents in blocks that begin with `known` bytes of context."""
    rest, known = b"", 0
    for content in joined_bytes(documents):
        block = rest + content
        yield np.frombuffer(block, dtype=np.uint8), known
        rest = block[-context:] if context else b""
        known = len(rest)


def joined_bytes(documents: Iterable[Document]) -> Iterator[bytes]:
    """The documents' bytes, joined, in blocks of about a megabyte."""
    parts: list[bytes] = []
    size = 0
    for document in documents:
        parts.append(document.content())
        size += len(parts[-1])
        if size >= _BLOCK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    if size:
        yield b"".join(parts)


def compressed_bits(documents: Iterable[Document]) -> dict[str, float]:
    """{"gzip -9": bits per byte, "xz -9": ...} of the documents as one stream."""
    xz = lzma.LZMACompressor(preset=9)
    zlib_size = _Counter()
    size = xz_size = 0
    with gzip.GzipFile(fileobj=zlib_size, mode="wb", compresslevel=9, mtime=0) as zipped:
        for content in joined_bytes(documents):
            size += len(content)
            zipped.write(content)
            xz_size += len(xz.compress(content))
    xz_size += len(xz.flush())
    if not size:
        raise DataError("no bytes to compress", expected="held-out text")
    return {"gzip -9": 8 * zlib_size.size / size, "xz -9": 8 * xz_size / size}


class _Counter:
    """A file that only counts what is written."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, content: bytes) -> int:
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        """Nothing is held."""


def measure(train: Iterable[Document], held_out: Iterable[Document]) -> dict[str, float]:
    """Every yardstick's bits per byte on `held_out`; both sources must be iterable twice."""
    return ByteNgrams(train).bits(held_out) | compressed_bits(held_out)
