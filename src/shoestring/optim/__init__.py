"""Optimizers that no library has, and what is needed to put one around another."""

from .adamw import ChunkedAdamW
from .stepping import Around, coupling, put_state, step_one
from .turns import InTurns

__all__ = ["Around", "ChunkedAdamW", "InTurns", "coupling", "put_state", "step_one"]
