"""A DiT in blocks: each is whole by itself, and is made without the others."""

import math

import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.models.dit import DiT, unit_table
from shoestring.models.dit_config import DiTConfig
from shoestring.models.dit_layers import Layer, turned, turns_of

IMAGES = DiTConfig(blocks=2, layers=4, width=32, heads=2, size=8, patch=4, classes=3, condition=16)
TOKENS = DiTConfig(blocks=2, layers=4, width=32, heads=2, vocabulary=11, length=6, condition=16)
TABLE = unit_table(11, 11, seed=0)


def shaken(model):
    """Weights that are not at their start, where gates are closed and the head gives 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def images(count=3, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def of_images(model, block, labels=None):
    return model.block(block)(images(), torch.tensor([0.1, -1.0, 1.0]), labels)


def test_patches_are_cut_and_put_together_in_place(monkeypatch):
    config = DiTConfig(layers=1, width=32, heads=2, size=12, channels=2, patch=4)
    block, seen = DiT.make(config, seed=0).block(1), []
    block.embed = torch.nn.Identity()
    block.embed.register_forward_hook(lambda module, args, x: seen.append(x))
    block.positions.data.zero_()
    monkeypatch.setattr(type(block), "run", lambda self, x, noise, labels: x)
    z = torch.arange(2 * 2 * 144.0).view(2, 2, 12, 12)
    assert torch.equal(block(z, torch.zeros(2)), z)
    assert seen[0].shape == (2, 9, 32)
    assert torch.equal(seen[0][1, 5].view(2, 4, 4), z[1, :, 4:8, 8:12])


def test_a_fresh_block_gives_zeros_whatever_it_is_told():
    model = DiT.make(IMAGES, seed=0)
    assert torch.equal(of_images(model, 1, torch.tensor([0, 1, 2])), torch.zeros(3, 1, 8, 8))


def test_noise_and_class_are_heard():
    model = shaken(DiT.make(IMAGES, seed=0))
    block = model.block(2)
    plain = block(images(), torch.zeros(3), torch.tensor([0, 1, 2]))
    assert not torch.equal(plain, block(images(), torch.ones(3), torch.tensor([0, 1, 2])))
    assert not torch.equal(plain, block(images(), torch.zeros(3), torch.tensor([1, 1, 2])))
    without = block(images(), torch.zeros(3), torch.full((3,), 3))
    assert torch.equal(without, block(images(), torch.zeros(3)))  # 3 = no class


def test_what_stands_at_a_masked_place_is_not_looked_at():
    block = shaken(DiT.make(TOKENS, seed=0, table=TABLE)).block(1)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    masked = torch.tensor([[False, True, False, True, False, False]])
    other = torch.where(masked, 10 - tokens, tokens)
    noise = torch.tensor([0.3])
    assert torch.equal(block(tokens, masked, noise, TABLE), block(other, masked, noise, TABLE))
    seen = torch.where(masked, tokens, 10 - tokens)
    assert not torch.equal(block(tokens, masked, noise, TABLE), block(seen, masked, noise, TABLE))


def test_tokens_know_how_far_apart_they_are_and_not_where():
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 9, 8)
    turns = turns_of(9, 8, torch.device("cpu"))
    scores = turned(q, turns) @ turned(k, turns).T
    for apart in range(-8, 9):
        same = scores.diagonal(apart)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[0, 0], scores[0, 5])
    twin = torch.stack([
        torch.tensor([
            x[j] * math.cos(t * s) - x[j + 4] * math.sin(t * s) if j < 4
            else x[j] * math.cos(t * s) + x[j - 4] * math.sin(t * s)
            for j in range(8) for s in [10_000 ** (-(j % 4) / 4)]
        ])
        for t, x in enumerate(q.tolist())
    ])  # fmt: skip
    torch.testing.assert_close(turned(q, turns), twin)


def test_the_order_of_tokens_is_heard():
    block = shaken(DiT.make(TOKENS, seed=0, table=TABLE)).block(1)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    seen = torch.zeros(1, 6, dtype=torch.bool)
    seen[0, 2] = True
    swapped = tokens[:, [1, 0, 2, 3, 4, 5]]
    noise = torch.tensor([0.3])
    one, other = (block(t, seen, noise, TABLE)[0, 2] for t in (tokens, swapped))
    assert not torch.equal(one, other)


def test_one_block_is_made_without_the_others_and_equals_its_place_in_the_whole():
    whole = DiT.make(IMAGES, seed=7)
    for block in (1, 2):
        alone = DiT.make(IMAGES, seed=7, only=block)
        assert alone.state_dict().keys() == whole.state_dict().keys()
        for other in range(1, 3):
            for name, parameter in alone.block(other).named_parameters():
                assert parameter.is_meta is (other != block)
                if other == block:
                    assert torch.equal(parameter, whole.block(other).get_parameter(name))
    first, second = whole.block(1).state_dict(), whole.block(2).state_dict()
    assert not torch.equal(first["layers.0.qkv.weight"], second["layers.0.qkv.weight"])


def test_weights_are_those_of_the_seed_whatever_was_drawn_before():
    one = DiT.make(IMAGES, seed=1).state_dict()
    torch.manual_seed(99)
    two = DiT.make(IMAGES, seed=1).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = DiT.make(IMAGES, seed=2).state_dict()
    assert not torch.equal(one["blocks.0.embed.weight"], other["blocks.0.embed.weight"])


def test_another_blocks_weights_are_nothing_to_a_block():
    model = shaken(DiT.make(IMAGES, seed=0))
    before = of_images(model, 1)
    with torch.no_grad():
        for parameter in model.block(2).parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(of_images(model, 1), before)


def test_a_block_runs_its_own_layers_only():
    model, ran = DiT.make(IMAGES, seed=0), []
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    of_images(model, 2)
    assert ran == ["blocks.1.layers.0", "blocks.1.layers.1"]


def test_table_has_rows_of_length_one_which_are_orthogonal_where_there_is_room():
    table = unit_table(11, 32, seed=3)
    torch.testing.assert_close(table @ table.T, torch.eye(11), atol=1e-6, rtol=0)
    crowded = unit_table(50, 8, seed=3)
    torch.testing.assert_close(crowded.norm(dim=1), torch.ones(50))
    assert torch.equal(unit_table(50, 8, seed=3), crowded)
    assert not torch.equal(unit_table(50, 8, seed=4), crowded)


def test_blocks_that_do_not_divide_the_layers_are_told_the_nearest():
    with pytest.raises(ConfigError, match=r"12 layers in 5 blocks.*The nearest: 4 or 6"):
        DiTConfig(layers=12, blocks=5, size=8)


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": 0, "size": 8},
        {"layers": 0, "size": 8},
        {"width": 30, "heads": 4, "size": 8},
        {"size": 10, "patch": 4},
        {},
        {"size": 8, "vocabulary": 3, "length": 4},
        {"vocabulary": 3},
        {"vocabulary": 3, "length": 4, "width": 6, "heads": 2},
    ],
)
def test_shape_without_sense_is_refused(settings):
    with pytest.raises(ConfigError, match="expected"):
        DiTConfig(**settings)


def test_config_is_plain_data_and_comes_back_equal():
    assert DiTConfig.from_json(IMAGES.to_json()) == IMAGES
    with pytest.raises(ConfigError, match="cannot be read"):
        DiTConfig.from_json({"depth": 3})


def test_a_table_that_does_not_fit_and_a_block_that_is_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"\(11, 11\)"):
        DiT.make(TOKENS, seed=0)
    with pytest.raises(ConfigError, match=r"\(11, 11\)"):
        DiT.make(TOKENS, seed=0, table=TABLE[:5])
    with pytest.raises(ConfigError, match="1 to 2"):
        DiT.make(IMAGES, seed=0).block(3)
