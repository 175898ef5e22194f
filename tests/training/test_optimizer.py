"""AdamW against torch's plain one, decay groups, and clipping against torch's own helper."""

import torch
from torch import nn

from shoestring.training.config import OptimConfig
from shoestring.training.optimizer import clip_, gradient_norm, optimizer_factory

CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(8, 16, generator=generator)).square().sum().backward()


def test_it_is_adamw_with_matrices_decayed_and_vectors_not():
    ours, theirs = network(), network()
    config = OptimConfig(lr=1e-2, weight_decay=0.3)
    optimizer = optimizer_factory(config, CPU)(ours.parameters())
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=config.betas,
        foreach=False,
        fused=False,
    )
    for step in range(5):
        backward(ours, step)
        backward(theirs, step)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # 5 updates of at most lr each, every one rounded a few times
        torch.testing.assert_close(one, other, rtol=20 * EPS, atol=20 * EPS)


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    optimizer = optimizer_factory(OptimConfig(), CPU)(model.parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_clipping_equals_torchs_own():
    ours, theirs = network(), network()
    backward(ours, 0)
    backward(theirs, 0)
    norm = gradient_norm(ours.parameters())
    clip_(ours.parameters(), float(norm), 0.5)
    reference = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5, foreach=False)
    torch.testing.assert_close(norm, reference, rtol=4 * EPS, atol=0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=8 * EPS, atol=0)


def test_gradients_below_the_limit_are_untouched():
    model = network()
    backward(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    clip_(model.parameters(), float(gradient_norm(model.parameters())), 1e9)
    clip_(model.parameters(), float(gradient_norm(model.parameters())), 0.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_norm_of_a_long_gradient_is_right_and_the_same_in_parts():
    # summed in float32 throughout, as torch does on CPU, this one is off by 1e-4
    gradient = torch.randn(4_000_003)
    norms = []
    for parts in (1, 2, 3):
        parameters = [torch.nn.Parameter(torch.empty_like(p)) for p in gradient.chunk(parts)]
        for parameter, part in zip(parameters, gradient.chunk(parts), strict=True):
            parameter.grad = part
        norms.append(gradient_norm(parameters))
    exact = gradient.double().norm()
    assert all(abs(norm - exact) <= 2 * torch.finfo(torch.float32).eps * exact for norm in norms)
    assert norms[0] == norms[1] == norms[2]
