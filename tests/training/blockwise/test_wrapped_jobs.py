"""Blocks of a transformer of diffusers as jobs: trained apart, merged, drawn from."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoestring.errors import CheckpointError, ConfigError, DataError
from shoestring.training.blockwise import sampling, task
from shoestring.training.blockwise.config import BlockwiseConfig
from shoestring.training.blockwise.every import train_every_block
from shoestring.training.blockwise.job import train_block
from shoestring.training.blockwise.merging import load_merged, merge
from shoestring.training.blockwise.sampling import losses_at, sample_images
from shoestring.training.blockwise.wrapped import WrappedImages

from .conftest import IMAGES, bars, changed, elsewhere
from .test_jobs import apart_is_in_turn, call, state_of

diffusers = pytest.importorskip("diffusers", reason="pip install 'shoestring[diffusion]'")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TEXTS = {"joint_attention_dim": 12, "pooled_projection_dim": 10}
CONFIGS = {
    "dit": {
        "_class_name": "DiTTransformer2DModel", "in_channels": 1, "num_layers": 4,
        "sample_size": 8, "num_embeds_ada_norm": 5, **HEADS,
    },
    "sd3": {
        "_class_name": "SD3Transformer2DModel", "sample_size": 8, "in_channels": 1,
        "out_channels": 1, "num_layers": 2, "caption_projection_dim": 16, "pos_embed_max_size": 8,
        **HEADS, **TEXTS,
    },
    "flux": {
        "_class_name": "FluxTransformer2DModel", "in_channels": 4, "num_layers": 1,
        "num_single_layers": 1, "axes_dims_rope": [2, 2, 4], **HEADS, **TEXTS,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_of(kind, images, folder, seed=0, **settings):
    """The run of the images by a wrapped model, whose data file has what it is given."""
    model = folder / f"{kind} config"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({**CONFIGS[kind], **settings}))
    source = images.data.source
    if kind != "dit":
        draws = torch.Generator().manual_seed(seed)
        source = str(folder / f"bars and texts {seed}.safetensors")
        given = {
            "encoder_hidden_states": torch.randn(4, 3, 12, generator=draws),
            "pooled_projections": torch.randn(4, 10, generator=draws),
        }
        save_file({**bars(), **given}, source)
    return changed(
        images, run={"save_every": 0, "steps": 3},
        model={"diffusers": str(model), "num_hidden_layers": 5},  # the second does not count
        data={"source": source}, blockwise={"objective": "edm" if kind == "dit" else "flow"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By kind: a run whose blocks are trained and merged, and the networks that were trained."""
    known = {}

    def trained(kind):
        if kind not in known:
            folder, nets, real = tmp_path_factory.mktemp(kind), [], task.Task.fresh
            save_file(bars(), folder / "bars.safetensors")
            (folder / "blocks.toml").write_text(IMAGES.format(folder=folder))
            config = run_of(kind, BlockwiseConfig.load(folder / "blocks.toml"), folder)

            def kept(self, block, device):
                nets.append(real(self, block, device))
                return nets[-1]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(task.Task, "fresh", kept)
                train_every_block(config)
            merge([config.run.directory])
            known[kind] = config, nets
        return known[kind]

    return trained


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_merged_model_draws_and_each_step_runs_its_owner_alone(kind, trained):
    config, _ = trained(kind)
    merged = load_merged(config.run.directory)
    for block in (1, 2):
        saved = state_of(config, block)
        for name, value in merged.model.block(block).state_dict().items():
            assert torch.equal(value, saved[f"weights {name}"])
    ran = []
    for block in (1, 2):
        for layer in merged.model.block(block).layers:
            layer.register_forward_hook(lambda *_, block=block: ran.append(block))
    drawn = sample_images(merged, 3, steps=4, labels=[0, 1, 2], seed=1)
    assert drawn.shape == (3, 1, 8, 8)
    assert bool(drawn.isfinite().all())
    # Four levels: a call each, and none at time 0 of a flow, where nothing is left to do.
    levels = merged.partition.grid(4)[: 4 if kind == "dit" else 3]
    owners = merged.partition.route(torch.tensor(levels, dtype=torch.float64)).tolist()
    share = len(merged.model.block(1).layers)
    assert ran == [block for block in owners for _ in range(share)]
    assert set(owners) == {1, 2}
    assert torch.equal(drawn, sample_images(merged, 3, steps=4, labels=[0, 1, 2], seed=1))
    others = sample_images(merged, 3, steps=4, labels=[1, 2, 0], seed=1)
    assert not torch.equal(drawn, others)
    assert not torch.equal(drawn, sample_images(merged, 3, steps=4, seed=1))
    guided = sample_images(merged, 3, steps=4, labels=[0, 1, 2], guidance=2.0, seed=1)
    assert not torch.equal(drawn, guided)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_merged_model_knows_what_its_blocks_know(kind, trained):
    """The same answers as the networks that were trained, with all that is in no state."""
    config, nets = trained(kind)
    merged = load_merged(config.run.directory)
    pixels, labels = task.task_of(config).held_out.batch(torch.arange(6))
    for block in (1, 2):
        level = torch.full((6,), 0.5 * sum(merged.partition.range(block)))
        net = nets[block - 1].block(block).eval()
        with torch.no_grad():
            wanted = merged.objective.denoised(net, pixels, level, labels)
        got = sampling.denoised(merged, pixels, float(level[0]), labels)
        assert torch.equal(got, wanted)
    assert all(loss > 0 for loss in losses_at(merged, pixels, labels, [0.3, 0.9]))


