"""Caches that hold what a form would give back, and count what it would keep.

For published forms that no package installs: keys and values stay dense, but every token that
leaves the window is replaced by its decoded value, once, and `nbytes` is the form's own formula
(codes, scales, exact tokens of 16 bits). Tokens are replaced after the call in which they leave, as
`serve` codes them, so queries of one call see the same tokens exactly in all forms.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops.row_code import RowCode
from ...serve.form import Turn
from .calibration import Calibration
from .watching import WatchingCache

# B rows, H heads of keys, t tokens, d width of a head

EXACT_BYTES = 2  # of a number of an exact token, as of the 16-bit models that papers serve


class SimulatedCache(WatchingCache):
    """window: newest tokens that stay exact; sinks: first ones; step: tokens coded at a time.

    A subclass gives `code`, and `coded_bytes` of one row. ConfigError for sliding layers.
    """

    def __init__(self, config: Any, *, window: int, sinks: int, step: int = 1) -> None:
        super().__init__(config=config)
        if any(layer.is_sliding for layer in self.layers):
            raise ConfigError(
                "a simulated form for sliding layers", expected="layers of full attention"
            )
        self.window, self.sinks, self.step, self.end = window, sinks, step, sinks

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of transformers. After the last layer, what leaves the window is coded."""
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            leaving = self.get_seq_length() - self.window - self.end
            if (count := leaving // self.step * self.step) > 0:
                self.code(self.end, self.end + count)
                self.end += count
        return found

    def code(self, start: int, end: int) -> None:
        """Replace tokens [start, end) of every layer by what is decoded of them."""
        for index, layer in enumerate(self.layers):
            keys, values = self.decoded(
                index, layer.keys[:, :, start:end], layer.values[:, :, start:end]
            )
            self.put(index, start, keys, values)

    def put(self, index: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write decoded tokens into a layer, in new tensors: attention may still read the old."""
        layer = self.layers[index]
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        layer.keys[:, :, start : start + keys.shape[2]] = keys
        layer.values[:, :, start : start + keys.shape[2]] = values

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the form gives back of (B, H, t, d) each."""
        raise NotImplementedError

    @property
    def coded(self) -> int:
        """Tokens of a row that are coded."""
        return self.end - self.sinks

    @property
    def numbers(self) -> int:
        """Numbers of one token, keys and values of all layers."""
        return sum(2 * x.keys.shape[1] * x.keys.shape[-1] for x in self.layers)

    @property
    def vectors(self) -> int:
        """Keys and values of one token."""
        return sum(2 * x.keys.shape[1] for x in self.layers)

    @property
    def coded_bytes(self) -> float:
        """Bytes of one row's coded tokens."""
        raise NotImplementedError

    @property
    def nbytes(self) -> float:
        """Bytes the form would keep: exact tokens in 16 bits, and the codes."""
        rows = self.layers[0].keys.shape[0]
        exact = self.get_seq_length() - self.coded
        return rows * (exact * self.numbers * EXACT_BYTES + self.coded_bytes)


def min_max(x: Tensor, bits: int, dim: int) -> Tensor:
    """Asymmetric codes of `bits`, with a minimum and a step of 16 bits along `dim`, decoded."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    codes = ((x - low) / step.clamp(min=1e-8)).round().clamp(0, 2**bits - 1)
    return codes * step + low


class KiviCache(SimulatedCache):
    """KIVI (arXiv 2402.02750, section 3): keys by channel over groups of tokens, values by token
    over groups of channels, asymmetric; the newest tokens exact."""

    def __init__(self, config: Any, *, bits: int, window: int, group: int = 32) -> None:
        super().__init__(config, window=window, sinks=0, step=group)
        self.bits, self.group = bits, group

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See SimulatedCache."""
        tokens = keys.unflatten(2, (-1, self.group))
        channels = values.unflatten(-1, (-1, min(self.group, values.shape[-1])))
        return (
            min_max(tokens, self.bits, 3).flatten(2, 3),
            min_max(channels, self.bits, -1).flatten(-2),
        )

    @property
    def coded_bytes(self) -> float:
        """bits and two constants of 16 for every group."""
        return self.coded * self.numbers * (self.bits + 32 / self.group) / 8


class CodedCache(SimulatedCache):
    """Our own code, with a map before it that can be left out: the control arm of rotation.

    rotate: whether vectors are rotated before the Lloyd-Max code; else everything is the same.
    Without, heads of whole groups of eight.
    """

    def __init__(
        self, config: Any, *, key_bits: int, value_bits: int, window: int, sinks: int,
        rotate: bool, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(config, window=window, sinks=sinks)
        self.bits, self.rotate, self.seed = (key_bits, value_bits), rotate, seed
        self.means: dict[int, Tensor] = {}

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See SimulatedCache. From keys the frozen mean of the first coded ones is taken, of 64
        or of as many as leave at once."""
        if layer not in self.means:
            whole = self.layers[layer].keys
            self.means[layer] = whole[:, :, self.sinks : self.sinks + 64].mean(2, keepdim=True)
        mean = self.means[layer]
        x = torch.stack([keys - mean, values], dim=1).double()
        heads, width = x.shape[2], x.shape[4]
        code = RowCode.uniform(heads, width, *self.bits)
        if not self.rotate:
            back = code.decode(code.encode(x))
        else:
            turn = Turn.random(heads, width, self.seed)
            back = code.decode(code.encode(x @ turn.forward.mT)) @ turn.inverse.mT.float()
        return back[:, 0] + mean, back[:, 1]

    @property
    def coded_bytes(self) -> float:
        """bits and one scale of 16 for every vector, and the means."""
        each = [b * self.numbers / 2 + 16 * self.vectors / 2 for b in self.bits]
        means = sum(4 * mean[0].numel() for mean in self.means.values())
        return self.coded * sum(each) / 8 + means


class OscarCache(SimulatedCache):
    """OSCAR (arXiv 2605.17757): one calibrated rotation for keys and one for values of a layer,
    clipping at a quantile of each vector, 2-bit codes with a minimum and a step.

    The rotation is U H P: eigenvectors of what attention weighs errors by, a Hadamard matrix, and a
    permutation that deals the eigenvalues out by bit reversal. Keys: U of the mean q q^T; values:
    U of the mean of v v^T weighed by k^T (q q^T) k. Quantiles 0.96 and 0.92 of |x|, group the head.
    """

    def __init__(
        self, config: Any, calibration: Calibration, *, window: int, sinks: int, bits: int = 2,
        clips: tuple[float, float] = (0.96, 0.92),
    ) -> None:  # fmt: skip
        super().__init__(config, window=window, sinks=sinks)
        self.bits, self.clips = bits, clips
        self.rotations = [oscar_rotations(calibration, i) for i in range(len(self.layers))]

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See SimulatedCache."""
        pairs = zip((keys, values), self.rotations[layer], self.clips, strict=True)
        found = [clipped(x.float() @ turn, clip, self.bits) @ turn.T for x, turn, clip in pairs]
        return found[0], found[1]

    @property
    def coded_bytes(self) -> float:
        """bits, a minimum and a step of 16 each for every vector."""
        return self.coded * (self.numbers * self.bits + 32 * self.vectors) / 8


def clipped(x: Tensor, quantile: float, bits: int) -> Tensor:
    """(..., d): each vector clamped to that quantile of its own sizes, then `min_max`."""
    limit = torch.quantile(x.abs(), quantile, dim=-1, keepdim=True)
    return min_max(x.clamp(-limit, limit), bits, -1)


def oscar_rotations(calibration: Calibration, layer: int) -> tuple[Tensor, Tensor]:
    """(d, d) for keys and for values of a layer, its heads taken together."""
    squares = calibration.query_squares[layer].double()
    keys, values = calibration.keys[layer].double(), calibration.values[layer].double()
    weights = (keys @ squares * keys).sum(-1, keepdim=True)
    weights = weights / weights.mean(1, keepdim=True)
    of_values = (values * weights).mT @ values / values.shape[1]
    return spectral_rotation(squares.mean(0)), spectral_rotation(of_values.mean(0))


def spectral_rotation(covariance: Tensor) -> Tensor:
    """(d, d) symmetric -> U H P float32; d a power of two."""
    d = len(covariance)
    if d & (d - 1):
        raise ConfigError(f"OSCAR for heads of {d}", expected="a power of two")
    sizes, vectors = torch.linalg.eigh(covariance)
    hadamard = torch.ones(1, 1, dtype=covariance.dtype)
    while len(hadamard) < d:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    places = torch.zeros(d, dtype=torch.long)
    places[bit_reversed(d)] = sizes.argsort(descending=True)
    return (vectors @ (hadamard / math.sqrt(d)))[:, places].float()


def bit_reversed(d: int) -> Tensor:
    """(d,): each index with its binary digits in the other order."""
    digits = d.bit_length() - 1
    return torch.tensor([int(format(i, f"0{digits}b")[::-1], 2) for i in range(d)])
