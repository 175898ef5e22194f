"""Adapters as a way to train: a model whose weights are frozen, with small ones beside them.

LoRA (arXiv 2106.09685) comes from peft and is planned as any other model, on fake tensors. It
trains another function than full fine-tuning does, so whoever asks for it gets it; what a plan may
put in by itself is methods/lora.py.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..errors import ConfigError
from .fake import built
from .given import copied, tensors_of


def has_peft() -> bool:
    """Whether peft is installed."""
    return importlib.util.find_spec("peft") is not None


def lora(config: Any, rank: int) -> Callable[[], nn.Module]:
    """What builds the model of a Hugging Face config, frozen, with LoRA of that rank beside all
    its linear layers but the head: for the planner, as its weights have no values.

    Adapters are float32, whatever the frozen weights are. ConfigError without peft, or for a rank
    below 1.
    """
    if rank < 1:
        raise ConfigError(f"a LoRA of rank {rank} trains nothing", expected="1 or more")
    if not has_peft():
        raise ConfigError(
            "LoRA is planned with peft, which is not installed",
            expected="peft", hint="pip install shoestring[peft]",
        )  # fmt: skip

    def build() -> nn.Module:
        device = torch.get_default_device()
        # peft moves modules, which fake tensors do not bear; without values it may.
        with unset_fake_temporarily(), torch.device("meta"):
            model = _with_lora(built(config), rank)
        memo: dict[int, Any] = {}
        for tensor in tensors_of(model):
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            wanted = tensor.requires_grad
            memo[id(tensor)] = (
                nn.Parameter(made, wanted) if isinstance(tensor, nn.Parameter) else made
            )
        return copied(model, memo)

    return build


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # Conv1D of GPT-2 is told apart by peft itself.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        # peft asks transformers for a name that it is about to lose.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted: nn.Module = get_peft_model(model, config)
    return adapted
