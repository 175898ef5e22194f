"""What a layer keeps: the same however it came, exactly once, and as many bytes as promised."""

import copy

import pytest
import torch

from serve.forms import graded, plain
from shoestring.errors import ConfigError, DataError, StackError
from shoestring.serve.layer import CompressedLayer, split

N = 330


def make(form=plain, **settings):
    return CompressedLayer(form(**settings))


def newest(layer):
    """Exact keys of the window."""
    return torch.cat([split(rows, 2)[0] for rows in layer.stores[0].segments()], dim=2)


def feed(layer, keys, values, chunk=32, pads=None, first=0):
    """Chunk by chunk; first: slots that are there already."""
    for start in range(0, keys.shape[2], chunk):
        stop = min(start + chunk, keys.shape[2])
        layer.update(keys[:, :, start:stop], values[:, :, start:stop])
        mask = None
        if pads is not None:
            mask = torch.arange(first + stop) >= torch.tensor(pads)[:, None]
            mask = mask[:, None, None].expand(-1, 1, stop - start, -1)
        layer.attended(mask)
    return layer


def kept(layer):
    """All that a layer's answers depend on."""
    tiers = [torch.cat([store.rows[:, :0], *store.segments()], dim=1) for store in layer.stores]
    mean = [] if layer.found_mean is None else [layer.found_mean.clone()]
    return [*tiers, *mean, layer.sinks.clone()]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def tokens(rows=2, n=N, width=20):
    return torch.randn(2, rows, 2, n, width) + 0.7


