"""Trying a conversion of a model's stack: on a few tokens before it is made, and what it does to
the loss once it is.

Nothing here converts anything; whoever converts passes the functions that do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .branches import split
from .errors import ShoestringError, StackError
from .ops.fixed_point import largest
from .stack import BlockCall, Executor, Stack, hidden_of, without_cache
from .tape import RandomState, frozen_statistics

TRIAL_TOKENS = 8


class Trial(Executor):
    """Runs the layers as they are on a few tokens: how large their values are and, with
    `splits`, whether x + A(x) + G(x + A(x)) from the branches is the layer's own output."""

    always = True

    def __init__(self, *, splits: bool) -> None:
        self.splits = splits
        self.error = 0.0
        self.amax = 0.0
        self.tuple = False

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        # Two runs would both write to a cache.
        args, kwargs = without_cache(block, call.args, call.kwargs)
        call = replace(call, args=args, kwargs=kwargs)
        x = call.hidden
        assert x is not None
        output = call(x)
        expected = hidden_of(output)
        self.tuple = isinstance(output, tuple | list)
        summed = x
        for branch in split(block, call) if self.splits else ():
            summed = summed + branch(summed)
        if not isinstance(x, FakeTensor):
            self.amax = max(self.amax, float(largest(x)), float(largest(expected)))
            if self.splits:
                scale = float((expected - x).norm()) or 1.0
                self.error = max(self.error, float((summed - expected).norm()) / scale)
        return output

    def run_through(self, stack: Stack) -> None:
        """Fill in the fields; StackError when the branches are not the layer, or cannot be tried.

        The model is left as it was, also when it fails. Under meta tensors there are no values,
        and a model that takes no token ids is tried only where branches have to be.
        """
        tokens = trial_tokens(stack.model)
        if tokens is None and self.splits:
            raise _cannot_be_tried(stack, "takes no token ids")
        if tokens is None or tokens.is_meta:
            return
        modes = [(module, module.training) for module in stack.model.modules()]
        stack.apply([(0, len(stack), self)])
        try:
            stack.model.eval()
            with torch.no_grad():
                stack.model(tokens)
        except ShoestringError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            if self.splits:
                why = f"does not run on token ids alone ({type(error).__name__}: {error})"
                raise _cannot_be_tried(stack, why) from error
        finally:
            stack.restore()
            for module, training in modes:
                module.training = training
        parameter = next(stack.model.parameters())
        if self.error > 64 * torch.finfo(parameter.dtype).eps:
            raise StackError(
                "the attention and MLP branches of "
                f"{type(stack.blocks[0]).__name__} do not add up to the layer (relative "
                f"difference {self.error:.1e})",
                expected="layer(x) = x + A(x) + G(x + A(x))",
                hint="It scales or gates its residuals; use a whole-layer rule (bdia, "
                "random_sign).",
            )


def trial_tokens(model: nn.Module) -> Tensor | None:
    """A few token ids that the model's vocabulary and positions have room for; None for a model
    without an embedding of ids."""
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        return None
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or TRIAL_TOKENS
    vocabulary = min(embedding.num_embeddings, getattr(config, "vocab_size", None) or 1 << 30)
    device = next(model.parameters()).device
    tokens = torch.arange(min(TRIAL_TOKENS, positions), device=device) % vocabulary
    return tokens.view(1, -1)


def _cannot_be_tried(stack: Stack, why: str) -> StackError:
    return StackError(
        f"{type(stack.model).__name__} {why}, so it cannot be checked whether the attention and "
        f"MLP branches of {type(stack.blocks[0]).__name__} add up to the layer",
        expected="a model that is called with token ids",
        hint="Use a whole-layer rule in float32 (bdia, random_sign), or pass the branches "
        "yourself to ReversibleStack.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """Loss of one batch around a conversion. None of it involves training."""

    rule: str
    before: float
    """Of the plain model, in eval mode."""
    after: float
    """Of the reversible one in train mode (dropout, if any, is on): mean over `draws` passes."""
    spread: float
    """Standard deviation over those passes: what the random coefficients do."""
    draws: int
    back: float
    """Of the model converted back, in eval mode; equals `before`."""


def measure_conversion(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    rule: str,
    convert: Callable[[nn.Module], Any],
    restore: Callable[[nn.Module], Any],
    draws: int,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None,
) -> ConversionReport:
    """Convert, measure, convert back. `model` is plain, and is left as it was: its modes and the
    random state too."""
    measured = loss or (lambda m, b: m(**b).loss)
    modes = [(module, module.training) for module in model.modules()]
    random = RandomState(next(model.parameters()))
    with torch.no_grad(), random.restored(), frozen_statistics(model):
        try:
            before = float(measured(model.eval(), batch))
            convert(model)
            model.train()
            values = torch.tensor([float(measured(model, batch)) for _ in range(draws)])
            restore(model)
            back = float(measured(model.eval(), batch))
        finally:
            restore(model)
            for module, training in modes:
                module.training = training
    return ConversionReport(
        rule=rule,
        before=before,
        after=float(values.mean()),
        spread=float(values.std()) if draws > 1 else 0.0,
        draws=draws,
        back=back,
    )
