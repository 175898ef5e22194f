"""An autoregressive block: nothing leaks, context is learned, what is kept is as good as new."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from shoestring.errors import ConfigError
from shoestring.models import causal
from shoestring.models.causal import CLEAN, Causal, CausalBlock
from shoestring.models.causal_config import CausalConfig
from shoestring.models.dit import unit_table
from shoestring.models.dit_layers import Layer, turned, turns_of
from shoestring.objectives import token_denoising as ops
from shoestring.ops.block_masks import block_mask
from shoestring.training.blockwise.decoding import answer, logits_ref

from .test_dit import shaken

V, S, W = 13, 22, 13
BARE = CausalConfig(
    blocks=1, layers=2, width=32, heads=2, vocabulary=V, length=S, condition=16, beside=False
)
PLAIN = CausalConfig(blocks=3, layers=6, width=32, heads=2, vocabulary=V, length=S, condition=16)
RECURRENT = CausalConfig(
    blocks=1, layers=5, prelude=2, coda=1, width=32, heads=2, vocabulary=V, length=S, condition=16
)
TABLE = unit_table(V, W, seed=0)
SHAPES = pytest.mark.parametrize(
    "config", [PLAIN, BARE, RECURRENT], ids=["blocks", "bare", "recurrent"]
)


def made(config):
    return shaken(Causal.make(config, seed=0, table=TABLE))


def batch(config=PLAIN, count=2):
    """(tokens, z, noise)."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (count, config.length), generator=draw)
    return tokens, torch.randn(count, config.length, W, generator=draw), torch.tensor([0.3, -1.0])


def nothing_leaks(config):
    """Token j is heard of by the rows after it, z_j by its own row; clean rows hear no noise."""
    for block in range(1, config.blocks + 1):
        net, (tokens, z, noise) = made(config).block(block), batch(config)
        before, plain = net(tokens, z, noise, TABLE), net.next_tokens(tokens, TABLE)
        for j in range(S):
            changed = tokens.clone()
            changed[:, j] = (changed[:, j] + 1) % V
            after, foreseen = net(changed, z, noise, TABLE), net.next_tokens(changed, TABLE)
            for one, other in ((before, after), (plain, foreseen)):
                assert torch.equal(one[:, : j + 1], other[:, : j + 1])
                for i in range(j + 1, S):
                    assert not torch.equal(one[:, i], other[:, i])
            noisier = z.clone()
            noisier[:, j] += 1
            after = net(tokens, noisier, noise, TABLE)
            others = [i for i in range(S) if i != j]
            assert torch.equal(before[:, others], after[:, others])
            assert not torch.equal(before[:, j], after[:, j])
        louder = torch.tensor([1.0, 1.0])
        quiet, loud = (read_at(net, tokens, z, at) for at in (noise, louder))
        for one, other in zip(quiet.layers, loud.layers, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
        assert not torch.equal(before, net(tokens, z, louder, TABLE))


def read_at(net, tokens, z, noise):
    """What is kept of the clean rows while noised ones of a level are answered."""
    kept, read = [], CausalBlock.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalBlock, "read", lambda self, x: kept.append(read(self, x)) or kept[-1])
        net(tokens, z, noise, TABLE)
    return kept[0]


@SHAPES
def test_nothing_leaks(config):
    """Would see: a plain causal mask over the 2 S rows, conventions mixed, a mask that lets noised
    rows see each other, clean rows that see their own token or hear the noise."""
    nothing_leaks(config)


def plain_causal(length, *, size=1, shifted=False, device=None):
    return torch.ones(2 * length, 2 * length, dtype=torch.bool).tril()


def same_position(length, *, size=1, shifted=False, device=None):
    return block_mask(length, shifted=False)


def noised_rows_see_each_other(length, *, size=1, shifted=False, device=None):
    mask = block_mask(length, shifted=True)
    mask[length:, length:] = torch.ones(length, length, dtype=torch.bool).tril()
    return mask


def own_token_in_sight(self, tokens, table):
    """The clean rows of the other convention: row i is token i, and known to row i."""
    return self._embedded(tokens, table)


