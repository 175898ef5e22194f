"""The table of methods. A new method is one file and one line here."""

from collections.abc import Iterable

from ..errors import ConfigError, StackError, closest
from ..stack import Span, Stack
from .base import MakeOptimizer, Method, Promises, Undo
from .bf16_stochastic import Bf16Stochastic
from .block_coordinate import BlockCoordinate
from .chunked_loss import ChunkedLoss
from .chunked_mlp import ChunkedMlp
from .fused_step import FusedStep
from .keep import Keep
from .lora import Lora
from .low_bit_states import LowBitStates
from .microbatch import Microbatch
from .offload import Offload
from .offload_optimizer import OffloadOptimizer
from .quantized_base import QuantizedBase
from .recompute import Recompute
from .reversible import Reversible
from .squeeze import Squeeze
from .stream_weights import StreamWeights

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Keep(),
        Recompute(),
        Offload(),
        Squeeze(),
        Reversible(),
        ChunkedLoss(),
        ChunkedMlp(),
        Microbatch(),
        StreamWeights(),
        Lora(),
        QuantizedBase(),
        FusedStep(),
        LowBitStates(),
        Bf16Stochastic(),
        OffloadOptimizer(),
        BlockCoordinate(),
    )
}


def method(name: str) -> Method:
    """The method of that name. ConfigError names the nearest one."""
    if name not in METHODS:
        raise ConfigError(
            f"{name!r} is not a method",
            expected=f"one of {sorted(METHODS)}",
            hint=closest(name, METHODS),
        )
    return METHODS[name]


def apply_spans(stack: Stack, spans: Iterable[Span]) -> None:
    """Run each span of the stack by its method, in place; `stack.restore()` undoes it.

    StackError when a method cannot run this stack, before anything is changed.
    """
    executors = []
    for span in spans:
        how = method(span.method)
        config = how.configure(span.config)
        if reason := how.fits(stack, config):
            raise StackError(f"method {span.method!r} cannot run {stack!r}: {reason}")
        executors.append(
            (span.start, span.stop, how.executor(stack, span.start, span.stop, config))
        )
    stack.apply(executors)


__all__ = ["METHODS", "MakeOptimizer", "Method", "Promises", "Undo", "apply_spans", "method"]
