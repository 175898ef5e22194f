"""What runs without gradients: evaluation and saving are in the promise, and what is not in it is
told before it allocates."""

import copy
import functools
import json
import logging

import pytest
import torch
from benchmarks.planner.models import llama, llama_batch
from torch import nn

from shoestring.errors import ConfigError, OutOfBudget
from shoestring.meter import Meter
from shoestring.models.gpt import GPT, GPTConfig
from shoestring.planner import Plan, plan, planner
from shoestring.planner.evaluation import call_bytes
from shoestring.planner.in_place import put_again

BATCH = llama_batch(2, 32, 512)
EVALUATED = llama_batch(16, 64, 512)


def big():
    torch.manual_seed(0)
    return llama(depth=3, width=64, vocabulary=512)


def reversible():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=512, hidden_size=64, num_hidden_layers=3, rule="leapfrog"))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def evaluated(model, batch=EVALUATED):
    model.eval()
    with torch.no_grad():
        loss = model(**batch).loss
    model.train()
    return loss


def measured(chosen, build, between=evaluated):
    """Peak of two steps with `between` after each."""
    model = chosen.build(build)
    chosen.apply(model, larger="error")
    optimizer = chosen.optimizer(model)
    model.train()
    with Meter(model, optimizer) as meter:
        meter.tracker.assign("other", BATCH.values())
        for _ in range(2):
            chosen.backward(model, BATCH)
            optimizer.step()
            optimizer.zero_grad()
            between(model)
    chosen.restore(model)
    return meter


@pytest.mark.parametrize("build", [big, reversible])
@pytest.mark.parametrize(
    "allow", [["keep"], ["recompute", "reversible", "chunked_loss", "chunked_mlp"],
              ["stream_weights", "offload_optimizer", "fused_step", "microbatch"]],
)  # fmt: skip
def test_an_evaluation_is_in_the_promise_and_named_where_it_decides(build, allow):
    settings = {"optimizer": adamw, "allow": allow, "seconds": False}
    without = planner(build, BATCH, **settings)
    plans = planner(build, BATCH, evaluate=EVALUATED, **settings)
    chosen = plans(plans.smallest_bytes)
    assert chosen.instant == "evaluation"
    assert chosen.peak_bytes > without.smallest_bytes
    meter = measured(chosen, build)
    assert meter.peak_bytes <= chosen.peak_bytes <= 1.03 * meter.peak_bytes


def test_of_a_small_evaluation_only_the_batch_is_in_the_promise():
    settings = {"optimizer": adamw, "budget": "1GiB", "seconds": False}
    small = llama_batch(1, 8, 512)
    with_it = plan(big(), BATCH, evaluate=small, **settings)
    without = plan(big(), BATCH, **settings)
    waiting = sum(tensor.nbytes for tensor in small.values())
    assert with_it.peak_bytes == without.peak_bytes + waiting
    assert with_it.instant == without.instant != "evaluation"


def test_a_held_out_batch_that_stays_is_counted_while_training_decides():
    held_out = llama_batch(2, 32, 512)
    chosen = plan(
        big, BATCH, evaluate=held_out, optimizer=adamw, budget="1GiB", seconds=False,
        allow=["keep"],
    )  # fmt: skip
    assert chosen.instant != "evaluation"
    meter = measured(chosen, big, lambda model: evaluated(model, held_out))
    assert meter.peak_bytes <= chosen.peak_bytes <= 1.03 * meter.peak_bytes


def test_an_evaluation_may_be_a_function_of_the_model():
    def evaluate(model):
        return model(input_ids=torch.zeros(16, 64, dtype=torch.long))

    chosen = plan(
        big, BATCH, evaluate=evaluate, optimizer=adamw, budget="1GiB", seconds=False,
        allow=["keep"],
    )  # fmt: skip
    assert chosen.instant == "evaluation"

    def between(model):
        model.eval()
        with torch.no_grad():
            evaluate(model)
        model.train()

    meter = measured(chosen, big, between)
    assert meter.peak_bytes <= chosen.peak_bytes <= 1.03 * meter.peak_bytes


def test_what_does_not_fit_for_its_evaluation_says_so_and_what_would_do():
    plans = planner(big(), BATCH, evaluate=EVALUATED, optimizer=adamw, allow=["keep"],
                    seconds=False)  # fmt: skip
    with pytest.raises(OutOfBudget, match="decided in the evaluation") as caught:
        plans(int(0.8 * plans.smallest_bytes))
    assert caught.value.instant == "evaluation"
    assert any("evaluation batch size 16 ->" in change for change in caught.value.changes)


def test_what_is_no_evaluation_is_refused():
    with pytest.raises(ConfigError, match="evaluate is a int; expected a batch"):
        plan(big(), BATCH, evaluate=3, budget="1GiB")


def test_the_copy_of_a_background_save_is_in_the_promise():
    settings = {"optimizer": adamw, "budget": "1GiB", "seconds": False, "allow": ["keep"]}
    without = plan(big(), BATCH, **settings)
    chosen = plan(big(), BATCH, background_save=True, **settings)
    model = big()
    chosen.apply(model)
    optimizer = chosen.optimizer(model)
    model.train()
    copies = []
    with Meter(model, optimizer) as meter:
        meter.tracker.assign("other", BATCH.values())
        for _ in range(2):
            chosen.backward(model, BATCH)
            optimizer.step()
            optimizer.zero_grad()
            copies = []  # the last one is written
            states = [v for s in optimizer.state.values() for v in s.values()]
            copies = [each.detach().clone() for each in [*model.state_dict().values(), *states]]
            copies.append(torch.get_rng_state())
    assert chosen.peak_bytes - without.peak_bytes == sum(each.nbytes for each in copies)
    assert meter.peak_bytes <= chosen.peak_bytes <= 1.03 * meter.peak_bytes
    value = json.loads(chosen.to_json())
    assert Plan.from_json(chosen.to_json()).made_for.beside == chosen.made_for.beside > 0
    del value["made_for"]["beside"]
    assert Plan.from_json(json.dumps(value)).made_for.beside == 0


