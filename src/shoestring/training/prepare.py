"""From a config to what the loop turns: data, then a plan, then the model and its optimizer.

The plan comes before the model: it is made from a fake twin, so a run that cannot fit ends
before its weights are allocated.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import (
    Corpus,
    PackedBatches,
    Rows,
    check_tokenizer,
    encode,
    load_tokenizer,
    open_source,
    train_tokenizer,
)
from ..data.packing import Layout
from ..errors import ConfigError
from ..methods.reversible import is_reversible, reversible
from ..models.gpt import GPT, GPTConfig
from ..objectives import next_token
from .config import ModelConfig, RunConfig
from .distributed import World
from .evaluate import HeldOutRows
from .load import load_config, load_model, weights_digest
from .step import LossFunction


@dataclass(frozen=True, slots=True)
class Data:
    """What a run reads."""

    tokenizer: Any
    batches: PackedBatches
    held_out: HeldOutRows
    corpus: Corpus
    prompt: Tensor
    """(1, T) ids that begin a held-out row: what samples continue."""


def prepare_data(config: RunConfig, world: World) -> Data:
    """Tokenizer, training batches and held-out rows. DataError on whatever is wrong with them."""
    # One process fills the cache, the others find it there.
    if not world.is_first:
        world.barrier()
    data = config.data
    field = None if data.text_field == "text" else data.text_field
    train, held_out = open_source(data.source, field=field).split(data.held_out)
    if data.tokenizer != "auto":
        tokenizer = load_tokenizer(data.tokenizer)
    elif config.model.name:
        tokenizer = load_tokenizer(config.model.name)
    else:
        tokenizer = train_tokenizer(train, data.vocabulary)
    corpus, rest = encode(train, tokenizer), encode(held_out, tokenizer)
    if world.is_first:
        world.barrier()
    # Conversations do not run into each other: one of them a row.
    layout: Layout = "pad" if corpus.is_chat else "join"
    batches = PackedBatches(
        corpus, length=data.sequence_length, batch=data.batch_size, seed=config.run.seed,
        layout=layout, rank=world.rank, world=world.size,
    )  # fmt: skip
    rows = Rows(rest, length=data.sequence_length, layout=layout, with_rest=True)
    scored = HeldOutRows(
        rows, tokenizer, count=config.evaluate.batches * data.batch_size,
        batch=data.batch_size, world=world,
    )  # fmt: skip
    prompt = rows.batch([0])["input_ids"][:, : data.sequence_length // 2]
    return Data(tokenizer, batches, scored, corpus, prompt)


class Builder:
    """Makes the run's model in float32 with its rule in place: a sketch for the planner's fake
    tensors, then the real one. ConfigError and DataError before anything is allocated."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        length: int,
        tokenizer: Any,
        device: torch.device,
        prepare: Callable[[nn.Module], object] = lambda model: None,
    ):
        """prepare: called with every model that is made."""
        self._prepare = prepare
        self._config, self._length, self._device = config, length, device
        self._tokenizer = tokenizer
        if config.name and config.dropout:
            raise ConfigError(
                f"model.dropout = {config.dropout} is set beside model.name = {config.name!r}",
                expected="0: a named model brings its own dropout",
            )

    def sketch(self) -> nn.Module:
        """The model's shape with whatever weights; reads no weights from disk."""
        with torch.device(self._device):
            model = self._build(from_scratch=True)
            self._prepare(model)
            return model

    def real(self, *, with_weights: bool = True, divided: bool = False) -> nn.Module:
        """The model to train, on its device, in training mode.

        with_weights=False: a named model's own are not read, because others will take their place.
        divided=True: it stays on the CPU, from where its parts go to the device.
        """
        # Made on the CPU, so that a seed gives the same weights for every device.
        from_scratch = self._config.from_scratch or not with_weights
        model = self._build(from_scratch=from_scratch).train()
        self._prepare(model)
        return model if divided else model.to(self._device)

    def shape(self) -> dict[str, Any]:
        """Every field of the model's config that decides what it computes."""
        return dict(self._shape().to_dict())

    def weights_digest(self) -> str:
        """Of the weights that training starts from, "none" for random ones."""
        if self._config.from_scratch or not self._config.name:
            return "none"
        return weights_digest(_local(self._config.name), self._shape())

    def _shape(self) -> Any:
        named = self._config.name
        return load_config(_local(named)) if named else self._own_shape()

    def _build(self, *, from_scratch: bool) -> nn.Module:
        if not self._config.name:
            return GPT(self._own_shape())
        model = load_model(_local(self._config.name), from_scratch=from_scratch)
        longest = getattr(model.config, "max_position_embeddings", None)
        if isinstance(longest, int) and self._length > longest:
            raise ConfigError(
                f"data.sequence_length = {self._length} is longer than the model's {longest} "
                "positions",
                expected=f"at most {longest}",
            )
        check_tokenizer(self._tokenizer, model)
        if self._config.rule != "residual" and not is_reversible(model):
            reversible(model, rule=self._config.rule)
        return model

    def _own_shape(self) -> GPTConfig:
        config, tokenizer = self._config, self._tokenizer
        shape: dict[str, Any] = {"max_position_embeddings": self._length, **config.gpt_fields()}
        return GPTConfig(
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            rule=config.rule,
            dropout=config.dropout,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )


def _local(name: str) -> str | Path:
    path = Path(name).expanduser()
    return path if path.is_dir() else name


def loss_function(config: RunConfig, device: torch.device) -> LossFunction:
    """(model, batch) -> mean nats a target, computed in the run's precision."""

    def loss(model: nn.Module, batch: next_token.Batch) -> Tensor:
        with precision(config, device):
            # A cache of keys and values that nobody reads is memory.
            return next_token.loss(model, cast(Any, {**batch, "use_cache": False}))

    return loss


def precision(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 when the run computes in it.

    Without autocast's own cache: it would keep a 16-bit copy of every weight to the end of the
    forward, and each weight is used once.
    """
    if config.precision.compute == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
