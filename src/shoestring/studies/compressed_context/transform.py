"""KVTC (arXiv 2511.01815): transform coding of a context, as of images.

Keys of all heads and layers of a token are one long vector, before rotary embedding; so are its
values. Each is centred and turned into its principal components, found once on calibration text.
A dynamic program cuts the components, largest first, into groups of 1, 16, 64, 256 or 1024 and
gives each group no bits, 2, 4 or 8 (float8), so that the least squared error is left within a
budget; each group of a token has a minimum and a step of 16 bits. Codes of all tokens then go
through deflate. The first 4 tokens and the newest 128 stay exact.

Taken from the paper's abstract, its summaries and reimplementations, where its text was not at
hand: group sizes and types, the 32 bits of a group, features across layers (its stated 2.4 % of a
70B model's parameters fits nothing else). Ours: all components may get bits, not the first 10,000;
one program for keys and one for values, which share the budget by a common price of a bit.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration
from .simulated import SimulatedCache

# t tokens, p features of a token (layers x heads x width), r components that get bits

SIZES = (1, 16, 64, 256, 1024)
BITS = (0, 2, 4, 8)
GROUP_BITS = 32  # a minimum and a step
_UNIT = 8  # bits that the program counts in
_COMPONENTS = 4096  # that the program looks at; the last of more get no bits in any budget here
_SAMPLE = 192  # tokens whose errors it counts


@dataclass(frozen=True, slots=True)
class Group:
    """A run of components with bits of their own."""

    start: int
    size: int
    bits: int

    @property
    def cost(self) -> int:
        """Bits of one token."""
        return self.size * self.bits + GROUP_BITS if self.bits else 0


@dataclass(frozen=True, slots=True)
class Transform:
    """mean: (p,); basis: (p, r), columns the components; groups: what is kept of them."""

    mean: Tensor
    basis: Tensor
    groups: tuple[Group, ...]

    @property
    def token_bits(self) -> int:
        """Of one token, ahead of deflate."""
        return sum(group.cost for group in self.groups)

    def encode(self, x: Tensor) -> list[tuple[Group, Tensor, Tensor, Tensor]]:
        """(t, p) -> each group's codes uint8 (t, size), minima and steps (t, 1)."""
        parts = (x - self.mean) @ self.basis
        found = []
        for group in self.groups:
            part = parts[:, group.start : group.start + group.size]
            found.append((group, *codes_of(part, group.bits)))
        return found

    def decode(self, coded: list[tuple[Group, Tensor, Tensor, Tensor]]) -> Tensor:
        """What `encode` gave -> (t, p)."""
        parts = torch.cat([values_of(g.bits, *rest) for g, *rest in coded], 1)
        places = torch.cat([torch.arange(g.start, g.start + g.size) for g in self.groups])
        return parts @ self.basis[:, places].T + self.mean


def codes_of(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(t, size) -> codes uint8, minimum and step (t, 1) as 16 bits hold them. 8 bits: float8."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if bits == 8:
        step = (x.abs().amax(1, keepdim=True) / 448).half().float().clamp(min=2**-24)
        return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), low, step
    low = low.half().float()
    step = ((high - low) / (2**bits - 1)).half().float()
    codes = ((x - low) / step.clamp(min=1e-8)).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), low, step


