"""Every cache that a context is read through: ours, others', published ideas, control arms.

Three kinds. "package": installed and used as it is; its bytes are those of every storage that the
cache owns (`owned`). "simulated": written here from a paper's equations, since nothing can be
installed; keys and values are dense and the bytes are a stated formula (`simulated`, `transform`,
`eviction`). "control": what a claim is held against. What a model-wide form shares between caches
(rotations, tables, components) is not in its bytes, but `shared_bytes` names it.

A peer whose package is missing stays in the list and says so.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from ...errors import ConfigError
from ...serve import Calibration as Sensitivity
from ...serve import CompressedCache, attach
from ...serve import calibrate as sensitivity
from ...serve.calibration import ROW
from .calibration import Calibration, calibrate
from .eviction import EvictingCache, kvzip_scores, random_scores
from .simulated import EXACT_BYTES, CodedCache, KiviCache, OscarCache, SimulatedCache
from .transform import KvtcCache, KvtcCodec, rotary_tables
from .watching import watched

# Of what 16-bit numbers take: 3,250 and 4,700 bytes a token of SmolLM2-135M, and 6,150 for ours.
SHARES = (3250 / 23040, 4700 / 23040)
MORE = 6150 / 23040
OURS = ((4, 4), (4, 2), (3, 3), (2, 2))
SEEDED = ((4, 2), (2, 2))  # of ours, those that are run with three rotations
TEXTS = 8  # that our calibration reads at most
MOST_BITS = 4.5  # of a number, ahead of deflate, that KVTC's program looks at


@dataclass
class Setting:
    """A model, and how long contexts are. window, sinks: tokens that stay exact; tokens: at which
    budgets are met; rows: (rows, t) of ids to calibrate on, which no test uses; others: the same,
    of another kind of text, or None; prompt: (1, p), that asks to repeat a context."""

    model: Any
    tokens: int
    rows: Tensor
    prompt: Tensor
    window: int = 128
    sinks: int = 4
    others: Tensor | None = None
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def plain_bytes(self) -> int:
        """Of one token in 16 bits."""
        config = self.model.config
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        heads: int = config.num_key_value_heads * config.num_hidden_layers
        return 2 * heads * width * EXACT_BYTES

    def calibration(self, other: bool = False) -> Calibration:
        """Made when the first peer asks. other: of the other kind of text."""
        name = f"calibration {other}"
        if name not in self._made:
            rows = self.others if other and self.others is not None else self.rows
            self._made[name] = calibrate(self.model, rows)
        found: Calibration = self._made[name]
        return found

    def sensitivity(self, seed: int, other: bool = False) -> Sensitivity:
        """Our own calibration, of the same texts, cut as it wants them."""
        name = f"sensitivity {seed} {other}"
        if name not in self._made:
            rows = self.others if other and self.others is not None else self.rows
            count = min(rows.numel() // ROW, TEXTS)
            rows = rows.flatten()[: count * ROW].view(count, ROW) if count else rows
            self._made[name] = sensitivity(self.model, rows, seed=seed)
        found: Sensitivity = self._made[name]
        return found

    def codec(self, how: str = "") -> KvtcCodec:
        """KVTC's, likewise. how: "", "by layer", or "other text"."""
        if how not in self._made:
            config = self.model.config
            tables = rotary_tables(self.model, min(8192, config.max_position_embeddings))
            self._made[how] = KvtcCodec(
                self.calibration(how == "other text"), *tables, by_layer=how == "by layer",
                most_bits=round(MOST_BITS * self.plain_bytes / EXACT_BYTES),
            )  # fmt: skip
        found: KvtcCodec = self._made[how]
        return found

    def scores(self, context: Tensor) -> Tensor:
        """KVzip's, of the newest context that was asked for."""
        known = self._made.get("scores")
        if known is None or not torch.equal(known[0], context):
            known = (context, kvzip_scores(self.model, context, self.prompt))
            self._made["scores"] = known
        found: Tensor = known[1]
        return found

    def coded_bytes(self, share: float) -> float:
        """What is left for each coded token when the whole context takes that share of 16 bits."""
        exact = self.window + self.sinks
        left = share * self.tokens - exact
        return self.plain_bytes * left / (self.tokens - exact)


@dataclass(frozen=True)
class Peer:
    """One cache. make: of the context (B, t) that it is going to read, which only those use that
    must know it ahead, inside of `attached`; needs: packages; share: of 16 bits, where it is made
    to take that much; shared: bytes of what all caches of a model have in common."""

    name: str
    kind: str
    source: str
    setting: Setting
    make: Callable[[Tensor], Cache]
    needs: tuple[str, ...] = ()
    seed: int = 0
    share: float | None = None
    shared: Callable[[], int] = lambda: 0

    @property
    def missing(self) -> str | None:
        """Why it cannot be run here, or None."""
        absent = [name for name in self.needs if not _is_there(name)]
        if absent:
            return f"not installed: {', '.join(absent)}"
        if self.share is not None and self.setting.coded_bytes(self.share) <= 0:
            return f"the exact tokens alone take more than {self.share:.1%}"
        if self.kind == "ours":
            try:
                with self.attached():
                    self.make(torch.zeros(1, 1, dtype=torch.long))
            except ConfigError as error:  # a budget under the smallest form
                return str(error)
        return None

    def attached(self) -> AbstractContextManager[Any]:
        """The model's attention is as the cache needs it, until the end of a `with`."""
        model = self.setting.model
        if self.kind == "ours":
            return attach(model)
        return watched(model) if self.kind in ("simulated", "control") else nullcontext()


