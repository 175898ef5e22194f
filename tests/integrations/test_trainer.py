"""Plans in Hugging Face's Trainer: losses as without, peaks as promised, no trace of a look."""

import dataclasses
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from integrations.trainers import LONGEST, Lines, Recording, losses, model, padded, trainer
from shoestring.errors import ConfigError, DataError, OutOfBudget, StackError
from shoestring.integrations import PlanCallback, evaluation_bytes, measured, plan_trainer
from shoestring.integrations.looking import largest_batch
from shoestring.meter import Meter, active_tracker
from shoestring.stack import Stack

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "not clipped": {"max_grad_norm": 0.0},
    "label smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "adafactor": {"optim": "adafactor"},
    "several groups": {"optim": "adamw_torch", "weight_decay": 0.1},
}


def roomy(of: Any) -> int:
    """The peak of a trainer's run when everything is kept."""
    return plan_trainer(of, budget="1GiB", allow=["keep"], seconds=False).peak_bytes


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_losses_are_equal_and_the_budget_is_kept(tmp_path, settings):
    expected = losses(trainer(tmp_path, data=Lines(equal=True), **settings))
    budget = roomy(trainer(tmp_path, data=Lines(equal=True), **settings)) * 85 // 100
    planned = trainer(tmp_path, data=Lines(equal=True), **settings)
    chosen = plan_trainer(planned, budget=budget, allow=["recompute"], seconds=False)
    assert any(span.method == "recompute" for span in chosen.spans)
    assert torch.equal(losses(planned), expected)
    assert len(expected) >= 20
    found = measured(planned)
    assert found.measured <= budget
    assert 0 <= found.error <= 0.03


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}])
def test_methods_that_reorder_sums_stay_within_their_bound(tmp_path, settings):
    expected = losses(trainer(tmp_path, **settings))
    budget = roomy(trainer(tmp_path, **settings)) * 95 // 100
    planned = trainer(tmp_path, **settings)
    chosen = plan_trainer(planned, budget=budget, allow=["chunked_loss"], seconds=False)
    assert [way.method for way in chosen.patches] == ["chunked_loss"]
    bound = 32 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(losses(planned), expected, rtol=bound, atol=0)


@pytest.mark.parametrize("share", [40, 30])
def test_methods_of_the_optimizer_change_no_loss(tmp_path, share):
    settings = {"max_grad_norm": 0.0, "optim": "adamw_torch", "data": Lines(equal=True)}
    expected = losses(trainer(tmp_path, **settings))
    budget = roomy(trainer(tmp_path, **settings)) * share // 100
    planned = trainer(tmp_path, **settings)
    allow = ["fused_step", "offload_optimizer", "recompute"]
    chosen = plan_trainer(planned, budget=budget, allow=allow, seconds=False)
    assert any(way.applies_to == "optimizer" for way in chosen.patches)
    assert torch.equal(losses(planned), expected)
    assert measured(planned).measured <= budget
    assert 0 <= measured(planned).error <= 0.03


def test_the_optimizer_has_the_trainers_groups_and_its_schedule(tmp_path):
    settings = {"weight_decay": 0.1, "warmup_steps": 5, "data": Lines(equal=True)}
    plain = trainer(tmp_path, **settings)
    expected = losses(plain)
    planned = trainer(tmp_path, **settings)
    budget = roomy(trainer(tmp_path, **settings)) // 2
    allow = ["offload_optimizer", "recompute"]
    chosen = plan_trainer(planned, budget=budget, allow=allow, seconds=False)
    assert chosen.patches

    def groups(of: Any) -> list[tuple[float, int]]:
        return [(g["weight_decay"], len(g["params"])) for g in of.optimizer.param_groups]

    assert groups(planned) == groups(plain)
    assert len({decay for decay, _ in groups(plain)}) == 2
    assert torch.equal(losses(planned), expected)
    assert plain.lr_scheduler.get_last_lr() == planned.lr_scheduler.get_last_lr()


# ---- looking at the data -----------------------------------------------------------------------


def test_looking_draws_nothing_and_moves_nothing_on(tmp_path):
    expected = losses(trainer(tmp_path, data=Lines(draws=True)))
    data = Lines(draws=True)
    planned = trainer(tmp_path, data=data)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    plan_trainer(planned, budget="1GiB", allow="bitwise")
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    assert states[:2] == after[:2]
    assert torch.equal(states[2], after[2])
    assert data.looks == 0
    assert not planned.accelerator._dataloaders
    assert torch.equal(losses(planned), expected)


