"""Masked diffusion: the parts of the bound sum to the whole, and nothing is looked up."""

import math

import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.models.dit import DiT, unit_table
from shoestring.models.dit_config import DiTConfig
from shoestring.objectives import masked_diffusion
from shoestring.objectives.masked_diffusion import (
    Draw,
    MaskedDiffusion,
    bits_per_token,
    nelbo_ref,
)
from shoestring.ops.noise_levels import LogNormal, MaskTime, partition

V, T = 7, 12
CONFIG = DiTConfig(
    blocks=3, layers=3, width=32, heads=2, vocabulary=V, length=T, condition=16, table_width=16
)
TABLE = unit_table(V, 16, seed=0)
OBJECTIVE = MaskedDiffusion(partition=partition(MaskTime(), 3, overlap=0.05))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def texts(count=64, seed=0):
    """Each letter follows from the one before, but for the first."""
    first = torch.randint(V, (count, 1), generator=generator(seed))
    return (first + 3 * torch.arange(T)) % V


def model(seed=0):
    made = DiT.make(CONFIG, seed=seed, table=TABLE)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator(seed + 1))
            parameter.add_(0.1 * noise)
    return made


def whole_bound(net, tokens, draws):
    """Each text's bound with levels from all of (0, 1), each routed to the block that owns it."""
    total = torch.zeros(len(tokens), dtype=torch.float64)
    seeds = generator(123)
    parts = OBJECTIVE.partition
    for _ in range(draws):
        level = torch.rand(len(tokens), generator=seeds, dtype=torch.float64)
        draw = OBJECTIVE.draw_at(level, tokens, seeds)
        owner = parts.route(level)
        for block in (1, 2, 3):
            rows = owner == block
            if bool(rows.any()):
                some = Draw(level[rows], draw.masked[rows])
                total[rows] += OBJECTIVE.losses(
                    net.block(block), tokens[rows], some, TABLE
                ).double()
    return total / draws


def parts_of_the_bound_sum_to_the_whole():
    net, tokens = model(), texts()
    draws = generator(1)
    parts = [OBJECTIVE.nelbo(net.block(b), b, tokens, TABLE, draws, draws=30) for b in (1, 2, 3)]
    with torch.no_grad():
        whole = whole_bound(net, tokens, draws=90)
    difference = sum(parts) - whole
    # the standard error of the mean over texts, of both estimates together
    error = float(difference.std()) / len(tokens) ** 0.5
    assert error < 0.04 * float(whole.mean())
    assert abs(float(difference.mean())) < 3 * error
    # three blocks with equal work have equal parts where the model knows nothing
    fresh = DiT.make(CONFIG, seed=0, table=TABLE)
    for block in (1, 2, 3):
        part = OBJECTIVE.nelbo(fresh.block(block), block, tokens, TABLE, draws, draws=50)
        assert float(part.mean()) == pytest.approx(T * math.log(V) / 3, rel=0.03)


def levels_of_a_bound_are_the_blocks_own():
    """What the overlap adds to a block's training is its neighbour's part of the bound."""
    wide, seen = MaskedDiffusion(partition=partition(MaskTime(), 3, overlap=0.9)), []

    def net(tokens, masked, noise, table):
        seen.append(noise)
        return torch.zeros(*tokens.shape, 16)

    wide.nelbo(net, 2, texts(), TABLE, generator(), draws=4)
    assert 1 / 3 - 1e-6 <= float(torch.cat(seen).min())
    assert float(torch.cat(seen).max()) <= 2 / 3 + 1e-6


def losses_are_those_of_the_twin():
    net, tokens = model(), texts(9)
    draw = OBJECTIVE.draw(2, tokens, generator())
    hidden = net.block(2)(tokens, draw.masked, draw.level.float(), TABLE)
    twin = nelbo_ref(hidden.detach() @ TABLE.T, tokens, draw.masked, draw.level)
    losses = OBJECTIVE.losses(net.block(2), tokens, draw, TABLE)
    torch.testing.assert_close(losses.double(), twin, rtol=1e-5, atol=1e-5)
    mean = OBJECTIVE.loss(net.block(2), tokens, draw, TABLE)
    assert float(mean.detach()) == pytest.approx(float(twin.mean()) / T, rel=1e-5)


def test_losses_in_chunks_are_those_at_once(monkeypatch):
    net, tokens = model(), texts(9)
    draw = OBJECTIVE.draw(2, tokens, generator())
    gradients, losses = [], []
    for limit in (2**23, 0):
        monkeypatch.setattr(masked_diffusion, "CHUNK_BYTES", limit)
        losses.append(OBJECTIVE.losses(net.block(2), tokens, draw, TABLE))
        losses[-1].sum().backward()
        gradients.append([p.grad.clone() for p in net.block(2).parameters()])
        net.zero_grad()
    torch.testing.assert_close(*losses)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def share_of_masked_tokens_is_the_mass():
    tokens = texts(4000)
    level = torch.full((4000,), 0.3, dtype=torch.float64)
    for alpha, mass in (("linear", 0.3), ("cosine", math.cos(0.7 * math.pi / 2))):
        objective = MaskedDiffusion(partition=partition(MaskTime(alpha=alpha), 3))
        masked = objective.draw_at(level, tokens, generator()).masked
        assert float(masked.double().mean()) == pytest.approx(mass, abs=0.01)


