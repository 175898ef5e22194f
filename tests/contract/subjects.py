"""What the contract is tested on: two small networks, and every method put into them.

Nothing here names a method. What a method needs follows from what it declares: one that rebuilds
"streams" is given a network made reversible, and is held against the same network with all
graphs kept (its `keep_top`); one for frozen weights is given some; every other method is given the
plain network and held against it. One of the optimizer is given a wider network, and makes the
optimizer wherever one is needed; one of the batch has every backward done in its parts. Where
weights are trained in turns these are cut short, so that a test sees several. Adapters are saved
by name, and learn less than all weights do: what they learn is tested with them.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.methods import METHODS, Method, apply_spans
from shoestring.methods.reversible import reversible
from shoestring.models.gpt import GPT, GPTConfig
from shoestring.objectives.next_token import num_targets
from shoestring.optim import InTurns
from shoestring.rows import cut
from shoestring.stack import Span, Stack

VOCABULARY = 83
DEPTH = 3
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


WIDER = {"hidden_size": 64, "intermediate_size": 128}
"""For methods of the optimizer, which leave small tensors as they are."""


def gpt(depth: int = DEPTH, dropout: float = 0.0, streams: bool = False, **shape: int) -> nn.Module:
    torch.manual_seed(1)
    rule = "feistel" if streams else "residual"
    sizes = {**SHAPE, **shape}
    return GPT(GPTConfig(num_hidden_layers=depth, dropout=dropout, rule=rule, **sizes)).train()


def llama(
    depth: int = DEPTH, dropout: float = 0.0, streams: bool = False, **shape: int
) -> nn.Module:
    torch.manual_seed(1)
    sizes = {**SHAPE, **shape}
    config = LlamaConfig(num_hidden_layers=depth, attention_dropout=dropout, **sizes)
    model = LlamaForCausalLM(config).train()
    return reversible(model) if streams else model


NETWORKS: dict[str, Callable[..., nn.Module]] = {"gpt": gpt, "llama": llama}


@dataclass(frozen=True)
class Subject:
    """One method with one of its settings."""

    method: Method
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def promises(self) -> Any:
        return self.method.promises

    @property
    def label(self) -> str:
        return "-".join([self.method.name, *(f"{k}={v}" for k, v in self.settings.items())])

    def network(self, kind: str = "gpt", **sizes: Any) -> nn.Module:
        """A network the method can run, the same weights each time."""
        if is_of_the_optimizer(self):
            sizes = {**WIDER, **sizes}
        model = NETWORKS[kind](streams=self.promises.rebuilds == "streams", **sizes)
        if self.promises.for_frozen:
            for module in nn.ModuleList(Stack.of(model).blocks).modules():
                if isinstance(module, nn.Linear):
                    module.weight.requires_grad_(False)
        return model

    def yardstick(self, kind: str = "gpt", **sizes: Any) -> nn.Module:
        """The same network with everything kept for backward."""
        model = self.network(kind, **sizes)
        if self.promises.rebuilds == "streams":
            everything = {"keep_top": len(Stack.of(model))}
            put(self.method, model, everything)
        return model

    def applied(self, kind: str = "gpt", **sizes: Any) -> nn.Module:
        model = self.network(kind, **sizes)
        put(self.method, model, self.settings)
        return model


TURN = 2
"""Steps of a turn here, where weights are trained in turns."""
MAKERS: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
PARTS: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()


def _made(
    method: Method, settings: Mapping[str, Any], model: nn.Module, parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    return method.optimizer(model, parameters, adamw, method.configure(settings))


def put(method: Method, model: nn.Module, settings: Mapping[str, Any]) -> Callable[[], None]:
    """Put the method into the model, in place; returns how to undo it. One of the optimizer
    makes the model's from then on."""
    if method.promises.applies_to == "optimizer":
        MAKERS[model] = functools.partial(_made, method, dict(settings))
    if method.promises.applies_to == "batch":
        PARTS[model] = method.configure(settings).parts
        return lambda: PARTS.pop(model, None)
    if method.promises.applies_to != "span":
        return method.apply(model, method.configure(settings))
    stack = Stack.of(model)
    apply_spans(stack, [Span(0, len(stack), method.name, settings)])
    return stack.restore