def cache_bytes(cache: Cache) -> float:
    """Bytes that a cache takes: what it says where it is ours, else every storage it owns."""
    if isinstance(cache, CompressedCache | SimulatedCache):
        return float(cache.nbytes)
    return float(owned(cache))


def peers(setting: Setting, seeds: tuple[int, ...] = (0, 1, 2)) -> list[Peer]:
    """All of them, the plain cache first."""
    made = [Peer("float32", "control", "transformers DynamicCache", setting, partial(
        _plain, setting,
    ))]  # fmt: skip
    return made + _ours(setting, seeds) + _packages(setting) + _simulated(setting) + _controls(
        setting, seeds
    )  # fmt: skip


def _plain(setting: Setting, ids: Tensor) -> Cache:
    return DynamicCache(config=setting.model.config)


def _ours(setting: Setting, seeds: tuple[int, ...]) -> list[Peer]:
    found = []
    for keys, values in OURS:
        for seed in seeds if (keys, values) in SEEDED else seeds[:1]:
            found.append(Peer(
                f"ours {keys}/{values}", "ours", "shoestring.serve", setting,
                partial(_compressed, setting, keys, values, seed), seed=seed,
            ))  # fmt: skip
    for share in (*SHARES, MORE):
        for how in ("", "other text", "not calibrated"):
            if how == "other text" and setting.others is None:
                continue
            for seed in seeds if not how and share != MORE else seeds[:1]:
                found.append(Peer(
                    f"ours {share:.1%}" + (f", {how}" if how else ""), "ours",
                    "shoestring.serve, by budget", setting,
                    partial(_budgeted, setting, share, seed, how), seed=seed,
                    shared=partial(_turns, setting, how),
                ))  # fmt: skip
    return found


def _compressed(setting: Setting, keys: int, values: int, seed: int, ids: Tensor) -> Cache:
    return CompressedCache(
        setting.model, key_bits=keys, value_bits=values, window=setting.window,
        sinks=setting.sinks, seed=seed,
    )  # fmt: skip


def _budgeted(setting: Setting, share: float, seed: int, how: str, ids: Tensor) -> Cache:
    """By bytes a token, everything counted, at the length of the context. The seed is that of the
    calibration's draws and signs."""
    calibration = None if how == "not calibrated" else setting.sensitivity(seed, how != "")
    return CompressedCache(
        setting.model, budget=share * setting.plain_bytes, context=setting.tokens,
        calibration=calibration, sinks=setting.sinks, seed=seed,
    )  # fmt: skip


def _turns(setting: Setting, how: str) -> int:
    """Bytes of what all our caches of a model share: turns in float64, their inverses in float32,
    and means; not the copy in float32 that a calibration keeps for `save`."""
    if how == "not calibrated":
        return 0
    found = setting.sensitivity(0, how != "")
    return sum(3 * x.nbytes for x in found.turns) + sum(2 * x.nbytes for x in found.means)


def _packages(setting: Setting) -> list[Peer]:
    config, window = setting.model.config, setting.window
    found = []
    for backend, bits, needs in (
        ("quanto", 4, "optimum.quanto"), ("quanto", 2, "optimum.quanto"),
        ("hqq", 4, "hqq"), ("hqq", 2, "hqq"), ("fp8", 8, "torch"),
    ):  # fmt: skip
        settings = {} if backend == "fp8" else {"nbits": bits, "residual_length": window}

        def make(
            ids: Tensor, backend: str = backend, settings: dict[str, int] = settings
        ) -> Cache:  # fmt: skip
            return QuantizedCache(backend=backend, config=config, **settings)

        name = backend if backend == "fp8" else f"{backend} {bits}"
        found.append(Peer(
            name, "package", "transformers QuantizedCache", setting, make, (needs,)
        ))  # fmt: skip
    for bits in (4, 2):
        found.append(Peer(
            f"turboquant {bits}", "package", "PyPI turboquant", setting,
            partial(_turboquant, bits, window, config.num_hidden_layers), ("turboquant", "scipy"),
        ))  # fmt: skip
    return found


def _turboquant(bits: int, window: int, layers: int, ids: Tensor) -> Cache:
    """Its codebooks call `numpy.trapz`, which numpy has no more: the same function under its new
    name is put there. Its layers are made here, since the window cannot be given otherwise."""
    import numpy

    if not hasattr(numpy, "trapz"):
        numpy.trapz = numpy.trapezoid  # type: ignore[attr-defined]
    package: Any = importlib.import_module("turboquant.cache")
    made: Any = package.TurboQuantCache(bits=bits)
    made.layers = [package.TurboQuantLayer(bits=bits, residual_len=window) for _ in range(layers)]
    cache: Cache = made
    return cache


