"""One attention layer's compressed cache.

Newest tokens are exact while their attention is taken. Then they enter the first tier of the form
(`form`) and move on through the others, one place for every token that comes, so that codes do not
depend on how many tokens came at a time. The first `sinks` tokens of each row stay exact beside
their codes, since many heads attend to them.

Where the form says so, a mean key of each head is taken from all keys alike: that adds the same to
every score, which a softmax does not see, and leaves the code less to describe. It is the mean of
the first keys after the sinks, as many as the exact tier holds, and is frozen when the first of
them is coded.

Rows of a batch may begin with padding. Slots count from the batch's start, and are the same for all
rows; where a row starts is read from the mask (`attended`), and its sinks and mean are counted from
there, so that it is treated as it would be by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import ConfigError, DataError, StackError
from ..ops.row_code import RowCode
from . import coding
from .form import LayerForm
from .store import Pile, Ring

# B batch, H heads of keys and values, S sinks, t tokens, d width of a head

PAYLOAD = "_shoestring_layer"
"""The attribute under which the keys that go to attention carry the layer."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one form, one after another. rows: (B, n, r), a view; code: None where they are
    exact (then r is keys, then values, of all heads); first: the slot of the first."""

    rows: Tensor
    code: RowCode | None
    first: int


class CompressedLayer(CacheLayerMixin):
    """form: see there; nothing is allocated before the first tokens."""

    is_sliding = False
    is_croppable = True  # while it records the past, as for transformers' sliding layers
    is_compileable = False

    def __init__(self, form: LayerForm) -> None:
        super().__init__()
        self.form = form
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.is_initialized, self.pending, self.torn = False, False, False
        self.fresh: tuple[Tensor, Tensor] | None = None
        self.stores: list[Ring | Pile] = []
        self.sinks: Tensor | None = None
        self.found_mean: Tensor | None = None
        self.starts: list[int] = []
        self.frozen: list[bool] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers for tensors like these (B, H, t, d)."""
        form, batch = self.form, key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        numbers = 2 * form.heads * form.width
        bytes_like = torch.empty(batch, dtype=torch.uint8, device=self.device)
        for tier in form.tiers:
            like = key_states if tier.code is None else bytes_like
            length = numbers if tier.code is None else tier.code.row_bytes
            self.stores.append(
                Pile(like, length) if tier.room is None else Ring(like, tier.room, length)
            )
        with torch.inference_mode(False):  # so that it can be written to outside of it, too
            self.sinks = key_states.new_zeros(batch, form.sinks, numbers)
            if form.centre:
                self.found_mean = torch.zeros(batch, form.heads, form.width, device=self.device)
        self.starts, self.frozen = [0] * batch, [not form.centre] * batch
        self.is_initialized = True

    # ---- what a model calls ------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, H, t, d) each -> the same, the keys carrying this layer to the attention function.

        ConfigError for another batch, shape, dtype or device than before; StackError with gradients
        on, and where the attention function of the model is not ours.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._settle()  # held back for a crop that did not come
        self.fresh = key_states, value_states
        self.pending = True
        keys = key_states.view_as(key_states)
        setattr(keys, PAYLOAD, self)
        return keys, value_states

    def attended(self, mask: Tensor | None) -> None:
        """The attention of the newest tokens is done; mask (B or 1, heads or 1, t, slots) or None.
        They enter the first tier, unless a crop is to come first.

        DataError for NaN and infinity in them; then they are not kept."""
        self.pending = False
        if mask is not None and max(self.starts) >= self.settled:
            self._find_starts(mask)
        if not self.record_past:
            self._settle()

    def refuse(self) -> None:
        """The newest tokens do not count; other layers may have kept them."""
        self.fresh, self.pending, self.torn = None, False, True

    @property
    def settled(self) -> int:
        """Tokens that are in a tier."""
        return sum(map(len, self.stores))

    def get_seq_length(self) -> int:
        """Tokens that were given and not cropped."""
        return self.settled + (0 if self.fresh is None else self.fresh[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots with the tokens to come, the first slot)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: none."""
        return -1

    def reset(self) -> None:
        """Everything is let go, the mean and an unfinished update too."""
        self._forget()

    def activate_past_recording(self) -> None:
        """From now on tokens stay out of the tiers until `crop` (or another update) has come, so
        that what is cropped at once leaves no trace."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens away; 0 or negative. What is coded and stays, stays coded.
        ConfigError for a positive count, and for more than there are."""
        length = self.get_seq_length()
        check_crop(tokens_to_remove, length)
        self.check_whole()
        if not self.is_initialized:
            return
        if tokens_to_remove == -length:
            return self._forget()  # what comes next may be padded otherwise
        left = -tokens_to_remove
        if self.fresh is not None:
            keys, values = self.fresh
            kept = max(keys.shape[2] - left, 0)
            left -= keys.shape[2] - kept
            self.fresh = (keys[:, :, :kept], values[:, :, :kept]) if kept else None
        for store in self.stores:
            gone = min(left, len(store))
            store.drop_newest(gone)
            left -= gone
        self._settle()

    def offload(self) -> None:
        """Refused: it is small as it is."""
        raise ConfigError(
            "a compressed cache to be offloaded", expected="one that stays where it is",
            hint="Give `generate` no offloading beside it.",
        )  # fmt: skip

    def prefetch(self) -> None:
        """Nothing: it never leaves."""

    def check_whole(self) -> None:
        """StackError where tokens were refused that other layers have kept."""
        if self.torn:
            raise StackError(
                "the last tokens were refused, and layers differ in what they hold",
                expected="a cache that was reset",
                hint="Find what made them unfit (the first error says it); then cache.reset().",
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch, by their indices; one may come several times."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows of the batch: indices, or a boolean for each row."""
        if not self.is_initialized:
            return
        indices, rows = indices.to(self.device), len(self.starts)
        if indices.dtype == torch.bool:
            if len(indices) != rows:
                raise ConfigError(f"a choice among {len(indices)} rows", expected=f"{rows}")
            indices = indices.nonzero().flatten()
        if not len(indices) or int(indices.min()) < -rows or int(indices.max()) >= rows:
            raise ConfigError(f"rows {indices.tolist()}", expected=f"one or more of {rows}")
        self._change_rows(lambda x: x.index_select(0, indices), indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after another."""
        if self.is_initialized:
            rows = [row for row in range(len(self.starts)) for _ in range(repeats)]
            self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0), rows)

    # ---- what attention reads ----------------------------------------------------------------

    def parts(self) -> list[Part]:
        """What is in the tiers, the oldest tokens first."""
        found, first = [], 0
        for store, tier in zip(self.stores[::-1], self.form.tiers[::-1], strict=True):
            for rows in store.segments():
                found.append(Part(rows, tier.code, first))
                first += rows.shape[1]
        return found

    def mean(self) -> Tensor | None:
        """(2, B or 1, H, d) float64, of keys and of values, or None."""
        if self.found_mean is not None:
            return torch.stack([self.found_mean, torch.zeros_like(self.found_mean)]).double()
        mean = self.form.turn.mean
        return None if mean is None else mean[:, None].to(self.device)

    def sinks_there(self) -> list[int]:
        """How many of each row's sinks are kept; the others, if any, are among the fresh."""
        there = self.settled
        return [min(max(there - start, 0), self.form.sinks) for start in self.starts]

    def tensors(self) -> list[Tensor]:
        """All that the layer owns."""
        found = [self.found_mean, self.sinks, *(self.fresh or ())]
        return [x for x in found if x is not None] + [store.rows for store in self.stores]

    # ---- inside ------------------------------------------------------------------------------

    def _check(self, keys: Tensor, values: Tensor) -> None:
        self.check_whole()
        if self.pending:
            raise StackError(
                "the last tokens never came to the compressed attention",
                expected="a model whose attention is ours",
                hint="Give the cache the model, CompressedCache(model), or call "
                "cache.attach(model); then cache.reset().",
            )
        if torch.is_grad_enabled() and keys.requires_grad:
            raise StackError(
                "keys with gradients are put into a compressed cache, through which none pass",
                expected="inference",
                hint="Run the model under torch.no_grad().",
            )
        form, there = self.form, (keys.shape[1], keys.shape[3])
        if there != (form.heads, form.width):
            raise ConfigError(
                f"keys of {there[0]} heads of width {there[1]}",
                expected=f"{form.heads} heads of width {form.width}, as the config has it",
            )
        if values.shape != keys.shape or values.dtype != keys.dtype:
            raise ConfigError(
                f"values {tuple(values.shape)} of {values.dtype}",
                expected=f"{tuple(keys.shape)} of {keys.dtype}, as keys",
            )
        if not self.is_initialized:
            return
        for name, given, known in (
            ("on", keys.device, self.device),
            ("of", keys.dtype, self.dtype),
            ("of rows", keys.shape[0], len(self.starts)),
        ):
            if given != known:
                raise ConfigError(
                    f"keys {name} {given}",
                    expected=f"what the cache holds, {known}",
                    hint="Take a new cache, or reset this one.",
                )

    def _find_starts(self, mask: Tensor) -> None:
        """What no query of the tokens so far sees, at a row's front, is padding."""
        seen = mask[:, 0]
        seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        seen = seen.any(-2)
        # A row without a token so far starts after all that is there.
        first = torch.where(seen.any(-1), seen.int().argmax(-1), seen.shape[-1])
        found = first.expand(len(self.starts)).tolist()
        there = self.settled
        # Where a row has begun it has begun, whatever later queries see.
        self.starts = [
            old if there > old else new for old, new in zip(self.starts, found, strict=True)
        ]

    def _settle(self) -> None:
        """Fresh tokens enter the first tier, and those that have to make room move on."""
        if self.fresh is None:
            return
        (keys, values), self.fresh = self.fresh, None
        self.torn = True  # until all is where it belongs
        if not bool(torch.isfinite(keys.sum() + values.sum())):
            self._check_finite(keys, values)
        self._enter(keys, values)
        self.torn = False

    def _enter(self, keys: Tensor, values: Tensor) -> None:
        there = self.settled
        self._keep_sinks(keys, values, there)
        stores = list(zip(self.stores, self.form.tiers, strict=True))
        if self.form.tiers[0].code is None:
            ring = self.stores[0]
            assert isinstance(ring, Ring)
            stores.pop(0)
            first = there - len(ring)
            gone = ring.push(torch.cat([x.transpose(1, 2).flatten(2) for x in (keys, values)], -1))
            if not gone.shape[1]:
                return
            if not all(self.frozen):
                self._freeze_means(gone, first)
            keys, values = split(gone, self.form.heads)
            there = first
        keys, values = self._unread_as_mean(keys, values, there)
        code = stores[0][1].code
        assert code is not None
        rows = coding.encode(keys, values, self.form.turn, self.mean(), code)
        for (store, tier), (_, after) in zip(stores, [*stores[1:], (None, None)], strict=True):
            left = store.push(rows)
            if left is None or after is None or not left.shape[1]:
                break
            assert tier.code is not None
            assert after.code is not None
            rows = coding.recode(left, tier.code, after.code)

    def _check_finite(self, keys: Tensor, values: Tensor) -> None:
        """DataError where one is not."""
        for name, x in (("keys", keys), ("values", values)):
            if not bool(torch.isfinite(x).all()):
                there = self.settled
                raise DataError(
                    f"{name} of tokens {there} to {there + x.shape[2] - 1} hold NaN or infinity",
                    expected="finite numbers",
                    hint="This layer has not kept them. Find where the model makes them; then "
                    "cache.reset().",
                )

    def _keep_sinks(self, keys: Tensor, values: Tensor, there: int) -> None:
        assert self.sinks is not None
        for row, start in enumerate(self.starts):
            for index in range(max(there - start, 0), self.form.sinks):
                if (at := start + index - there) < keys.shape[2]:
                    both = torch.stack([keys[row, :, at], values[row, :, at]])
                    self.sinks[row, index] = both.flatten()

    def _freeze_means(self, gone: Tensor, first: int) -> None:
        """gone: (B, p, r), exact rows from slot `first` on that are to be coded now."""
        assert self.found_mean is not None
        ring = self.stores[0]
        after = torch.cat([gone, *ring.segments()], dim=1)
        for row, start in enumerate(self.starts):
            begin = start + self.form.sinks
            if not self.frozen[row] and begin < first + gone.shape[1]:
                at = max(begin - first, 0)
                keys, _ = split(after[row : row + 1, at : at + self.form.window], self.form.heads)
                self.found_mean[row] = keys[0].double().mean(1)
                self.frozen[row] = True

    def _unread_as_mean(self, keys: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Padding and sinks, whose codes nobody reads, come out as codes of the mean, so that rows
        are the same whatever was known when they were coded."""
        unread = [start + self.form.sinks - first for start in self.starts]
        if max(unread) <= 0:
            return keys, values
        mean = self.mean()
        both = [torch.empty_like(x, dtype=torch.float32).copy_(x) for x in (keys, values)]
        for side, x in enumerate(both):
            for row, many in enumerate(unread):
                there = 0 if mean is None else mean[side, min(row, mean.shape[1] - 1), :, None]
                x[row, :, : max(many, 0)] = there
        return both[0], both[1]

    def _change_rows(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        assert self.sinks is not None
        for store in self.stores:
            store.change_rows(change)
        with torch.inference_mode(False):
            self.sinks = change(self.sinks).clone()
            if self.found_mean is not None:
                self.found_mean = change(self.found_mean).clone()
        if self.fresh is not None:
            self.fresh = change(self.fresh[0]), change(self.fresh[1])
        self.starts = [self.starts[row] for row in rows]
        self.frozen = [self.frozen[row] for row in rows]


def split(rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Exact rows (B, n, r) -> keys and values (B, H, n, d), views."""
    both = rows.unflatten(-1, (2, heads, -1))
    return both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2)


def check_crop(count: int, length: int) -> None:
    """ConfigError for a count of tokens that cannot be cropped from that many."""
    if not isinstance(count, int) or count > 0:
        raise ConfigError(
            f"crop({count})", expected="0, or a negative count of tokens to take away"
        )
    if -count > length:
        raise ConfigError(
            f"crop({count}) of a cache of {length} tokens", expected=f"-{length} to 0"
        )
