"""Batches: every token a target once, an order that can be repeated, resumed and shared."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.data import (
    Corpus,
    PackedBatches,
    Rows,
    encode,
    held_out_batches,
    open_source,
    train_tokenizer,
)
from shoestring.errors import ConfigError, DataError

END = 9


def corpus(*documents, answers=None):
    """A corpus of these documents (lists of ids), joined as `encode` joins them."""
    is_chat = answers is not None
    ids, bounds = ([], [0]) if is_chat else ([END], [1])
    for document in documents:
        ids += [*document] if is_chat else [*document, END]
        bounds.append(len(ids))
    return Corpus(
        digest="0", ids=np.array(ids, np.uint16), bounds=np.array(bounds), end=END, num_bytes=1,
        answers=np.array(answers, np.uint8) if is_chat else None,
    )  # fmt: skip


def numbered(count):
    """A corpus of one document whose tokens are all different."""
    return corpus(range(10, 10 + count))


def targets(batches):
    """Every label that is predicted, in order."""
    found = []
    for batch in batches:
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
        assert batch["input_ids"].shape == batch["labels"].shape
        found += batch["labels"][batch["labels"] != -100].tolist()
    return found


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(left, right):
    return all(torch.equal(a[k], b[k]) for a, b in zip(left, right, strict=True) for k in (*a, *b))


@given(count=st.integers(1, 200), length=st.integers(2, 40), batch=st.integers(1, 5))
def test_held_out_targets_are_every_token_exactly_once(count, length, batch):
    data = numbered(count)
    found = targets(held_out_batches(data, length=length, batch=batch))
    assert found == data.ids[1:].tolist()


@given(count=st.integers(60, 200), length=st.integers(2, 40), seed=st.integers(0, 9))
def test_an_epoch_has_every_token_of_whole_rows_exactly_once(count, length, seed):
    data = numbered(count)
    batches = PackedBatches(data, length=length, batch=1, seed=seed)
    whole = (data.num_tokens - 1) // (length - 1) * (length - 1)
    found = targets(take(batches, len(batches.rows)))
    assert sorted(found) == sorted(data.ids[1 : 1 + whole].tolist())


def test_labels_are_the_inputs_and_the_first_is_predicted_by_nothing():
    (batch,) = held_out_batches(numbered(7), length=8, batch=4)
    assert batch["input_ids"].tolist() == [[END, 10, 11, 12, 13, 14, 15, 16], [16] + [END] * 7]
    assert batch["labels"].tolist() == [
        [-100, 10, 11, 12, 13, 14, 15, 16], [-100, END] + [-100] * 6
    ]  # fmt: skip


def test_order_depends_on_the_seed_and_the_epoch_alone():
    def epochs(seed):
        batches = PackedBatches(numbered(100), length=5, batch=1, seed=seed)
        count = len(batches.rows)
        return targets(take(batches, count)), targets(take(batches, count))

    first, second = epochs(0)
    assert first != second
    assert sorted(first) == sorted(second)
    assert epochs(0) == (first, second)
    assert epochs(1)[0] != first


def test_without_shuffling_rows_come_in_order():
    batches = PackedBatches(numbered(99), length=11, batch=2, shuffle=False)
    assert targets(take(batches, 5)) == numbered(99).ids[1:].tolist()


@pytest.mark.parametrize("stop", [0, 1, 7, 40])
def test_restored_position_continues_bit_equal(stop):
    def fresh():
        return PackedBatches(numbered(100), length=5, batch=3, seed=4)

    whole = take(fresh(), 60)
    first = fresh()
    take(first, stop)
    again = fresh()
    again.load_state(json.loads(json.dumps(first.state())))
    assert same(take(again, 60 - stop), whole[stop:])


def test_ranks_share_the_rows_of_one_process():
    def rows(rank, world, batch, steps):
        batches = PackedBatches(
            numbered(100), length=5, batch=batch, seed=2, rank=rank, world=world
        )
        return [b["input_ids"] for b in take(batches, steps)]

    alone = torch.cat(rows(0, 1, 6, 20))
    shared = zip(*(rows(rank, 3, 2, 20) for rank in range(3)), strict=True)
    assert torch.equal(torch.cat([part for step in shared for part in step]), alone)


def test_position_survives_another_number_of_processes():
    two = PackedBatches(numbered(100), length=5, batch=2, seed=2, rank=1, world=2)
    take(two, 7)
    assert two.state()["position"] == 28
    one = PackedBatches(numbered(100), length=5, batch=4, seed=2)
    reference = PackedBatches(numbered(100), length=5, batch=4, seed=2)
    one.load_state(two.state())
    assert same(take(one, 5), take(reference, 12)[7:])
    assert one.epoch == one.position / len(one.rows)


def test_held_out_rows_are_divided_among_ranks():
    data = numbered(57)
    found = [targets(held_out_batches(data, length=4, batch=3, rank=r, world=3)) for r in range(3)]
    assert sorted(itertools.chain(*found)) == sorted(data.ids[1:].tolist())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 1}, "seed = 1; expected 0"),
        ({"length": 9}, "length = 9; expected 5"),
        ({"corpus": "x"}, "corpus = 'x'; expected '0'"),
        ({"position": -1}, "position is -1"),
        ({"position": "3"}, "position is '3'"),
        ({"position": None}, "position is None"),
    ],
)
def test_state_of_other_rows_is_refused(change, text):
    batches = PackedBatches(numbered(100), length=5, batch=1)
    with pytest.raises(DataError, match=text):
        batches.load_state({**batches.state(), **change})


def test_padded_rows_are_one_document_each():
    data = corpus([1, 2, 3], [4], [5, 6, 7, 8, 1, 2])
    (batch,) = held_out_batches(data, length=5, batch=9, layout="pad")
    assert batch["input_ids"].tolist() == [[9, 1, 2, 3, 9], [9, 4, 9, 9, 9], [9, 5, 6, 7, 8]]
    assert batch["labels"].tolist() == [
        [-100, 1, 2, 3, 9], [-100, 4, 9, -100, -100], [-100, 5, 6, 7, 8]
    ]  # fmt: skip
    assert Rows(data, length=5, layout="pad").num_cut == 1


def test_only_answers_are_targets_in_both_layouts():
    data = corpus([1, 2, 3, 4], [5, 6, 7], answers=[0, 0, 1, 1, 0, 0, 1])
    (padded,) = held_out_batches(data, length=4, batch=9, layout="pad")
    assert padded["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 9]]
    assert padded["labels"].tolist() == [[-100, -100, 3, 4], [-100, -100, 7, -100]]
    assert targets(held_out_batches(data, length=4, batch=1)) == [3, 4, 7]


@pytest.mark.parametrize("layout", ["join", "pad"])
def test_rows_without_a_target_are_left_out(layout):
    answers = [0] * 8 + [0, 0, 0, 1] + [1] + [0] * 3
    data = corpus([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4], [5, 6, 7, 8], answers=answers)
    for batch in held_out_batches(data, length=4, batch=1, layout=layout):
        assert (batch["labels"] != -100).any()
    batches = PackedBatches(data, length=4, batch=1, layout=layout)
    for batch in take(batches, 10):
        assert (batch["labels"] != -100).any()


def test_real_chats_teach_the_same_answers_in_both_layouts(chats, tmp_path):
    source = open_source(chats)
    data = encode(source, train_tokenizer(source, 300, cache=tmp_path), cache=tmp_path)
    answers = Counter(data.ids[data.answers.astype(bool)].tolist())
    for layout in ("join", "pad"):
        found = targets(held_out_batches(data, length=200, batch=4, layout=layout))
        assert Counter(found) == answers


def test_data_shorter_than_a_row():
    with pytest.raises(DataError, match="has 12 tokens, which do not make one row of 64") as caught:
        PackedBatches(numbered(10), length=64, batch=1)
    assert "shorter length" in str(caught.value)


def test_answers_that_no_row_shows():
    data = corpus([1, 2, 3, 4, 5, 6], answers=[0] * 5 + [1])
    with pytest.raises(DataError, match="do not make one row of 3"):
        PackedBatches(data, length=3, batch=1, layout="pad")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"length": 1}, "length = 1 leaves nothing to predict"),
        ({"batch": 0}, "batch = 0 is not a number of rows"),
        ({"rank": 2, "world": 2}, "rank = 2 of 2 processes; expected 0 to 1"),
        ({"layout": "fold"}, "layout = 'fold' is not known"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ConfigError, match=text):
        PackedBatches(numbered(50), **{"length": 5, "batch": 1, **options})


def test_number_of_rows_is_the_tokens_by_the_length():
    assert len(Rows(numbered(100), length=5)) == 101 // 4
    assert len(Rows(numbered(100), length=5, with_rest=True)) == math.ceil(101 / 4)
