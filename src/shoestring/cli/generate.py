"""`shoestring generate DIRECTORY --prompt TEXT`: continues a text with a trained model.

The continuation alone goes to stdout, so that it can be piped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ..errors import ConfigError
from ..units import format_bytes
from .arguments import Common
from .caches import check_cache, settings_of
from .terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Continue a text with a trained model."""

    model: Annotated[Positional[str], arg(metavar="DIRECTORY")]
    """A run directory, or a Hugging Face model directory."""
    prompt: str = ""
    """Text to continue; - reads it from standard input. Empty starts from nothing."""
    tokens: int = 100
    """Tokens to add."""
    temperature: float = 0.8
    """0 = always the likeliest token; higher = more varied."""
    top_k: int = 50
    """Choose among so many likeliest tokens; 0 = all."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """auto (CUDA when there is one, else CPU), cpu, cuda or cuda:N."""
    cache: str = ""
    """Keep the context compressed: bits of keys/values (4/2), bytes a token (4700B), or bits of a
    number (3.25bits). Empty = as it is."""
    calibration: str = ""
    """Of `shoestring calibrate`, for a cache by bytes or bits."""

    def __post_init__(self) -> None:
        check_cache(self.cache, calibration=self.calibration)
        for name, low in (("tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if not value >= low:
                raise ConfigError(f"--{name} {value} cannot be used", expected=f"{low} or more")


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Prints the continuation; exit code 0."""
    import torch

    from .. import load
    from ..training.distributed import pick_device

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    device = pick_device(arguments.device)
    model, tokenizer = load(Path(arguments.model))
    if tokenizer is None:
        raise ConfigError(
            f"{arguments.model} holds no tokenizer", expected="a tokenizer beside the model"
        )
    model.to(device).eval()
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # Text begins after an end mark, as in training; it is also what an empty prompt starts from.
    start = [tokenizer.bos_token_id or tokenizer.eos_token_id]
    given = torch.tensor([start + ids], device=device)
    torch.manual_seed(arguments.seed)
    cache = _cache(model, given.shape[1] + arguments.tokens, arguments)
    new = _continue(model, given, arguments, tokenizer.eos_token_id, cache)
    text = tokenizer.decode(new, skip_special_tokens=True)
    told = {"prompt": prompt, "text": text, "tokens": len(new), "seed": arguments.seed}
    if cache is not None:
        told |= _about(cache, terminal, device)
    terminal.emit(told)
    terminal.say(prompt + text)
    return 0


def _cache(model: Any, tokens: int, arguments: Arguments) -> Any:
    """What --cache asks for, for that many tokens; None without it."""
    if not arguments.cache:
        return None
    from ..serve import Calibration, CompressedCache

    calibration = Calibration.load(arguments.calibration) if arguments.calibration else None
    settings = settings_of(arguments.cache, calibration=calibration, context=max(tokens, 2048))
    return CompressedCache(model, **settings)


def _about(cache: Any, terminal: Terminal, device: Any) -> dict[str, Any]:
    from ..serve import kernel_in_use

    tokens, kernel = cache.get_seq_length(), kernel_in_use(device)
    terminal.note(f"context: {format_bytes(cache.nbytes)} for {tokens} tokens, {kernel}")
    return {"cache_bytes": cache.nbytes, "cache_tokens": tokens, "cache_kernel": kernel}


def _continue(
    model: Any, given: Any, arguments: Arguments, end: int | None, cache: Any
) -> list[int]:  # fmt: skip
    """Ids that follow `given`, a (1, T) tensor of ids."""
    import torch

    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
        sampling["top_k"] = arguments.top_k
    with torch.no_grad():
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=arguments.tokens,
            eos_token_id=end,
            pad_token_id=end,
            past_key_values=cache,
            **sampling,
        )
    return list(out[0, given.shape[1] :].tolist())
