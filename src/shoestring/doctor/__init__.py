"""A memory doctor: watches somebody's own training step, says where its memory goes, and what
would lower the peak by how much.

watch sees (through the meter's Tracker), facts tells, trial simulates a change, measured takes
tensors out of what was seen, advice prescribes (free: what costs nothing, paid: the rest); context
is the door in Python, script and child the one of the command line, process what can be seen of
another process. Imported when first used: the command line waits for a script in a process without
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context import Doctor
    from .diagnosis import Advice, Diagnosis

_WHERE = {"Advice": "diagnosis", "Diagnosis": "diagnosis", "Doctor": "context"}
__all__ = ["Advice", "Diagnosis", "Doctor"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'shoestring.doctor' has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value
