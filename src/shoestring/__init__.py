"""Shoestring: train in the memory you have, serve in a different shape.

The public names, nothing else. They are imported when first used, so that `import shoestring`
and the command line's --help do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ShoestringError

if TYPE_CHECKING:
    from .allocator import release
    from .doctor import Doctor
    from .meter import Meter
    from .methods.reversible import reversible
    from .planner import Plan, plan
    from .stack import Span, Stack
    from .training.load import load
    from .training.loop import Run, resume, train

_WHERE = {
    "Doctor": "doctor",
    "Meter": "meter",
    "Plan": "planner",
    "Run": "training.loop",
    "Span": "stack",
    "Stack": "stack",
    "load": "training.load",
    "plan": "planner",
    "release": "allocator",
    "resume": "training.loop",
    "reversible": "methods.reversible",
    "train": "training.loop",
}
__version__ = "0.1.0"
__all__ = [
    "Doctor",
    "Meter",
    "Plan",
    "Run",
    "ShoestringError",
    "Span",
    "Stack",
    "load",
    "plan",
    "release",
    "resume",
    "reversible",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'shoestring' has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
