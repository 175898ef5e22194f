"""Generators that are functions of a few numbers, such as seed, block and step.

What is drawn does not depend on what was drawn before, and nothing random has to be saved.
"""

import hashlib

import torch


def generator_of(*numbers: int) -> torch.Generator:
    """A generator on the CPU, seeded by a few numbers."""
    text = "/".join(map(str, numbers)).encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)