class Shaking:
    """A collator with random numbers of its own, first made when first used."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(7)
        batch = padded(examples)
        noise = torch.rand(batch["labels"].shape, generator=self.generator)
        return {**batch, "labels": batch["labels"].masked_fill(noise < 0.1, -100)}


def test_a_collator_with_its_own_random_numbers_draws_the_same_ones(tmp_path):
    def make() -> Any:
        made = trainer(tmp_path, max_steps=3)
        made.data_collator = Shaking()
        return made

    expected = losses(make())
    planned = make()
    plan_trainer(planned, budget="1GiB", allow="bitwise", seconds=False)
    assert torch.equal(losses(planned), expected)


def test_the_largest_batch_is_that_of_the_longest_examples(tmp_path):
    loader = trainer(tmp_path).get_train_dataloader()
    assert largest_batch(loader)["input_ids"].shape == (4, LONGEST)
    few = trainer(tmp_path, data=Lines(3)).get_train_dataloader()
    assert largest_batch(few)["input_ids"].shape == (3, LONGEST)


def test_every_column_is_as_long_as_it_gets():
    rows = [{"a": [0] * n, "b": [0] * (9 - n)} for n in range(1, 9)]

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = {k: max(len(e[k]) for e in examples) for k in "ab"}
        return {k: torch.zeros(len(examples), n) for k, n in longest.items()}

    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collate)
    batch = largest_batch(loader)
    assert {k: tuple(v.shape) for k, v in batch.items()} == {"a": (2, 8), "b": (2, 8)}


def test_lengths_are_read_from_columns_where_there_are_some():
    datasets = pytest.importorskip("datasets")
    from shoestring.integrations.looking import _lengths, _lengths_in_arrow

    rows = [{"ids": [1] * n, "label": n, "text": "ab"} for n in (3, 0, 5)]
    data = datasets.Dataset.from_list(rows)
    assert _lengths(data) == {"ids": [3, 0, 5], "label": [1, 1, 1], "text": [1, 1, 1]}
    assert _lengths(data.select([2, 0]))["ids"] == [5, 3]
    assert _lengths(data.with_transform(lambda x: {"ids": [[1, 2]] * len(x["ids"])})) == {
        "ids": [2, 2, 2]
    }
    assert _lengths_in_arrow(rows) is None


def test_data_without_a_largest_batch_has_to_be_told(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield {"input_ids": [0] * 20}

    with pytest.raises(ConfigError, match=r"from front to back.*batch="):
        plan_trainer(trainer(tmp_path, data=Endless()), budget="1GiB")
    planned = trainer(tmp_path, data=Endless())
    batch = padded([{"input_ids": [0] * 20}] * 4)
    plan_trainer(planned, budget="1GiB", batch=batch, allow="bitwise", seconds=False)
    planned.train()
    assert 0 <= measured(planned).error <= 0.03
    with pytest.raises(ConfigError, match="put together by Own"):
        largest_batch(torch.utils.data.DataLoader(Lines(), batch_sampler=Own([[0], [1, 2]])))
    with pytest.raises(DataError, match="no training example"):
        largest_batch(torch.utils.data.DataLoader([], batch_size=2))


class Own(list):
    """A batch sampler of somebody's own."""


# ---- while it trains -----------------------------------------------------------------------------


def test_what_was_measured_is_in_the_log(tmp_path, caplog):
    planned = trainer(tmp_path, data=Lines(equal=True))
    with caplog.at_level(logging.INFO, logger="shoestring"):
        chosen = plan_trainer(planned, budget="1GiB", allow="bitwise", seconds=False)
        assert measured(planned) is None
        planned.train()
    entry = next(e for e in planned.state.log_history if "measured_peak_bytes" in e)
    assert entry["step"] == 2
    assert entry["planned_peak_bytes"] == chosen.peak_bytes
    assert entry["measured_peak_bytes"] == measured(planned).measured
    assert "peak of the first steps: predicted" in caplog.text
    assert "Plan for LlamaForCausalLM" in caplog.text