@pytest.fixture(scope="module")
def chosen():
    plans = planner(big, BATCH, optimizer=adamw, allow=["recompute"], seconds=False)
    return plans(plans.smallest_bytes)


def forward(model, rows, tokens):
    with torch.no_grad():
        model(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)


def test_an_evaluation_over_the_budget_is_told_once_and_a_larger_one_again(chosen, caplog):
    model = big()
    chosen.apply(model)
    with caplog.at_level(logging.WARNING, logger="shoestring"):
        for _ in range(2):
            forward(model, 2, 32)
            evaluated(model, llama_batch(2, 32, 512))
        assert not caplog.records
        for _ in range(2):
            forward(model, 64, 64)
        forward(model, 32, 64)
    (told,) = [r.message for r in caplog.records]
    assert "without gradients on input_ids of 64 x 64 will need" in told
    assert "at most the budget of" in told
    assert "evaluate=" in told
    with caplog.at_level(logging.WARNING, logger="shoestring"):
        forward(model, 64, 65)
    assert len(caplog.records) == 2


def test_as_an_error_it_comes_each_time_before_anything_is_allocated(chosen):
    model = big()
    chosen.apply(model, larger="error")
    ids = torch.zeros(64, 64, dtype=torch.long)
    for it in (model, copy.deepcopy(model)):
        for _ in range(2):
            with (
                Meter(it) as meter, torch.inference_mode(),
                pytest.raises(OutOfBudget, match="will need") as caught,
            ):  # fmt: skip
                it(input_ids=ids)
            weights = sum(t.nbytes for t in [*it.parameters(), *it.buffers()])
            assert meter.peak_bytes <= weights + ids.nbytes
        assert caught.value.instant == "evaluation"
        assert caught.value.smallest_bytes > chosen.budget_bytes
    chosen.apply(model, larger="ignore")
    forward(model, 64, 64)


@pytest.mark.parametrize("build", [big, reversible])
def test_a_call_is_simulated_as_it_measures(build):
    model = build().eval()
    with torch.no_grad():
        with Meter(model) as meter:
            ids = torch.zeros(4, 32, dtype=torch.long)
            output = model(input_ids=ids)
        first = call_bytes(model, (), {"input_ids": ids})
        assert meter.peak_bytes <= first <= 1.03 * meter.peak_bytes
        cache = output.past_key_values
        del output
        before = cache.get_seq_length()
        given = {"input_ids": ids[:, :1], "past_key_values": cache}
        predicted = call_bytes(model, (), given)
        assert cache.get_seq_length() == before  # nothing was put into it
        with Meter(model) as meter:
            model(**given)
    assert meter.peak_bytes <= predicted <= 1.03 * meter.peak_bytes


def test_a_generation_whose_cache_outgrows_the_budget_is_told(caplog, monkeypatch):
    simulated = []

    def counted(*call):
        simulated.append(1)
        return call_bytes(*call)

    monkeypatch.setattr("shoestring.planner.made_for.call_bytes", counted)
    batch = llama_batch(1, 8, 512)
    plans = planner(big, batch, optimizer=adamw, allow=["recompute"], seconds=False)
    chosen = plans(plans.smallest_bytes)
    model = big().eval()
    chosen.apply(model)
    ids = torch.ones(8, 8, dtype=torch.long)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with caplog.at_level(logging.WARNING, logger="shoestring"):
        model.generate(ids, max_new_tokens=4, **settings)
        assert not caplog.records
        before = len(simulated)
        with Meter(model) as meter:
            model.generate(ids, max_new_tokens=240, **settings)
    room = chosen.budget_bytes - chosen.by_category["optimizer"]
    assert meter.peak_bytes > room  # it is true
    (told,) = [r.message for r in caplog.records]
    assert "will need" in told
    assert len(simulated) - before < 20  # of 240 steps


def test_what_cannot_be_simulated_runs_without_a_word(chosen, caplog):
    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x if self.training or x.sum() > 0 else -x

    model = Decides()
    made = plan(
        model, {"x": torch.randn(4, 8)}, loss=lambda m, b: m(b["x"]).sum(), optimizer=adamw,
        budget="1GiB", seconds=False,
    )  # fmt: skip
    made.apply(model, larger="error")
    model.eval()
    with caplog.at_level(logging.WARNING, logger="shoestring"), torch.no_grad():
        for _ in range(2):
            model(torch.randn(400, 8))
    assert not caplog.records


def test_weights_that_a_plan_has_moved_are_simulated_where_they_are():
    plans = planner(big, BATCH, optimizer=adamw, seconds=False, allow=[
        "stream_weights", "offload_optimizer", "fused_step", "recompute"])  # fmt: skip
    chosen = plans(plans.smallest_bytes)
    assert {"stream_weights"} <= {each["method"] for each in chosen.methods}
    model = chosen.build(big)
    chosen.apply(model, larger="error")
    forward(model, 1, 8)
    with torch.no_grad(), Meter(model) as meter:
        model(input_ids=BATCH["input_ids"])
    again = functools.partial(put_again, chosen.patches, chosen.spans)
    predicted = call_bytes(model, (), {"input_ids": BATCH["input_ids"]}, again)
    assert meter.peak_bytes <= predicted <= 1.03 * meter.peak_bytes
    with pytest.raises(OutOfBudget):
        forward(model, 64, 64)
    chosen.restore(model)
