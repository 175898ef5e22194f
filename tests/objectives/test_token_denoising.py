"""Denoising the token that follows: what z says by itself, what a block is fed, what it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

from shoestring.errors import ConfigError
from shoestring.models import causal
from shoestring.models.causal import Causal, CausalBlock
from shoestring.models.causal_config import CausalConfig
from shoestring.models.dit import unit_table
from shoestring.objectives import token_denoising as ops
from shoestring.objectives.token_denoising import Draw, TokenDenoising
from shoestring.ops.block_masks import block_mask
from shoestring.ops.noise_levels import LogNormal, MaskTime, partition

V, W, S = 24, 16, 12
CONFIG = CausalConfig(
    blocks=2, layers=4, width=32, heads=2, vocabulary=V, length=S, condition=16, table_width=W
)
TABLE = unit_table(V, W, seed=0)
PARTS = partition(LogNormal(), 2)
OBJECTIVE = TokenDenoising(partition=PARTS, top_share=0.3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def texts(count=40):
    return torch.randint(V, (count, S), generator=generator(1))


def at(level, count=40, seed=2):
    levels = torch.full((count,), level, dtype=torch.float64)
    return Draw(levels, torch.randn(count, S, W, generator=generator(seed)))


class Listener:
    """A net that remembers what it was fed, and answers with given rows."""

    def __init__(self, hidden=None):
        self.fed, self.hidden = [], hidden

    def __call__(self, tokens, z, noise, table):
        self.fed.append((tokens, z, noise, table))
        return torch.zeros(*tokens.shape, W) if self.hidden is None else self.hidden

    def next_tokens(self, tokens, table):
        self.fed.append((tokens, table))
        return self.hidden


def an_untrained_block_reads_nothing_out_of_z():
    """ln V at the highest level, and no free lunch below it: not better than the nearest row."""
    model, tokens = Causal.make(CONFIG, seed=0, table=TABLE), texts()
    loss = OBJECTIVE.loss(model.block(1), tokens, at(80.0), TABLE)
    assert float(loss.detach()) == pytest.approx(math.log(V), rel=0.05)
    for level in (0.2, 0.3012, 0.6):
        draw = at(level)
        found = OBJECTIVE.loss(model.block(2), tokens, draw, TABLE).detach()
        z = OBJECTIVE.noised(tokens, draw, TABLE)
        known = ops.of_z_alone_ref(z, draw.level, TABLE).flatten(0, 1)
        assert float(found) > float(F.nll_loss(known, tokens.flatten()))


def z_is_scaled_to_unit_variance_and_the_text_is_left_as_it_is():
    net, tokens = Listener(), texts(400)
    for level in (0.002, 0.3, 80.0):
        OBJECTIVE.loss(net, tokens, at(level, 400), TABLE)
        read, z, noise, table = net.fed.pop()
        assert float(z.square().mean()) == pytest.approx(1, abs=0.02)
        assert float(noise[0]) == pytest.approx(math.log(level) / 4)
        assert read is tokens
        assert table is TABLE


def a_text_has_one_level_of_its_own():
    net, tokens = Listener(), texts()
    draw = OBJECTIVE.draw(2, tokens, W, generator())
    assert draw.level.shape == (40,)
    assert len(draw.level.unique()) == 40
    OBJECTIVE.loss(net, tokens, draw, TABLE)
    _, z, noise, _ = net.fed.pop()
    wanted, at_level = ops.noised_ref(tokens, draw, TABLE)
    torch.testing.assert_close(z.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(noise.double(), at_level, atol=1e-6, rtol=1e-6)


def losses_are_cross_entropies_without_weight():
    tokens = texts(5)
    net = Listener(torch.randn(5, S, W, generator=generator(3)))
    twin = float(ops.loss_ref(net.hidden @ TABLE.T, tokens))
    draw = OBJECTIVE.draw(1, tokens, W, generator())
    assert float(OBJECTIVE.loss(net, tokens, draw, TABLE)) == pytest.approx(twin, rel=1e-5)
    assert float(OBJECTIVE.ordinary_loss(net, tokens, TABLE)) == pytest.approx(twin, rel=1e-5)
    assert float(ops.nats(net.hidden, tokens, TABLE).mean()) == pytest.approx(twin, rel=1e-5)


def the_share_at_the_top_is_block_ones_alone():
    tokens = texts(20_000)[:, :1]
    first = OBJECTIVE.draw(1, tokens, W, generator())
    assert float((first.level == 80).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert not bool((OBJECTIVE.draw(2, tokens, W, generator()).level == 80).any())
    others = first.level[first.level < 80]
    assert float((others > 1).double().mean()) == pytest.approx(2 * 0.159, abs=0.01)


def every_other_update_is_ordinary():
    kinds = [OBJECTIVE.is_ordinary(step) for step in range(1, 7)]
    assert kinds == [False, True] * 3
    assert not any(TokenDenoising(partition=PARTS, mixed_every=0).is_ordinary(n) for n in range(9))
    assert all(TokenDenoising(partition=PARTS, mixed_every=1).is_ordinary(n) for n in range(1, 9))


INVARIANTS = [
    an_untrained_block_reads_nothing_out_of_z,
    z_is_scaled_to_unit_variance_and_the_text_is_left_as_it_is,
    a_text_has_one_level_of_its_own,
    losses_are_cross_entropies_without_weight,
    the_share_at_the_top_is_block_ones_alone,
    every_other_update_is_ordinary,
]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda f: f.__name__)
def test_invariant(invariant):
    invariant()


def readout_of_z(self, net, tokens, z, level, table):
    """z runs into the readout beside the block: an untrained model is right by way of z alone."""
    return ANSWERS(self, net, tokens, z, level, table) + 50 * z


def rows_of_unit_components(self, tokens, draw, table):
    """Targets as long as the paper's sigma_data would have them: free at nearly every level."""
    return NOISED(self, tokens, draw, table * W**0.5)