def _kivi(setting: Setting, bits: int, ids: Tensor) -> Cache:
    return KiviCache(setting.model.config, bits=bits, window=setting.window)


def _kvtc(setting: Setting, share: float, how: str, ids: Tensor) -> Cache:
    codec = setting.codec(how)
    return KvtcCache(
        setting.model.config, codec, codec.within(setting.coded_bytes(share)),
        window=setting.window, sinks=setting.sinks,
    )  # fmt: skip


def _components(setting: Setting, share: float, how: str) -> int:
    """Bytes, in 16 bits, of the components that get bits; by layer, of one layer's features."""
    transforms = setting.codec(how).within(setting.coded_bytes(share))
    count = sum(group.size for each in transforms for group in each.groups)
    features = len(transforms[0].mean)
    return 2 * count * (features // setting.model.config.num_hidden_layers if how == "by layer"
                        else features)  # fmt: skip


def _simulated(setting: Setting) -> list[Peer]:
    config = setting.model.config
    found = [
        Peer(
            f"KIVI {bits}", "simulated", "arXiv 2402.02750", setting, partial(_kivi, setting, bits)
        )
        for bits in (4, 2)
    ]

    def oscar(ids: Tensor, window: int = setting.window) -> Cache:
        return OscarCache(config, setting.calibration(), window=window, sinks=setting.sinks)

    rotations = setting.model.config.num_hidden_layers * 2 * _width(config) ** 2 * 4
    found += [
        Peer("OSCAR 2", "simulated", "arXiv 2605.17757", setting, oscar, shared=lambda: rotations),
        Peer(
            "OSCAR 2, no window", "simulated", "arXiv 2605.17757", setting,
            partial(oscar, window=0), shared=lambda: rotations,
        ),
    ]  # fmt: skip
    for share in SHARES:
        is_first = share == SHARES[0]
        others = ["other text"] if setting.others is not None and is_first else []
        for how in ("", "by layer", *others):
            found.append(Peer(
                f"KVTC {share:.1%}" + (f", {how}" if how else ""),
                "control" if how else "simulated", "arXiv 2511.01815", setting,
                partial(_kvtc, setting, share, how), share=share,
                shared=partial(_components, setting, share, how),
            ))  # fmt: skip
        for bits in (4, 16):
            found.append(Peer(
                f"KVzip {share:.1%}, {bits} bits", "simulated", "arXiv 2505.23416", setting,
                partial(_evicting, setting, share, bits, None), share=share,
            ))  # fmt: skip
    return found


def _evicting(
    setting: Setting, share: float, bits: int, seed: int | None, ids: Tensor
) -> Cache:  # fmt: skip
    """KVzip, or eviction at random from a seed."""
    config = setting.model.config
    pair = 2 * (_width(config) * bits + (32 if bits == 4 else 0)) / 8
    pairs = config.num_hidden_layers * config.num_key_value_heads
    keep = min(1.0, setting.coded_bytes(share) / (pairs * pair))
    scores = (
        setting.scores(ids) if seed is None
        else random_scores(config, ids, seed)
    )  # fmt: skip
    return EvictingCache(
        config, scores, keep=keep, bits=bits, window=setting.window, sinks=setting.sinks
    )


def _controls(setting: Setting, seeds: tuple[int, ...]) -> list[Peer]:
    config = setting.model.config
    exact: dict[str, int] = {"window": setting.window, "sinks": setting.sinks}
    found = []
    for keys, values in SEEDED:
        for rotate in (True, False):

            def make(
                ids: Tensor, keys: int = keys, values: int = values, rotate: bool = rotate
            ) -> Cache:
                return CodedCache(
                    config, key_bits=keys, value_bits=values, rotate=rotate, **exact
                )  # fmt: skip

            name = f"{'rotated' if rotate else 'no rotation'} {keys}/{values}"
            found.append(Peer(name, "control", "our code, simulated", setting, make))
    share = SHARES[1]
    for seed in seeds:
        found.append(Peer(
            f"random eviction {share:.1%}, 4 bits", "control", "as KVzip, scores at random",
            setting, partial(_evicting, setting, share, 4, seed), seed=seed, share=share,
        ))  # fmt: skip
    return found


def _width(config: Any) -> int:
    width: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return width


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def owned(cache: Any) -> int:
    """Bytes of every storage that can be reached from a cache of transformers."""
    seen: dict[int, Any] = {}  # held, so that no other object gets the same id
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if id(value) in seen or isinstance(value, str | int | float | type | torch.dtype):
            return
        seen[id(value)] = value
        if isinstance(value, Tensor):
            inner = [x for x in vars(value).values() if isinstance(x, Tensor)]
            for each in inner:  # a subclass around its parts
                walk(each)
            if not inner:
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list | tuple):
            for each in value:
                walk(each)
        elif isinstance(value, dict):
            walk(list(value.values()))
        elif hasattr(value, "__dict__"):
            walk(list(vars(value).values()))

    walk(cache.layers)
    return sum(storages.values())