def clean_rows_that_hear_the_noise(self, tokens, z, noise, table):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalBlock, "_clean", lambda block, x: block.condition(noise, None))
        return FORWARD(self, tokens, z, noise, table)


FORWARD, READ = CausalBlock.forward, CausalBlock.read
LEAKS = [
    (causal.block_masks, "block_mask", plain_causal),
    # no leak but a loss: a token is not heard of by the row after it
    (causal.block_masks, "block_mask", same_position),
    (causal.block_masks, "block_mask", noised_rows_see_each_other),
    (CausalBlock, "rows", own_token_in_sight),
    (CausalBlock, "forward", clean_rows_that_hear_the_noise),
]


@pytest.mark.parametrize(("owner", "name", "bug"), LEAKS, ids=[bug.__name__ for *_, bug in LEAKS])
def test_planted_leak_is_seen(monkeypatch, owner, name, bug):
    if name == "block_mask":  # not for everybody: the other module has the real one
        monkeypatch.setattr(causal, "block_masks", type("masks", (), {name: staticmethod(bug)}))
    else:
        monkeypatch.setattr(owner, name, bug)
    with pytest.raises(AssertionError):
        nothing_leaks(BARE)


def doubled_ref(net, tokens, z, noise, table):
    """Twin of `forward`: 2 S rows at once through whole layers, under the mask, in float64."""
    net, table = net.double(), table.double()
    clean = net.condition(torch.full((1,), CLEAN, dtype=torch.float64), None)
    noised = net.condition(noise.double(), None)
    answered = []
    for n in range(len(tokens)):
        seen, own = net.rows(tokens[n : n + 1], table), net.noised(z[n : n + 1].double())
        x = torch.cat((seen, own + seen if net.config.beside else own), 1)
        turns = tuple(torch.cat((t, t)) for t in turns_of(S, 16, torch.device("cpu")))
        for layer in net.layers:
            parts = [layer.modulation(c).expand(S, -1) for c in (clean, noised[n : n + 1])]
            shift, scale, gate, more, bigger, last = torch.cat(parts)[None].chunk(6, dim=-1)
            h = layer.attention_norm(x) * (1 + scale) + shift
            q, k, v = layer.qkv(h).view(1, 2 * S, 3, 2, 16).permute(2, 0, 3, 1, 4)
            scores = turned(q, turns) @ turned(k, turns).mT / 4
            scores = scores.masked_fill(~block_mask(S, shifted=True), -torch.inf)
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 2 * S, 32)
            x = x + gate * layer.out(y)
            h = layer.mlp_norm(x) * (1 + bigger) + more
            x = x + last * layer.down(F.gelu(layer.up(h), approximate="tanh"))
        answered.append(net.finish(x[:, S:], noised[n : n + 1])[0] * W**0.5)
    return torch.stack(answered)


@pytest.mark.parametrize("config", [PLAIN, BARE], ids=["blocks", "bare"])
def test_a_block_is_its_twin_of_twice_the_rows_under_the_mask(config):
    net, (tokens, z, noise) = made(config).block(1), batch()
    found = net(tokens, z, noise, TABLE)
    torch.testing.assert_close(found.double(), doubled_ref(net, tokens, z, noise, TABLE),
                               atol=1e-5, rtol=1e-4)  # fmt: skip


def kept_rows_are_as_good_as_new(config):
    """20 tokens: noised rows at several levels, and clean rows, against all rows made anew."""
    tokens, z, _ = batch(config)
    for block in range(1, config.blocks + 1):
        net = made(config).block(block)
        with torch.no_grad():
            hidden, kept = net.begin(tokens[:, :1], TABLE)
            for place in range(1, 21):
                assert kept.count == place + 1
                for sigma in (80.0, 0.5, 0.01):
                    level = torch.full((2,), sigma, dtype=torch.float64)
                    one = answer(net, kept, z[:, place] * sigma, level, TABLE)
                    all_anew = logits_ref(net, tokens[:, :place], z[:, place] * sigma, level, TABLE)
                    torch.testing.assert_close(one, all_anew, atol=1e-5, rtol=0)
                padded = tokens[:, : place + 1]
                torch.testing.assert_close(
                    hidden, net.next_tokens(padded, TABLE)[:, place], atol=1e-5, rtol=0
                )
                hidden, kept = net.extend(kept, tokens[:, place], TABLE)