def subjects() -> list[Subject]:
    """Every registered method as it comes, and with each of the settings it offers."""
    return [
        Subject(method, settings)
        for method in METHODS.values()
        for settings in ({}, *getattr(method, "variants", ()))
    ]


def every(*having: Callable[[Subject], bool]) -> pytest.MarkDecorator:
    """Parametrise a test over the subjects of which all of `having` is true."""
    chosen = [s for s in subjects() if all(test(s) for test in having)]
    return pytest.mark.parametrize("subject", chosen, ids=[s.label for s in chosen])


def every_pair(*having: Callable[[Subject], bool]) -> pytest.MarkDecorator:
    """As `every`, on both networks for a method as it comes, on the first for its settings."""
    pairs = [
        pytest.param(s, kind, id=f"{s.label}-{kind}")
        for s in subjects()
        if all(test(s) for test in having)
        for kind in ([*NETWORKS] if is_default(s) else [*NETWORKS][:1])
    ]
    return pytest.mark.parametrize(("subject", "kind"), pairs)


def is_exact(subject: Subject) -> bool:
    return bool(subject.promises.fidelity == "exact")


def has_other_weights(subject: Subject) -> bool:
    """Whether a structural method trains other weights than the model's own, or codes them."""
    promises = subject.promises
    return bool(promises.fidelity == "structural" and promises.changes_weights)


def is_bitwise(subject: Subject) -> bool:
    return bool(subject.promises.grade == "bitwise")


def is_of_the_batch(subject: Subject) -> bool:
    return bool(subject.promises.applies_to == "batch")


def is_of_the_optimizer(subject: Subject) -> bool:
    return bool(subject.promises.applies_to == "optimizer")


def is_noisy(subject: Subject) -> bool:
    """Whether its gradient is right only in expectation."""
    return subject.promises.gradient_error is not None


def is_default(subject: Subject) -> bool:
    return not subject.settings


def batch(rows: int = 2, tokens: int = 24) -> dict[str, Tensor]:
    """Token ids with labels; the last row ends in padding."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, fused=True)


def optimizer(
    model: nn.Module, parameters: list[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """AdamW, made by the method that was put into the model, if that makes optimizers."""
    parameters = list(model.parameters()) if parameters is None else parameters
    make = MAKERS.get(model)
    return adamw(parameters) if make is None else make(model, parameters)


def backward(model: nn.Module, data: Mapping[str, Tensor]) -> Tensor:
    """Forward and backward, in the parts that a method has put there; the loss."""
    pieces = cut(data, PARTS.get(model, 1))
    counts = [num_targets(piece) for piece in pieces]
    total: Tensor | None = None
    for piece, count in zip(pieces, counts, strict=True):
        loss = model(**piece).loss
        loss = loss * (count / sum(counts)) if len(pieces) > 1 else loss
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def gradients(
    model: nn.Module, data: Mapping[str, Tensor], seed: int = 3
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradient of every parameter) from a fixed random state."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = backward(model, data)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss, found


def train(
    model: nn.Module, steps: int, data: Callable[[int], Mapping[str, Tensor]], start: int = 0,
    state: dict[str, Any] | None = None,
) -> tuple[list[float], torch.optim.Optimizer]:  # fmt: skip
    """AdamW for steps start..steps-1; returns the losses and the optimizer."""
    stepping = optimizer(model)
    if state is not None:
        stepping.load_state_dict(copy.deepcopy(state))
    losses = []
    for step in range(start, steps):
        torch.manual_seed(100 + step)
        loss = backward(model, data(step))
        stepping.step()
        stepping.zero_grad(set_to_none=True)
        losses.append(float(loss))
        if isinstance(stepping, InTurns) and step % TURN == TURN - 1:
            stepping.end_turn()
    return losses, stepping