def test_blocks_trained_apart_are_those_trained_in_turn_with_dropout_too(images, folder):
    apart_is_in_turn(run_of("dit", images, folder, dropout=0.1), folder)


def test_dropout_drawn_from_what_was_before_is_seen(images, folder, monkeypatch):
    monkeypatch.setattr(WrappedImages, "loss", task.Images.loss)
    with pytest.raises(AssertionError):
        apart_is_in_turn(run_of("dit", images, folder, dropout=0.1), folder)


def test_what_is_given_is_shared_and_compared(images, folder):
    one = elsewhere(run_of("sd3", images, folder), folder / "one")
    other = elsewhere(run_of("sd3", images, folder, seed=1), folder / "other")
    train_block(one, 1)
    train_block(other, 2)
    with pytest.raises(ConfigError, match="table is"):
        merge([one.run.directory, other.run.directory])
    train_block(one, 2)
    merged = load_merged(merge([one.run.directory]))
    data = load_file(one.data.source)
    rows = [data[name].flatten(1) for name in ("encoder_hidden_states", "pooled_projections")]
    assert torch.equal(merged.model.table, torch.cat(rows, dim=1))


def test_blocks_of_other_models_are_told_apart(images, folder):
    one = elsewhere(run_of("dit", images, folder), folder / "one")
    train_block(one, 1)
    other = elsewhere(run_of("dit", images, folder, norm_eps=1e-6), folder / "other")
    train_block(other, 2)
    with pytest.raises(ConfigError, match=r"model\.settings\.norm_eps is"):
        merge([one.run.directory, other.run.directory])
    with pytest.raises(ConfigError, match="norm_eps"):
        train_block(changed(other, run={"directory": one.run.directory}), 1)


def test_from_the_command_line(images, folder, capsys):
    config = run_of("dit", images, folder)
    (folder / "run.toml").write_text(config.to_toml())
    code, line = call(capsys, "train", folder / "run.toml")
    assert (code, line["event"], line["receipt"]["status"]) == (0, "done", "finished")
    assert call(capsys, "merge", config.run.directory)[0] == 0
    code, _ = call(capsys, "sample", config.run.directory, "--count", 4, "--labels", 0, 1)
    assert code == 0
    assert (folder / "run" / "samples.png").stat().st_size > 100


