"""Any transformer of diffusers in B blocks, each a whole denoiser, without editing the model.

A block is the model itself with some of its layers: the lists of layers hold the block's own ones
only, and everything else (embeddings, conditioning, last norm, readout) is the block's own copy.
So its forward is the library's, and with one block it is the model, bit for bit. Weights keep the
names that they have in the whole model. A block can be made, trained and saved alone; layers of
other blocks are never allocated (`models/wrapped_cut.py`).

What is called a class is, for a model of text embeddings, a row of a frozen table: all that is
given to the model for one prompt, flattened, the last row for no prompt. So labels, their dropout
and guidance work as with classes.

Timesteps run from 0 at the lowest noise to what the architecture is used to at the highest: for a
flow the time times 1000, for EDM evenly in ln sigma. Channels that a model gives beyond those of
the image (learned variances) are not looked at.

Source: DiffusionBlocks, arXiv 2506.14202, sections 3 and 4; DiT, arXiv 2212.09748; SD3, arXiv
2403.03206.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..ops.noise_levels import Partition
from .wrapped_config import WrappedConfig
from .wrapped_cut import Wanted, keep, made, skeleton
from .wrapped_sources import config_of, read_weights, weight_files

# N samples, C channels, H, W pixels, V rows of the table, R numbers of a row


class WrappedBlock(nn.Module):
    """A denoiser: the model with this block's layers, under `net`."""

    def __init__(self, whole: "Wrapped", net: nn.Module) -> None:
        super().__init__()
        self.config = whole.config
        self.net = net
        self._whole = (whole,)  # in a tuple it is nobody's submodule
        self._is_checked = False
        self.train(self.training)

    @property
    def layers(self) -> list[nn.Module]:
        """The block's own layers, in the order in which they run."""
        return [layer for name in self.config.call.lists for layer in getattr(self.net, name)]

    def train(self, mode: bool = True) -> "WrappedBlock":
        """Training mode, except where the model would leave out classes by draws of its own:
        which are left out is the objective's to say."""
        super().train(mode)
        for module in self.net.modules():
            if hasattr(module, "token_drop"):
                module.eval()
        return self

    def forward(self, z: Tensor, noise_N: Tensor, labels_N: Tensor | None = None) -> Tensor:
        """z (N, C, H, W), noise (N,), labels (N,) int64 or None -> z's shape.

        A label equal to `classes` stands for no class.
        """
        c = self.config
        time = (noise_N - c.low) * (c.call.top / (c.high - c.low))
        given = self._given(len(z), z.device, labels_N)
        if c.call.packed:
            given |= self._places(z, given)
        given |= {"hidden_states": _packed(z) if c.call.packed else z, "timestep": time}
        run = self.net if self._is_checked else self._checked
        out = run(**given, return_dict=False)[0]
        if c.call.packed:
            out = _unpacked(out, z)
        fits = out.dim() == 4 and out.shape[1] >= z.shape[1]
        if not fits or (len(out), out.shape[2:]) != (len(z), z.shape[2:]):
            raise ConfigError(
                f"{c.architecture} gives {tuple(out.shape)} for images {tuple(z.shape)}",
                expected="the images' shape, which its settings decide",
            )
        return out[:, : z.shape[1]]

    def _given(self, count: int, device: torch.device, labels_N: Tensor | None) -> dict[str, Any]:
        """What the model is told beside z and the timestep."""
        c = self.config
        if labels_N is None:
            labels_N = torch.full((count,), c.classes, device=device)
        given: dict[str, Any] = dict(c.call.fixed)
        if c.call.labels:
            null = int(c.settings[c.call.null])
            given[c.call.labels] = torch.where(labels_N == c.classes, null, labels_N)
        if c.rows:
            table = self._whole[0].table
            assert table is not None
            parts = table[labels_N].split([_numel(shape) for shape in c.rows.values()], dim=1)
            for part, (name, shape) in zip(parts, c.rows.items(), strict=True):
                given[name] = part.reshape(count, *shape).contiguous()  # as a caller's would be
        return given

    def _places(self, z: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
        high, wide = z.shape[2] // 2, z.shape[3] // 2
        ids = torch.zeros(high, wide, 3, device=z.device)
        ids[..., 1] = torch.arange(high, device=z.device)[:, None]
        ids[..., 2] = torch.arange(wide, device=z.device)[None]
        texts = next(v.shape[1] for v in given.values() if isinstance(v, Tensor) and v.dim() == 3)
        return {"img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(texts, 3, device=z.device)}

    def _checked(self, **given: Any) -> tuple[Tensor, ...]:
        """The first call: every layer has to run, once and in order, or the cut is wrong."""
        ran: list[nn.Module] = []
        hooks = [
            each.register_forward_pre_hook(lambda module, _: ran.append(module))
            for each in self.layers
        ]
        try:
            out = self.net(**given)
        finally:
            for hook in hooks:
                hook.remove()
        if [id(each) for each in ran] != [id(each) for each in self.layers]:
            raise ConfigError(
                f"{self.config.architecture} does not run its layers {self.config.call.lists} one "
                "after the other, each once",
                expected="lists of layers in the order in which they run",
            )
        self._is_checked = True
        return out


class Wrapped(nn.Module):
    """B blocks and the frozen table of what is given for a class; block b of 1..B is
    `blocks[b - 1]`, the highest noise first. As constructed all is on the meta device; `make` and
    `of` give weights."""

    table: Tensor | None

    def __init__(self, config: WrappedConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList()
        for block in range(1, config.blocks + 1):
            net = skeleton(config.architecture, config.settings)
            keep(net, config.call, wanted_by(config, block))
            self.blocks.append(WrappedBlock(self, net))
        self.register_buffer("table", None, persistent=True)

    @classmethod
    def make(
        cls,
        config: WrappedConfig,
        *,
        seed: int,
        only: int | None = None,
        table: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> "Wrapped":
        """Fresh weights, those of the model's own constructor. They depend on the seed and the
        number of the block alone.

        only: make that block's (1..B); the others stay on the meta device and take no memory.
        table: (classes + 1, R), where embeddings are given.
        """
        _check_table(config, table)
        model = cls(config)
        model.table = None if table is None else table.to(device)
        for block in range(1, config.blocks + 1) if only is None else (only,):
            model.fill(block, seed=seed, device=device)
        return model

    @classmethod
    def of(
        cls, network: nn.Module, config: WrappedConfig, *, table: Tensor | None = None,
        only: int | None = None,
    ) -> "Wrapped":  # fmt: skip
        """Blocks that start as copies of a model's weights; the model stays as it is."""
        _check_table(config, table)
        other = next((p.dtype for p in network.parameters() if p.dtype != torch.float32), None)
        if other is not None:
            raise ConfigError(
                f"weights of {other}", expected="float32", hint="model.float() makes them so."
            )
        model = cls(config)
        device = next(network.parameters()).device
        model.table = None if table is None else table.to(device)
        for block in range(1, config.blocks + 1) if only is None else (only,):
            wanted = wanted_by(config, block)
            part = copy.copy(network)  # of its own lists: another one's are not copied at all
            part._modules = dict(network._modules)
            keep(part, config.call, wanted)
            model.blocks[block - 1] = WrappedBlock(model, copy.deepcopy(part))
        return model

    @classmethod
    def hollow(cls, config: WrappedConfig) -> "Wrapped":
        """All that a saved state does not hold, such as tables of positions, with parameters on
        the meta device: to be loaded into, one block of memory at most is used on the way."""
        model = cls(config)
        for block in range(1, config.blocks + 1):
            model.fill(block, seed=0)
            model.block(block).net = _without_parameters(model.block(block).net)
        return model

    def fill(self, block: int, *, seed: int, device: torch.device | str = "cpu") -> None:
        """Give a block that is on the meta device its fresh weights, drawn on the CPU."""
        c = self.config
        wanted = wanted_by(c, block)
        net = made(c.architecture, c.settings, c.call, wanted, seed * 1_000_003 + block)
        self.blocks[block - 1] = WrappedBlock(self, net.to(device))

    @torch.no_grad()
    def start_from(self, block: int, path: str | Path) -> None:
        """Give a block the weights that a plain model's safetensors files have under its names;
        nothing else of them is read. path: a file, or a folder of them. CheckpointError for
        weights that are missing or of another shape."""
        wanted = self.block(block).net.state_dict()
        left = set(wanted)
        for file in weight_files(path):
            for name, value in read_weights(file, left):
                if value.shape != wanted[name].shape:
                    raise CheckpointError(
                        f"{name} of {file} is {tuple(value.shape)}",
                        expected=f"{tuple(wanted[name].shape)}",
                    )
                wanted[name].copy_(value)
                left.discard(name)
        if left:
            raise CheckpointError(
                f"{path} has no {sorted(left)[0]}",
                expected=f"the weights of a {self.config.architecture}",
            )

    def block(self, block: int) -> WrappedBlock:
        """Block b of 1..B."""
        self.config.owned(block)
        part = self.blocks[block - 1]
        assert isinstance(part, WrappedBlock)
        return part

    def plain_state(self, block: int) -> dict[str, Tensor]:
        """The state of a plain model of diffusers: the layers of all blocks, and block b's ends.

        The plain model runs all layers at once, which is another network than the blocks are; what
        is had by it is a file that every tool reads, to go on from.
        """
        lists = tuple(f"{name}." for name in self.config.call.lists)
        state = dict(self.block(block).net.state_dict())
        for other in range(1, self.config.blocks + 1):
            for name, value in self.block(other).net.state_dict().items():
                if name.startswith(lists):
                    state[name] = value
        return state

    def to_diffusers(self, block: int) -> nn.Module:
        """A plain model of diffusers with `plain_state(block)`; it shares the tensors."""
        c = self.config
        model = made(c.architecture, c.settings, c.call, lambda _: True, 0)
        model.load_state_dict(self.plain_state(block), strict=True, assign=True)
        return model


def wrap(
    network: nn.Module | Mapping[str, Any],
    partition: Partition,
    *,
    table: Tensor | None = None,
    only: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Wrapped:
    """A transformer of diffusers in the partition's blocks, with the model's own weights, or with
    fresh ones where its config is given.

    table: (classes + 1, R) of embeddings.  only: the one block to make.  settings: as `config_of`.
    """
    config = config_of(network, partition, **settings)
    if isinstance(network, nn.Module):
        return Wrapped.of(network, config, table=table, only=only)
    return Wrapped.make(config, seed=seed, only=only, table=table)


def wanted_by(config: WrappedConfig, block: int) -> Wanted:
    """Whether a layer belongs to a block."""
    own = {(name, number) for name, numbers in config.owned(block) for number in numbers}
    return own.__contains__


def _check_table(config: WrappedConfig, table: Tensor | None) -> None:
    wanted = (config.classes + 1, config.row)
    if config.row and (table is None or tuple(table.shape) != wanted):
        raise ConfigError(
            f"a table of shape {None if table is None else tuple(table.shape)}",
            expected=f"{wanted}: {', '.join(config.rows)} of every class, and of none at the end",
        )


def _without_parameters(net: nn.Module) -> nn.Module:
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"))
    return net


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _packed(z: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H/2 W/2, 4 C)."""
    x = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # N, C, h, p, w, q
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpacked(x: Tensor, like: Tensor) -> Tensor:
    _, _, high, wide = like.shape
    x = x.view(len(x), high // 2, wide // 2, -1, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, high, wide)
