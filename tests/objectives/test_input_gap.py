"""What the input tells beyond z: bounded by what there is to know, nothing where it is free."""

import math

import pytest
import torch

from shoestring.models.dit import unit_table
from shoestring.objectives import input_gap
from shoestring.objectives.input_gap import class_gap, image_gap
from shoestring.ops.noise_levels import LogNormal

TABLE = unit_table(4, 4, seed=0)
LEVELS = torch.tensor([0.05, 0.5, 1.0, 3.0, 80.0], dtype=torch.float64)


def signals(noise, count=1200):
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (count,), generator=draws)
    means = torch.randn(4, 1, 1, 6, generator=draws)
    return means[labels] + noise * torch.randn(count, 1, 1, 6, generator=draws), labels


def test_the_gap_is_all_of_the_class_for_a_clear_input_and_none_where_z_tells():
    gap = class_gap(*signals(0.05), TABLE)(LEVELS)
    assert abs(gap[0]) < 1e-3
    assert bool((gap.diff() > 0).all())
    assert float(gap[-1]) == pytest.approx(math.log(4), abs=0.1)
    murky = class_gap(*signals(2.0), TABLE)(LEVELS)
    assert bool((murky < gap + 1e-3).all())
    assert float(murky[-1]) > 0.05


def of_others(x, labels, classes):
    rest, known = READ(x, labels, classes)
    return rest, known.roll(1, dims=0)


READ = input_gap._read


def test_an_input_that_belongs_to_others_has_no_gap(monkeypatch):
    monkeypatch.setattr(input_gap, "_read", of_others)
    assert float(class_gap(*signals(0.05), TABLE)(LEVELS)[-1]) < 0


def test_images_whose_values_do_not_depend_on_each_other_have_no_gap():
    draws = torch.Generator().manual_seed(0)
    alone = torch.randn(2000, 1, 4, 4, generator=draws) / 2
    alike = alone.mean(dim=(2, 3), keepdim=True).expand_as(alone) * 4
    gaps = [image_gap(x, LogNormal(), 0.5)(LEVELS) for x in (alone, alike)]
    assert bool((gaps[0] < 0.02).all())
    assert float(gaps[1].max()) > 0.3
    # more values than images: the same through the smaller product
    few = image_gap(alike[:12], LogNormal(), 0.5)(LEVELS)
    x = alike[:12].flatten(1).double()
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    wanted = input_gap.linear_gap(LogNormal(), x.var(dim=0, correction=0), spectrum, 0.5)(LEVELS)
    torch.testing.assert_close(few, wanted)