def test_more_than_promised_is_a_warning_that_names_what(tmp_path, caplog):
    planned = trainer(tmp_path, data=Lines(equal=True), max_steps=3)
    chosen = plan_trainer(planned, budget="1GiB", allow="bitwise", seconds=False)
    callback = planned.callback_handler.callbacks[-1]
    less = {**chosen.by_category, "saved": 1000}
    callback.plan = dataclasses.replace(chosen, peak_bytes=10_000, by_category=less)
    planned.train()
    assert "the first steps took more than promised" in caplog.text
    assert "saved +" in caplog.text
    assert "weights +" not in caplog.text


def test_training_that_fails_leaves_no_meter_on(tmp_path):
    class Failing(Recording):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, "losses", None):
                raise RuntimeError("of its own")
            return super().compute_loss(*args, **kwargs)

    planned = trainer(tmp_path, kind=Failing)
    plan_trainer(planned, budget="1GiB", allow="bitwise", seconds=False)
    with pytest.raises(RuntimeError, match="of its own"):
        planned.train()
    assert active_tracker() is None


def test_a_batch_longer_than_planned_is_told_before_its_step(tmp_path, caplog):
    short = padded([{"input_ids": [0] * (LONGEST // 2)}] * 4)
    planned = trainer(tmp_path)
    plan_trainer(
        planned, budget="1GiB", batch=short, allow="bitwise", seconds=False, larger="error"
    )
    with pytest.raises(
        OutOfBudget, match=f"larger than planned for; expected at most 4 x {LONGEST // 2}"
    ):
        planned.train()
    assert active_tracker() is None
    planned = trainer(tmp_path)
    plan_trainer(planned, budget="1GiB", batch=short, allow="bitwise", seconds=False)
    planned.train()
    assert "larger than planned for" in caplog.text


def test_a_planned_trainer_saves_and_resumes(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    expected = losses(trainer(tmp_path / "a", **settings))
    first = trainer(tmp_path / "b", **settings)
    budget = roomy(trainer(tmp_path / "c", **settings)) // 2
    plan_trainer(first, budget=budget, allow=["offload_optimizer", "recompute"], seconds=False)
    first.train()
    again = trainer(tmp_path / "b", of=model(), **settings)
    plan_trainer(again, budget="1GiB", allow=["recompute"], seconds=False)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    assert torch.equal(torch.stack(again.losses), expected[5:])


# ---- evaluation ----------------------------------------------------------------------------------


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("compute_metrics", [None, accuracy])
def test_the_peak_of_evaluation_is_told_and_kept(tmp_path, compute_metrics, caplog):
    data = Lines(24, equal=True)
    planned = trainer(
        tmp_path, data=Lines(equal=True), max_steps=2,
        settings={"eval_dataset": data, "compute_metrics": compute_metrics},
    )  # fmt: skip
    chosen = plan_trainer(planned, budget="1GiB", allow="bitwise", seconds=False)
    assert "evaluation" not in caplog.text
    predicted = evaluation_bytes(planned)
    planned.train()
    planned.model.zero_grad()
    with Meter(planned.model, planned.optimizer.optimizer) as meter:
        planned.evaluate()
    assert meter.peak_bytes <= predicted
    if compute_metrics is None:
        assert predicted <= meter.peak_bytes * 1.03
        assert predicted < chosen.peak_bytes
    else:
        assert predicted > 2 * 24 * LONGEST * 256 * 4  # logits of all examples, twice


def test_an_evaluation_that_does_not_fit_is_told_at_once(tmp_path, caplog):
    def make() -> Any:
        settings = {"eval_dataset": Lines(200), "compute_metrics": accuracy}
        return trainer(tmp_path, settings=settings, per_device_eval_batch_size=8)

    budget = 8_000_000
    plan_trainer(make(), budget=budget, allow="bitwise", seconds=False)
    assert "evaluation will need" in caplog.text
    assert "per_device_eval_batch_size (now 8) lower" in caplog.text
    assert "prediction_loss_only=True" in caplog.text
    with pytest.raises(OutOfBudget, match="evaluation will need") as caught:
        plan_trainer(make(), budget=budget, allow="bitwise", seconds=False, evaluation="error")
    assert caught.value.instant == "evaluation"
    caplog.clear()
    plan_trainer(make(), budget=budget, allow="bitwise", seconds=False, evaluation="ignore")
    assert "evaluation" not in caplog.text


def test_several_evaluation_sets_count_as_their_largest(tmp_path):
    sets = {"short": Lines(4), "long": Lines(8, equal=True)}
    of = trainer(tmp_path, settings={"eval_dataset": sets})
    both = evaluation_bytes(of)
    of.eval_dataset = sets["long"]
    assert evaluation_bytes(of) == both
    of.eval_dataset = None
    assert evaluation_bytes(of) == 0


# ---- what does not go together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"gradient_checkpointing": True},
            "activation_checkpointing does not go .* twice",
        ),
        ({"torch_compile": True}, "Set torch_compile=False"),
        ({"auto_find_batch_size": True}, "Set auto_find_batch_size=False"),
        ({"use_liger_kernel": True}, "Apply Liger's kernels to the model first"),
    ],
)
def test_settings_that_do_not_go_with_a_plan_are_refused(tmp_path, settings, match):
    of = trainer(tmp_path)
    for name, value in settings.items():
        setattr(of.args, name, value)
    with pytest.raises(ConfigError, match=match):
        plan_trainer(of, budget="1GiB")
    assert of.optimizer is None
    callback = PlanCallback(budget="1GiB")
    with pytest.raises(ConfigError, match=match):
        callback.on_train_begin(of.args, of.state, of.control, model=of.model)


def test_several_devices_and_wrapped_models_are_refused(tmp_path):
    of = trainer(tmp_path)
    of.args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"more than one device \(2\) does not go"):
        plan_trainer(of, budget="1GiB")
    of = trainer(tmp_path)
    of.model_wrapped = torch.nn.DataParallel(of.model)
    with pytest.raises(StackError, match="wrapped in DataParallel"):
        plan_trainer(of, budget="1GiB")
    of = trainer(tmp_path)
    of.model_init = model
    with pytest.raises(ConfigError, match="model_init"):
        plan_trainer(of, budget="1GiB")
    of = trainer(tmp_path)
    for module in of.model.modules():
        module.gradient_checkpointing = True
    with pytest.raises(ConfigError, match="gradient_checkpointing_disable"):
        plan_trainer(of, budget="1GiB")


@pytest.mark.parametrize(
    ("allow", "settings", "match"),
    [
        (["fused_step"], {}, "set max_grad_norm=0"),
        (["fused_step"], {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}, "has to be 1"),
        ("microbatch", {}, "raise gradient_accumulation_steps"),
        (["chunked_loss"], {"label_smoothing_factor": 0.1}, "outside of the model"),
    ],
)
def test_a_method_that_is_asked_for_and_cannot_be_used_is_refused(tmp_path, allow, settings, match):
    with pytest.raises(ConfigError, match=match):
        plan_trainer(trainer(tmp_path, **settings), budget="1GiB", allow=allow)


def test_gradients_that_are_scaled_cannot_be_used_in_backward(tmp_path):
    of = trainer(tmp_path, max_grad_norm=0.0)
    of.args.fp16 = True
    with pytest.raises(ConfigError, match=r"still scaled \(fp16\); use bf16"):
        plan_trainer(of, budget="1GiB", allow=["fused_step"])


# ---- only a callback -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_a_callback_plans_when_training_begins(tmp_path, settings):
    settings = {"data": Lines(equal=True), **settings}
    expected = losses(trainer(tmp_path, **settings))
    budget = roomy(trainer(tmp_path, **settings)) * 85 // 100
    callback = PlanCallback(budget=budget, allow="bitwise", seconds=False)
    peaks: list[int] = []

    class Measured(Recording):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step != 2:
                return super().training_step(model, *args, **kwargs)
            with Meter(model, self.optimizer.optimizer) as meter:
                loss = super().training_step(model, *args, **kwargs)
            peaks.append(meter.peak_bytes)
            return loss

    planned = trainer(tmp_path, kind=Measured, settings={"callbacks": [callback]}, **settings)
    assert torch.equal(losses(planned), expected)
    assert any(Stack.of(planned.model).executors)
    assert callback.plan.peak_bytes <= budget
    assert max(peaks) <= callback.plan.peak_bytes <= 1.05 * max(peaks)


def test_a_callback_leaves_loss_and_optimizer_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"applies to the loss; plan_trainer can"):
        trainer(
            tmp_path,
            settings={"callbacks": [PlanCallback(budget="1GiB", allow=["chunked_loss"])]},
        ).train()
    with pytest.raises(ConfigError, match="where a callback cannot see it"):
        trainer(
            tmp_path, label_smoothing_factor=0.1,
            settings={"callbacks": [PlanCallback(budget="1GiB")]},
        ).train()  # fmt: skip
