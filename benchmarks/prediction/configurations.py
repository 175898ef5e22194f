"""The training runs that are planned from a config, then made: families, sizes, optimizers, and
what the plan may do, by name."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from shoestring.models.gpt import GPT, GPTConfig

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
BOTH = ("optimizer", "batch")
ALLOWED: dict[str, tuple[str | list[str], tuple[str, ...]]] = {
    "keep": (["keep"], ()),
    "exact": ("exact", ()),
    "exact, all handed over": ("exact", BOTH),
    "unbiased": ("unbiased", ()),
    # Every unbiased method, and of the exact ones those that are not combined with all others:
    # all together are some hundred combinations, a minute to price.
    "unbiased, all handed over": (
        [
            "recompute",
            "reversible",
            "squeeze",
            "low_bit_states",
            "bf16_stochastic",
            "fused_step",
            "microbatch",
        ],
        BOTH,
    ),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-4),
}


class Convolutions(nn.Module):
    """A stem, residual convolutional blocks with group norm, mean over places, and a head."""

    def __init__(self, classes: int, width: int = 48, depth: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ConvolutionalBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> ImageClassifierOutput:
        x = self.stem(pixel_values)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean(dim=(2, 3)))
        return ImageClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


class ConvolutionalBlock(nn.Module):
    """x + conv(gelu(conv(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.up = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.down = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _gpt(vocabulary: int, tokens: int, rule: str) -> nn.Module:
    return GPT(
        GPTConfig(
            vocab_size=vocabulary, hidden_size=96, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=tokens, rule=rule,
        )
    )  # fmt: skip


def _hugging_face(name: str, head: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(pad_token_id=0, **settings)
    model: nn.Module = getattr(transformers, head)(config)
    return model


_LLAMA = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[int, int], nn.Module]] = {
    "GPT": lambda v, t: _gpt(v, t, "residual"),
    "GPT, reversible": lambda v, t: _gpt(v, t, "leapfrog"),
    "Llama": lambda v, t: _hugging_face(
        "Llama", "LlamaForCausalLM", vocab_size=v, max_position_embeddings=t, **_LLAMA
    ),
    "GPT-2": lambda v, t: _hugging_face(
        "GPT2", "GPT2LMHeadModel", vocab_size=v, n_positions=t, n_embd=96, n_layer=5, n_head=4
    ),
    "Mixtral": lambda v, t: _hugging_face(
        "Mixtral", "MixtralForCausalLM", vocab_size=v, max_position_embeddings=t,
        **{**_LLAMA, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "T5": lambda v, t: _hugging_face(
        "T5", "T5ForConditionalGeneration", vocab_size=v, d_model=96, d_kv=24, d_ff=256,
        num_layers=2, num_decoder_layers=5, num_heads=4, decoder_start_token_id=0,
    ),
    "ViT": lambda v, t: _hugging_face(
        "ViT", "ViTForImageClassification", hidden_size=96, intermediate_size=256,
        num_hidden_layers=5, num_attention_heads=4, image_size=t, patch_size=8, num_labels=v,
    ),
    "Convolutions": lambda v, t: Convolutions(v),
}  # fmt: skip
IMAGES = ("ViT", "Convolutions")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """length: tokens of a row, or the side of an image.  vocabulary: tokens, or classes.
    settings: further arguments of `planner`: autocast, accumulate, grad_clip."""

    family: str
    rows: int
    length: int
    vocabulary: int
    optimizer: str
    allow: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        sizes = f"{self.rows} x {self.length}, {self.vocabulary}"
        parts = [self.family, sizes, self.optimizer, *map(_told, self.settings.items())]
        return "; ".join(parts)

    def build(self) -> nn.Module:
        return FAMILIES[self.family](self.vocabulary, self.length)

    def batch(self) -> dict[str, Tensor]:
        if self.family in IMAGES:
            return {
                "pixel_values": torch.randn(self.rows, 3, self.length, self.length),
                "labels": torch.randint(self.vocabulary, (self.rows,)),
            }
        ids = torch.randint(5, self.vocabulary, (self.rows, self.length))
        mask = torch.ones_like(ids)
        mask[:, -1] = 0  # one of ones would be dropped on the way
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](parameters)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around a forward."""
        dtype = self.settings.get("autocast")
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            yield


def _told(setting: tuple[str, Any]) -> str:
    name, value = setting
    return f"{name} {str(value).removeprefix('torch.')}"


_Row = tuple[int, int, int, str, str]  # rows, length, vocabulary, optimizer, allowed
_K, _E, _EO = "keep", "exact", "exact, all handed over"
_U, _UO = "unbiased", "unbiased, all handed over"
_TEXT: Sequence[_Row] = (
    (4, 128, 512, "AdamW, fused", _K),
    (2, 64, 8192, "AdamW", _E),
    (8, 64, 512, "SGD, momentum", _EO),
    (2, 256, 512, "AdamW, foreach", _U),
    (4, 64, 2048, "AdamW, fused", _UO),
)
_ROWS: dict[str, Sequence[_Row]] = {
    "GPT": _TEXT,
    "GPT, reversible": (
        (4, 128, 512, "SGD", _E),
        (2, 64, 8192, "AdamW, fused", _EO),
        (8, 64, 512, "AdamW", _UO),
        (2, 256, 512, "AdamW, foreach", _E),
        (1, 32, 512, "Adafactor", _K),
    ),
    "Llama": (
        *_TEXT[1:],
        (8, 128, 512, "Adafactor", _E),
        (1, 16, 512, "AdamW, foreach", _EO),
    ),
    "GPT-2": (
        (4, 128, 512, "AdamW", _E),
        (2, 64, 8192, "SGD", _U),
        (8, 64, 512, "AdamW, fused", _EO),
        (2, 256, 512, "Adafactor", _K),
        (4, 64, 512, "AdamW, foreach", _UO),
    ),
    "Mixtral": (
        (4, 64, 512, "AdamW, fused", _E),
        (2, 128, 4096, "AdamW, foreach", _U),
        (8, 32, 512, "AdamW", _EO),
        (2, 64, 512, "SGD", _K),
    ),
    "T5": (
        (4, 64, 512, "AdamW, fused", _E),
        (2, 128, 4096, "Adafactor", _U),
        (4, 64, 512, "AdamW", _EO),
    ),
    "ViT": (
        (8, 64, 10, "AdamW, fused", _E),
        (4, 96, 1000, "AdamW, foreach", _U),
        (8, 64, 10, "SGD, momentum", _EO),
        (16, 32, 100, "AdamW", _UO),
        (4, 64, 10, "Adafactor", _K),
    ),
    "Convolutions": (
        (8, 32, 10, "AdamW, fused", _E),
        (4, 64, 100, "SGD, momentum", _U),
        (8, 32, 10, "AdamW, foreach", _EO),
    ),
}
_LOOPS = (
    Configuration(
        family="GPT", rows=4, length=64, vocabulary=512, optimizer="AdamW, fused", allow=_E,
        settings={"autocast": torch.bfloat16, "grad_clip": 1.0},
    ),
    Configuration(
        family="Llama", rows=4, length=64, vocabulary=512, optimizer="AdamW, foreach", allow=_EO,
        settings={"accumulate": 2, "grad_clip": 1.0},
    ),
    Configuration(
        family="GPT-2", rows=4, length=64, vocabulary=512, optimizer="AdamW", allow=_U,
        settings={"autocast": torch.bfloat16},
    ),
    Configuration(
        family="Mixtral", rows=4, length=64, vocabulary=512, optimizer="AdamW, fused", allow=_E,
        settings={"autocast": torch.bfloat16},
    ),
)  # fmt: skip
CONFIGURATIONS = [
    *(
        Configuration(
            family=family, rows=rows, length=length, vocabulary=vocabulary, optimizer=optimizer,
            allow=allow,
        )
        for family, table in _ROWS.items()
        for rows, length, vocabulary, optimizer, allow in table
    ),
    *_LOOPS,
]  # fmt: skip
