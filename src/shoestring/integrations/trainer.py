"""Plans in Hugging Face's Trainer and in what derives from it, such as TRL's SFTTrainer.

    trainer = Trainer(...)
    plan = shoestring.integrations.plan_trainer(trainer, budget="6 GiB")
    trainer.train()

It plans for what the trainer really does: its `compute_loss`, the optimizer that it makes, its
accumulation, clipping and autocast, and the largest batch of its data. Losses do not change but
for what the methods of the plan promise, and where they are bitwise, they are equal.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, OutOfBudget
from ..meter import Tracker
from ..methods import METHODS, Method
from ..planner import Plan, Verification, plan
from ..planner.evaluation import with_states
from ..planner.fake import fake_batch, fake_model
from ..planner.made_for import Larger
from ..planner.quick import QuickFakeMode
from ..planner.ways import Allow
from ..units import format_bytes
from .callbacks import Measuring
from .conflicts import autocast_of, refuse_conflicts, usable
from .looking import largest_batch, undisturbed
from .optimizers import Remade, inner
from .stand_in import BESIDE, as_prepared, loss_of_trainer, stand_in, with_waiting

log = logging.getLogger("shoestring")


def plan_trainer(
    trainer: Any,
    *,
    budget: int | str,
    allow: Allow = "exact",
    batch: Mapping[str, Any] | None = None,
    seconds: bool = True,
    measure: int = 2,
    larger: Larger = "warn",
    evaluation: Literal["warn", "error", "ignore"] = "warn",
) -> Plan:
    """Plan a trainer's run within `budget`, and put the plan in place. Call it once, before
    `trainer.train()`.

    budget, allow, seconds: as for `shoestring.plan`.  batch: the largest batch, as the collator
    makes it; found in the data when left out, with nothing drawn or moved on.
    measure: so many first steps run under the meter, and what they took is held against the
    promise (`measured(trainer)`, the log, `trainer.state.log_history`); 0 for none.
    larger: what is done about a batch that is larger than planned for; see `Plan.apply`.
    evaluation: what is done, now, about an evaluation that needs more than the budget.

    The plan is in `trainer.model`, its optimizer in `trainer.optimizer`. ConfigError for settings
    of the trainer that a plan cannot go with, which names them; OutOfBudget when nothing fits.
    """
    refuse_conflicts(trainer)
    args, model = trainer.args, trainer.model
    methods = usable(allow, functools.partial(_why_not, trainer))
    with undisturbed():
        if batch is None:
            batch = largest_batch(_loader(trainer, trainer.get_train_dataloader))
        made = Remade(
            trainer.create_optimizer(), [p for p in model.parameters() if p.requires_grad]
        )
        with _noise(trainer), _without_triton():
            chosen = plan(
                model, _step_batch(trainer, batch), budget=budget, allow=methods, seconds=seconds,
                optimizer=made, loss=_loss(trainer), autocast=autocast_of(args),
                accumulate=args.gradient_accumulation_steps, grad_clip=_clip(args, methods),
            )  # fmt: skip
            if evaluation != "ignore":
                _check_evaluation(trainer, chosen, strict=evaluation == "error")
    chosen.apply(model, larger=larger)
    with undisturbed():
        trainer.optimizer = chosen.optimizer(model, made)
    trainer.callback_handler.optimizer = trainer.optimizer
    _watch(trainer, Measuring(chosen, measure))
    log.info("%s", chosen)
    return chosen


def measured(trainer: Any) -> Verification | None:
    """Peak promised and measured of the first steps of a trainer that was planned; None before
    they are done, or when they were not to be measured."""
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, Measuring)]
    return found[-1].verification if found else None


# ---- what is planned ---------------------------------------------------------------------------


def _why_not(trainer: Any, method: Method) -> str | None:
    """Why a trainer cannot use a method; None when it can."""
    args, promises = trainer.args, method.promises
    if promises.applies_to == "batch":
        return "the trainer runs each batch whole; lower per_device_train_batch_size and raise " \
               "gradient_accumulation_steps instead"  # fmt: skip
    if promises.applies_to == "weights" or promises.changes_weights:
        return "the trainer moves the weights by itself"
    if promises.applies_to == "loss":
        return _why_no_loss_method(trainer)
    if promises.applies_to == "optimizer" and trainer.lr_scheduler is not None:
        return "the scheduler that the trainer was given belongs to the optimizer as it is"
    if promises.frees_gradients:
        if args.fp16:
            return "it steps within backward, where gradients are still scaled (fp16); use bf16"
        if args.gradient_accumulation_steps > 1:
            return "it steps within backward, so gradient_accumulation_steps has to be 1"
        if args.max_grad_norm > 0:
            return "it steps within backward, before gradients can be clipped; set max_grad_norm=0"
    return None


def _why_no_loss_method(trainer: Any) -> str | None:
    from transformers import Trainer

    if type(trainer).compute_loss is not Trainer.compute_loss:
        return f"{type(trainer).__name__} computes its loss by itself"
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return "the loss is computed from the logits outside of the model"
    if trainer.compute_metrics is not None:
        return "compute_metrics needs the logits, which are never whole"
    return None


def _loss(trainer: Any) -> Callable[[nn.Module, Mapping[str, Any]], Tensor]:
    steps = trainer.args.gradient_accumulation_steps

    def compute(model: nn.Module, inputs: dict[str, Any], items: Any) -> Tensor:
        twin = stand_in(trainer, model, accumulate=steps)
        loss: Tensor = twin.compute_loss(model, inputs, num_items_in_batch=items)
        return loss

    return loss_of_trainer(compute, autocast_of(trainer.args), convert=_converts(trainer.args))


def _converts(args: Any) -> bool:
    return autocast_of(args) is not None


def _step_batch(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch and what lies beside it: the others of its update, and on the CPU the one that is
    fetched ahead."""
    args = trainer.args
    batch = dict(trainer._prepare_inputs(dict(batch)))
    items = trainer._get_num_items_in_batch([batch], args.device)
    ahead = 1 if args.device.type == "cpu" else 0
    others = args.gradient_accumulation_steps - 1 + ahead
    trained = sum(p.requires_grad for p in trainer.model.parameters())
    # Whether or not it clips, the trainer takes the norm of all gradients.
    return with_waiting(batch, items=items, others=others, beside=BESIDE + 12 * trained)


