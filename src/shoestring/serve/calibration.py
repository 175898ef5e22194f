"""Which errors of keys and values a model notices, found from text.

An error e of a key moves the model's answer, the law of the next token, by about e^T M e / 2 nats,
where M is the Fisher information of that key: the mean of g g^T over gradients g of log p(y), with
y drawn from the model itself, not from the text (Kunstner et al., arXiv 1905.12558, section 3). One
backward pass gives g for all keys and values at once. Since bits will fall with age, M is kept
apart for queries of each *band* of ages: every band's scores come from a copy of the keys of its
own, whose gradient is seen apart from the others'.

Of each head, M of older ages and the covariance C of its vectors give a basis that has independent
coordinates whose squared errors count alike: the Karhunen-Loeve basis of M^1/2 C M^1/2, which makes
bits worth the most (reverse water-filling; Cover and Thomas, 10.3.3, for a weighted error). Within
groups of eight coordinates, which share their bits, a Hadamard matrix makes them alike.

M is estimated from some thousand tokens and is nearly singular; as much of its mean eigenvalue is
added to all directions.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..checkpoint import atomic_directory
from ..checkpoint.tensors import write_tensors
from ..errors import ConfigError, DataError
from ..ops.rotation import Rotation
from ..ops.row_code import GROUP
from . import files
from .attention import check_model
from .config import check_count, shapes, text_config
from .form import Turn
from .identity import shape_of, weights_of

# H heads of keys, G heads of queries for each, T tokens of a text, d width; side 0 keys, 1 values

BANDS = (0, 32, 128, 512)
"""Ages, in tokens, at which bands begin."""
ROW = 768
"""Tokens of a text, usually."""
FORMAT = 1
_SKIPPED = 4  # first tokens of a text: sinks, which stay exact and are like no others
_NAME = "shoestring_calibrating"
_FILES = ("calibration.json", "calibration.safetensors")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a model's layers of full attention are like.

    means: (2, H, d) of each layer. turns: (2, H, d, d), A of z = A (x - mean). weights: (bands, 2,
    H, d / 8), nats that a squared error of 1 in a group's coordinate costs, summed over the queries
    of a band and over the 8 coordinates.
    tokens: that it was made of, in texts of `row`.  shape, weights_of: of the model.
    """

    means: list[Tensor]
    turns: list[Tensor]
    weights: list[Tensor]
    tokens: int
    row: int
    shape: str
    weights_of: str
    _turns: dict[int, Turn] = field(default_factory=dict, init=False, repr=False)
    _digest: list[str] = field(default_factory=list, init=False, repr=False)

    def turn(self, layer: int) -> Turn:
        """Of one layer, made once for all caches."""
        if layer not in self._turns:
            forward = self.turns[layer].double()
            mean = self.means[layer].double()
            inverse = torch.linalg.inv(forward).float().contiguous()
            self._turns[layer] = Turn(forward, inverse, mean)
        return self._turns[layer]

    @property
    def digest(self) -> str:
        """Hex of what codes depend on."""
        if not self._digest:
            made = hashlib.sha256()
            for x in (*self.means, *self.turns, *self.weights):
                made.update(x.contiguous().numpy().tobytes())
            self._digest.append(made.hexdigest()[:32])
        return self._digest[0]

    def check(self, config_or_model: Any) -> None:
        """ConfigError where it is of another model, as far as can be told from what is given."""
        model = config_or_model if isinstance(config_or_model, nn.Module) else None
        there = [tuple(mean.shape[1:]) for mean in self.means]
        config = text_config(config_or_model)
        if shape_of(config) != self.shape or there != shapes(config):
            raise ConfigError(
                "the calibration is of a model of another shape", expected="one of this model",
                hint="Calibrate this model: shoestring calibrate, or calibrate().",
            )  # fmt: skip
        if model is not None and weights_of(model) != self.weights_of:
            raise ConfigError(
                "the calibration is of a model with other weights", expected="one of this model",
                hint="Calibrate this model: shoestring calibrate, or calibrate().",
            )  # fmt: skip

    def save(self, directory: str | Path) -> None:
        """A directory that appears whole or not, with checksums."""
        facts = {
            "format": FORMAT, "tokens": self.tokens, "row": self.row, "shape": self.shape,
            "weights_of": self.weights_of, "layers": len(self.means), "bands": list(BANDS),
        }  # fmt: skip
        files.check_target(directory, _FILES[0])
        known: dict[str, str] = {}
        with atomic_directory(directory, known) as temporary:
            (temporary / _FILES[0]).write_text(json.dumps(facts, indent=1) + "\n")
            parts = {"mean": self.means, "turn": self.turns, "weights": self.weights}
            tensors = {f"{name}.{i}": x for name, many in parts.items() for i, x in enumerate(many)}
            known[_FILES[1]] = write_tensors(temporary / _FILES[1], tensors)

    @classmethod
    def load(cls, directory: str | Path) -> "Calibration":
        """CheckpointError for what is not there, not whole, or of another format."""
        facts, tensors = files.read(directory, _FILES, "calibration", FORMAT)
        if facts.get("bands") != list(BANDS):
            raise files.unfit(directory, f"bands {facts.get('bands')!r:.50}")
        kinds = {"tokens": int, "row": int, "layers": int, "shape": str, "weights_of": str}
        for name, kind in kinds.items():
            if type(facts.get(name)) is not kind or (kind is int and facts[name] <= 0):
                raise files.unfit(directory, f"{name} is {facts.get(name)!r:.50}")
        if set(tensors) != {
            f"{p}.{i}" for p in _PARTS for i in range(min(facts["layers"], 10_000))
        }:
            raise files.unfit(directory, f"{len(tensors)} tensors for {facts['layers']} layers")
        means, turns, weights = (
            [tensors[f"{part}.{i}"] for i in range(facts["layers"])] for part in _PARTS
        )
        for index, each in enumerate(zip(means, turns, weights, strict=True)):
            _check_layer(directory, index, *each)
        return cls(
            means, turns, weights, facts["tokens"], facts["row"], facts["shape"],
            facts["weights_of"],
        )  # fmt: skip


