"""Plans in TRL's SFTTrainer: losses and metrics as without them, peaks as promised."""

import ast
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from integrations.trainers import model
from shoestring.data import open_source, train_tokenizer
from shoestring.errors import ConfigError
from shoestring.integrations import evaluation_bytes, measured, plan_trainer
from shoestring.meter import Meter
from shoestring.stack import Stack

pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings(
    # announcements of transformers and trl about their next major versions
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:`return_outputs=True`, and the logits:FutureWarning",
    "ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`:FutureWarning",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = open_source(Path(ast.__file__))
    return train_tokenizer(source, 300, sample_bytes=50_000, cache=tmp_path_factory.mktemp("tok"))


class Losses(TrainerCallback):
    """The loss of every step, as the trainer logs it: with every digit."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            wanted = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
            self.found.append({name: logs[name] for name in wanted})


def sft(tmp_path: Path, tokenizer: Any, *, of: Any = None, **changes: Any) -> tuple[Any, Losses]:
    """An SFT trainer of a fresh model on source code, cut to rows of one length."""
    from datasets import Dataset

    text = Path(ast.__file__).read_text()
    rows = [{"text": text[i : i + 400]} for i in range(0, 24_000, 400)]
    settings = {
        "output_dir": str(tmp_path), "max_steps": 20, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "activation_checkpointing": False, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "max_length": 64,
        "bf16": False, "dataloader_pin_memory": False, "dataset_num_proc": None,
    }  # fmt: skip
    trainers = {k: changes.pop(k) for k in ("peft_config", "eval_dataset", "compute_metrics")
                if k in changes}  # fmt: skip
    if trainers.get("eval_dataset") is True:
        trainers["eval_dataset"] = Dataset.from_list(rows[:8])
    found = Losses()
    made = trl.SFTTrainer(
        model=of if of is not None else model(vocabulary=len(tokenizer)),
        args=trl.SFTConfig(**{**settings, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[found],
        **trainers,
    )
    return made, found


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"label_smoothing_factor": 0.1}],
    ids=["plain", "accumulated", "bf16", "label smoothing"],
)
def test_losses_and_metrics_are_equal_and_the_budget_is_kept(tmp_path, tokenizer, settings):
    plain, expected = sft(tmp_path, tokenizer, **settings)
    plain.train()
    planned, found = sft(tmp_path, tokenizer, **settings)
    keeping = plan_trainer(planned, budget="1GiB", allow=["keep"], seconds=False)
    budget = keeping.peak_bytes - 150_000
    planned, found = sft(tmp_path, tokenizer, **settings)
    chosen = plan_trainer(planned, budget=budget, allow=["recompute"], seconds=False)
    assert any(span.method == "recompute" for span in chosen.spans)
    planned.train()
    assert len(expected.found) == 20
    assert found.found == expected.found
    assert measured(planned).measured <= budget
    assert 0 <= measured(planned).error <= 0.03


def test_adapters_are_trained_as_without_a_plan(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")

    def make() -> tuple[Any, Losses]:
        settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return sft(tmp_path, tokenizer, peft_config=settings)

    plain, expected = make()
    plain.train()
    planned, found = make()
    chosen = plan_trainer(planned, budget="1GiB", allow=["recompute"], seconds=False)
    planned, found = make()
    names = list(planned.model.state_dict())
    plan_trainer(planned, budget=chosen.peak_bytes - 150_000, allow=["recompute"], seconds=False)
    assert any(Stack.of(planned.model).executors)
    planned.train()
    assert found.found == expected.found
    assert 0 <= measured(planned).error <= 0.03
    assert list(planned.model.state_dict()) == names
    planned.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_its_own_checkpointing_is_refused(tmp_path, tokenizer):
    of, _ = sft(tmp_path, tokenizer, activation_checkpointing=True)
    with pytest.raises(ConfigError, match=r"Set activation_checkpointing=False \(TRL's configs"):
        plan_trainer(of, budget="1GiB")


def test_its_loss_is_its_own(tmp_path, tokenizer):
    of, _ = sft(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="SFTTrainer computes its loss by itself"):
        plan_trainer(of, budget="1GiB", allow=["chunked_loss"])


def test_planning_writes_nothing_into_the_trainer(tmp_path, tokenizer):
    of, _ = sft(tmp_path, tokenizer, eval_dataset=True)
    plan_trainer(of, budget="1GiB", allow=["recompute"], seconds=False)
    assert not any(of._metrics["train"].values())
    assert not any(of._metrics["eval"].values())
    assert of._total_train_tokens == 0
    assert of.state.log_history == []


@pytest.mark.parametrize("with_metrics", [False, True])
def test_the_peak_of_evaluation_is_known(tmp_path, tokenizer, with_metrics):
    metrics = {"compute_metrics": lambda prediction: {"rows": len(prediction.label_ids)}}
    of, _ = sft(tmp_path, tokenizer, eval_dataset=True, **(metrics if with_metrics else {}))
    plan_trainer(of, budget="1GiB", allow=["keep"], seconds=False)
    predicted = evaluation_bytes(of)
    with Meter(of.model) as meter:
        of.evaluate()
    states = 8 * sum(p.numel() for p in of.model.parameters())
    assert meter.peak_bytes <= predicted
    if not with_metrics:
        assert predicted - states <= meter.peak_bytes * 1.03