def _clip(args: Any, methods: Sequence[str]) -> float | None:
    """What the gradients are clipped to: without clipping the trainer still takes their norm,
    unless there are none left."""
    if args.max_grad_norm > 0:
        return float(args.max_grad_norm)
    return None if any(METHODS[m].promises.frees_gradients for m in methods) else float("inf")


def _loader(trainer: Any, make: Callable[[], Any]) -> Any:
    """A data loader as the trainer makes it, of which Accelerate then knows nothing."""
    known = list(trainer.accelerator._dataloaders)
    try:
        return make()
    finally:
        trainer.accelerator._dataloaders[:] = known


@contextlib.contextmanager
def _noise(trainer: Any) -> Iterator[None]:
    """With the noise on embeddings (NEFTune) that the trainer switches on when it trains."""
    if getattr(trainer, "neftune_noise_alpha", None) is None:
        yield
        return
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune

    handle = activate_neftune(trainer.model, trainer.neftune_noise_alpha, trainer.accelerator)
    try:
        yield
    finally:
        deactivate_neftune(trainer.model, handle, trainer.accelerator)


@contextlib.contextmanager
def _without_triton() -> Iterator[None]:
    """TRL's head picks rows by value on CUDA, which fake tensors have not; without its kernels it
    takes all rows, the most that there can be."""
    modules = [m for n, m in sys.modules.items() if n in _TRITON and hasattr(m, "_use_triton")]
    before = [m._use_triton for m in modules]
    for module in modules:
        vars(module)["_use_triton"] = lambda device: False
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            vars(module)["_use_triton"] = function


_TRITON = ("trl.trainer.utils", "trl.kernels.chunked_logprob")


