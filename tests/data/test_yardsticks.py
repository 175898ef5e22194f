"""Byte n-grams against the equations in exact fractions, and compressors against the library."""

import gzip
import lzma
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.conftest import sentences
from shoestring.data import (
    ByteNgrams,
    Document,
    bits_per_byte,
    compressed_bits,
    measure,
    yardsticks,
)
from shoestring.errors import ConfigError, DataError


def as_documents(*texts):
    return [Document(str(i), text) for i, text in enumerate(texts)]


def probability_ref(train: bytes, context: bytes, byte: int) -> Fraction:
    """Witten-Bell from the equations: P(c|h), by counting in `train` each time."""
    if not context:
        below = Fraction(1, 256)
    else:
        below = probability_ref(train, context[1:], byte)
    n = len(context)
    followers = Counter(train[i + n] for i in range(len(train) - n) if train[i : i + n] == context)
    if not followers:
        return below
    kinds = len(followers)
    return (followers[byte] + kinds * below) / (sum(followers.values()) + kinds)


def bits_ref(train: bytes, held_out: bytes, order: int) -> float:
    bits = 0.0
    for i, byte in enumerate(held_out):
        context = held_out[max(i - order + 1, 0) : i]
        bits -= math.log2(probability_ref(train, context, byte))
    return bits / len(held_out)


@settings(max_examples=12)  # each fits tables of 64 MiB
@given(
    train=st.text("abc\n\u00e9", min_size=1, max_size=60),
    held_out=st.text("abcd\n", min_size=1, max_size=40),
)
def test_ngrams_are_the_equations(train, held_out):
    found = ByteNgrams(as_documents(train)).bits(as_documents(held_out))
    assert list(found) == ["unigram", "bigram", "trigram"]
    for order, value in enumerate(found.values(), 1):
        # float64 against fractions: one rounding an operation, a few dozen operations
        assert value == pytest.approx(bits_ref(train.encode(), held_out.encode(), order), rel=1e-13)


@pytest.mark.parametrize("block_bytes", [1, 50])
def test_blocks_do_not_change_the_result(monkeypatch, block_bytes):
    train, held_out = as_documents(*sentences(20)), as_documents(*sentences(10, seed=1))
    whole = ByteNgrams(train).bits(held_out)
    monkeypatch.setattr(yardsticks, "_BLOCK_BYTES", block_bytes)
    cut = ByteNgrams(as_documents(*"".join(d.text for d in train)))
    parts = cut.bits(as_documents(*"".join(d.text for d in held_out)))
    assert all(np.array_equal(a, b) for a, b in zip(
        cut._counts, ByteNgrams(train)._counts, strict=True))  # fmt: skip
    assert parts == pytest.approx(whole, rel=1e-13)


def test_longer_contexts_say_more_about_text():
    train, held_out = as_documents(*sentences(200)), as_documents(*sentences(20, seed=1))
    unigram, bigram, trigram = ByteNgrams(train).bits(held_out).values()
    assert 8 > unigram > bigram > trigram > 0


@pytest.mark.parametrize("order", [0, 4])
def test_orders_that_are_not_fitted(order):
    with pytest.raises(ConfigError, match=f"order = {order}"):
        ByteNgrams(as_documents("a"), order)


def test_lower_order_alone_is_the_same_model():
    train, held_out = as_documents(*sentences(20)), as_documents(*sentences(5, seed=1))
    full = ByteNgrams(train).bits(held_out)
    assert ByteNgrams(train, 2).bits(held_out) == {k: full[k] for k in ("unigram", "bigram")}


def test_compressors_are_the_librarys():
    texts = sentences(300)
    content = "".join(texts).encode()
    found = compressed_bits(as_documents(*texts))
    assert found["xz -9"] == 8 * len(lzma.compress(content, preset=9)) / len(content)
    assert found["gzip -9"] == 8 * len(gzip.compress(content, 9, mtime=0)) / len(content)


def test_measure_has_every_yardstick():
    found = measure(as_documents(*sentences(50)), as_documents(*sentences(20, seed=1)))
    assert list(found) == ["unigram", "bigram", "trigram", "gzip -9", "xz -9"]
    assert all(0 < value < 8 for value in found.values())


def test_bits_per_byte_of_a_uniform_guess_is_eight():
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8, rel=1e-15)


def test_nothing_to_measure():
    with pytest.raises(DataError, match="no bytes to fit"):
        ByteNgrams([])
    with pytest.raises(DataError, match="no bytes to compress"):
        compressed_bits([])
    with pytest.raises(DataError, match="bits per byte of 0 bytes"):
        ByteNgrams(as_documents("a")).bits([])