@SHAPES
def test_kept_rows_are_as_good_as_new(config):
    """Would see: positions that are counted wrongly, a row read twice or not at all, keys of the
    noised row that stay, a cache that depends on the noise level."""
    kept_rows_are_as_good_as_new(config)


def one_place_late(self, first, last, device):
    return TURNS(self, first + 1, last + 1, device) if last - first == 1 else TURNS(
        self, first, last, device)  # fmt: skip


def forgetful(self, kept, tokens, table):
    hidden, after = EXTEND(self, kept, tokens, table)
    return hidden, causal.Kept((kept.layers[0], *after.layers[1:]), after.entry)


def noised_rows_stay(self, kept, z, noise):
    found = ANSWER(self, kept, z, noise)
    keys, _ = kept.layers[-1]
    keys[:, :, -1] += 0.1
    return found


TURNS, EXTEND, ANSWER = CausalBlock._turns, CausalBlock.extend, CausalBlock.answer


@pytest.mark.parametrize(
    ("name", "bug"),
    [("_turns", one_place_late), ("extend", forgetful), ("answer", noised_rows_stay)],
)
def test_planted_bug_of_what_is_kept_is_seen(monkeypatch, name, bug):
    monkeypatch.setattr(CausalBlock, name, bug)
    with pytest.raises(AssertionError):
        kept_rows_are_as_good_as_new(PLAIN)


def an_empty_prompt_begins_at_the_start(config):
    net, (tokens, z, _) = made(config).block(1), batch(config)
    with torch.no_grad():
        hidden, kept = net.begin(tokens[:, :0], TABLE)
        torch.testing.assert_close(hidden, net.next_tokens(tokens, TABLE)[:, 0])
        level = torch.full((2,), 3.0, dtype=torch.float64)
        one = answer(net, kept, z[:, 0], level, TABLE)
        torch.testing.assert_close(one, logits_ref(net, tokens[:, :0], z[:, 0], level, TABLE))


@SHAPES
def test_an_empty_prompt_begins_at_the_start(config):
    an_empty_prompt_begins_at_the_start(config)


def context_is_learned(config):
    """The noised rows' loss is heard by the keys and values of all clean rows but the last one's
    own, and by what they are made of."""
    net, (tokens, z, noise), kept = made(config).block(1), batch(config), []
    read = CausalBlock.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalBlock, "read", lambda self, x: kept.append(read(self, x)) or kept[-1])
        loss = net(tokens, z, noise, TABLE)[:, -1].square().sum()
    seen = [each for pair in kept[0].layers[net.prelude :] for each in pair]
    assert all(each.requires_grad for each in seen)
    for gradient in torch.autograd.grad(loss, seen, retain_graph=True):
        assert bool((gradient.abs().sum(dim=(0, 1, 3)) > 0).all())
    loss.backward()
    for name in ("start", "embed.weight", "noised.weight", "layers.0.qkv.weight"):
        gradient = net.get_parameter(name).grad
        assert gradient is not None, name
        assert bool(gradient.abs().sum() > 0), name


@SHAPES
def test_context_is_learned_through_the_clean_rows(config):
    """Would see: clean rows made under no_grad."""
    context_is_learned(config)


def without_graph(self, x):
    with torch.no_grad():
        return READ(self, x)


@SHAPES
def test_clean_rows_without_a_graph_are_seen(monkeypatch, config):
    monkeypatch.setattr(CausalBlock, "read", without_graph)
    with pytest.raises(AssertionError):
        context_is_learned(config)


@contextmanager
def layers_run(model):
    ran, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            hooks.append(module.register_forward_hook(lambda *_, name=name: ran.append(name)))
    yield ran
    for hook in hooks:
        hook.remove()


