"""Plans in other people's loops: Hugging Face Trainer, TRL's SFTTrainer, Accelerate.

    plan = plan_trainer(trainer, budget="6 GiB")            # then trainer.train() as before
    Trainer(..., callbacks=[PlanCallback(budget="6 GiB")])  # where only callbacks can be passed
    plan = plan_accelerated(accelerator, model, batch, budget="6 GiB", optimizer=make)

One file per framework; each is imported when its first name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accelerated import plan_accelerated
    from .callbacks import PlanCallback
    from .trainer import evaluation_bytes, measured, plan_trainer

_WHERE = {
    "PlanCallback": "callbacks",
    "evaluation_bytes": "trainer",
    "measured": "trainer",
    "plan_accelerated": "accelerated",
    "plan_trainer": "trainer",
}
__all__ = ["PlanCallback", "evaluation_bytes", "measured", "plan_accelerated", "plan_trainer"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'shoestring.integrations' has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value
