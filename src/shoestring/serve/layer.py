"""One attention layer's compressed cache.

A token is exact while it is among the newest `window`, and coded once when it leaves them; what is
coded is never coded again. The first `sinks` tokens of each row stay exact beside their codes,
since many heads attend to them. From all keys alike, exact or coded, a mean key of each head is
taken: that adds the same to every score, which a softmax does not see, and leaves the code less to
describe. The mean is of the first keys after the sinks and is frozen when the first of them is
coded; which keys those are does not depend on how many tokens came at a time.

Rows of a batch may begin with padding. Slots count from the batch's start, and are the same for all
rows; where a row starts is read from the mask (`attended`), and its sinks and mean are counted from
there, so that it is treated as it would be by itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import ConfigError, DataError, StackError
from ..ops.vector_code import VectorCode
from .store import Coded, Recent

# B rows of the batch, H heads of keys and values, S sinks, t tokens, d width of a head

PAYLOAD = "_shoestring_layer"
"""The attribute under which the keys that go to attention carry the layer."""
MEAN_OF = 64
"""Keys that the mean is of, or as many as the window holds if that is more."""


class CompressedLayer(CacheLayerMixin):
    """key_bits, value_bits: of a coordinate; window, sinks: tokens; see the module."""

    is_sliding = False
    is_croppable = True  # while it records the past, as for transformers' sliding layers
    is_compileable = False

    def __init__(
        self,
        codes: Callable[[int, int], VectorCode],
        *,
        key_bits: int,
        value_bits: int,
        window: int,
        sinks: int,
        centre: bool,
    ) -> None:
        super().__init__()
        self.make_code = codes
        self.key_bits, self.value_bits = key_bits, value_bits
        self.window, self.sinks, self.centre = window, sinks, centre
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.is_initialized, self.pending = False, False
        self.recent: Recent | None = None
        self.coded: Coded | None = None
        self.mean: Tensor | None = None
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.starts: list[int] = []
        self.frozen: list[bool] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers for tensors like these (B, H, t, d)."""
        B, H, _, d = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.coded = Coded(
            self.make_code(d, self.key_bits),
            self.make_code(value_states.shape[-1], self.value_bits),
        )
        self.recent = Recent(key_states, value_states, self.window)
        if self.centre:
            self.mean = torch.zeros(B, H, 1, d, device=self.device)
        self.sink_keys = key_states.new_zeros(B, H, self.sinks, d)
        self.sink_values = value_states.new_zeros(B, H, self.sinks, value_states.shape[-1])
        self.starts, self.frozen = [0] * B, [False] * B
        self.is_initialized = True

    # ---- what a model calls ------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, H, t, d) each -> the same, the keys carrying this layer to the attention function.

        ConfigError for another batch, dtype or device than before; StackError with gradients on,
        and where the attention function of the model is not ours.
        """
        self._check(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.recent is not None
        self._code_what_left()  # held back for a crop that did not come
        self.recent.append(key_states, value_states)
        self.pending = True
        keys = key_states.view_as(key_states)
        setattr(keys, PAYLOAD, self)
        return keys, value_states

    def attended(self, mask: Tensor | None) -> None:
        """The attention of the newest tokens is done; mask (B or 1, heads or 1, t, slots) or None.
        What leaves the window is coded, unless a crop is to come first."""
        self.pending = False
        if mask is not None and not all(self.frozen):
            self._find_starts(mask)
        if not self.record_past:
            self._code_what_left()

    def get_seq_length(self) -> int:
        """Tokens that were given and not cropped."""
        if self.coded is None or self.recent is None:
            return 0
        return len(self.coded) + len(self.recent)

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
        """From now on tokens are coded only once `crop` (or another update) has come, so that what
        is cropped at once leaves no trace."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens away; 0 or negative. What is coded and stays, stays coded.
        ConfigError for a positive count, and for more than there are."""
        length = self.get_seq_length()
        check_crop(tokens_to_remove, length)
        if self.coded is None or self.recent is None:
            return
        left = length + tokens_to_remove
        if left == 0:
            return self._forget()  # what comes next may be padded otherwise
        self.recent.drop_newest(min(-tokens_to_remove, len(self.recent)))
        if left < len(self.coded):
            self.coded.crop(left)
        self._code_what_left()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch, by their indices; one may come several times."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows of the batch: indices, or a boolean for each row."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._change_rows(lambda x: x.index_select(0, indices), indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after another."""
        if self.is_initialized:
            rows = [row for row in range(len(self.starts)) for _ in range(repeats)]
            self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0), rows)

    # ---- what attention reads ----------------------------------------------------------------

    def sink_slots(self) -> Tensor:
        """(B, S) int64: where the sinks of each row are; those below len(coded) are kept here."""
        starts = torch.tensor(self.starts, device=self.device)
        return starts[:, None] + torch.arange(self.sinks, device=self.device)

    def tensors(self) -> list[Tensor]:
        """All that the layer owns."""
        found = [self.mean, self.sink_keys, self.sink_values]
        if self.recent is not None and self.coded is not None:
            found += [*self.recent.buffers, *self.coded.tensors()]
        return [x for x in found if x is not None]

    # ---- inside ------------------------------------------------------------------------------

    def _check(self, keys: Tensor) -> None:
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
        if not self.is_initialized:
            return
        for name, given, there in (
            ("on", keys.device, self.device),
            ("of", keys.dtype, self.dtype),
            ("of rows", keys.shape[0], len(self.starts)),
        ):
            if given != there:
                raise ConfigError(
                    f"keys {name} {given}",
                    expected=f"what the cache holds, {there}",
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
        pairs = zip(self.starts, found, self.frozen, strict=True)
        self.starts = [old if frozen else new for old, new, frozen in pairs]

    def _code_what_left(self) -> None:
        """Codes all but the window, as far as the means allow."""
        if self.coded is None or self.recent is None:
            return
        length, there = self.get_seq_length(), len(self.coded)
        stop, count = length - self.window, max(self.window, MEAN_OF)
        firsts = [start + self.sinks for start in self.starts]
        waiting = [row for row, frozen in enumerate(self.frozen) if not frozen]
        if self.centre:
            stop = min([stop] + [firsts[r] for r in waiting if firsts[r] + count > length])
        if stop <= there:
            return
        ready = [row for row in waiting if firsts[row] < stop]
        mean = self.mean
        if mean is not None and ready:
            mean = mean.clone()
            for row in ready:
                at = firsts[row] - there
                mean[row, :, 0] = self.recent.keys[row, :, at : at + count].double().mean(1)
        self._code(stop - there, mean)
        self.mean = mean
        for row in ready:
            self.frozen[row] = True

    def _code(self, count: int, mean: Tensor | None) -> None:
        assert self.coded is not None
        assert self.recent is not None
        assert self.sink_keys is not None
        assert self.sink_values is not None
        there, keys, values = len(self.coded), self.recent.keys, self.recent.values
        try:
            self.coded.append(*self._counting(count, mean), mean)
        except DataError as error:
            raise DataError(
                f"keys or values of tokens {there} to {there + count - 1} hold NaN or infinity",
                expected="finite numbers",
                hint="The cache holds them uncoded; find where the model makes them.",
            ) from error
        for row, start in enumerate(self.starts):
            for index in range(self.sinks):
                if 0 <= (at := start + index - there) < count:
                    self.sink_keys[row, :, index] = keys[row, :, at]
                    self.sink_values[row, :, index] = values[row, :, at]
        self.recent.drop_oldest(count)

    def _counting(self, count: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values to code. Padding and sinks, whose codes nobody reads, come out as zeros,
        so that codes do not depend on what was known of the mean when they left."""
        assert self.coded is not None
        assert self.recent is not None
        keys, values = self.recent.keys[:, :, :count], self.recent.values[:, :, :count]
        unread = [start + self.sinks - len(self.coded) for start in self.starts]
        if max(unread) > 0:
            keys, values = keys.clone(), values.clone()
            for row, many in enumerate(unread):
                keys[row, :, : max(many, 0)] = 0 if mean is None else mean[row]
                values[row, :, : max(many, 0)] = 0
        return keys, values

    def _change_rows(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        assert self.coded is not None
        assert self.recent is not None
        assert self.sink_keys is not None
        assert self.sink_values is not None
        self.recent.change_rows(change)
        self.coded.change_rows(change)
        self.mean = None if self.mean is None else change(self.mean)
        self.sink_keys, self.sink_values = change(self.sink_keys), change(self.sink_values)
        self.starts = [self.starts[row] for row in rows]
        self.frozen = [self.frozen[row] for row in rows]


def check_crop(count: int, length: int) -> None:
    """ConfigError for a count of tokens that cannot be cropped from that many."""
    if count > 0:
        raise ConfigError(
            f"crop({count})", expected="0, or a negative count of tokens to take away"
        )
    if -count > length:
        raise ConfigError(
            f"crop({count}) of a cache of {length} tokens", expected=f"-{length} to 0"
        )
