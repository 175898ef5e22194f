"""Predicted against measured: whole training steps, families and settings that differ in kind."""

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shoestring.errors import ConfigError
from shoestring.meter import Meter, allocator_peak
from shoestring.planner.fake import fake_model, simulate

TOLERANCE = 0.03
SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {
    **GROUPED,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SMALL, "num_key_value_heads": 4}),
    "llama grouped": ("Llama", GROUPED),
    "qwen3": ("Qwen3", GROUPED),
    "gpt2": ("GPT2", {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gemma2": ("Gemma2", {**GROUPED, "sliding_window": 16}),
    "gemma3": ("Gemma3", {**GROUPED, "sliding_window": 16}),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen3 moe": ("Qwen3Moe", {**EXPERTS, "moe_intermediate_size": 64}),
    "bert": ("Bert", SMALL),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
HEADS = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}


def config_of(family: str, **changes: Any) -> Any:
    name, settings = FAMILIES[family]
    kind = getattr(transformers, CONFIGS.get(name, f"{name}Config"))
    return kind(**{**settings, **changes}, pad_token_id=0)


def build(family: str, **changes: Any) -> nn.Module:
    name, _ = FAMILIES[family]
    kind = getattr(transformers, HEADS.get(name, f"{name}ForCausalLM"))
    model: nn.Module = kind(config_of(family, **changes))
    return model


def text(padding: int | None = None, rows: int = 2, tokens: int = 64) -> dict[str, torch.Tensor]:
    """Token ids and labels; with a mask when `padding` is not None."""
    ids = torch.randint(5, 256, (rows, tokens))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padding is not None:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, :padding] = 0
    return batch


def adamw(**settings: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, **settings)


