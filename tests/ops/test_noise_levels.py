"""Noise levels, their division among blocks and the router, and that these tests can fail."""

import dataclasses
import math
from statistics import NormalDist

import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.ops import noise_levels
from shoestring.ops.noise_levels import (
    FlowTime,
    LogNormal,
    MaskTime,
    Partition,
    partition,
    route_ref,
    sigma_edges_ref,
    sigma_range_ref,
)

EDGES = {
    2: [0.3012],
    3: [0.17963, 0.50504],
    4: [0.13408, 0.3012, 0.67665],
    6: [0.09434, 0.17963, 0.3012, 0.50504, 0.96167],
    8: [0.07575, 0.13408, 0.20549, 0.3012, 0.44148, 0.67665, 1.19772],
}
WIDENED = {  # (blocks, overlap): ranges from the lowest up
    (3, 0.05): [(0.002, 0.2249), (0.1706, 0.5318), (0.3920, 80)],
    (4, 0.1): [(0.002, 0.2042), (0.1237, 0.3266), (0.2778, 0.7337), (0.4198, 80)],
}
LAWS = [LogNormal(), FlowTime(), FlowTime(mean=-0.5, std=1.0), MaskTime(), MaskTime(alpha="cosine")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- invariants, each a function, so that each can be run against a planted bug ----------------


def edges_are_those_of_the_sheet():
    for blocks, inner in EDGES.items():
        edges = partition(LogNormal(), blocks).edges
        assert edges[0] == 0.002
        assert edges[-1] == 80
        assert list(edges) == sorted(edges)
        assert edges[1:-1] == pytest.approx(inner, abs=1e-4)
        assert edges == pytest.approx(sigma_edges_ref(LogNormal(), blocks), rel=1e-9)


def widened_ranges_are_those_of_the_sheet():
    for (blocks, overlap), ranges in WIDENED.items():
        parts = partition(LogNormal(), blocks, overlap=overlap)
        for block, (low, high) in zip(range(blocks, 0, -1), ranges, strict=True):
            assert parts.trained_range(block) == pytest.approx((low, high), abs=1e-4)
            twin = sigma_range_ref(parts.edges, block, overlap)
            assert parts.trained_range(block) == pytest.approx(twin, rel=1e-12)


def draws_of_the_law_fall_into_the_blocks_equally():
    levels = partition(LogNormal(), 1).sample(1, 100_000, generator())
    blocks = partition(LogNormal(), 4).route(levels)
    for block in range(1, 5):
        assert (blocks == block).double().mean() == pytest.approx(0.25, abs=0.01)
    # P(sigma > 1) and P(sigma > 5) of the sheet, section 2.2
    assert (levels > 1).double().mean() == pytest.approx(0.159, abs=0.005)
    assert (levels > 5).double().mean() == pytest.approx(0.0096, abs=0.002)


def draws_stay_in_the_widened_range_and_fill_it():
    parts = partition(LogNormal(), 3, overlap=0.05)
    for block in (1, 2, 3):
        low, high = parts.trained_range(block)
        levels = parts.sample(block, 100_000, generator(block))
        assert low <= levels.min() <= levels.max() <= high
        own = parts.route(levels)
        assert (own == block).double().mean() > 0.75
        # within the range the law itself: half of the draws lie below the level of half the mass
        ends = parts.law.mass(torch.tensor([low, high], dtype=torch.float64))
        middle = parts.law.level(ends.mean())
        assert (levels < middle).double().mean() == pytest.approx(0.5, abs=0.01)
    outside = parts.sample(2, 100_000, generator(2))
    low, high = parts.range(2)
    assert ((outside < low) | (outside > high)).any()


def every_sample_has_a_level_of_its_own():
    levels = partition(LogNormal(), 2).sample(1, 1000, generator())
    assert levels.shape == (1000,)
    assert levels.dtype == torch.float64
    assert len(levels.unique()) == 1000


def router_gives_the_first_layers_the_highest_noise():
    parts = partition(LogNormal(), 4)
    assert parts.route(torch.tensor([80.0])).tolist() == [1]
    assert parts.route(torch.tensor([0.002])).tolist() == [4]
    assert parts.route(torch.tensor([0.5, 0.2, 1.0, 0.01])).tolist() == [2, 3, 1, 4]
    for count in (4, 8):
        edges = torch.tensor(partition(LogNormal(), count).edges, dtype=torch.float64)
        for dtype in (torch.float64, torch.float32):
            blocks = partition(LogNormal(), count).route(edges.to(dtype)).tolist()
            assert blocks == [count, *range(count, 0, -1)]
    for level in parts.sample(3, 200, generator()).tolist():
        assert int(parts.route(torch.tensor(level))) == route_ref(parts.edges, level)


def extreme_uniforms_give_finite_levels():
    law = LogNormal()
    assert law.level(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.002, 80], rel=1e-9)
    normal = NormalDist(-1.2, 1.2)
    first, last = normal.cdf(math.log(0.002)), normal.cdf(math.log(80))
    for mass in (1 - 1e-7, 1 - 1e-5, 1e-7):  # digits near 1 are still told apart
        twin = math.exp(normal.inv_cdf(first + mass * (last - first)))
        assert float(law.level(torch.tensor(mass, dtype=torch.float64))) == pytest.approx(twin)
    wide = LogNormal(low=1e-30, high=1e30)  # whose ends have masses of exactly 0 and 1
    levels = wide.level(torch.tensor([0.0, 1.0]))
    assert torch.isfinite(levels).all()
    assert levels.tolist() == [1e-30, 1e30]