def values_of(bits: int, codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """What `codes_of` gave -> (t, size)."""
    if bits == 8:
        return codes.view(torch.float8_e4m3fn).float() * step
    return codes.float() * step + low


def principal(x: Tensor, count: int, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """(t, p) -> mean (p,), components (p, count), the largest variance first. blocks: features are
    taken in so many parts, and no component is of more than one."""
    mean = x.mean(0)
    x = x - mean
    if blocks > 1:
        return mean, _by_block(x, blocks)[:, :count].contiguous()
    if x.shape[0] < x.shape[1]:  # fewer tokens than features: from the smaller of the two products
        sizes, left = torch.linalg.eigh(x @ x.T)
        keep = sizes > sizes[-1] * 1e-6
        basis = x.T @ (left[:, keep] / sizes[keep].sqrt())
    else:
        basis = torch.linalg.eigh(x.T @ x)[1]
    return mean, basis.flip(1)[:, :count].contiguous()


def _by_block(x: Tensor, blocks: int) -> Tensor:
    """(t, p), centred -> (p, p): components of each part by itself, all in one order."""
    sizes, bases = torch.linalg.eigh(torch.stack([part.T @ part for part in x.chunk(blocks, 1)]))
    whole = torch.block_diag(*bases)
    return whole[:, sizes.flatten().argsort(descending=True)]


def errors_of(parts: Tensor) -> dict[tuple[int, int], Tensor]:
    """(t, r) -> by (size, bits): squared error of the group that ends at each component (r,)."""
    found = {}
    for size in SIZES:
        if size > parts.shape[1]:
            continue
        for bits in BITS:
            whole = torch.full((parts.shape[1],), torch.inf, dtype=torch.float64)
            for end in range(size, parts.shape[1] + 1):
                part = parts[:, end - size : end]
                lost = part if not bits else part - values_of(bits, *codes_of(part, bits))
                whole[end - 1] = lost.double().square().sum()
            found[size, bits] = whole
    return found


@dataclass(frozen=True, slots=True)
class Program:
    """The dynamic program's table, from which the groups of any smaller budget can be read.

    error: (units,), least squared error with that many units of 8 bits. chosen: (r + 1, units),
    which of `choices` (size, bits) ends at a component with that many units.
    """

    error: Tensor
    chosen: Tensor
    choices: tuple[tuple[int, int], ...]

    def groups(self, bits: int) -> tuple[Group, ...]:
        """Those of least error whose bits come to no more."""
        found, end, left = [], len(self.chosen) - 1, bits // _UNIT
        while end:
            size, each = self.choices[int(self.chosen[end, left])]
            end -= size
            found.append(Group(end, size, each))
            left -= _units(found[-1])
        return tuple(group for group in reversed(found) if group.bits)


def allocate(errors: dict[tuple[int, int], Tensor], budget: int) -> Program:
    """The program for budgets up to that many bits of a token. errors: see `errors_of`.

    e[i, b] = min over groups (s, q) that end at i of e[i - s, b - cost(s, q)] + error(i, s, q)
    """
    count, units = len(errors[1, 0]), budget // _UNIT + 1
    table = torch.full((count + 1, units), torch.inf, dtype=torch.float64)
    table[0] = 0
    chosen = torch.zeros(count + 1, units, dtype=torch.uint8)
    for i in range(1, count + 1):
        for index, (size, bits) in enumerate(errors):
            cost = _units(Group(0, size, bits))
            if size > i or cost >= units:
                continue
            reached = table[i - size, : units - cost] + errors[size, bits][i - 1]
            better = reached < table[i, cost:]
            table[i, cost:] = torch.where(better, reached, table[i, cost:])
            chosen[i, cost:][better] = index
    return Program(table[count], chosen, tuple(errors))


def _units(group: Group) -> int:
    return -(-group.cost // _UNIT)


class KvtcCodec:
    """Transforms for keys and values of a model. calibration: keys as attention sees them;
    cos, sin: (positions, width) of the rotary embedding, which is taken from keys and given back;
    most_bits: of a token, that budgets may ask for; by_layer: components of each layer by itself.
    """

    def __init__(
        self, calibration: Calibration, cos: Tensor, sin: Tensor, *, most_bits: int,
        by_layer: bool = False,
    ) -> None:  # fmt: skip
        self.cos, self.sin = cos.float(), sin.float()
        body = calibration.positions >= 4
        at = calibration.positions[body]
        keys = unturned(calibration.keys[:, :, body], self.cos[at], self.sin[at])
        self.bases, self.samples, self.programs = [], [], []
        for x in (keys, calibration.values[:, :, body]):
            flat = features(x)
            mean, basis = principal(flat, _COMPONENTS, len(x) if by_layer else 1)
            sample = flat[:: -(-len(flat) // _SAMPLE)]
            self.bases.append((mean, basis))
            self.samples.append(sample)
            self.programs.append(allocate(errors_of((sample - mean) @ basis), most_bits))

    def transforms(self, token_bits: int) -> tuple[Transform, Transform]:
        """For keys and values, that come to no more than token_bits together before deflate. Keys
        get what leaves the least error in both."""
        units = token_bits // _UNIT
        errors = [program.error[: units + 1] for program in self.programs]
        for_keys = int((errors[0] + errors[1].flip(0)).argmin()) * _UNIT
        shares = (for_keys, units * _UNIT - for_keys)
        found = [
            Transform(mean, basis, program.groups(bits))
            for (mean, basis), program, bits in zip(self.bases, self.programs, shares, strict=True)
        ]
        return found[0], found[1]

    def within(self, token_bytes: float) -> tuple[Transform, Transform]:
        """Transforms whose deflated codes took that many bytes a token on the calibration text."""
        bits = 8 * token_bytes
        for _ in range(3):
            found = self.transforms(int(min(bits, (len(self.programs[0].error) - 1) * _UNIT)))
            size = 0
            for transform, sample in zip(found, self.samples, strict=True):
                kept = [torch.cat(_bytes_of(rest), 1) for _, *rest in transform.encode(sample)]
                size += len(deflated(transform, kept))
            bits *= token_bytes / (size / len(self.samples[0]))
        return found


class KvtcCache(SimulatedCache):
    """What KVTC gives back of a context. transforms: of `KvtcCodec`, for the budget wanted."""

    def __init__(
        self, config: Any, codec: KvtcCodec, transforms: tuple[Transform, Transform], *,
        window: int, sinks: int,
    ) -> None:  # fmt: skip
        super().__init__(config, window=window, sinks=sinks)
        self.codec, self.transforms = codec, transforms
        self.streams: list[list[dict[int, list[Tensor]]]] = []

    def code(self, start: int, end: int) -> None:
        """All layers together, row by row."""
        at = slice(start, end)
        cos, sin = self.codec.cos[at], self.codec.sin[at]
        keys = torch.stack([layer.keys[:, :, at] for layer in self.layers], 1)
        values = torch.stack([layer.values[:, :, at] for layer in self.layers], 1)
        self.streams = self.streams or [[{}, {}] for _ in range(len(keys))]
        back = []
        for row in range(len(keys)):
            parts = (unturned(keys[row].float(), cos, sin), values[row].float())
            for x, transform, kept in zip(parts, self.transforms, self.streams[row], strict=True):
                coded = transform.encode(features(x))
                for index, (_, *tensors) in enumerate(coded):
                    kept.setdefault(index, []).append(torch.cat(_bytes_of(tensors), 1))
                back.append(unfeatured(transform.decode(coded), x.shape))
        for index in range(len(self.layers)):
            turned = [rotary(x[index], cos, sin) for x in back[::2]]
            self.put(index, start, torch.stack(turned), torch.stack([x[index] for x in back[1::2]]))

    @property
    def nbytes(self) -> float:
        """Exact tokens in 16 bits, and what deflate makes of each row's codes."""
        exact = self.get_seq_length() - self.coded
        rows = self.layers[0].keys.shape[0]
        return rows * exact * self.numbers * 2 + sum(map(self._deflated, range(len(self.streams))))

    def _deflated(self, row: int) -> int:
        return sum(
            len(deflated(transform, [torch.cat(kept[i]) for i in range(len(transform.groups))]))
            for transform, kept in zip(self.transforms, self.streams[row], strict=True)
        )


def deflated(transform: Transform, kept: Sequence[Tensor]) -> bytes:
    """kept: of each group (t, size + 4) uint8, codes and constants. A component's codes follow one
    another, packed."""
    stream = []
    for group, whole in zip(transform.groups, kept, strict=True):
        codes, constants = whole[:, : group.size], whole[:, group.size :]
        stream += [_packed(codes, group.bits), constants.T.contiguous().numpy().tobytes()]
    return zlib.compress(b"".join(stream), 9)


def _bytes_of(tensors: list[Tensor]) -> list[Tensor]:
    codes, low, step = tensors
    return [codes, low.half().view(torch.uint8), step.half().view(torch.uint8)]


def _packed(codes: Tensor, bits: int) -> bytes:
    """(t, size) codes, a component after the other, as many to a byte as go in."""
    flat = codes.T.reshape(-1)
    per = 8 // bits
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % per)).view(-1, per)
    shifts = torch.arange(per) * bits
    packed: bytes = (flat.int() << shifts).sum(1).to(torch.uint8).numpy().tobytes()
    return packed


def features(x: Tensor) -> Tensor:
    """(L, H, t, d) -> (t, L H d): one vector of a token."""
    return x.permute(2, 0, 1, 3).flatten(1)


def unfeatured(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """What `features` made, back in the shape (L, H, t, d)."""
    layers, heads, tokens, width = shape
    return flat.view(tokens, layers, heads, width).permute(1, 2, 0, 3)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (..., t, d) with tables (t, d), halves against each other."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def unturned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotary`."""
    return rotary(x, cos, -sin)


@torch.no_grad()
def rotary_tables(model: Any, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, width) of a Llama-like model."""
    x = torch.zeros(1, 1, model.config.hidden_size)
    cos, sin = model.model.rotary_emb(x, torch.arange(positions)[None])
    return cos[0], sin[0]
