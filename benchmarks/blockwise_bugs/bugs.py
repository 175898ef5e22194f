"""Mistakes of block-wise training, each as one text in the place of another.

Kinds follow what reimplementations of DiffusionBlocks (arXiv 2506.14202) got wrong.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bug:
    """One mistake. file: below src/shoestring.  tests: below tests; one of them has to fail."""

    kind: str
    what: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


LEVELS, SCALES = "ops/noise_levels.py", "ops/preconditioning.py"
DENOISE, LABELS = "objectives/denoise.py", "objectives/label_denoising.py"
MASKED, MASKS = "objectives/masked_diffusion.py", "ops/block_masks.py"
JOB, SAMPLING = "training/blockwise/job.py", "training/blockwise/sampling.py"
DIT = "models/dit.py"

OF_LEVELS, OF_SCALES = ("ops/test_noise_levels.py",), ("ops/test_preconditioning.py",)
OF_DENOISE = ("objectives/test_denoise.py",)
OF_LABELS = ("objectives/test_label_denoising.py",)
OF_MASKED, OF_MASKS = ("objectives/test_masked_diffusion.py",), ("ops/test_block_masks.py",)
OF_DIT, OF_JOBS = ("models/test_dit.py",), ("training/blockwise/test_jobs.py",)
OF_MERGING = ("training/blockwise/test_merging.py",)
OF_ONE = ("training/blockwise/test_one_block_only.py",)
OF_CHAIN = ("training/blockwise/test_classifying.py",)
CAUSAL, TOKENS = "models/causal.py", "objectives/token_denoising.py"
DECODING = "training/blockwise/decoding.py"
OF_CAUSAL, OF_TOKENS = ("models/test_causal.py",), ("objectives/test_token_denoising.py",)
OF_DECODING = ("training/blockwise/test_tokens.py",)

BUGS = [
    Bug("the step's sign", "a step that raises the noise, as printed in the paper", SCALES,
        "return a * z + (1 - a) * denoised", "return (2 - a) * z - (1 - a) * denoised", OF_SCALES),
    Bug("the step's sign", "a step with the levels exchanged", SCALES,
        "a = spread(next_N / level_N, z)", "a = spread(level_N / next_N, z)", OF_SCALES),
    Bug("order of blocks", "block 1 owns the lowest noise", LEVELS,
        "place = self.blocks - block", "place = block - 1", OF_LEVELS),
    Bug("order of blocks", "a router that inverts the blocks", LEVELS,
        "return self.blocks - torch.bucketize(level.float(), edges)",
        "return 1 + torch.bucketize(level.float(), edges)", OF_LEVELS),
    Bug("one sample's level for another", "levels (N,) against (N, 1)", SCALES,
        "return per_sample_N.to(like.dtype).view(-1, *[1] * (like.dim() - 1))",
        "return per_sample_N.mean().to(like.dtype)", OF_SCALES),
    Bug("one sample's level for another", "each loss is the mean of all", DENOISE,
        "return (got.float() - target.float()).square().flatten(1).mean(dim=1)",
        "return (got.float() - target.float()).square().mean().expand(len(images))", OF_DENOISE),
    Bug("weights of cross-entropies", "EDM's weight on the classes' cross-entropy", LABELS,
        'return F.cross_entropy(self.logits(net, z, draw.level, images), labels_N, '
        'reduction="none")',
        'return F.cross_entropy(self.logits(net, z, draw.level, images), labels_N, '
        'reduction="none") * ops.edm_weight(draw.level.float(), table_VW.shape[1] ** -0.5)',
        OF_LABELS),
    Bug("weights of cross-entropies", "a masked text's nats not divided by the masked share",
        MASKED, "sums / mass.clamp_min(1e-12).to(sums.device, sums.dtype)", "sums", OF_MASKED),
    Bug("tables of training and sampling", "a longer table between the steps", LABELS,
        "return logits_NV.softmax(dim=1) @ table_VW", "return logits_NV.softmax(dim=1) @ "
        "(3 * table_VW)", (*OF_LABELS, *OF_CHAIN)),
    Bug("weights of cross-entropies", "EDM's weight on the next token's cross-entropy", TOKENS,
        "return _mean_loss(hidden, tokens_NT, table_VW)\n\n    def ordinary_loss",
        "return _mean_loss(hidden, tokens_NT, table_VW) * ops.edm_weight("
        "draw.level.float(), table_VW.shape[1] ** -0.5).mean()\n\n    def ordinary_loss",
        OF_TOKENS),
    Bug("tables of training and sampling", "a shorter table between the steps of a text", TOKENS,
        "return logits.softmax(dim=-1) @ table_VW", "return logits.softmax(dim=-1) @ table_VW / 2",
        (*OF_TOKENS, *OF_DECODING)),
    Bug("all layers at once", "every byte of a text answered by block 1", DECODING,
        "for place, (level, owner) in enumerate(zip(self.levels, self.owners, strict=True)):",
        "for place, (level, owner) in enumerate(zip(self.levels, [0] * len(self.levels))):",
        (*OF_TOKENS, *OF_DECODING)),
    Bug("tables of training and sampling", "the sampler's table turned around", SAMPLING,
        "logits = (net(tokens, masked, noise, table) @ table.T)",
        "logits = (net(tokens, masked, noise, table) @ table.flip(0).T)", OF_MERGING),
    Bug("masks that leak", "a noised row sees its own clean token", MASKS,
        "known = before | same if shifted else before", "known = before | same", OF_MASKS),
    Bug("masks that leak", "noised rows see all noised ones before them", MASKS,
        "torch.cat((known, same), dim=1)", "torch.cat((known, before | same), dim=1)", OF_MASKS),
    Bug("the noised row's place", "rows for the next token know one token less", MASKS,
        "known = before | same if shifted else before", "known = before", OF_MASKS),
    Bug("the noised row's place", "clean rows see the clean row that follows", MASKS,
        "clean = torch.cat((before | same, torch.zeros_like(same)), dim=1)",
        "clean = torch.cat((before | same | same.roll(1, 1), torch.zeros_like(same)), dim=1)",
        OF_MASKS),
    Bug("masks that leak", "a plain causal mask over clean and noised rows", CAUSAL,
        "mask = block_masks.block_mask(length, shifted=True, device=z_NTW.device)[length:]",
        "mask = torch.ones(2 * length, 2 * length, dtype=torch.bool).tril()[length:]",
        OF_CAUSAL),
    Bug("the noised row's place", "clean rows that are shown the token they foresee", CAUSAL,
        "return torch.cat((start, self._embedded(tokens_NT[:, :-1], table_VW)), dim=1)",
        "return self._embedded(tokens_NT, table_VW)", OF_CAUSAL),
    Bug("the noised row's place", "noised rows one position on", CAUSAL,
        "turns = self._turns(kept.count - 1, kept.count, z_NW.device)",
        "turns = self._turns(kept.count, kept.count + 1, z_NW.device)", OF_CAUSAL),
    Bug("context that is not learned", "clean rows without a graph", CAUSAL,
        "return self._denoise(kept, z_NTW, noise_N, self._turns(0, length, z_NTW.device), mask)",
        "kept = Kept(tuple((k.detach(), v.detach()) for k, v in kept.layers), "
        "kept.entry.detach())\n        "
        "return self._denoise(kept, z_NTW, noise_N, self._turns(0, length, z_NTW.device), mask)",
        (*OF_CAUSAL, *OF_TOKENS)),
    Bug("context that is not learned", "noised rows that see no clean ones", CAUSAL,
        "k, v = torch.cat((kept[0], k), dim=2), torch.cat((kept[1], v), dim=2)\n        return",
        "k, v = torch.cat((kept[0] * 0, k), dim=2), torch.cat((kept[1] * 0, v), dim=2)\n"
        "        return", (*OF_CAUSAL, *OF_TOKENS)),
    Bug("scales of clean rows", "clean rows scaled by the noise", CAUSAL,
        "kept = self.read(self.rows(tokens_NT, table_VW))",
        "kept = self.read(self.rows(tokens_NT, table_VW) * noise_N[:, None, None].exp())",
        OF_CAUSAL),
    Bug("scales of clean rows", "clean rows that hear the noise", CAUSAL,
        "kept = self.read(self.rows(tokens_NT, table_VW))",
        "kept = self.read(self.rows(tokens_NT, table_VW) + "
        "self.condition(noise_N, None).mean(dim=1)[:, None, None])", OF_CAUSAL),
    Bug("levels of a batch", "one level for all samples", LEVELS,
        "u = torch.rand(1 if even else count, generator=generator, **kind)",
        "u = torch.rand(1, generator=generator, **kind).expand(1 if even else count)", OF_LEVELS),
    Bug("levels of a batch", "levels of the whole law for every block", LEVELS,
        "return self.law.level(first + u * (last - first)).clamp(low, high)",
        "return self.law.level(u)", OF_LEVELS),
    Bug("blocks that move others", "the optimizer holds the table of all", JOB,
        "self.optimizer = make(list(self.net.parameters()))",
        "self.optimizer = make([p for p in self.model.parameters()])", OF_JOBS),
    Bug("blocks that move others", "an update's draws depend on those before it",
        "training/blockwise/task.py",
        "return self.loss(net, block, generator_of(self.config.run.seed, block, step, part))",
        "return self.loss(net, block, torch.default_generator)", OF_JOBS),
    Bug("one schedule for all", "a schedule over the updates of all blocks", JOB,
        "peak=config.optim.lr, steps=steps",
        "peak=config.optim.lr, steps=steps * config.blockwise.blocks", OF_ONE),
    Bug("one schedule for all", "a schedule that goes on from block to block", JOB,
        "config.schedule, step, peak", "config.schedule, step + (self.block - 1) * steps, peak",
        OF_ONE),
    Bug("all layers at once", "every step answered by block 1", SAMPLING,
        "return int(merged.partition.route(torch.tensor(level, dtype=torch.float64)))",
        "return 1", OF_MERGING),
    Bug("all layers at once", "a block runs its layers twice", DIT,
        "for layer in self.layers:\n            x = layer(x, condition, turns)",
        "for layer in [*self.layers, *self.layers]:\n            x = layer(x, condition, turns)",
        OF_DIT),
    Bug("losses averaged over levels", "all levels answered by the first one's owner", SAMPLING,
        "net = merged.model.block(_owner(merged, level))\n        found.append",
        "net = merged.model.block(_owner(merged, levels_K[0]))\n        found.append", OF_MERGING),
    Bug("losses averaged over levels", "a part of the bound counted for its neighbour too", MASKED,
        "partition=dataclasses.replace(self.partition, overlap=0.0), top",
        "partition=self.partition, top", OF_MASKED),
    Bug("digits of the levels", "masses in float32", LEVELS,
        "return torch.special.ndtr((level.log() - self.mean) / self.std)",
        "return torch.special.ndtr((level.log() - self.mean).half().double() / self.std)",
        OF_LEVELS),
    Bug("digits of the levels", "the target as a difference of large numbers", SCALES,
        "return (sigma / data_std * y - data_std * noise) / (sigma.square() + data_std**2).sqrt()",
        "return ((y - data_std**2 / (sigma.square() + data_std**2) * (y + sigma * noise)) "
        "/ (sigma * data_std / (sigma.square() + data_std**2).sqrt())).half().to(y.dtype)",
        (*OF_SCALES, *OF_DENOISE)),
    Bug("ends of the levels", "an inverse that is infinite at the top", LEVELS,
        "return self.raw_level(first + mass.double() * (last - first)).clamp(self.low, self.high)",
        "return self.raw_level(mass.double())", OF_LEVELS),
    Bug("ends of the levels", "draws beyond the ends", LEVELS,
        "law.high if high == law.high else min(law.high, law.unstretch(last + more))",
        "law.unstretch(last + more)", OF_LEVELS),
    Bug("tied or trained tables", "a table that is changed on its way into the model", DIT,
        'model.table = None if table is None else table.to(device)',
        'model.table = None if table is None else table.to(device).mul_(1.5)', OF_ONE),
    Bug("tied or trained tables", "rows that are not of length 1", DIT,
        "return F.normalize(draw, dim=1).float().contiguous()",
        "return draw.float().contiguous() * 2", OF_DIT),
    Bug("blocks that cannot learn", "gates that are frozen at 0", DIT,
        "module.modulation.weight.zero_()",
        "module.modulation.weight.zero_().requires_grad_(False)", OF_ONE),
    Bug("blocks that cannot learn", "a condition that does not hear the noise",
        "models/dit_layers.py", "condition = self.second(F.silu(self.first(waves)))",
        "condition = self.second(F.silu(self.first(waves * 0)))", OF_DIT),
    Bug("numbers that are not had", "bits of a model without a likelihood", SAMPLING,
        'if not isinstance(merged.objective, MaskedDiffusion):', "if False:", OF_MERGING),
    Bug("numbers that are not had", "next tokens of blocks that were not taught them", DECODING,
        "if not objective.mixed_every:", "if False:", OF_DECODING),
    Bug("numbers that are not had", "half of the bound told as the whole",
        "training/blockwise/merging.py",
        "return sum(known) if len(known) == len(parts) else None",
        "return sum(known[1:]) if len(known) == len(parts) else None", OF_MERGING),
]  # fmt: skip

LEFT_OUT = {
    "unused weights of data-parallel training": "a block's job is one process",
    "noise levels as numbers of a compiled graph": "nothing is compiled here",
    "perplexity of samples without their diversity": "no sample is scored by another model",
}
