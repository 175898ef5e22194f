"""Models from disk: what a run saved, or any Hugging Face directory or name.

A manifest is verified before anything is read from the files it names. Which rule a model was
trained with is in its config, and is put back in place.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoint import MANIFEST, newest_complete, verify
from ..errors import CheckpointError, ConfigError
from ..methods.reversible import reversible
from ..models.gpt import GPT, GPTConfig
from .save import no_progress_bar


def load(run_or_model_dir: str | Path) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a run directory or a model directory; tokenizer None without one.

    CheckpointError when a file does not match the manifest or nothing is there.
    """
    directory = model_directory(Path(run_or_model_dir))
    verify(directory)
    model = load_model(directory)
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return model, None
    from transformers import AutoTokenizer

    return model, AutoTokenizer.from_pretrained(directory)


def model_directory(path: Path) -> Path:
    """Where the model is: `path` itself, or `model` below a run directory."""
    _refuse_pickles(path)
    for candidate in (newest_complete(path / "model"), newest_complete(path)):
        if (candidate / "config.json").is_file() or (candidate / MANIFEST).is_file():
            return candidate
    raise CheckpointError(
        f"there is no model in {path}" if path.exists() else f"{path} does not exist",
        expected="a run directory with model/, or a directory with config.json",
        hint="A run writes its model when it ends.",
    )


def _refuse_pickles(path: Path) -> None:
    """A pickle runs whatever code its writer put in, so none is ever opened."""
    files = [path] if path.is_file() else sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
    if any(path.glob("*.safetensors")) if path.is_dir() else False:
        return  # what is read are the safetensors beside it
    for file in files:
        with file.open("rb") as opened:
            start = opened.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80" or file.suffix in (".pt", ".pth", ".bin"):
            raise CheckpointError(
                f"{file} is a pickle, which is never opened here: it could run any code",
                expected="a directory with safetensors files",
                hint="Where you trust it, load it with torch and save it with save_pretrained.",
            )
    if path.is_file():
        raise CheckpointError(f"{path} is a file", expected="a run or model directory")


def load_model(name: str | Path, *, from_scratch: bool = False) -> PreTrainedModel:
    """A causal language model in float32 from a directory or a hub name.

    from_scratch: its config with random weights. ConfigError when it cannot be had.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no model can be had from {str(name)!r}: {str(error).splitlines()[0]}",
            expected="a model directory, or a model's name on the hub that can be reached",
        ) from error
    return _build(config, name, from_scratch=from_scratch)


def _build(config: Any, name: str | Path, *, from_scratch: bool) -> PreTrainedModel:
    kind = GPT if isinstance(config, GPTConfig) else AutoModelForCausalLM
    info = getattr(config, "shoestring", None)
    if from_scratch:
        config.dtype = torch.float32
        model = GPT(config) if kind is GPT else AutoModelForCausalLM.from_config(config)
    else:
        with no_progress_bar():
            model = kind.from_pretrained(name, config=config, dtype="float32")
    if info and kind is not GPT:
        remember(model, info)
    return model


def remember(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Make a loaded model's stack reversible as its config says it was."""
    scale_bits: Any = "auto" if info.get("auto") else info["scale_bits"]
    reversible(model, rule=info["rule"], streams=info["streams"], scale_bits=scale_bits)
    # The runners read the same dict. Branches follow the dtype the model had when it was made
    # reversible, which is not the one it is loaded in.
    for setting in ("scale_bits", "branches", "tuple"):
        model.config.shoestring[setting] = info.get(setting, model.config.shoestring[setting])
