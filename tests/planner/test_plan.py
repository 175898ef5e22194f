"""Plans of small models: within budget, monotone, exact, printable, savable, refusable."""

import json

import pytest
import torch
from benchmarks.planner.models import PlainGPT, llama, llama_batch, plain_batch, plain_loss

from shoestring.errors import ConfigError, OutOfBudget, StackError
from shoestring.meter import allocator_peak
from shoestring.planner import Plan, plan, plan_config, planner
from shoestring.planner.changes import _allowing
from shoestring.stack import Span, Stack


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def small():
    return PlainGPT(depth=3, width=32, heads=2, vocabulary=64)


def small_batch():
    return plain_batch(4, 64, 64)


@pytest.fixture(scope="module")
def plain():
    """Plans of one small model for any budget, with times."""
    torch.manual_seed(0)
    model, batch = small(), small_batch()
    return model, batch, planner(model, batch, loss=plain_loss, allow=["keep", "recompute"])


@pytest.fixture(scope="module")
def hugging_face():
    torch.manual_seed(0)
    model, batch = llama(depth=3, width=32, vocabulary=64), llama_batch(2, 32, 64)
    return model, batch, planner(model, batch, seconds=False, allow=["keep", "recompute"])


def budgets(plans, count):
    low, high = plans.smallest_bytes, plans.planner.curve[-1].peak_bytes + 4096
    return [low + (high - low) * k // (count - 1) for k in range(count)]


def stepper(model, optimizer, compute):
    def step():
        compute().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def gradients(model, compute):
    model.zero_grad()
    compute().backward()
    return [p.grad for p in model.parameters()]


def test_every_budget_is_kept_and_seconds_fall_as_it_grows(plain):
    model, batch, plans = plain
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    expected = gradients(model, lambda: plain_loss(model, batch))
    seconds, peaks = [], []
    for budget in budgets(plans, 5):
        chosen = plans(budget)
        chosen.apply(model)
        found = gradients(model, lambda: plain_loss(model, batch))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        model.zero_grad()
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        checked = chosen.verify(stepper(model, optimizer, lambda: plain_loss(model, batch)))
        model.load_state_dict(kept)
        chosen.restore(model)
        assert checked.measured <= budget
        assert 0 <= checked.error <= 0.03
        seconds.append(chosen.step_seconds)
        peaks.append(checked.measured)
    assert seconds == sorted(seconds, reverse=True)
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


def test_a_llama_keeps_its_budget_at_both_ends(hugging_face):
    model, batch, plans = hugging_face
    expected = gradients(model, lambda: model(**batch).loss)
    for budget in (plans.smallest_bytes, plans.planner.curve[-1].peak_bytes + 4096):
        chosen = plans(budget)
        assert chosen.step_seconds is None
        chosen.apply(model)
        found = gradients(model, lambda: model(**batch).loss)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        model.zero_grad()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, lr=0.0)
        checked = chosen.verify(stepper(model, optimizer, lambda: model(**batch).loss))
        chosen.restore(model)
        assert checked.measured <= budget
        assert 0 <= checked.error <= 0.03


def test_the_last_block_is_not_run_again_for_nothing():
    """With gradients that appear on the way, running the last block again saves nothing where
    head and loss decide (column B of the G4 table)."""
    model, batch = PlainGPT(), plain_batch()
    only = {"allow": ["recompute"], "seconds": False}  # offload gets below head and loss
    plans = planner(model, batch, loss=plain_loss, optimizer=sgd, **only)
    last = plans(plans.smallest_bytes).spans[-1]
    assert (last.method, last.stop) == ("keep", 4)


def test_json_gives_the_same_plan_back(plain):
    chosen = plain[2](plain[2].smallest_bytes)
    again = Plan.from_json(chosen.to_json())
    assert again == chosen
    assert again.to_json() == chosen.to_json()
    json.dumps(chosen.methods)


def test_plan_of_before_there_were_histories_still_loads(plain):
    chosen = plain[2](plain[2].smallest_bytes)
    assert chosen.history["peak_bytes"] <= chosen.peak_bytes
    text = chosen.to_json(history=False)
    assert "history" not in text
    older = Plan.from_json(text)
    assert older.history is None
    assert older.to_json() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is not a plan"),
        ("[]", "a plan of format 'list' cannot be read"),
        ('{"format": 99}', "a plan of format 99 cannot be read; expected format 1"),
        ('{"format": 1}', "this plan lacks .*model"),
    ],
)
def test_json_that_is_no_plan_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Plan.from_json(text)


def test_the_table_has_the_usual_schemes_and_says_what_fits(plain):
    _, _, plans = plain
    table = plans(plans.smallest_bytes).table()
    rows = {row["name"]: row for row in table.data}
    assert list(rows) == [
        "keep everything", "recompute every block", "nested, segments of 2", "this plan"
    ]  # fmt: skip
    assert not rows["keep everything"]["fits"]
    assert rows["this plan"]["fits"]
    assert rows["keep everything"]["seconds"] <= rows["this plan"]["seconds"]
    assert "does not fit" in str(table)