def measure(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    *,
    optimizer: Any = None,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    grad_clip: float | None = None,
    history: bool = False,
) -> Meter:
    """The real run that `simulate` with the same settings is about: two steps, or with `history`
    the second alone."""
    model.train()
    parameters = list(model.parameters())
    chosen = (optimizer or adamw(fused=True))(parameters)

    def step() -> None:
        for _ in range(accumulate):
            with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                loss = model(**batch).loss
            (loss / accumulate if accumulate > 1 else loss).backward()
            del loss
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(parameters, grad_clip)
        chosen.step()
        chosen.zero_grad(set_to_none=True)

    if history:
        step()
    with Meter(model, chosen, history=history) as meter:
        meter.tracker.assign("other", batch.values())
        for _ in range(1 if history else 2):
            step()
    return meter


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    **{each: (lambda each=each: build(each), {}, {}) for each in FAMILIES if each != "llama"},
    "grouped, padded": (lambda: build("llama grouped"), {"padding": 20}, {}),
    "gemma3, padded": (lambda: build("gemma3"), {"padding": 20}, {}),
    "bert, padded": (lambda: build("bert"), {"padding": 20}, {}),
    "eager attention": (lambda: build("llama grouped", attn_implementation="eager"), {}, {}),
    "checkpointed": (lambda: checkpointed(build("llama grouped")), {}, {}),
    "checkpointed, dropout": (lambda: checkpointed(build("gpt2")), {}, {}),
    "checkpointed, padded": (lambda: checkpointed(build("qwen3")), {"padding": 20}, {}),
    "bf16": (lambda: build("llama grouped").bfloat16(), {}, {}),
    "autocast": (lambda: build("llama"), {}, {"autocast": torch.bfloat16}),
    "layer norm under autocast": (lambda: build("bert"), {}, {"autocast": torch.bfloat16}),
    "accumulated, clipped": (lambda: build("llama"), {}, {"accumulate": 2, "grad_clip": 1.0}),
    "large vocabulary": (lambda: build("llama", vocab_size=8000), {}, {}),
    "default adamw": (lambda: build("llama"), {"rows": 1, "tokens": 8}, {"optimizer": adamw()}),
    "foreach adamw": (
        lambda: build("llama"), {"rows": 1, "tokens": 8}, {"optimizer": adamw(foreach=True)},
    ),
    "fused adamw": (lambda: build("llama"), {"rows": 1, "tokens": 8}, {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_prediction_is_never_below_and_hardly_above(case: str) -> None:
    make, shape, settings = CASES[case]
    model, batch = make(), text(**shape)
    profile = simulate(model, batch, **settings)
    meter = measure(model, batch, **settings)
    error = (profile.peak_bytes - meter.peak_bytes) / meter.peak_bytes
    assert 0 <= error <= TOLERANCE
    assert profile.instant == meter.instant
    assert sum(profile.by_category.values()) == profile.peak_bytes
    assert 0 <= profile.retained_bytes / meter.retained_bytes - 1 <= TOLERANCE
    shorter = simulate(model, batch, **settings, steps=1, later=True)
    assert (shorter.peak_bytes, shorter.instant) == (profile.peak_bytes, profile.instant)
    assert shorter.by_category == profile.by_category
    assert shorter.history is not None
    assert shorter.history["peak_bytes"] <= shorter.peak_bytes


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", ["checkpointed, padded", "accumulated, clipped", "fused adamw"])
def test_one_simulated_step_tells_the_instants_of_a_later_one(case: str) -> None:
    make, shape, settings = CASES[case]
    model, batch = make(), text(**shape)
    predicted = simulate(model, batch, **settings, steps=1, later=True).history
    measured = measure(model, batch, **settings, history=True).history
    assert predicted is not None
    names = [name for name, _ in predicted["phases"]]
    assert names == [name for name, _ in measured["phases"]]
    assert set(predicted["bytes"]) == set(measured["bytes"])
    for name, rows in predicted["bytes"].items():
        assert 0 <= max(rows) - max(measured["bytes"][name]) <= TOLERANCE * max(rows)
    assert predicted["bytes"]["optimizer"][0] == measured["bytes"]["optimizer"][0] > 0


def test_a_mask_counts_as_padded_unless_it_is_believed() -> None:
    model, ones, padded = (
        build("llama grouped", num_hidden_layers=1),
        text(padding=0),
        text(padding=20),
    )
    worst, given = (simulate(model, ones, mask=each).peak_bytes for each in ("worst", "given"))
    assert worst == measure(model, padded).peak_bytes
    # the mask itself, an integer a token, is in the batch but no longer in the step
    at_most = ones["attention_mask"].nbytes
    assert 0 <= measure(model, ones).peak_bytes - given <= at_most
    assert simulate(model, padded, mask="given").peak_bytes == worst > given


def test_packed_positions_are_believed_only_when_given() -> None:
    model = checkpointed_quietly(build("llama grouped", num_hidden_layers=1))
    plain = text()
    positions = torch.arange(64).remainder(32).expand(2, 64).contiguous()
    packed = {**plain, "position_ids": positions}
    assert simulate(model, plain).peak_bytes == measure(model, plain).peak_bytes
    assert simulate(model, packed).peak_bytes == measure(model, packed).peak_bytes


def checkpointed_quietly(model: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return checkpointed(model)


def test_a_config_says_what_the_model_says(tmp_path: Path) -> None:
    batch = text(tokens=16)
    model = build("llama", num_hidden_layers=1)
    model.config.save_pretrained(tmp_path)
    expected = simulate(model, batch).peak_bytes
    assert simulate(tmp_path, batch).peak_bytes == expected
    built = simulate(lambda: build("llama", num_hidden_layers=1), batch)
    assert built.peak_bytes == expected
    named = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**named, "dtype": "bfloat16"}))
    half = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype is torch.bfloat16
    predicted = simulate(tmp_path / "config.json", batch).peak_bytes
    assert predicted == simulate(half, batch).peak_bytes < expected


def test_a_config_without_a_class_gets_the_causal_model_of_its_type() -> None:
    config = config_of("qwen3", num_hidden_layers=1)
    assert config.architectures is None
    twin = fake_model(config, FakeTensorMode())
    assert type(twin).__name__ == "Qwen3ForCausalLM"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config at"):
        simulate(tmp_path / "absent", text())
    with pytest.raises(ConfigError, match="cannot make a model of int"):
        simulate(3, text())