_PARTS = ("mean", "turn", "weights")


def _check_layer(
    directory: str | Path, index: int, mean: Tensor, turn: Tensor, weights: Tensor
) -> None:  # fmt: skip
    """CheckpointError for tensors that do not belong together, or no basis."""
    good = mean.dim() == 3 and mean.shape[0] == 2 and mean.shape[2] % GROUP == 0
    if good:
        _, heads, width = mean.shape
        good = turn.shape == (2, heads, width, width) and weights.shape == (
            len(BANDS), 2, heads, width // GROUP,
        )  # fmt: skip
    for x in (mean, turn, weights):
        good = good and x.dtype == torch.float32 and bool(torch.isfinite(x).all())
    if not good or not bool((weights > 0).all()):
        raise files.unfit(directory, f"the numbers of layer {index}")
    if int(torch.linalg.inv_ex(turn.double())[1].max()):
        raise files.unfit(directory, f"the turn of layer {index} cannot be turned back")


def calibrate(
    model: nn.Module,
    texts: Tensor,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> Calibration:
    """texts: (n, T) of ids, each read by itself; 8 of 768 are enough for a small model.

    Takes the memory of a training step on one text, attention recomputed; weights and their
    gradients stay as they are. ConfigError for a model that cannot be served, DataError
    for texts that do not do.
    """
    check_model(model)
    config = text_config(model)
    check_count("seed", seed)
    _check_texts(texts, config.vocab_size)
    widths = {width for _, width in shapes(config)}
    if odd := sorted(width for width in widths if width % GROUP):
        raise ConfigError(f"heads of width {odd[0]}", expected=f"a multiple of {GROUP}")
    found: dict[int, _Sums] = {}
    generator = torch.Generator(device=model.device).manual_seed(seed)  # type: ignore[arg-type]
    with _calibrating(model, found):
        for index, text in enumerate(texts):
            _backward(model, text, generator)
            progress(index + 1, len(texts))
    made = [_layer(sums, texts.numel(), seed) for _, sums in sorted(found.items())]
    means, turns, weights = (list(each) for each in zip(*made, strict=True))
    return Calibration(
        means, turns, weights, texts.numel(), texts.shape[1], shape_of(config), weights_of(model)
    )


def _check_texts(texts: Tensor, vocabulary: int) -> None:
    if not isinstance(texts, Tensor):
        raise DataError(f"texts as {type(texts).__name__}", expected="a tensor (texts, tokens)")
    if texts.dim() != 2 or texts.dtype not in (torch.int64, torch.int32) or not len(texts):
        raise DataError(
            f"texts {tuple(texts.shape)} of {texts.dtype}", expected="ids (texts, tokens), int64"
        )
    if texts.shape[1] <= BANDS[1]:
        raise DataError(
            f"texts of {texts.shape[1]} tokens", expected=f"more than {BANDS[1]}; {ROW} is usual"
        )
    if int(texts.min()) < 0 or int(texts.max()) >= vocabulary:
        raise DataError(
            f"ids from {int(texts.min())} to {int(texts.max())}", expected=f"0 to {vocabulary - 1}"
        )


# ---- gradients ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sums:
    """Of one layer, float64. vectors: how many; first (2, H, d), second (2, H, d, d): of vectors;
    fisher: (bands, 2, H, d, d), of gradients."""

    vectors: int
    first: Tensor
    second: Tensor
    fisher: Tensor


_FOUND: ContextVar[dict[int, _Sums]] = ContextVar("_FOUND")


@contextmanager
def _calibrating(model: Any, found: dict[int, _Sums]) -> Iterator[None]:
    before = model.config.get_text_config()._attn_implementation
    training = [module for module in model.modules() if module.training]
    asked = [weight for weight in model.parameters() if weight.requires_grad]
    token = _FOUND.set(found)
    try:
        for weight in asked:
            weight.requires_grad_(False)
        model.eval()
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        for module in training:
            module.training = True
        for weight in asked:
            weight.requires_grad_(True)
        _FOUND.reset(token)


def _backward(model: Any, text: Tensor, generator: torch.Generator) -> None:
    text = text.to(model.device)
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(text[None]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        if not bool(torch.isfinite(logits).all()):
            raise DataError("logits with NaN or infinity", expected="a model that works")
        said = logits.log_softmax(-1)
        drawn = torch.multinomial(said.detach().exp(), 1, generator=generator)
        said.gather(-1, drawn).sum().backward()


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Plain causal attention that leaves sums of keys, values and their gradients behind."""
    if kwargs.get("sliding_window") is not None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sums = _sums_of(module.layer_idx, key, value)
    copies = []
    for band in range(len(BANDS)):
        for side, x in enumerate((key, value)):
            copy = x.view_as(x)
            copy.register_hook(lambda g, b=band, s=side: _note_gradient(sums, b, s, g))
            copies.append(copy)
    out = checkpoint(_banded, query, scaling, *copies, use_reentrant=False)
    assert out is not None
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def _sums_of(layer: int, key: Tensor, value: Tensor) -> _Sums:
    """The layer's sums, with these vectors added."""
    found, (_, H, _, d) = _FOUND.get(), key.shape
    x = torch.stack([key, value])[:, 0, :, _SKIPPED:].detach().double()
    if layer not in found:
        zeros = x.new_zeros
        found[layer] = _Sums(
            0, zeros(2, H, d), zeros(2, H, d, d), zeros(len(BANDS), 2, H, d, d)
        )  # fmt: skip
    sums = found[layer]
    sums.vectors += x.shape[2]
    sums.first += x.sum(2)
    sums.second += x.mT @ x
    return sums


def _note_gradient(sums: _Sums, band: int, side: int, gradient: Tensor) -> None:
    g = gradient[0, :, _SKIPPED:].double()
    sums.fisher[band, side] += g.mT @ g


def _banded(query: Tensor, scaling: float, *copies: Tensor) -> Tensor:
    """query (1, G H, T, d); copies: keys and values (1, H, T, d) of each band -> (1, G H, T, d)."""
    keys, values = copies[::2], copies[1::2]
    H, T = keys[0].shape[1:3]
    q = query.float().unflatten(1, (H, -1)).flatten(2, 3)
    places = torch.arange(T, device=query.device)
    age = places[:, None] - places
    bands = [(age >= low) & (age < high) for low, high in zip(BANDS, (*BANDS[1:], T), strict=True)]
    scores = q.new_zeros(1, H, q.shape[2] // T, T, T)
    for band, key in zip(bands, keys, strict=True):
        scores = scores + (q @ key.float().mT).view_as(scores) * band
    weights = (scores * scaling).masked_fill(age < 0, -torch.inf).softmax(-1)
    out = sum(
        (weights * band).flatten(2, 3) @ value.float()
        for band, value in zip(bands, values, strict=True)
    )
    assert isinstance(out, Tensor)
    return out.unflatten(2, (-1, T)).flatten(1, 2)


# ---- from gradients to bases -------------------------------------------------------------------


def _layer(sums: _Sums, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, turn and weights of one layer."""
    mean = sums.first / sums.vectors
    covariance = sums.second / sums.vectors - mean[..., :, None] * mean[..., None, :]
    fisher = sums.fisher / tokens
    turn = _basis(_firm(fisher[1:].sum(0)), covariance)  # the youngest band has bits to spare
    inverse = torch.linalg.inv(turn)
    costs = torch.stack([inverse.mT @ _firm(each) @ inverse for each in fisher])
    weights = costs.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, GROUP)).sum(-1)
    mixed = Rotation(GROUP, seed=seed).matrix(dtype=torch.float64)
    turn = (mixed @ turn.unflatten(-2, (-1, GROUP))).flatten(-3, -2)
    return mean.float().cpu(), turn.float().cpu(), weights.float().cpu()


def _firm(fisher: Tensor) -> Tensor:
    """With its mean eigenvalue added in every direction."""
    d = fisher.shape[-1]
    mean = fisher.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(d, dtype=fisher.dtype, device=fisher.device)
    return fisher + mean.clamp_min(1e-30) * eye


def _basis(fisher: Tensor, covariance: Tensor) -> Tensor:
    """(..., d, d): z = A x has covariance 1, and errors that count apart, the heaviest first."""
    values, vectors = torch.linalg.eigh(fisher)
    root = vectors * values.sqrt()[..., None, :] @ vectors.mT
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    # A coordinate that never moves would have no scale.
    values = values.flip(-1).clamp_min(1e-9 * values.amax(-1, keepdim=True).clamp_min(1e-30))
    basis: Tensor = (vectors.flip(-1) * values.rsqrt()[..., None, :]).mT @ root
    return basis


def queries_per_token(low: int, high: int | None, tokens: int) -> float:
    """Queries that a token meets at ages from low to below high, in the mean over a text."""
    last = min(tokens if high is None else high, tokens)
    if last <= low:
        return 0.0
    return (last - low) * (tokens - (low + last - 1) / 2) / tokens


def stretched(weights: Tensor, row: int, context: int) -> Tensor:
    """weights (bands, ...) of texts of `row` tokens -> for contexts of `context`.

    A longer text has more old keys and more queries that meet them, each of which a query attends
    to less. That nats grow as the root of the queries is a compromise that measurements on one
    model found good. A band that the texts did not reach takes the one before.
    """
    found: list[Tensor] = []
    for band, (low, high) in enumerate(zip(BANDS, (*BANDS[1:], None), strict=True)):
        met = queries_per_token(low, high, row)
        if not met:
            found.append(found[-1])
            continue
        ratio = queries_per_token(low, high, context) / met
        found.append(weights[band] * math.sqrt(max(ratio, 1.0)))
    return torch.stack(found)