def test_a_job_starts_from_the_weights_of_a_plain_model_and_reads_its_own_only(images, folder):
    config = run_of("dit", images, folder)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        settings = {k: v for k, v in CONFIGS["dit"].items() if k[0] != "_"}
        plain = diffusers.DiTTransformer2DModel(**settings)
    state, files = plain.state_dict(), folder / "weights"
    files.mkdir()
    (one, two) = ({n: v for n, v in state.items() if ("blocks.3" in n) == is_last}
                  for is_last in (False, True))  # fmt: skip
    save_file(one, files / "part-1.safetensors")
    save_file(two, files / "part-2.safetensors")
    config = changed(config, model={"weights": str(files)})
    made = task.task_of(config).fresh(2, torch.device("cpu"))
    own = made.block(2).net.state_dict()
    assert {name.split(".")[1] for name in own if "blocks" in name} == {"2", "3"}
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    (files / "part-2.safetensors").unlink()
    train_block(config, 1)  # whose weights are all there
    with pytest.raises(CheckpointError, match=r"has no transformer_blocks\.3"):
        train_block(config, 2)
    save_file({**state, "proj_out_2.bias": torch.zeros(3)}, files / "part-1.safetensors")
    with pytest.raises(CheckpointError, match=r"proj_out_2\.bias .* is \(3,\).*\(4,\)"):
        train_block(config, 2)
    with pytest.raises(CheckpointError, match="holds no weights"):
        train_block(changed(config, model={"weights": str(folder / "none")}), 2)
    with pytest.raises(ConfigError, match=r"model\.diffusers is not"):
        changed(images, model={"weights": "x"})


# ---- what is refused ---------------------------------------------------------------------------


def test_data_without_what_the_model_is_given_is_named(images, folder):
    config = run_of("sd3", images, folder)
    bare = changed(config, data={"source": images.data.source})
    with pytest.raises(DataError, match=r"encoder_hidden_states .* is missing.*\(4, \.\.\.\)"):
        train_block(bare, 1)
    save_file({**load_file(config.data.source), "pooled_projections": torch.zeros(3, 10)},
              folder / "short.safetensors")  # fmt: skip
    short = changed(config, data={"source": str(folder / "short.safetensors")})
    with pytest.raises(DataError, match=r"pooled_projections .* is \(3, 10\)"):
        train_block(short, 1)
    assert not (folder / "run" / "block-1" / "checkpoints").exists()


def test_latents_may_be_any_finite_numbers(images, folder):
    config = run_of("dit", images, folder)
    data = load_file(config.data.source)
    for top, is_fine in ((5.0, True), (float("inf"), False)):
        pixels = data["images"].float() / 255
        pixels[0, 0, 0, 0] = top
        save_file({**data, "images": pixels}, folder / f"latents {top}.safetensors")
        latents = changed(config, data={"source": str(folder / f"latents {top}.safetensors")})
        if is_fine:
            assert float(task.task_of(latents).train.images.max()) <= 5.0
        else:
            with pytest.raises(DataError, match="not finite"):
                task.task_of(latents)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 3}, r"images of 1 channels for DiTTransformer2DModel.*expected 3"),
        ({"num_layers": 3}, r"3 layers of DiTTransformer2DModel in 2 blocks.*nearest: 1 or 3"),
        ({"num_embeds_ada_norm": 2}, "3 classes, and num_embeds_ada_norm .* is 2"),
        ({"_class_name": "UViT2DModel"}, "UViT2DModel"),
        ({"_class_name": 7}, "names no class"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(images, folder, settings, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        train_block(run_of("dit", images, folder, **settings), 1)


def test_a_config_that_is_not_there_and_objectives_of_other_things_are_refused(images, folder):
    with pytest.raises(ConfigError, match="'nowhere' cannot be read"):
        train_block(changed(images, model={"diffusers": "nowhere"}), 1)
    with pytest.raises(ConfigError, match=r"model\.diffusers with objective 'masked'"):
        changed(images, model={"diffusers": "x"}, blockwise={"objective": "masked"})
