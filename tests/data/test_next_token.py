"""The next-token objective: its weighting of microbatches and its held-out sums."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.data.packing import held_out_batches
from shoestring.errors import DataError
from shoestring.objectives.next_token import Evaluation, evaluate, loss, num_targets, shares

# B rows, T tokens, V vocabulary
V = 11
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, attention_dropout=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch_of(*lengths, seed=0):
    """Rows of 8 tokens of which so many are targets."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (len(lengths), 8), generator=draw)
    labels = ids.clone()
    labels[:, 0] = -100
    for row, length in enumerate(lengths):
        labels[row, 1 + length :] = -100
    return {"input_ids": ids, "labels": labels}


def nats_ref(model, batch):
    """The sum of -log p(x_t | x_<t) over targets, one position at a time."""
    total = 0.0
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for t in range(1, len(ids)):
            if labels[t] != -100:
                total -= float(log_p[t - 1, labels[t]])
    return total


def test_loss_is_the_mean_over_targets(model):
    model.eval()
    batch = batch_of(7, 3)
    with torch.no_grad():
        # float32 log-softmax over V tokens against float64
        assert float(loss(model, batch)) == pytest.approx(nats_ref(model, batch) / 10, rel=1e-6)


def test_targets_are_counted_without_the_first_of_a_row():
    batch = batch_of(7, 3, 0)
    assert num_targets(batch) == 10
    batch["labels"][:, 0] = 5
    assert num_targets(batch) == 10


def test_unequal_microbatches_give_the_gradient_of_one_batch(model):
    model.eval()
    parts = [batch_of(7, 7, seed=1), batch_of(1, 2, seed=2), batch_of(5, 0, seed=3)]
    whole = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    loss(model, whole).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    weights = shares([num_targets(part) for part in parts])
    for part, weight in zip(parts, weights, strict=True):
        (loss(model, part) * weight).backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        # The sums are only ordered differently: a few dozen roundings in float32. The mean of the
        # microbatches' means would be off by a tenth and more.
        scale = gradient.abs().max().item()
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=50 * EPSILON * scale)
    assert weights == [14 / 22, 3 / 22, 5 / 22]


def test_shares_over_processes_average_to_the_sum():
    mine, theirs = [3, 1], [4, 0]
    a = shares(mine, total=8, world=2)
    b = shares(theirs, total=8, world=2)
    assert [(x + y) / 2 for x, y in zip(a, b, strict=True)] == [7 / 8, 1 / 8]
    assert (sum(a) + sum(b)) / 2 == 1


def test_update_without_a_target():
    with pytest.raises(DataError, match="no target to learn from"):
        shares([0, 0])


def test_evaluation_sums_nats_and_targets(model):
    batches = [batch_of(7, 3, seed=1), batch_of(1, seed=2), batch_of(0, seed=3)]
    found = evaluate(model, batches)
    model.eval()
    with torch.no_grad():
        expected = sum(nats_ref(model, batch) for batch in batches)
    assert found.targets == 11
    assert found.nats == pytest.approx(expected, rel=1e-6)
    assert found.loss == found.nats / 11


def test_evaluation_leaves_the_model_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = True
    modes = [module.training for module in model.modules()]
    first = evaluate(model, [batch_of(7)])
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is True
    assert all(p.grad is None for p in model.parameters())
    assert evaluate(model, [batch_of(7)]) == first  # dropout was off


def test_evaluation_keeps_no_key_value_cache(model):
    seen = []
    model.register_forward_hook(lambda _m, _a, out: seen.append(out.past_key_values))
    evaluate(model, [batch_of(7)])
    assert seen == [None]


def test_evaluation_that_fails_still_puts_the_mode_back(model):
    model.train()
    with pytest.raises(IndexError):
        evaluate(model, [{"input_ids": torch.full((1, 8), V), "labels": torch.ones(1, 8).long()}])
    assert all(module.training for module in model.modules())
    assert model.config.use_cache


def test_any_module_with_a_loss_will_do():
    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(V, V))

        def forward(self, input_ids, labels):
            logits = self.table[input_ids[:, :-1]]
            return SimpleNamespace(loss=functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten()))  # fmt: skip

    found = evaluate(Bigram(), [batch_of(7, 2)])
    assert found.nats == pytest.approx(9 * math.log(V), rel=1e-6)


def test_bits_per_byte_of_held_out_text(model, texts, tokenizer, tmp_path):
    from shoestring.data import encode, open_source

    corpus = encode(open_source(texts), tokenizer, cache=tmp_path)
    model.resize_token_embeddings(len(tokenizer))
    found = evaluate(model, held_out_batches(corpus, length=32, batch=16))
    assert found.targets == corpus.num_tokens - 1
    assert found.bits_per_byte(corpus.num_bytes) == pytest.approx(
        found.loss * found.targets / math.log(2) / corpus.num_bytes
    )
    with pytest.raises(DataError, match="bits per byte of 0 bytes"):
        found.bits_per_byte(0)


def test_evaluation_of_nothing_is_not_a_number():
    assert math.isnan(Evaluation(0.0, 0).loss)