def unscaled_z(self, net, tokens, z, level, table):
    return net(tokens, z, level.float().log() / 4, table)


def scaled_text(self, net, tokens, z, level, table):
    """c_in on the clean tokens, too."""
    fed, noise = ops.scaled(z, level)
    return net(tokens, fed, noise, table / (float(level[0]) ** 2 + 1 / W) ** 0.5)


def weighted(self, net, tokens, draw, table):
    return LOSS(self, net, tokens, draw, table) / float(draw.level[0]) ** 2


def one_level_for_the_batch(self, block, tokens, width, generator):
    draw = DRAW(self, block, tokens, width, generator)
    return Draw(draw.level[:1].expand(len(tokens)).clone(), draw.noise)


def levels_of_another_text(self, tokens, draw, table):
    return NOISED(self, tokens, Draw(draw.level.flip(0), draw.noise), table)


def for_every_block(self, block, tokens, width, generator):
    return DRAW(self, 1, tokens, width, generator)


def never(self, step):
    return False


ANSWERS, LOSS, DRAW = TokenDenoising.answers, TokenDenoising.loss, TokenDenoising.draw
NOISED = TokenDenoising.noised
BUGS = [
    ("answers", readout_of_z, an_untrained_block_reads_nothing_out_of_z),
    ("noised", rows_of_unit_components, z_is_scaled_to_unit_variance_and_the_text_is_left_as_it_is),
    ("answers", unscaled_z, z_is_scaled_to_unit_variance_and_the_text_is_left_as_it_is),
    ("answers", scaled_text, z_is_scaled_to_unit_variance_and_the_text_is_left_as_it_is),
    ("loss", weighted, losses_are_cross_entropies_without_weight),
    ("draw", one_level_for_the_batch, a_text_has_one_level_of_its_own),
    ("noised", levels_of_another_text, a_text_has_one_level_of_its_own),
    ("draw", for_every_block, the_share_at_the_top_is_block_ones_alone),
    ("is_ordinary", never, every_other_update_is_ordinary),
]


@pytest.mark.parametrize(("name", "bug", "invariant"), BUGS, ids=[b.__name__ for _, b, _ in BUGS])
def test_planted_bug_is_seen(monkeypatch, name, bug, invariant):
    monkeypatch.setattr(TokenDenoising, name, bug)
    with pytest.raises(AssertionError):
        invariant()