INVARIANTS = [
    edges_are_those_of_the_sheet,
    widened_ranges_are_those_of_the_sheet,
    draws_of_the_law_fall_into_the_blocks_equally,
    draws_stay_in_the_widened_range_and_fill_it,
    every_sample_has_a_level_of_its_own,
    router_gives_the_first_layers_the_highest_noise,
    extreme_uniforms_give_finite_levels,
]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda f: f.__name__)
def test_invariant(invariant):
    invariant()


# ---- planted bugs ------------------------------------------------------------------------------


def reversed_router(self, level):
    edges = torch.tensor(self.edges[1:-1], dtype=torch.float64).float()
    return 1 + torch.bucketize(level.float(), edges)


def edge_to_the_block_above(self, level):
    edges = torch.tensor(self.edges[1:-1], dtype=torch.float64).float()
    return self.blocks - torch.bucketize(level.float(), edges, right=True)


def router_in_two_precisions(self, level):
    edges = torch.tensor(self.edges[1:-1], dtype=torch.float64)
    return self.blocks - torch.bucketize(level.double(), edges)


def ascending_ranges(self, block):
    return self.edges[block - 1], self.edges[block]


def overlap_in_the_level(self, block):
    low, high = self.range(block)
    more = self.overlap * (high - low)
    return max(self.law.low, low - more), min(self.law.high, high + more)


def no_overlap(self, block):
    return self.range(block)


def one_level_for_the_batch(self, block, count, generator, *, even=False):
    return SAMPLE(self, block, 1, generator, even=even).expand(count)


def uniform_in_the_level(self, block, count, generator, *, even=False):
    low, high = self.trained_range(block)
    return low + torch.rand(count, generator=generator, dtype=torch.float64) * (high - low)


def law_of_the_whole(self, block, count, generator, *, even=False):
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return self.law.level(u).clamp(*self.trained_range(block))


def inverse_in_float32(self, mass):
    first, last = self._ends()
    raw = (first + mass.float() * (last - first)).float()
    return self.raw_level(raw).double().clamp(self.low, self.high)


def inverse_without_ends(self, mass):
    first, last = self._ends()
    return self.raw_level(first + mass.double() * (last - first))


def untruncated(self, mass):
    return self.raw_level(mass.double()).clamp(self.low, self.high)


SAMPLE = Partition.sample
BUGS = [  # what is replaced, by what, and the invariant that is to see it
    (Partition, "route", reversed_router, router_gives_the_first_layers_the_highest_noise),
    (Partition, "route", edge_to_the_block_above, router_gives_the_first_layers_the_highest_noise),
    (Partition, "route", router_in_two_precisions, router_gives_the_first_layers_the_highest_noise),
    (Partition, "range", ascending_ranges, widened_ranges_are_those_of_the_sheet),
    (Partition, "trained_range", overlap_in_the_level, widened_ranges_are_those_of_the_sheet),
    (Partition, "trained_range", no_overlap, draws_stay_in_the_widened_range_and_fill_it),
    (Partition, "sample", one_level_for_the_batch, every_sample_has_a_level_of_its_own),
    (Partition, "sample", uniform_in_the_level, draws_stay_in_the_widened_range_and_fill_it),
    (Partition, "sample", law_of_the_whole, draws_stay_in_the_widened_range_and_fill_it),
    (noise_levels.Law, "level", inverse_in_float32, extreme_uniforms_give_finite_levels),
    (noise_levels.Law, "level", inverse_without_ends, extreme_uniforms_give_finite_levels),
    (noise_levels.Law, "level", untruncated, edges_are_those_of_the_sheet),
]


@pytest.mark.parametrize(
    ("owner", "name", "bug", "invariant"), BUGS, ids=[bug.__name__ for _, _, bug, _ in BUGS]
)
def test_planted_bug_is_seen(monkeypatch, owner, name, bug, invariant):
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises(AssertionError):
        invariant()


