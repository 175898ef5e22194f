"""One update: accumulation equals the big batch, and a bad number changes nothing."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.errors import DataError, TrainingDiverged
from shoestring.objectives.next_token import IGNORED, num_targets
from shoestring.training.config import OptimConfig
from shoestring.training.distributed import World
from shoestring.training.guard import FiniteGuard
from shoestring.training.optimizer import optimizer_factory
from shoestring.training.step import update

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
EPS = torch.finfo(torch.float32).eps


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    ).train()


def rows(count: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows whose number of targets differs, as in chats where only answers are learned."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(61, (count, 16), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, : 2 * row + 1] = IGNORED
    return {"input_ids": ids, "labels": labels}


def parts(batch: dict[str, torch.Tensor], *sizes: int) -> list[dict[str, torch.Tensor]]:
    split = {name: tensor.split(list(sizes)) for name, tensor in batch.items()}
    return [{name: tensors[i] for name, tensors in split.items()} for i in range(len(sizes))]


def own_loss(model, batch):
    return model(**batch).loss


def stepped(microbatches, *, loss=own_loss, clip=1.0, model=None, optim=None):
    model = model or llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if optim is not None:
        optimizer = optimizer_factory(optim, ALONE.device)(model.parameters())
    guard = FiniteGuard(model)
    updated = update(
        1, model, optimizer, microbatches, loss=loss, guard=guard, world=ALONE, clip=clip
    )
    return model, updated


def test_microbatches_of_unequal_weight_equal_one_big_batch():
    batch = rows(6)
    whole, one = stepped([batch])
    split, many = stepped(parts(batch, 1, 3, 2))
    assert one.tokens == many.tokens == num_targets(batch)
    assert many.loss == pytest.approx(one.loss, rel=16 * EPS)
    assert many.norm == pytest.approx(one.norm, rel=64 * EPS)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        # gradients of norm 1 are summed in another order, then subtracted once
        torch.testing.assert_close(a, b, rtol=64 * EPS, atol=64 * EPS)


def test_plain_means_of_microbatches_would_not_pass_the_test_above():
    batch = rows(6)
    whole, _ = stepped([batch])
    model = llama()
    for part in parts(batch, 1, 3, 2):
        (model(**part).loss / 3).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    worst = max(
        float((a - b).detach().abs().max())
        for a, b in zip(whole.parameters(), model.parameters(), strict=True)
    )
    assert worst > 1000 * EPS


def test_a_microbatch_without_targets_changes_nothing():
    batch, empty = rows(4), rows(2, seed=1)
    empty["labels"][:] = IGNORED
    plain, one = stepped([batch])
    mixed, other = stepped([empty, batch])
    assert one == other
    for a, b in zip(plain.parameters(), mixed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_without_any_target_is_an_error():
    empty = rows(2)
    empty["labels"][:] = IGNORED
    with pytest.raises(DataError, match="no target"):
        stepped([empty])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_gradient_is_named_and_nothing_is_updated(accumulate):
    model, batch = llama(), rows(4)
    stepped([batch], model=model, optim=OptimConfig())
    before = copy.deepcopy(model.state_dict())
    # The gradient turns to NaN behind block 1: block 2 and the head stay finite.
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_full_backward_pre_hook(lambda module, grads: (grads[0] * math.nan,))
    with pytest.raises(TrainingDiverged, match=r"gradient of model\.layers\.1\.mlp\.down_proj"):
        stepped([batch] * accumulate, model=model, optim=OptimConfig())
    handle.remove()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_bad_loss_is_named_and_nothing_is_updated():
    model, batch = llama(), rows(4)
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        return own_loss(model, batch) * (math.inf if calls == 2 else 1.0)

    with pytest.raises(TrainingDiverged, match="step 1: the loss is inf in microbatch 1"):
        stepped(parts(batch, 2, 2), model=model, loss=loss)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gradients_are_gone_after_a_step():
    model, _ = stepped([rows(4)])
    assert all(p.grad is None for p in model.parameters())
