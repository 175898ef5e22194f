"""Levels of least error, against Lloyd's own rounds and published tables."""

import pytest

from shoestring.errors import ConfigError
from shoestring.ops.codebook import codebook, codebook_ref

# Max 1960 and arXiv 2504.19874, section 3.1: positive levels of the normal law, and the error.
NORMAL = {
    1: ([0.797885], 0.363380),
    2: ([0.452780, 1.510418], 0.117482),
    3: ([0.245094, 0.756005, 1.343909, 2.151946], 0.034548),
    4: (
        [0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590],
        0.009501,
    ),
}


@pytest.mark.parametrize("bits", NORMAL)
def test_levels_of_the_normal_law_are_those_of_the_tables(bits):
    book = codebook(bits)
    levels, error = NORMAL[bits]
    assert book.levels[len(levels) :] == pytest.approx(levels, abs=1e-6)
    assert book.error == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(("bits", "width"), [(2, None), (3, 64), (4, 8), (2, 3)])
def test_levels_are_those_of_lloyds_rounds(bits, width):
    assert codebook(bits, width).levels == pytest.approx(
        codebook_ref(bits, width, rounds=3000), abs=2e-4
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [3, 8, 64, 1536, None])
def test_codebooks_are_in_order_symmetric_and_within_the_bounds_of_the_paper(bits, width):
    book = codebook(bits, width)
    assert len(book.levels) == 2**bits
    assert list(book.levels) == sorted(book.levels)
    assert book.levels == pytest.approx([-level for level in reversed(book.levels)], abs=1e-12)
    assert book.edges[len(book.edges) // 2] == pytest.approx(0, abs=1e-12)
    assert book.error <= 3**0.5 * 3.14159265 / 2 * 4.0**-bits  # Theorem 1
    if width is None:
        assert book.error >= 4.0**-bits  # Theorem 3


def test_more_bits_lose_four_times_less_each():
    errors = [codebook(bits).error * 4**bits for bits in range(1, 9)]
    assert errors == pytest.approx(
        [1.4535, 1.8797, 2.2111, 2.4323, 2.5648, 2.6388, 2.6784, 2.6991], abs=1e-4
    )


@pytest.mark.parametrize(("bits", "width"), [(0, 64), (9, 64), (2, 2)])
def test_what_has_no_codebook_is_refused(bits, width):
    with pytest.raises(ConfigError, match="expected"):
        codebook(bits, width)