# ---- every law ---------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_mass_and_level_undo_each_other(law):
    masses = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    levels = law.level(masses)
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(law.mass(levels), masses, rtol=1e-9, atol=1e-12)
    ends = torch.tensor([law.low, law.high], dtype=torch.float64)
    assert law.mass(ends).tolist() == [0, 1]
    assert law.unstretch(law.stretch(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_blocks_share_the_training_equally(law, blocks):
    parts = partition(law, blocks)
    masses = law.mass(torch.tensor(parts.edges, dtype=torch.float64))
    torch.testing.assert_close(masses.diff(), torch.full((blocks,), 1 / blocks).double())
    assert [parts.range(b)[1] for b in range(blocks, 0, -1)] == list(parts.edges[1:])


def test_edges_of_masked_diffusion_lie_evenly_in_alpha():
    assert partition(MaskTime(), 4).edges == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    edges = torch.tensor(partition(MaskTime(alpha="cosine"), 4).edges, dtype=torch.float64)
    alpha = 1 - (math.pi / 2 * (1 - edges)).cos()
    assert alpha.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_spacings_of_the_ablation():
    assert partition(LogNormal(), 2, spacing="uniform").edges[1] == pytest.approx(40.001)
    assert partition(LogNormal(), 2, spacing="log").edges[1] == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="one of equal, uniform"):
        partition(FlowTime(), 2, spacing="log")


def test_even_draws_take_one_of_each_share_and_each_is_drawn_from_all():
    parts, draw = partition(LogNormal(), 3), generator()
    several = [parts.sample(2, 64, draw, even=True) for _ in range(300)]
    for levels in several[:3]:
        masses = parts.law.mass(levels) * 3 - 1
        assert sorted((masses * 64).floor().tolist()) == list(range(64))
    first = parts.law.mass(torch.stack(several)[:, 0]) * 3 - 1
    assert float(first.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(first.std()) == pytest.approx(12**-0.5, abs=0.02)


def test_inference_grid_is_that_of_the_sheet():
    parts = partition(LogNormal(), 3)
    assert parts.grid(3) == pytest.approx([80, 0.3012, 0.002], abs=1e-4)
    assert parts.grid(4) == pytest.approx([80, 0.5050, 0.1796, 0.002], abs=1e-4)
    # with B + 1 levels every block is called, the last one twice
    assert parts.route(torch.tensor(parts.grid(4), dtype=torch.float64)).tolist() == [1, 2, 3, 3]
    assert parts.grid(3, first=5.0)[0] == 5.0


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_partition_is_plain_data_and_comes_back_equal(law):
    import json

    parts = partition(law, 3, overlap=0.05)
    assert Partition.from_json(json.loads(json.dumps(parts.to_json()))) == parts


@pytest.mark.parametrize(
    "change",
    [
        {"law": {"kind": "heat"}},
        {"edges": [0.002, 80.0, 0.3]},
        {"edges": [0.002, 0.3, 79.0]},
        {"edges": "wide"},
        {"overlap": 1.0},
        {"overlap": None},
    ],
)
def test_partition_that_cannot_be_read_is_refused(change):
    data = partition(LogNormal(), 2).to_json()
    with pytest.raises(ConfigError, match="expected"):
        Partition.from_json({**data, **change})
    with pytest.raises(ConfigError, match="law, edges and overlap"):
        Partition.from_json({"edges": [0.0, 1.0]})


@pytest.mark.parametrize("level", [0.001, 81.0, math.nan, -1.0])
def test_level_outside_of_the_schedule_is_refused(level):
    with pytest.raises(ConfigError, match=r"0\.002 to 80, which is what the blocks were trained"):
        partition(LogNormal(), 2).route(torch.tensor([1.0, level]))


@pytest.mark.parametrize("block", [0, 3, True, -1])
def test_block_that_is_not_there_is_refused(block):
    with pytest.raises(ConfigError, match="1 to 2"):
        partition(LogNormal(), 2).range(block)


@pytest.mark.parametrize(
    ("law", "settings"),
    [
        (LogNormal, {"low": 0.0}),
        (LogNormal, {"low": 2.0, "high": 1.0}),
        (LogNormal, {"std": 0.0}),
        (FlowTime, {"high": 1.5}),
        (FlowTime, {"std": -1.0}),
        (MaskTime, {"alpha": "square"}),
    ],
)
def test_law_without_sense_is_refused(law, settings):
    with pytest.raises(ConfigError, match="expected"):
        law(**settings)


def test_counts_without_sense_are_refused():
    with pytest.raises(ConfigError, match="1 or more"):
        partition(LogNormal(), 0)
    with pytest.raises(ConfigError, match="2 or more"):
        partition(LogNormal(), 2).grid(1)


def test_laws_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LogNormal().low = 1.0  # type: ignore[misc]


def test_a_grid_of_no_given_length_calls_each_block_where_it_takes_over():
    parts = partition(LogNormal(), 3, spacing="uniform")
    assert parts.grid(None) == list(reversed(parts.edges))
    owners = parts.route(torch.tensor(parts.grid(None), dtype=torch.float64)).tolist()
    assert owners == [1, 2, 3, 3]
    assert partition(LogNormal(), 3).grid(None) == pytest.approx(partition(LogNormal(), 3).grid(4))
    assert parts.grid(None, first=5.0) == parts.grid(4, first=5.0)