def _watch(trainer: Any, callback: Measuring) -> None:
    """The callback, at any end of training."""
    trainer.callback_handler.callbacks[:] = [
        c for c in trainer.callback_handler.callbacks if not isinstance(c, Measuring)
    ]
    trainer.add_callback(callback)
    train = trainer.train

    @functools.wraps(train)
    def closing(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            callback.close()

    trainer.train = closing


# ---- evaluation --------------------------------------------------------------------------------


def evaluation_bytes(
    trainer: Any, chosen: Plan | None = None, *, batch: Mapping[str, Any] | None = None
) -> int:
    """Predicted peak of evaluating: weights, optimizer states, one batch, and the logits of all
    batches that are collected for `compute_metrics`.

    batch: the largest one, as the collator makes it; found in `trainer.eval_dataset` when left
    out.  chosen: the plan, when it is not in place.
    """
    if batch is not None:
        return _evaluation(trainer, chosen, batch, collected=1)
    peak = 0
    for key in _eval_keys(trainer):
        loader = _loader(trainer, functools.partial(trainer.get_eval_dataloader, key))
        with undisturbed():
            batch = largest_batch(loader, what="evaluation")
        peak = max(peak, _evaluation(trainer, chosen, batch, collected=_collected(trainer, loader)))
    return peak


def _eval_keys(trainer: Any) -> list[Any]:
    data = trainer.eval_dataset
    return [] if data is None else list(data) if isinstance(data, dict) else [None]


def _loss_only(trainer: Any) -> bool:
    return trainer.compute_metrics is None or bool(trainer.args.prediction_loss_only)


def _collected(trainer: Any, loader: Any) -> int:
    """Batches whose logits lie on the device at once."""
    args = trainer.args
    if _loss_only(trainer) or args.batch_eval_metrics:
        return 1
    steps = args.eval_accumulation_steps
    # On the CPU what is collected stays where it is, in arrays.
    return min(steps, len(loader)) if steps and args.device.type != "cpu" else len(loader)


def _evaluation(
    trainer: Any, chosen: Plan | None, batch: Mapping[str, Any], *, collected: int
) -> int:
    mode = QuickFakeMode()
    twin = fake_model(trainer.model, mode)
    inputs = trainer._prepare_inputs(dict(batch))
    fake = fake_batch(inputs, mode)
    with mode:
        if chosen is not None:
            chosen.apply(twin, larger="ignore")
        twin.eval()
        states = _states(trainer, twin, chosen, mode)
        tracker = Tracker()
        tracker.seed(twin, states)
        tracker.assign("other", [t for t in fake.values() if isinstance(t, Tensor)])
        proxy = stand_in(trainer, twin)
        with (
            tracker,
            torch.no_grad(),
            as_prepared(twin, autocast_of(trainer.args), _converts(trainer.args)),
        ):
            kept = proxy.prediction_step(twin, fake, _loss_only(trainer))
            if trainer.preprocess_logits_for_metrics is not None and kept[1] is not None:
                kept = (*kept[:1], trainer.preprocess_logits_for_metrics(kept[1], kept[2]), kept[2])
            held = _bytes(kept)
    ahead = _bytes(inputs) if trainer.args.device.type == "cpu" else 0
    # While a batch is added to those that are collected, both and their sum are there.
    more = 2 * collected * held if collected > 1 else 0
    return tracker.ledger.peak + ahead + BESIDE + more


def _bytes(value: Any) -> int:
    from torch.utils._pytree import tree_leaves

    return sum(t.nbytes for t in tree_leaves(value) if isinstance(t, Tensor))


def _states(
    trainer: Any, twin: nn.Module, chosen: Plan | None, mode: QuickFakeMode
) -> Optimizer | None:
    """The optimizer of the twin, with the states that it has after a step; None before there is
    one."""
    if chosen is not None:
        return with_states(twin, lambda parameters: chosen.optimizer(twin), mode)
    if trainer.optimizer is None:
        return None
    real = [p for p in trainer.model.parameters() if p.requires_grad]
    return with_states(twin, Remade(inner(trainer.optimizer), real), mode)


def _check_evaluation(trainer: Any, chosen: Plan, *, strict: bool) -> None:
    """Says when an evaluation will need more than the budget, and what to do."""
    try:
        peak = evaluation_bytes(trainer, chosen)
    except ConfigError as error:
        log.warning("the peak of evaluation is not known: %s", error)
        return
    if peak <= chosen.budget_bytes:
        return
    args = trainer.args
    todo = [f"per_device_eval_batch_size (now {args.per_device_eval_batch_size}) lower"]
    if not _loss_only(trainer):
        todo.append("prediction_loss_only=True, or preprocess_logits_for_metrics to keep less of "
                    "the logits")  # fmt: skip
        if args.device.type != "cpu":
            todo.append("eval_accumulation_steps=1, so that logits do not stay on the device")
    too_much = OutOfBudget(
        f"evaluation will need {format_bytes(peak)}",
        expected=f"at most the budget of {format_bytes(chosen.budget_bytes)}",
        hint=f"Set {'; or '.join(todo)}.",
        smallest_bytes=peak, instant="evaluation",
    )  # fmt: skip
    if strict:
        raise too_much
    log.warning("%s", too_much)