def test_a_model_that_decides_by_values_is_refused_with_a_way_out() -> None:
    model = build("mixtral", experts_implementation="eager")
    with pytest.raises(ConfigError, match="grouped_mm"):
        simulate(model, text(tokens=16))


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = build("llama", num_hidden_layers=1)
    state, mode = {k: v.clone() for k, v in model.state_dict().items()}, model.training
    before, python = torch.get_rng_state(), random.getstate()
    simulate(model, text_without_drawing())
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert model.training is mode
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def text_without_drawing() -> dict[str, torch.Tensor]:
    ids = torch.arange(128).view(2, 64)
    return {"input_ids": ids, "labels": ids}


def test_nothing_of_the_models_size_is_allocated() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=2,
        num_attention_heads=16,
    )  # fmt: skip
    batch, profiles = text_without_drawing(), []
    allocated = allocator_peak(lambda: profiles.append(simulate(config, batch)))
    assert profiles[0].peak_bytes > 3_000_000_000
    assert allocated < 3_000_000


def test_ties_parameters_and_buffers_survive_in_the_twin() -> None:
    model = build("gpt2", n_layer=1)
    twin = fake_model(model, FakeTensorMode())
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert [name for name, _ in twin.named_parameters()] == [
        name for name, _ in model.named_parameters()
    ]
    assert all(isinstance(each, nn.Parameter) for each in twin.parameters())
    assert [b.shape for b in twin.buffers()] == [b.shape for b in model.buffers()]


def test_methods_are_applied_to_the_twin_only() -> None:
    model, batch, seen = build("llama", num_hidden_layers=1), text(), []

    def recompute(twin: nn.Module) -> None:
        seen.append(twin)
        for layer in twin.model.layers:
            inner = layer.forward
            layer.forward = lambda *a, inner=inner, **k: checkpoint(
                inner, *a, use_reentrant=False, **k
            )

    less = simulate(model, batch, apply=recompute)
    assert less.retained_bytes < 0.5 * simulate(model, batch).retained_bytes
    assert seen[0] is not model
    assert "forward" not in vars(model.model.layers[0])


def test_a_loss_of_ones_own_and_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    model[0].requires_grad_(False)
    batch = {"x": torch.randn(16, 32), "y": torch.randint(0, 8, (16,))}

    def loss(each: nn.Module, data: Any) -> torch.Tensor:
        return F.cross_entropy(each(data["x"]), data["y"])

    profile = simulate(model, batch, loss=loss)
    optimizer = torch.optim.AdamW(model[2].parameters(), fused=True)
    with Meter(model, optimizer) as meter:
        for _ in range(2):
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert profile.peak_bytes == meter.peak_bytes
    assert profile.by_category == meter.by_category


class Log(TorchDispatchMode):
    """Every operator with the bytes and strides of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, list[tuple[int, tuple[int, ...]]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in str(func):
            tensors = [each for each in out if isinstance(each, torch.Tensor)]
            sizes = [(each.untyped_storage().nbytes(), each.stride()) for each in tensors]
            self.lines.append((str(func), sizes))
        return out


@pytest.mark.parametrize("layout", ["heads last", "heads first", "packed"])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_takes_the_same_kernel_and_layout(
    layout: str, mask: str, key_heads: int, dtype: torch.dtype
) -> None:
    def run() -> list[Any]:
        def heads(count: int) -> torch.Tensor:
            if layout == "heads first":
                made = torch.randn(2, count, 16, 8, dtype=dtype)
            elif layout == "heads last":
                made = torch.randn(2, 16, count, 8, dtype=dtype).transpose(1, 2)
            else:
                made = torch.randn(2, 16, 3, count, 8, dtype=dtype).permute(2, 0, 3, 1, 4)[1]
            return made.requires_grad_()

        given = {
            "bool": lambda: torch.ones(2, 1, 16, 16, dtype=torch.bool),
            "float": lambda: torch.zeros(2, 1, 16, 16, dtype=dtype),
        }.get(mask, lambda: None)()
        with Log() as log:
            F.scaled_dot_product_attention(
                heads(4), heads(key_heads), heads(key_heads), attn_mask=given,
                is_causal=mask == "causal", enable_gqa=key_heads != 4,
            ).sum().backward()  # fmt: skip
        return log.lines

    real = run()
    with FakeTensorMode():
        fake = run()
    assert len(real) >= 2
    assert fake == real
