"""Bits for a budget: the best there are, all bytes counted, and what is under the smallest form."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from serve.test_generate import distance, ids, read
from shoestring.errors import ConfigError, OutOfBudget
from shoestring.ops.row_code import error
from shoestring.serve import CompressedCache, calibrate
from shoestring.serve.choose import allocate, bytes_a_token


def test_no_other_bits_save_more():
    torch.manual_seed(0)
    weights, tokens = [torch.rand(2, 2, 1, 1) ** 2], [1, 3]
    found = allocate(weights, tokens, 14)[0]

    def cost(bits):
        return sum(float(w) * error(b) for w, b in zip(weights[0].flatten(), bits, strict=True))

    spent = sum(int(bits.sum()) * n for bits, n in zip(found, tokens, strict=True))
    assert spent <= 14
    every = [
        cost(bits)
        for bits in itertools.product(range(9), repeat=4)
        if sum(bits[:2]) + 3 * sum(bits[2:]) <= spent
    ]
    assert cost(torch.cat([x.flatten() for x in found]).tolist()) == pytest.approx(min(every))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", [2.5, 3.25, 5])
def test_a_budget_is_met_and_used(grouped, calibrated, bits):
    texts = torch.randint(1, 128, (2, 140), generator=torch.Generator().manual_seed(1))
    calibration = calibrate(grouped, texts) if calibrated else None
    cache = CompressedCache(
        grouped, budget=f"{bits + 2.5}bits", context=2000, calibration=calibration
    )
    wanted = (bits + 2.5) / 8 * 2 * 3 * 2 * 16 * 2000
    assert 0.97 * wanted < cache.bytes_at(2000) <= wanted
    read(grouped, ids(1, 600), cache, chunk=100)
    assert cache.nbytes == cache.bytes_at(600)


def test_bits_that_are_calibrated_lose_less(grouped):
    text = ids(1, 700, seed=3)
    wanted = read(grouped, text, DynamicCache(config=grouped.config), chunk=32)
    calibration = calibrate(grouped, ids(4, 300, seed=4))
    found = [
        distance(
            read(
                grouped, text,
                CompressedCache(grouped, budget="7bits", context=700, calibration=each), chunk=32,
            ), wanted,
        )
        for each in (None, calibration)
    ]  # fmt: skip
    assert found[1] < 0.7 * found[0]


def test_more_bytes_are_nearer(grouped):
    text = ids(1, 500, seed=3)
    wanted = read(grouped, text, DynamicCache(config=grouped.config), chunk=32)
    calibration = calibrate(grouped, ids(3, 300, seed=4))
    found = [
        distance(
            read(
                grouped, text,
                CompressedCache(grouped, budget=budget, context=600, calibration=calibration),
                chunk=32,
            ), wanted,
        )
        for budget in ("4.5bits", "6bits", "8bits")
    ]  # fmt: skip
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0]


def test_caches_of_the_same_settings_share_their_tables(grouped):
    calibration = calibrate(grouped, ids(1, 100))
    for settings in ({}, {"budget": "8bits"}, {"budget": "8bits", "calibration": calibration}):
        one, other = (CompressedCache(grouped, **settings) for _ in range(2))
        assert all(a is b for a, b in zip(one.forms, other.forms, strict=True))
        third = CompressedCache(grouped, sinks=2, **settings)
        assert third.forms[0] is not one.forms[0]


def test_budgets_are_read_as_they_are_written(grouped):
    config = grouped.config
    assert bytes_a_token("4700B", config) == bytes_a_token(4700, config) == 4700
    assert bytes_a_token("4 bits", config) == 2 * 3 * 2 * 16 / 2
    for bad in ("bits", "four bits", "-3bits", 0, "nan", None, "3 apples", float("nan")):
        with pytest.raises(ConfigError, match="budget"):
            bytes_a_token(bad, config)


def test_a_budget_under_the_smallest_form_says_what_that_is(grouped):
    with pytest.raises(ConfigError, match="or more") as caught:
        CompressedCache(grouped, budget="10B")
    least = caught.value.expected.split()[0]
    cache = CompressedCache(grouped, budget=f"{least}B")
    assert cache.bytes_at(2048) <= int(least) * 2048
    with pytest.raises(ConfigError, match="context"):
        CompressedCache(grouped, budget="4bits", context=32)


def test_the_longest_context_is_the_last_that_fits(grouped):
    cache = CompressedCache(grouped, budget="6bits")
    tokens = cache.longest_context("1MB")
    assert cache.bytes_at(tokens) <= 10**6 < cache.bytes_at(tokens + 1)
    with pytest.raises(OutOfBudget, match="or more"):
        cache.longest_context("1kB")