def one_batch_is_learned(beside=True):
    """Invariant 18: the loss at the highest level, where only what came before can tell, goes to
    about 0 for all but first tokens, and with other texts before it does not."""
    shape = CausalConfig(**{**CONFIG.to_json(), "beside": beside})
    net = Causal.make(shape, seed=0, table=TABLE).block(1)
    tokens = torch.randint(4, (4, S), generator=generator(5))  # few letters: one is not enough
    tokens[:, 0] = torch.arange(4)  # the texts differ from the first one on
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 200)
        OBJECTIVE.loss(net, tokens, at(80.0, 4, seed=10 + step), TABLE).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        draw = at(80.0, 4)
        z = OBJECTIVE.noised(tokens, draw, TABLE)
        known = OBJECTIVE.answers(net, tokens, z, draw.level, TABLE)
        other = OBJECTIVE.answers(net, tokens.roll(1, dims=0), z, draw.level, TABLE)
    assert float(ops.nats(known, tokens, TABLE)[:, 1:].mean()) < 0.08
    assert float(ops.nats(other, tokens, TABLE)[:, 1:].mean()) > math.log(2)


@pytest.mark.parametrize("beside", [True, False])
def test_one_batch_is_learned(beside):
    one_batch_is_learned(beside)


def no_context(length, *, size=1, shifted=False, device=None):
    mask = block_mask(length, shifted=True)
    mask[length:, :length] = False
    return mask


def test_noised_rows_that_see_no_text_are_seen(monkeypatch):
    masks = type("masks", (), {"block_mask": staticmethod(no_context)})
    monkeypatch.setattr(causal, "block_masks", masks)
    with pytest.raises(AssertionError):
        one_batch_is_learned()


def test_text_that_is_made_again_without_a_graph_is_seen(monkeypatch):
    """Clean rows under no_grad: what they are embedded with never moves, however long it trains."""
    before = Causal.make(CONFIG, seed=0, table=TABLE).block(1)
    real, moved = CausalBlock.read, []

    def without_graph(self, x):
        with torch.no_grad():
            return real(self, x.detach())

    for bug in (None, without_graph):
        with monkeypatch.context() as patch:
            if bug is not None:
                patch.setattr(CausalBlock, "read", bug)
            net = Causal.make(CONFIG, seed=0, table=TABLE).block(1)
            tokens = texts(4)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for step in range(4):
                OBJECTIVE.loss(net, tokens, at(80.0, 4, seed=step), TABLE).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            moved.append(not torch.equal(net.embed.weight, before.embed.weight))
    assert moved == [True, False]


def test_what_z_says_and_what_is_foreseen_are_put_together_by_bayes_rule():
    tokens = texts(300)
    for level in (0.2, 0.5):
        draw = at(level, 300)
        z = OBJECTIVE.noised(tokens, draw, TABLE)
        alone = ops.of_z_alone_ref(z, draw.level, TABLE)
        even = ops.posterior_ref(torch.zeros(300, S, V), z, draw.level, TABLE)
        torch.testing.assert_close(alone, even)
        # density of z around each row, times what was foreseen
        foreseen = torch.randn(300, S, V, generator=generator(4)).double()
        apart = (z[0, 0].double() - TABLE.double()).square().sum(dim=1)
        twin = (foreseen[0, 0] - apart / (2 * level**2)).log_softmax(dim=0)
        found = ops.posterior_ref(foreseen, z, draw.level, TABLE)
        torch.testing.assert_close(found[0, 0], twin, atol=1e-5, rtol=1e-5)
    top = at(80.0, 300)
    z = OBJECTIVE.noised(tokens, top, TABLE)
    found = ops.posterior_ref(foreseen, z, top.level, TABLE)
    assert float((found - foreseen.log_softmax(dim=2)).abs().max()) < 0.2


def test_levels_that_are_no_sigma_are_refused():
    with pytest.raises(ConfigError, match="levels of kind sigma"):
        TokenDenoising(partition=partition(MaskTime(), 2))


def test_d_is_the_mean_row_and_as_long_as_a_row_where_nothing_is_doubted():
    """Planted: another table between the steps than in training."""
    sure = torch.full((3, V), -1e4)
    sure[torch.arange(3), torch.tensor([5, 0, 9])] = 0.0
    torch.testing.assert_close(ops.denoised(sure, TABLE), TABLE[[5, 0, 9]])
    torch.testing.assert_close(ops.denoised(torch.zeros(1, V), TABLE)[0], TABLE.mean(dim=0))