def an_untrained_model_knows_nothing():
    """CE at the highest level is ln V: a leak would show here."""
    fresh, tokens = DiT.make(CONFIG, seed=0, table=TABLE), texts()
    level = torch.ones(len(tokens), dtype=torch.float64)
    draw = OBJECTIVE.draw_at(level, tokens, generator())
    assert bool(draw.masked.all())
    nats = OBJECTIVE.loss(fresh.block(1), tokens, draw, TABLE)
    assert float(nats.detach()) == pytest.approx(math.log(V), rel=0.05)


INVARIANTS = [
    parts_of_the_bound_sum_to_the_whole,
    levels_of_a_bound_are_the_blocks_own,
    losses_are_those_of_the_twin,
    share_of_masked_tokens_is_the_mass,
    an_untrained_model_knows_nothing,
]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda f: f.__name__)
def test_invariant(invariant):
    invariant()


def nelbo_with_the_overlap(self, net, block, tokens, table, generator, *, draws=1):
    ends = torch.tensor(self.partition.trained_range(block), dtype=torch.float64)
    share = float(ends.diff())
    total = torch.zeros(len(tokens), dtype=torch.float64)
    with torch.no_grad():
        for _ in range(draws):
            draw = self.draw(block, tokens, generator)
            total += self.losses(net, tokens, draw, table).double()
    return total * share / draws


def losses_without_weight(self, net, tokens, draw, table):
    return LOSSES(self, net, tokens, draw, table) * draw.level.float()


def losses_of_all_places(self, net, tokens, draw, table):
    return LOSSES(self, net, tokens, Draw(draw.level, torch.ones_like(draw.masked)), table)


def unmasked_share(self, level, tokens, generator):
    draw = DRAW_AT(self, level, tokens, generator)
    return Draw(level, ~draw.masked)


LOSSES, DRAW_AT = MaskedDiffusion.losses, MaskedDiffusion.draw_at
BUGS = [
    ("nelbo", nelbo_with_the_overlap, parts_of_the_bound_sum_to_the_whole),
    ("losses", losses_without_weight, parts_of_the_bound_sum_to_the_whole),
    ("losses", losses_of_all_places, losses_are_those_of_the_twin),
    ("draw_at", unmasked_share, share_of_masked_tokens_is_the_mass),
]


@pytest.mark.parametrize(("name", "bug", "invariant"), BUGS, ids=[b.__name__ for _, b, _ in BUGS])
def test_planted_bug_is_seen(monkeypatch, name, bug, invariant):
    monkeypatch.setattr(MaskedDiffusion, name, bug)
    with pytest.raises(AssertionError):
        invariant()


def test_nothing_of_the_tables_size_is_differentiated():
    net, tokens = model(), texts(4)
    table = TABLE.clone()
    OBJECTIVE.loss(net.block(1), tokens, OBJECTIVE.draw(1, tokens, generator()), table).backward()
    assert table.grad is None
    assert all(p.grad is not None for p in net.block(1).parameters())
    assert all(p.grad is None for b in (2, 3) for p in net.block(b).parameters())


def test_a_text_without_a_masked_token_costs_nothing():
    net, tokens = model(), texts(2)
    level = torch.tensor([0.5, 0.5], dtype=torch.float64)
    masked = torch.zeros(2, T, dtype=torch.bool)
    masked[1] = True
    losses = OBJECTIVE.losses(net.block(2), tokens, Draw(level, masked), TABLE)
    assert losses[0] == 0
    assert losses[1] > 0
    losses.sum().backward()


def test_a_block_learns_what_follows_from_what():
    net, draws = DiT.make(CONFIG, seed=0, table=TABLE), generator()
    block, tokens = net.block(3), texts()
    optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3)
    for _ in range(150):
        loss = OBJECTIVE.loss(block, tokens, OBJECTIVE.draw(3, tokens, draws), TABLE)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    part = OBJECTIVE.nelbo(block, 3, tokens, TABLE, draws, draws=20)
    assert float(part.mean()) < 0.5 * T * math.log(V) / 3
    assert bits_per_token(part, T) == pytest.approx(float(part.mean()) / T / math.log(2))


def test_levels_that_are_no_masking_are_refused():
    with pytest.raises(ConfigError, match="levels of kind mask"):
        MaskedDiffusion(partition=partition(LogNormal(), 2))


def test_a_share_of_block_ones_texts_is_all_masked_and_the_bound_knows_nothing_of_it():
    parts = partition(MaskTime(), 3)
    tokens = torch.zeros(4000, 4, dtype=torch.int64)
    for block, wanted in ((1, 0.3), (2, 0.0)):
        objective = MaskedDiffusion(partition=parts, top_share=0.3)
        draw = objective.draw(block, tokens, torch.Generator().manual_seed(0))
        at_top = draw.level == 1.0
        assert float(at_top.double().mean()) == pytest.approx(wanted, abs=0.03)
        assert bool(draw.masked[at_top].all())
    table = torch.eye(4)

    def net(tokens, masked, noise, table):
        return (tokens[..., None] == torch.arange(4)).float() + noise[:, None, None]

    bounds = [
        MaskedDiffusion(partition=parts, top_share=share).nelbo(
            net, 1, tokens[:20], table, torch.Generator().manual_seed(0), draws=3
        )
        for share in (0.0, 0.9)
    ]
    assert torch.equal(*bounds)
