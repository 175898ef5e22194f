"""MNIST-1D, generated: ten templates, padded, stretched, shifted, sheared and noised.

After Sam Greydanus' package mnist1d 0.0.2 (Apache-2.0; arXiv 2011.14439), with its constants and
its order of random draws; 6,400 signals of 40 values here instead of 5,000.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

Signal = NDArray[np.float64]
TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
LENGTH, PADDING, SHIFT, FINAL = 12, (36, 60), 48, 40
STRETCH, CORRELATED, INDEPENDENT, SHEAR = 0.4, 0.25, 0.02, 0.75


def resampled(x: Signal, count: int) -> Signal:
    return np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(x)), x)


def drawn(template: Signal, random: np.random.RandomState) -> Signal:
    low, high = PADDING
    zeros = np.zeros(low + int(random.rand() * (high - low + 1)))
    x = resampled(np.concatenate([template + 1e-8, zeros]), LENGTH + high)
    x *= 1 + STRETCH * (random.rand() - 0.5)
    x = np.roll(x, random.choice(SHIFT))
    noise = gaussian_filter(CORRELATED * random.randn(*x.shape), 2)
    x = np.where(x != 0, x, noise) + INDEPENDENT * random.randn(*x.shape)
    x = x - SHEAR * (random.rand() - 0.5) * np.linspace(-0.5, 0.5, len(x))
    return resampled(x, FINAL)


def write_signals(into: Path, count: int = 6400) -> None:
    """A safetensors file: images (count, 1, 1, 40) in [-1, 1], three deviations of the signals,
    and labels (count,)."""
    templates = np.asarray(TEMPLATES, dtype=np.float64)
    templates -= templates.mean(1, keepdims=True)
    templates /= templates.std(1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6
    random = np.random.RandomState(42)
    signals = np.stack([drawn(each, random) for each in templates for _ in range(count // 10)])
    signals = (signals - signals.mean()) / signals.std()
    images = torch.from_numpy(signals / 3).float().clamp(-1, 1).view(-1, 1, 1, FINAL)
    save_file({"images": images, "labels": torch.arange(10).repeat_interleave(count // 10)}, into)