def test_a_block_runs_its_own_layers_only():
    model, (tokens, z, noise) = made(PLAIN), batch()
    with layers_run(model) as ran:
        model.block(2)(tokens, z, noise, TABLE)
    # of the last layer nobody sees more of the clean rows than their keys and values
    assert ran == ["blocks.1.layers.0", "blocks.1.layers.0", "blocks.1.layers.1"]
    with torch.no_grad():
        before = model.block(2)(tokens, z, noise, TABLE)
        for other in (1, 3):
            for parameter in model.block(other).parameters():
                parameter.fill_(float("nan"))
        assert torch.equal(before, model.block(2)(tokens, z, noise, TABLE))


def saved_by(blocks):
    """Bytes that autograd keeps of one step: of the whole on S rows, of a block on 2 S."""
    config = CausalConfig(
        blocks=blocks, layers=12, width=32, heads=2, vocabulary=V, length=S, condition=16
    )
    net, (tokens, z, noise) = Causal.make(config, seed=0, only=1, table=TABLE).block(1), batch()
    weights = {p.untyped_storage().data_ptr() for p in (*net.parameters(), TABLE)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = (
            net.next_tokens(tokens, TABLE) if blocks == 1 else net(tokens, z, noise, TABLE)
        )  # fmt: skip
        ops.nats(hidden, tokens, TABLE)
    return sum(kept.values())


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_activations_of_a_block_are_nearly_twice_its_share(blocks):
    """Invariant 16, as it is: 2 S rows, but of the last layer keys and values of S of them."""
    ratio = saved_by(blocks) / saved_by(1)
    assert 1.7 / blocks < ratio < 2.02 / blocks


def test_recurrent_depth_reads_the_text_once_and_runs_the_rest_again():
    model, (tokens, z, noise) = made(RECURRENT), batch(RECURRENT)
    net = model.block(1)
    with torch.no_grad(), layers_run(model) as ran:
        _, kept = net.begin(tokens[:, :3], TABLE)
        first = list(ran)
        ran.clear()
        for _ in range(4):
            net.answer(kept, z[:, 0], noise)
    assert len(first) == 5
    assert ran == [f"blocks.0.layers.{number}" for number in (2, 3, 4)] * 4


def test_unrolled_runs_the_core_k_times_and_is_taught_through_all_of_them():
    model, (tokens, _, _) = made(RECURRENT), batch(RECURRENT)
    net = model.block(1)
    with layers_run(model) as ran:
        found = net.unrolled(tokens, TABLE, 3)
    assert [int(name[-1]) for name in ran] == [0, 1, 2, 3, 2, 3, 2, 3, 4]
    assert not torch.equal(found, net.unrolled(tokens, TABLE, 2))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % V
    other = net.unrolled(changed, TABLE, 3)
    assert torch.equal(found[:, :10], other[:, :10])
    assert not torch.equal(found[:, 10:], other[:, 10:])
    found.square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in net.layers[2].parameters())


def test_an_untrained_block_says_nothing():
    net, (tokens, z, noise) = Causal.make(PLAIN, seed=0, table=TABLE).block(1), batch()
    logits = net(tokens, z, noise, TABLE) @ TABLE.T
    assert torch.equal(logits, torch.zeros(2, S, V))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 2, "layers": 4, "prelude": 1}, "recurrent model in 2 blocks"),
        ({"layers": 4, "prelude": 2, "coda": 2}, "fewer than all together"),
        ({"layers": 4, "coda": 1}, "1 or more before it"),
        ({"layers": 4, "prelude": -1}, "-1 layers before"),
        ({"layers": 4, "classes": 3}, "a vocabulary and a length"),
        ({"layers": 4, "blocks": 3}, "nearest: 2 or 4"),
    ],
)
def test_shapes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CausalConfig(width=32, heads=2, vocabulary=V, length=S, **settings)


def test_a_shape_comes_back_from_plain_data():
    assert CausalConfig.from_json(RECURRENT.to_json()) == RECURRENT
    with pytest.raises(ConfigError, match="cannot be read"):
        CausalConfig.from_json({**PLAIN.to_json(), "colour": 3})
    assert ops.scaled(torch.ones(1, W), torch.tensor([80.0]))[1].item() > CLEAN
