"""What a denoiser is fed and asked for at a noise level, and the step from one level to the next.

EDM (z = y + sigma eps): a block F sees c_in z and c_noise and stands for the denoiser
D = c_skip z + c_out F. With s = sigma_data, the deviation of a component of y:
c_skip = s^2 / (sigma^2 + s^2), c_out = sigma s / sqrt(sigma^2 + s^2),
c_in = 1 / sqrt(sigma^2 + s^2), c_noise = ln(sigma) / 4; the weight of |D - y|^2 is w = 1 / c_out^2.
Then w |D - y|^2 = |F - f|^2 with f = (y - c_skip z) / c_out
= (sigma y / s - s eps) / sqrt(sigma^2 + s^2), which is how it is computed: the first form
multiplies what rounding left of D - y by up to 250,000.

Flow (z = (1 - t) y + t eps): F stands for the velocity eps - y, and D = z - t F.

Euler, both: z' = a z + (1 - a) D with a = level' / level, so a perfect D lands on the noise of
level'. The step *lowers* the noise; equations 3 to 5 of arXiv 2506.14202 print the other sign.

Levels are (N,), one a sample, and are spread over the components of a sample here and nowhere else.
Source: EDM, arXiv 2206.00364, table 1; flow matching, arXiv 2210.02747.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# N samples; ... components of one


class Scales(NamedTuple):
    """c_skip, c_out, c_in (each (N,)) and c_noise (N,) of EDM."""

    skip: Tensor
    out: Tensor
    inner: Tensor
    noise: Tensor


def edm_scales(sigma_N: Tensor, data_std: float) -> Scales:
    """EDM's four, in sigma's dtype, which is to be float32 or float64."""
    square = sigma_N.square() + data_std**2
    root = square.sqrt()
    return Scales(data_std**2 / square, sigma_N * data_std / root, 1 / root, sigma_N.log() / 4)


def edm_weight(sigma_N: Tensor, data_std: float) -> Tensor:
    """Weight of a sample's squared error, (N,): 1 / c_out^2."""
    return (sigma_N.square() + data_std**2) / (sigma_N * data_std).square()


def edm_noised(y: Tensor, noise: Tensor, sigma_N: Tensor) -> Tensor:
    """y + sigma eps, in y's dtype."""
    return y + spread(sigma_N, y) * noise


def edm_target(y: Tensor, noise: Tensor, sigma_N: Tensor, data_std: float) -> Tensor:
    """What F should give: of unit variance where y's components have deviation data_std."""
    sigma = spread(sigma_N, y)
    return (sigma / data_std * y - data_std * noise) / (sigma.square() + data_std**2).sqrt()


def edm_denoised(f: Tensor, z: Tensor, sigma_N: Tensor, data_std: float) -> Tensor:
    """D out of F."""
    scales = edm_scales(sigma_N, data_std)
    return spread(scales.skip, z) * z + spread(scales.out, z) * f


def flow_noised(y: Tensor, noise: Tensor, time_N: Tensor) -> Tensor:
    """(1 - t) y + t eps, in y's dtype."""
    time = spread(time_N, y)
    return (1 - time) * y + time * noise


def flow_denoised(velocity: Tensor, z: Tensor, time_N: Tensor) -> Tensor:
    """D out of the velocity."""
    return z - spread(time_N, z) * velocity


def euler_step(z: Tensor, denoised: Tensor, level_N: Tensor, next_N: Tensor) -> Tensor:
    """From level_N down to next_N < level_N (both (N,)), for sigma and for time of a flow."""
    a = spread(next_N / level_N, z)
    return a * z + (1 - a) * denoised


def waves_of_level(noise_N: Tensor, count: int) -> Tensor:
    """c_noise or a time as `count` cosines and as many sines, (N, 2 count) float32, of frequencies
    from 1/4 to 64, a power of two apart in equal steps."""
    place = torch.linspace(-2, 6, count, device=noise_N.device)
    angles = noise_N.float()[:, None] * torch.exp2(place)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def spread(per_sample_N: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ...) in the dtype of what it multiplies. Never (N,) against (N, 1)."""
    if per_sample_N.dim() != 1 or len(per_sample_N) not in (1, len(like)):
        raise ValueError(f"one level a sample: {tuple(per_sample_N.shape)}, {tuple(like.shape)}")
    return per_sample_N.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


# ---- twins -------------------------------------------------------------------------------------


def edm_loss_ref(f: Tensor, y: Tensor, noise: Tensor, sigma_N: Tensor, data_std: float) -> Tensor:
    """Twin of |F - edm_target|^2: each sample's weighted mean square of D - y, float64, (N,)."""
    losses = []
    for n, sigma in enumerate(sigma_N.double()):
        z = y[n].double() + sigma * noise[n].double()
        skip = data_std**2 / (sigma**2 + data_std**2)
        out = sigma * data_std / (sigma**2 + data_std**2).sqrt()
        denoised = skip * z + out * f[n].double()
        weight = (sigma**2 + data_std**2) / (sigma * data_std) ** 2
        losses.append(weight * (denoised - y[n].double()).square().mean())
    return torch.stack(losses)


def euler_step_ref(z: Tensor, denoised: Tensor, level: float, following: float) -> Tensor:
    """Twin of `euler_step` for one sample: along dz/dsigma = (z - D) / sigma, float64."""
    slope = (z.double() - denoised.double()) / level
    return z.double() + (following - level) * slope
