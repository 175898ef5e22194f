"""The largest batch and the longest context: exact, by few simulations, kept by measured steps."""

from types import SimpleNamespace

import pytest
import torch
from benchmarks.planner.models import PlainGPT, plain_batch, plain_loss
from hypothesis import given
from hypothesis import strategies as st

from shoestring.errors import ConfigError, OutOfBudget
from shoestring.planner import largest, planner
from shoestring.planner.adapters import lora

WIDTH, VOCABULARY = 32, 64


def plans_of(rows=4, tokens=32):
    torch.manual_seed(0)
    model = PlainGPT(depth=2, width=WIDTH, heads=2, vocabulary=VOCABULARY)
    batch = plain_batch(rows, tokens, VOCABULARY)
    return planner(model, batch, loss=plain_loss, seconds=False, allow=["keep", "recompute"])


def measured(rows, tokens):
    """Peak of two real steps with the smallest plan of that size."""
    plans = plans_of(rows, tokens)
    model, batch = plans.planner.step.model, plans.planner.step.batch
    chosen = plans(plans.smallest_bytes)
    chosen.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        plain_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return chosen.verify(step).measured


@pytest.mark.parametrize("budget", [1 << 20, 3 << 20])
def test_the_largest_batch_fits_and_one_row_more_does_not_in_real_steps(budget):
    found = largest(lambda n: plans_of(rows=n), budget, start=2)
    assert measured(found.size, 32) == found.peak_bytes <= budget
    assert measured(found.size + 1, 32) == found.next_bytes > budget
    assert len(found.simulated) <= 8


def test_the_longest_context_fits_and_one_token_more_does_not_in_real_steps():
    budget = 2 << 20
    found = largest(lambda n: plans_of(tokens=n), budget, start=200, least=2)
    assert measured(4, found.size) == found.peak_bytes <= budget
    assert measured(4, found.size + 1) == found.next_bytes > budget


def test_the_answer_is_the_same_wherever_the_search_starts():
    found = {largest(lambda n: plans_of(rows=n), 1 << 20, start=s).size for s in (1, 5, 40)}
    assert len(found) == 1


def test_the_models_own_limit_ends_the_search():
    found = largest(lambda n: plans_of(tokens=n), 1 << 30, start=8, most=64)
    assert (found.size, found.next_bytes) == (64, None)


def test_a_budget_without_any_size_is_an_error_that_says_what_would_do():
    with pytest.raises(OutOfBudget, match="nothing fits into") as caught:
        largest(lambda n: plans_of(rows=n), 1000, start=4)
    assert caught.value.smallest_bytes == plans_of(rows=1).smallest_bytes


def test_a_search_from_outside_its_range_is_refused():
    with pytest.raises(ConfigError, match="cannot start at 9"):
        largest(lambda n: plans_of(rows=n), 1 << 20, start=9, most=8)


def stub(needs, looked):
    """Plans of a size that needs `needs(size)` bytes."""

    def plans(size):
        looked.append(size)
        return SimpleNamespace(
            smallest_bytes=needs(size), planner=SimpleNamespace(choose=lambda budget: None)
        )

    return plans


@given(
    st.integers(0, 10_000), st.lists(st.integers(1, 300), min_size=1, max_size=5),
    st.integers(1, 400), st.integers(1, 5_000),
)  # fmt: skip
def test_any_convex_need_is_answered_exactly(fixed, slopes, start, size):
    """A maximum of lines, as peaks are, with the size that is wanted anywhere."""
    kinks = [(100 * i * i, slope) for i, slope in enumerate(slopes)]

    def needs(n):
        return fixed + max(slope * max(0, n - kink) + n for kink, slope in kinks)

    looked = []
    found = largest(stub(needs, looked), needs(size), start=start)
    assert found.size == size
    assert found.next_bytes == needs(size + 1)
    assert len(looked) <= 40


@given(st.lists(st.integers(1, 1000), min_size=64, max_size=64), st.integers(1, 62))
def test_any_rising_need_is_answered_exactly(steps, size):
    total = [sum(steps[: n + 1]) for n in range(64)]

    def needs(n):
        return total[n] if n < 64 else total[-1] * n

    found = largest(stub(needs, []), needs(size), start=1)
    assert found.size == size


@pytest.fixture
def config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_lora_is_planned_as_a_real_one_measures(config):
    """Weights that are frozen have neither gradients nor states."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    from shoestring.planner import planner_for_config

    plans = planner_for_config(
        config, batch_size=2, sequence_length=16, seconds=False, build=lora(config, 4)
    )
    chosen = plans(1 << 30)
    torch.manual_seed(0)
    real = peft.get_peft_model(
        LlamaForCausalLM(config),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    twin = plans.planner.base.model
    assert {n: (p.shape, p.requires_grad) for n, p in real.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in twin.named_parameters()
    }
    chosen.apply(real)
    optimizer = torch.optim.AdamW([p for p in real.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, 64, (2, 16))
    mask = torch.ones_like(ids)
    mask[:, -1] = 0

    def step():
        real(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    checked = chosen.verify(step)
    assert 0 <= checked.error <= 0.03


def test_a_lora_of_no_rank_or_without_peft_is_refused(config, monkeypatch):
    with pytest.raises(ConfigError, match="trains nothing"):
        lora(config, 0)
    monkeypatch.setattr("shoestring.planner.adapters.has_peft", lambda: False)
    with pytest.raises(ConfigError, match="peft, which is not installed"):
        lora(config, 4)
