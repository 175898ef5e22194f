"""What a layer keeps: the same however it came, exactly once, and as many bytes as promised."""

import copy
from functools import partial

import pytest
import torch

from shoestring.errors import ConfigError, DataError, StackError
from shoestring.ops.vector_code import VectorCode
from shoestring.serve.layer import CompressedLayer

SETTINGS = {"key_bits": 4, "value_bits": 3, "window": 20, "sinks": 3, "centre": True}
N = 330


def make(**settings):
    return CompressedLayer(partial(VectorCode, seed=1), **{**SETTINGS, **settings})


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
    parts = [part for _, keys, values in layer.coded.tiles() for part in (keys, values)]
    codes = [x.clone() for part in parts for x in (part.packed, part.scale)]
    exact = [layer.recent.keys.clone(), layer.recent.values.clone()]
    return [*codes, *exact, layer.mean, layer.sink_keys, layer.sink_values]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def tokens(rows=2, n=N, width=20):
    return torch.randn(2, rows, 2, n, width) + 0.7


@pytest.mark.parametrize("window", [0, 20, 100])
def test_what_is_kept_does_not_depend_on_how_many_came_at_a_time(window):
    keys, values = tokens()
    wanted = kept(feed(make(window=window), keys, values, chunk=N))
    for chunk in (1, 7, 32):
        assert same(kept(feed(make(window=window), keys, values, chunk)), wanted)


def test_codes_are_those_of_the_keys_less_the_mean_of_the_first():
    keys, values = tokens()
    layer = feed(make(window=100), keys, values)
    mean = keys[:, :, 3:103].double().mean(2, keepdim=True)
    assert (layer.mean - mean).abs().max() < 1e-6
    _, found, _ = next(layer.coded.tiles())
    wanted = VectorCode(20, 4, seed=1).encode(keys.double() - layer.mean.double())
    assert torch.equal(found.packed[:, :, 3:230], wanted.packed[:, :, 3:230])
    assert torch.equal(found.scale[:, :, 3:230], wanted.scale[:, :, 3:230])
    assert torch.equal(layer.sink_keys, keys[:, :, :3])
    assert torch.equal(layer.recent.keys, keys[:, :, -100:])


def test_nothing_that_is_coded_changes_in_500_steps():
    keys, values = tokens(n=100)
    layer = feed(make(), keys, values)
    there = len(layer.coded)
    _, first, _ = next(layer.coded.tiles())
    before = first.packed.clone(), first.scale.clone(), layer.mean.clone()
    feed(layer, *tokens(n=500), chunk=1)
    _, first, _ = next(layer.coded.tiles())
    assert torch.equal(first.packed[:, :, :there], before[0])
    assert torch.equal(first.scale[:, :, :there], before[1])
    assert torch.equal(layer.mean, before[2])


@pytest.mark.parametrize("chunk", [7, 64, N])
def test_a_padded_row_is_kept_as_it_would_be_by_itself(chunk):
    keys, values = tokens()
    pads = (0, 90)
    both = feed(make(window=100), keys, values, chunk, pads)
    alone = feed(make(window=100), keys[1:, :, 90:], values[1:, :, 90:])
    assert both.starts == [0, 90]
    assert torch.equal(both.mean[1:], alone.mean)
    assert torch.equal(both.sink_keys[1:], alone.sink_keys)
    _, one, _ = next(both.coded.tiles())
    _, other, _ = next(alone.coded.tiles())
    assert torch.equal(one.packed[1:, :, 90:], other.packed)
    assert torch.equal(one.scale[1:, :, 90:], other.scale)


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
    for _, *both in layer.coded.tiles():
        for code, codes in zip(layer.coded.codes, both, strict=True):
            assert not code.decode(codes).any()
    assert all(bool(x.isfinite().all()) for x in layer.tensors() if x.is_floating_point())


@pytest.mark.parametrize("left", [N - 1, N - 20, N - 21, 257, 256, 40, 2])
def test_what_a_crop_leaves_stays_as_it_is_and_what_comes_next_is_coded_as_ever(left):
    keys, values = tokens()
    layer = feed(make(), keys, values)
    layer.crop(left - N)
    assert layer.get_seq_length() == left
    coded = min(left, N - 20)
    assert (len(layer.coded), len(layer.recent)) == (coded, left - coded)
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
    bad = tokens(n=1)
    bad[place, 1, 0, 0, 3] = torch.nan
    feed(layer, *bad)
    there = len(layer.coded)
    with pytest.raises(DataError, match="NaN"):
        feed(layer, *tokens(n=25))
    assert len(layer.coded) == there


def test_norms_beyond_sixteen_bit_scales_need_other_scales():
    keys, values = tokens()
    with pytest.raises(ConfigError, match="bfloat16"):
        feed(make(), keys * 1e5, values)
    codes = partial(VectorCode, scale_dtype=torch.bfloat16)
    assert len(feed(CompressedLayer(codes, **SETTINGS), keys * 1e5, values).coded) == N - 20


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
