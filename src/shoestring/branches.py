"""A transformer layer as its two residual branches, attention and MLP.

Whether a layer can be split is not a matter of structure (four norms, parallel branches), so one
small table names the children that make up each branch, in order. A layer is split only when its
parametric children are exactly those of a row; `shoestring.reversible` then checks the split
against the layer's own output. What is not in the table is an error.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import StackError
from .stack import BlockCall, hidden_of


@dataclass(frozen=True, slots=True)
class Roles:
    """Children applied one after the other in each branch; `attends` gets the layer's arguments."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    attends: str

    def children(self) -> set[str]:
        return {*self.attention, *self.mlp}


ROLES = (
    # Llama, Mistral, Qwen, Gemma 1, Mixtral
    Roles(("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"), "self_attn"),
    # GPT-2
    Roles(("ln_1", "attn"), ("ln_2", "mlp"), "attn"),
    # Gemma 2 and 3
    Roles(
        ("input_layernorm", "self_attn", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
        "self_attn",
    ),
    # OLMo 2
    Roles(
        ("self_attn", "post_attention_layernorm"),
        ("mlp", "post_feedforward_layernorm"),
        "self_attn",
    ),
    # models.gpt
    Roles(("attention_norm", "attention"), ("mlp_norm", "mlp"), "attention"),
)


def roles_of(block: nn.Module) -> Roles:
    """The row of the table that describes `block`; StackError when none does."""
    parametric = {n for n, c in block.named_children() if any(True for _ in c.parameters())}
    for roles in ROLES:
        if roles.children() == parametric:
            return roles
    raise StackError(
        f"{type(block).__name__} with children {sorted(parametric)} cannot be split into "
        "an attention and an MLP branch",
        expected=f"children such as {sorted(ROLES[0].children())}",
        hint="Use a whole-layer rule (bdia, random_sign, midpoint, leapfrog), or pass the "
        "branches yourself to ReversibleStack.",
    )


def split(block: nn.Module, call: BlockCall) -> list[Callable[[Tensor], Tensor]]:
    """The two branches of one call of `block`, each (B, T, d) -> (B, T, d), norms included."""
    roles = roles_of(block)
    passed = _attention_arguments(block, getattr(block, roles.attends), call)

    def attention(x: Tensor) -> Tensor:
        for name in roles.attention:
            part = getattr(block, name)
            x = hidden_of(part(x, **passed) if name == roles.attends else part(x))
        return x

    def mlp(x: Tensor) -> Tensor:
        for name in roles.mlp:
            x = hidden_of(getattr(block, name)(x))
        return x

    return [attention, mlp]


def _attention_arguments(block: nn.Module, attention: nn.Module, call: BlockCall) -> dict[str, Any]:
    """The layer call's arguments by name, less the hidden state and what attention rejects."""
    signature = inspect.signature(type(block).forward)
    bound = signature.bind_partial(block, *call.args, **call.kwargs).arguments
    named: dict[str, Any] = {}
    for name, value in list(bound.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            named[name] = value
    hidden = call.place if isinstance(call.place, str) else list(bound)[1 + call.place]
    named.pop(hidden)
    accepted = inspect.signature(attention.forward).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        named = {n: v for n, v in named.items() if n in accepted}
    return named
