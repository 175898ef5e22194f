"""A corpus as batches: fixed rows, shuffled by seed, at a position that can be saved.

Rows follow the convention of Hugging Face causal models, which shift inside: `input_ids` and
`labels` are both (B, T), position t is predicted from the positions before it, and labels[:, 0] is
-100 because nothing predicts it. So a row of T tokens has T - 1 targets at most, and
`(labels != -100).sum()` is exactly the number of targets.

join   rows are windows over the joined documents; neighbours share one token, so every token of
       the corpus is a target exactly once an epoch (what is left at the end, less than a row,
       only in `held_out_batches`).
pad    one row a document, cut at T tokens, filled up with the end mark. Filling lies to the right
       of a causal model's tokens and has label -100, so no attention mask is needed.

The order of an epoch depends on (seed, epoch) alone; the position counts rows over all ranks, so
a run continues where it was even with another batch size or number of processes.
"""

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch

from ..errors import ConfigError, DataError
from .corpus import Corpus

# B rows of a batch, T tokens of a row
IGNORED = -100
Layout = Literal["join", "pad"]
Batch = dict[str, torch.Tensor]


class Rows:
    """The rows of a corpus by number, each made when it is asked for.

    length: T.  with_rest: also the last, shorter row of the joined layout, filled up.
    Rows without any target are not counted.
    """

    def __init__(
        self, corpus: Corpus, *, length: int, layout: Layout = "join", with_rest: bool = False
    ) -> None:
        if length < 2:
            raise ConfigError(f"length = {length} leaves nothing to predict", expected="2 or more")
        if layout not in ("join", "pad"):
            raise ConfigError(f"layout = {layout!r} is not known", expected="'join' or 'pad'")
        self.corpus, self.length, self.layout = corpus, length, layout
        self._starts, self._stops = self._padded() if layout == "pad" else self._joined(with_rest)
        if not len(self._starts):
            raise DataError(
                f"the data has {corpus.num_tokens} tokens, which do not make one row of {length}",
                expected="at least one whole row with a target",
                hint="Use a shorter length, or more data.",
            )

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def num_cut(self) -> int:
        """How many documents are longer than a row of the padded layout, and so lose their end."""
        return int((self._stops - self._starts > self.length).sum())

    def _joined(self, with_rest: bool) -> tuple[np.ndarray, np.ndarray]:
        stride, targets = self.length - 1, self.corpus.num_tokens - 1
        count = -(-targets // stride) if with_rest else targets // stride
        starts = np.arange(count, dtype=np.int64) * stride
        stops = np.minimum(starts + self.length, self.corpus.num_tokens)
        return self._with_targets(starts, stops)

    def _padded(self) -> tuple[np.ndarray, np.ndarray]:
        starts, stops = self.corpus.bounds[:-1], self.corpus.bounds[1:]
        if not self.corpus.is_chat:
            starts = starts - 1  # the end mark before a text predicts its first token
        return self._with_targets(np.asarray(starts), np.asarray(stops))

    def _with_targets(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.corpus.answers is None:
            return starts, stops
        # The mean loss of a row without targets would be 0 / 0.
        answers = self.corpus.answers
        shown = np.minimum(stops, starts + self.length)
        keep = [bool(answers[a + 1 : b].any()) for a, b in zip(starts, shown, strict=True)]
        return starts[keep], stops[keep]

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids (T,), labels (T,)), both int64."""
        start = int(self._starts[number])
        stop = min(int(self._stops[number]), start + self.length)
        ids = np.full(self.length, self.corpus.end, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        ids[: stop - start] = self.corpus.ids[start:stop]
        labels[1 : stop - start] = ids[1 : stop - start]
        if self.corpus.answers is not None:
            is_target = self.corpus.answers[start + 1 : stop].astype(bool)
            labels[1 : stop - start][~is_target] = IGNORED
        return ids, labels

    def batch(self, numbers: list[int]) -> Batch:
        """{"input_ids": (B, T), "labels": (B, T)}, torch.long."""
        ids, labels = zip(*map(self.row, numbers), strict=True)
        return {
            "input_ids": torch.from_numpy(np.stack(ids)),
            "labels": torch.from_numpy(np.stack(labels)),
        }


class PackedBatches:
    """An endless iterator of training batches whose position can be saved and restored.

    batch: B, the rows of one process.  rank, world: this process among those that train together;
    their rows never overlap within an epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        length: int,
        batch: int,
        seed: int = 0,
        shuffle: bool = True,
        layout: Layout = "join",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _check_shares(batch, rank, world)
        self.rows = Rows(corpus, length=length, layout=layout)
        self.batch, self.seed, self.shuffle = batch, seed, shuffle
        self.rank, self.world = rank, world
        self.position = 0
        self._order_of = (-1, np.empty(0, dtype=np.int64))

    @property
    def epoch(self) -> float:
        """How often the data was gone through, all processes together."""
        return self.position / len(self.rows)

    def __iter__(self) -> "PackedBatches":
        return self

    def __next__(self) -> Batch:
        first = self.position + self.rank * self.batch
        numbers = [self._number(first + i) for i in range(self.batch)]
        self.position += self.batch * self.world
        return self.rows.batch(numbers)

    def _number(self, position: int) -> int:
        epoch, within = divmod(position, len(self.rows))
        if not self.shuffle:
            return within
        if self._order_of[0] != epoch:
            order = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._order_of = epoch, order.permutation(len(self.rows))
        return int(self._order_of[1][within])

    def state(self) -> dict[str, Any]:
        """Where this iterator is, as JSON: the same on every rank."""
        return {"position": self.position, **self._fixed()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue at a saved position. DataError when it belongs to other rows."""
        for name, mine in self._fixed().items():
            if state.get(name) != mine:
                raise DataError(
                    f"the saved data position has {name} = {state.get(name)!r}",
                    expected=repr(mine),
                    hint="Continue with the same data, tokenizer, length and seed as before.",
                )
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise DataError(
                f"the saved data position is {position!r}", expected="a count of rows, 0 or more"
            )
        self.position = position

    def _fixed(self) -> dict[str, Any]:
        return {
            "corpus": self.rows.corpus.digest,
            "length": self.rows.length,
            "layout": self.rows.layout,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


def held_out_batches(
    corpus: Corpus,
    *,
    length: int,
    batch: int,
    layout: Layout = "join",
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Every target of the corpus exactly once, in order; the last batch may have fewer rows.

    With several processes each gives its own rows, and their sums add up to the whole.
    """
    _check_shares(batch, rank, world)
    rows = Rows(corpus, length=length, layout=layout, with_rest=True)
    mine = iter(range(rank, len(rows), world))
    while numbers := list(itertools.islice(mine, batch)):
        yield rows.batch(numbers)


def _check_shares(batch: int, rank: int, world: int) -> None:
    if batch < 1:
        raise ConfigError(f"batch = {batch} is not a number of rows", expected="1 or more")
    if not 0 <= rank < world:
        raise ConfigError(f"rank = {rank} of {world} processes", expected=f"0 to {world - 1}")