def test_below_the_smallest_the_error_says_what_would_do():
    model, batch = small(), small_batch()
    plans = planner(model, batch, loss=plain_loss, seconds=False)
    budget = int(plans.smallest_bytes * 0.9)
    with pytest.raises(OutOfBudget, match="nothing fits into") as caught:
        plans(budget)
    error = caught.value
    assert error.exit_code == 3
    assert error.smallest_bytes == plans.smallest_bytes
    assert str(plans.smallest_bytes) in str(error)
    assert error.instant in str(error)
    assert len(error.changes) == 3
    assert plans(error.smallest_bytes).peak_bytes <= error.smallest_bytes
    assert any("batch size 4 -> 2" in c for c in error.changes)
    half = planner(model, plain_batch(2, 64, 64), loss=plain_loss, seconds=False).planner
    assert half.smallest.peak_bytes <= budget


def test_the_model_is_left_as_it_was(plain):
    model, batch = small(), small_batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    plan(model, batch, budget="1 GiB", loss=plain_loss)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(Stack.of(model).executors)


def test_planning_with_times_stays_inside_the_budget():
    model, batch = small(), small_batch()
    # With offload the smallest plan is smaller than one block kept, which is timed, too.
    given = {"loss": plain_loss, "allow": ["recompute"]}
    smallest = planner(model, batch, seconds=False, **given).smallest_bytes
    weights = sum(p.nbytes for p in model.parameters())
    taken = allocator_peak(lambda: plan(model, batch, budget=smallest, **given))
    assert weights + taken <= smallest


def test_a_plan_for_another_depth_is_refused(plain):
    chosen = plain[2]("1 GiB")
    with pytest.raises(StackError, match="this plan is for 3 blocks of PlainGPT, PlainGPT has 2"):
        chosen.apply(PlainGPT(depth=2, width=32, heads=2, vocabulary=64))


def test_restoring_what_was_not_applied_is_refused(plain):
    with pytest.raises(StackError, match="not applied"):
        plain[2]("1 GiB").restore(small())


def test_applying_again_replaces_the_plan(plain):
    _, _, plans = plain
    model = small()
    plans(plans.smallest_bytes).apply(model)
    plans("1 GiB").apply(model)
    assert {type(e).__name__ for e in Stack.of(model).executors} == {"KeepExecutor"}


@pytest.mark.parametrize("allow", ["exakt", ["keep", "recompte"]])
def test_an_unknown_fidelity_or_method_is_refused(allow):
    with pytest.raises(ConfigError, match=r"neither a fidelity nor a method.*Did you mean"):
        plan(small(), small_batch(), budget="1 GiB", loss=plain_loss, allow=allow)


def test_only_listed_methods_are_used():
    model, batch = small(), small_batch()
    plans = planner(model, batch, loss=plain_loss, allow=["keep"], seconds=False)
    assert [c.spans for c in plans.planner.curve] == [(Span(0, 3, "keep"),)]
    first, _ = next(_allowing(plans.planner))
    assert first.startswith("allow 'bitwise' methods")


def test_an_optimizer_object_plans_as_its_factory():
    model, batch = small(), small_batch()
    made = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)

    def floor(optimizer):
        plans = planner(model, batch, loss=plain_loss, optimizer=optimizer)
        return plans.planner.costs.variant(()).floor

    assert floor(made) == floor(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True))
    assert floor(made) > floor(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True))


def test_something_that_is_no_optimizer_is_refused():
    with pytest.raises(ConfigError, match="optimizer is a str"):
        plan(small(), small_batch(), budget="1 GiB", loss=plain_loss, optimizer="adam")


def test_accumulated_gradients_are_in_the_promise():
    model, batch = small(), small_batch()
    chosen = planner(model, batch, loss=plain_loss, accumulate=2, seconds=False)
    mine = chosen(chosen.smallest_bytes)
    mine.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        for _ in range(2):
            (plain_loss(model, batch) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    checked = mine.verify(step)
    assert checked.measured <= mine.peak_bytes
    assert checked.error <= 0.03


def test_a_config_file_alone_is_enough(tmp_path):
    config = llama(depth=2, width=32, vocabulary=64).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    chosen = plan_config(tmp_path, batch_size=2, sequence_length=32, budget="1 GiB")
    assert chosen.model == "LlamaForCausalLM"
    assert chosen.blocks == 2
    assert chosen.step_seconds > 0


def test_a_config_needs_a_positive_batch(tmp_path):
    with pytest.raises(ConfigError, match="batch_size = 0; expected a positive integer"):
        plan_config(tmp_path, batch_size=0, sequence_length=8, budget=1)
