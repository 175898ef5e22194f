"""A memory doctor: watches somebody's own training step, says where its memory goes, and what
would lower the peak by how much.

watch sees (through the meter's Tracker), facts tells, trial simulates a change, measured takes
tensors out of what was seen, advice prescribes; context is the door in Python, script and child
the one of the command line, process what can be seen of another process.
"""

from .context import Doctor
from .diagnosis import Advice, Diagnosis

__all__ = ["Advice", "Diagnosis", "Doctor"]