FORMS = {
    "no window": {"window": 0}, "window": {}, "long window": {"window": 100},
    "graded": {"form": graded, "width": 24},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_does_not_depend_on_how_many_came_at_a_time(form):
    keys, values = tokens(width=FORMS[form].get("width", 20))
    wanted = kept(feed(make(**FORMS[form]), keys, values, chunk=N))
    for chunk in (1, 7, 32):
        assert same(kept(feed(make(**FORMS[form]), keys, values, chunk)), wanted)


def test_a_token_moves_on_from_tier_to_tier_and_is_cut_not_turned_again():
    keys, values = tokens(width=24)
    layer = feed(make(graded), keys, values, chunk=7)
    first, second, third = (tier.code for tier in layer.form.tiers)
    assert [len(store) for store in layer.stores] == [10, 30, N - 40]
    x = torch.stack([keys, values], dim=1).double() - layer.form.turn.mean[:, :, None]
    rows = first.encode(x @ layer.form.turn.forward.mT)
    parts = layer.parts()
    assert [part.first for part in parts] == sorted(part.first for part in parts)
    for part in parts:
        came = rows[:, part.first : part.first + part.rows.shape[1]]
        for before, after in ((first, second), (second, third)):
            if part.code is first or (part.code is second and after is third):
                break
            came = after.encode(before.decode(came, torch.float64))
        skip = max(3 - part.first, 0)  # of sinks nobody reads the codes
        assert torch.equal(part.rows[:, skip:], came[:, skip:])


def test_codes_are_those_of_the_keys_less_the_mean_of_the_first():
    keys, values = tokens()
    layer = feed(make(window=100), keys, values)
    mean = keys[:, :, 3:103].double().mean(2)
    assert (layer.found_mean - mean).abs().max() < 1e-6
    x = torch.stack([keys, values], dim=1).double()
    x[:, 0] -= layer.found_mean.double()[:, :, None]
    wanted = layer.form.tiers[1].code.encode(x @ layer.form.turn.forward.mT)
    found = layer.parts()[0].rows
    assert found.shape[1] == N - 100
    assert torch.equal(found[:, 3:], wanted[:, 3 : N - 100])
    sinks, _ = split(layer.sinks, 2)
    assert torch.equal(sinks, keys[:, :, :3])
    assert torch.equal(newest(layer), keys[:, :, -100:])


def test_nothing_that_is_coded_changes_in_500_steps():
    keys, values = tokens(n=100)
    layer = feed(make(), keys, values)
    before, mean = layer.parts()[0].rows.clone(), layer.found_mean.clone()
    feed(layer, *tokens(n=500), chunk=1)
    assert torch.equal(layer.parts()[0].rows[:, : before.shape[1]], before)
    assert torch.equal(layer.found_mean, mean)


@pytest.mark.parametrize("chunk", [7, 64, N])
def test_a_padded_row_is_kept_as_it_would_be_by_itself(chunk):
    keys, values = tokens()
    pads = (0, 90)
    both = feed(make(window=100), keys, values, chunk, pads)
    alone = feed(make(window=100), keys[1:, :, 90:], values[1:, :, 90:])
    assert both.starts == [0, 90]
    assert torch.equal(both.found_mean[1:], alone.found_mean)
    assert torch.equal(both.sinks[1:], alone.sinks)
    assert torch.equal(both.parts()[0].rows[1:, 90:], alone.parts()[0].rows)


def test_a_last_token_that_sees_little_makes_no_padding_of_the_rest():
    keys, values = tokens()
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask[-1, : N - 2] = False
    layer = make()
    layer.update(keys, values)
    layer.attended(mask[None, None])
    assert layer.starts == [0, 0]
    assert same(kept(layer), kept(feed(make(), keys, values)))


def test_vectors_of_zeros_and_single_tokens_are_kept():
    keys, values = torch.zeros_like(tokens())
    layer = feed(make(), keys, values, chunk=1)
    assert not layer.form.tiers[1].code.decode(layer.parts()[0].rows).any()
    assert all(bool(x.isfinite().all()) for x in layer.tensors() if x.is_floating_point())


@pytest.mark.parametrize("left", [N - 1, N - 20, N - 21, 257, 256, 40, 2])
def test_what_a_crop_leaves_stays_as_it_is_and_what_comes_next_is_coded_as_ever(left):
    keys, values = tokens()
    layer = feed(make(), keys, values)
    layer.crop(left - N)
    assert layer.get_seq_length() == left
    coded = min(left, N - 20)
    assert [len(store) for store in layer.stores] == [left - coded, coded]
    feed(layer, keys[:, :, left:], values[:, :, left:])
    assert same(kept(layer), kept(feed(make(), keys, values)))


def test_a_crop_to_nothing_is_a_new_start():
    keys, values = tokens()
    layer = feed(make(), keys, values)
    layer.crop(-N)
    assert layer.get_seq_length() == 0
    other = tokens()
    assert same(kept(feed(layer, *other)), kept(feed(make(), *other)))
    layer.reset()
    assert layer.tensors() == []
    assert same(kept(feed(layer, *other)), kept(feed(make(), *other)))


def test_tokens_that_are_cropped_at_once_leave_no_trace_where_the_past_is_recorded():
    keys, values = tokens()
    layer, plain = feed(make(), keys, values), feed(make(), keys, values)
    layer.activate_past_recording()
    feed(layer, *tokens(n=9), chunk=9)
    layer.crop(-9)
    assert same(kept(layer), kept(plain))
    new = tokens(n=9)
    feed(layer, *new, chunk=9)
    layer.crop(-4)
    feed(plain, *new[:, :, :, :5])
    assert same(kept(layer), kept(plain))


def test_rows_are_chosen_repeated_and_reordered_whole():
    keys, values = tokens(rows=3)
    pads = (0, 5, 60)
    layer = feed(make(), keys, values, pads=pads)
    for change, rows in (
        (lambda x: x.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda x: x.batch_select_indices(torch.tensor([1])), [1]),
        (lambda x: x.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        changed = copy.deepcopy(layer)
        change(changed)
        chosen = feed(make(), keys[rows], values[rows], pads=[pads[row] for row in rows])
        assert same(kept(changed), kept(chosen))
        assert changed.starts == chosen.starts
        more = tokens(rows=len(rows), n=40)
        assert same(kept(feed(changed, *more)), kept(feed(chosen, *more)))


def test_a_changed_copy_leaves_the_first_alone():
    keys, values = tokens()
    layer = feed(make(), keys, values)
    before, other = kept(layer), copy.deepcopy(layer)
    other.crop(-100)
    feed(other, *tokens(n=50))
    assert same(kept(layer), before)


@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_an_error_and_changes_no_code(place):
    pair = tokens()
    layer = feed(make(), *pair)
    before, bad = kept(layer), tokens(n=1)
    bad[place, 1, 0, 0, 3] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        feed(layer, *bad)
    assert same(kept(layer), before)
    for use in (lambda: feed(layer, *pair), lambda: layer.crop(-1), layer.check_whole):
        with pytest.raises(StackError, match="reset"):  # other layers may have kept the tokens
            use()
    layer.reset()
    assert same(kept(feed(layer, *pair)), before)


def test_vectors_too_long_for_a_scale_are_refused():
    keys, values = tokens()
    layer = make()
    with pytest.raises(DataError, match="65504"):
        feed(layer, keys * 1e5, values)
    with pytest.raises(StackError, match="reset"):
        feed(layer, keys, values)


def test_values_that_are_not_like_keys_are_refused():
    keys, values = tokens()
    for bad in (values[..., :8], values[:1], values.half()):
        with pytest.raises(ConfigError, match="as keys"):
            make().update(keys, bad)


def test_rows_that_are_not_there_cannot_be_chosen():
    layer = feed(make(), *tokens())
    before = kept(layer)
    for bad in (torch.tensor([2]), torch.tensor([]).long(), torch.tensor([True])):
        with pytest.raises(ConfigError, match="row"):
            layer.batch_select_indices(bad)
    with pytest.raises(ConfigError, match="crop"):
        layer.crop(-1.5)
    with pytest.raises(ConfigError, match="offload"):
        layer.offload()
    assert same(kept(layer), before)


def test_what_cannot_be_put_in_is_refused():
    keys, values = tokens()
    layer = feed(make(), keys, values)
    before = kept(layer)
    for bad, what in (
        (keys.bfloat16(), "bfloat16"), (keys[:1], "rows 1"), (keys.to("meta"), "meta"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=what):
            layer.update(bad, bad)
    with pytest.raises(StackError, match="gradients"):
        layer.update(keys.clone().requires_grad_(), values)
    for count in (1, -N - 1):
        with pytest.raises(ConfigError, match="crop"):
            layer.crop(count)
    assert same(kept(layer), before)


def test_tokens_that_no_attention_of_ours_saw_are_noticed():
    keys, values = tokens()
    layer = make()
    layer.update(keys, values)
    with pytest.raises(StackError, match="attach"):
        layer.update(keys, values)
    layer.reset()
    feed(layer, keys, values)
