"""Edges at equal useful work: equal areas, what is free dropped, and nothing from nothing."""

import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.ops import useful_levels
from shoestring.ops.noise_levels import FlowTime, LogNormal, partition
from shoestring.ops.useful_levels import (
    free_below,
    linear_gap,
    useful_edges_ref,
    useful_partition,
    without_free,
)

LAWS = (LogNormal(), LogNormal(mean=0.7, std=1.0, low=0.3, high=10.0), FlowTime())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_a_gap_that_is_the_same_everywhere_gives_equal_shares(law, blocks):
    found = useful_partition(law, blocks, torch.ones_like, overlap=0.05)
    wanted = partition(law, blocks, overlap=0.05)
    assert found.edges == pytest.approx(wanted.edges, rel=2e-4)
    assert (found.edges[0], found.edges[-1]) == (law.low, law.high)
    assert found.overlap == 0.05


def rising(level):
    return level.log1p() ** 2


def areas_are_equal():
    for law in LAWS:
        for blocks in (2, 3, 4):
            found = useful_partition(law, blocks, rising)
            masses = torch.linspace(0, 1, 200_001, dtype=torch.float64)
            gap = rising(law.level(masses))
            edges = law.mass(torch.tensor(found.edges, dtype=torch.float64))
            place = torch.bucketize(masses, edges[1:-1])
            shares = torch.zeros(blocks, dtype=torch.float64).index_add(0, place, gap)
            assert (shares / gap.sum()).tolist() == pytest.approx([1 / blocks] * blocks, abs=1e-2)
            K = useful_levels.LEVELS
            middles = (torch.arange(K, dtype=torch.float64) + 0.5) / K
            ends = [(k + 1) / K for k in range(K)]
            wanted = useful_edges_ref(ends, rising(law.level(middles)).tolist(), blocks)
            assert edges[1:-1].tolist() == pytest.approx(wanted, abs=1e-4)


def test_areas_between_useful_edges_are_equal():
    areas_are_equal()


def piece_above(law, area, share):
    place = int(torch.searchsorted(area, share)) + 8
    return float(law.level(torch.tensor(place / useful_levels.LEVELS, dtype=torch.float64)))


def test_a_planted_bug_of_the_edges_is_seen(monkeypatch):
    monkeypatch.setattr(useful_levels, "_level_of", piece_above)
    with pytest.raises(AssertionError):
        areas_are_equal()


def test_free_levels_are_those_of_the_sheet_and_the_nearest_row_is_right_there():
    for rows, wanted in ((10, 0.466), (100, 0.330), (1000, 0.269), (50257, 0.215)):
        assert free_below(rows) == pytest.approx(wanted, abs=1e-3)
    rows = torch.eye(100)
    draws = torch.Generator().manual_seed(0)
    for factor, low, high in ((0.5, 0.99, 1.0), (3.0, 0.0, 0.4)):
        z = rows + factor * free_below(100) * torch.randn(50, 100, 100, generator=draws)
        right = ((z @ rows.T).argmax(-1) == torch.arange(100)).double().mean()
        assert low <= right <= high


def test_only_what_is_free_is_dropped():
    assert without_free(LogNormal(), 10) == LogNormal(low=0.466)
    assert without_free(LogNormal(low=0.6), 10) == LogNormal(low=0.6)
    with pytest.raises(ConfigError, match="hides no class"):
        without_free(LogNormal(high=0.4), 10)
    with pytest.raises(ConfigError, match="2 or more"):
        without_free(LogNormal(), 1)


def test_where_nothing_is_to_be_learned_there_are_no_edges():
    for gap in (torch.zeros_like, lambda level: -level, lambda level: level * float("nan")):
        with pytest.raises(ConfigError, match="tells nothing"):
            useful_partition(LogNormal(), 3, gap)
    with pytest.raises(ConfigError, match="0 blocks"):
        useful_partition(LogNormal(), 0, torch.ones_like)


def test_the_linear_gap_is_what_two_linear_denoisers_lose():
    draws = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=draws, dtype=torch.float64)
    y = torch.randn(200_000, 6, generator=draws, dtype=torch.float64) @ mix / 3
    covariance = mix.T @ mix / 9
    spectrum = torch.linalg.eigvalsh(covariance)
    noise = torch.randn(y.shape, generator=draws, dtype=torch.float64)
    for law, level in ((LogNormal(), 0.7), (FlowTime(), 0.4)):
        gap = linear_gap(law, covariance.diagonal(), spectrum, 0.5)(torch.tensor([level]))
        sigma = level if isinstance(law, LogNormal) else level / (1 - level)
        z = y + sigma * noise
        errors = []
        for known in (covariance.diagonal().diag(), covariance):
            D = z @ torch.linalg.solve(known + sigma**2 * torch.eye(6), known)
            errors.append(float((D - y).square().mean()))
        w = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 if sigma == level else level**-2
        assert float(gap) == pytest.approx(w * (errors[0] - errors[1]), rel=0.02)
        assert float(gap) > 0
