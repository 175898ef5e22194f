"""Settings of a run: strict reading, exact writing, messages."""

import tomllib
from dataclasses import fields, is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.errors import ConfigError
from shoestring.training import toml
from shoestring.training.config import (
    PRESETS,
    DataConfig,
    JobConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    RunConfig,
)


def read(text):
    return toml.from_table(tomllib.loads(text), RunConfig)


def test_empty_file_is_all_defaults():
    assert read("") == RunConfig()


def test_settings_are_read_into_their_sections():
    config = read(
        '[run]\nsteps = 7\nbudget = "6 GiB"\n[optim]\nlr = 1\nbetas = [0.8, 0.9]\n'
        '[model]\nhidden_size = 32\nrule = "feistel"\n[plan]\nnever = ["keep"]\n'
    )
    assert config.run.steps == 7
    assert config.run.budget_bytes == 6 * 2**30
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.optim.betas == (0.8, 0.9)
    assert config.model.hidden_size == 32
    assert config.plan.never == ("keep",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlrr = 1", "unknown setting optim.lrr. Did you mean 'optim.lr'?"),
        ("[optin]\nlr = 1", "unknown setting optin. Did you mean 'optim'?"),
        ("[optim]\nqqqqqq = 1", "setting optim.qqqqqq; expected one of optim.name, optim.lr"),
        ('[optim]\nlr = "fast"', "optim.lr = 'fast' cannot be used; expected a number"),
        ("[run]\nsteps = 1.5", "run.steps = 1.5 cannot be used; expected a whole number"),
        ("[run]\nsteps = true", "run.steps = True cannot be used; expected a whole number"),
        ("[run]\ndirectory = 3", "run.directory = 3 cannot be used; expected a string"),
        ("[plan]\nguard = 1", "plan.guard = 1 cannot be used; expected true or false"),
        ("run = 3", "run = 3 is not a table; expected a table [run]"),
        ("[optim]\nbetas = [0.9]", "expected a list of numbers, 2 long"),
        ("[optim]\nbetas = 0.9", "optim.betas = 0.9 cannot be used; expected a list"),
        ("[plan]\nonly = [1]", "plan.only[0] = 1 cannot be used; expected a string"),
        ('[model]\nrule = "feistle"', "Did you mean 'feistel'?"),
        ('[schedule]\nkind = "linear"', "expected one of cosine, wsd, constant"),
        ('[precision]\ncompute = "fp16"', "expected one of fp32, bf16"),
        ("[model]\nhidden_size = []", "model.hidden_size = [] cannot be used"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(text, message):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("[optim]\nlr = -1", "optim.lr = -1.0", "more than 0"),
        ("[optim]\nlr = nan", "optim.lr = nan", "more than 0"),
        ("[optim]\nlr = inf", "optim.lr = inf", "more than 0"),
        ("[optim]\nbetas = [0.9, 1.0]", "optim.betas = (0.9, 1.0)", "below 1"),
        ("[optim]\naccumulate = 0", "optim.accumulate = 0", "1 or more"),
        ("[run]\nsteps = 0", "run.steps = 0", "1 or more"),
        ("[run]\nseed = -1", "run.seed = -1", "0 or more"),
        ('[run]\ndirectory = " "', "run.directory = ' '", "a folder"),
        ('[run]\ndevice = "gpu"', "run.device = 'gpu'", "auto, cpu, cuda or cuda:N"),
        ('[run]\nbudget = "6 Gib/s"', "run.budget: '6 Gib/s'", "auto, none, or a number of bytes"),
        ('[run]\nbudget = "0"', "run.budget: '0'", "auto, none"),
        ("[data]\nheld_out = 0", "data.held_out = 0.0", "between 0 and 1"),
        ("[data]\nvocabulary = 256", "data.vocabulary = 256", "259 or more"),
        ('[data]\nsource = ""', "data.source = ''", "a file, folder or name"),
        ("[schedule]\nwarmup_share = 1.5", "schedule.warmup_share = 1.5", "from 0 to 1"),
        ('[model]\npreset = "big"', "model.preset = 'big'", "tiny, deep, small, gpt2"),
        ("[model]\ndropout = 1", "model.dropout = 1.0", "a share below 1"),
        ("[model]\nhidden_size = 100", "model.hidden_size = 100", "multiple of twice"),
        ("[model]\nnum_key_value_heads = 3", "model.num_key_value_heads = 3", "a divisor of 4"),
        ("[model]\nfrom_scratch = true", "model.from_scratch = True", "model.name with it"),
        ("[evaluate]\nbatches = 0", "evaluate.batches = 0", "1 or more"),
    ],
)
def test_out_of_range_names_field_value_and_range(text, name, expected):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert name in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[model]\nname = "m"\nhidden_size = 64', "model.hidden_size is set beside model.name"),
        ('[model]\nname = "m"\nrule = "bdia"', "makes another network out of m"),
        (
            "[model]\nmax_position_embeddings = 64",
            "data.sequence_length = 256 is longer than model.max_position_embeddings = 64",
        ),
        (
            '[schedule]\nkind = "wsd"\nwarmup_share = 0.5\ndecay_share = 0.6',
            "schedule.decay_share = 0.6",
        ),
        ('[plan]\nonly = ["keep"]\nnever = ["keep"]', "plan.never = ('keep',)"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert message in str(caught.value)


def test_reversible_rule_on_a_pretrained_model_needs_leave():
    model = ModelConfig(name="m", rule="bdia")
    assert RunConfig(model=model, run=JobConfig(allow="structural")).model.rule == "bdia"
    assert RunConfig(model=replace(model, from_scratch=True)).model.rule == "bdia"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"[run", "is not TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"[run]\nstep = 1", "run.toml: unknown setting run.step. Did you mean 'run.steps'?"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, message):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_written_config_reads_back_equal(tmp_path):
    config = RunConfig(
        run=JobConfig(directory='a "b"\\c\n\t\x7f', budget="300MiB"),
        model=ModelConfig(preset="small", dropout=0.1, num_key_value_heads=2),
        optim=OptimConfig(lr=1 / 3, eps=1e-30),
        plan=PlanConfig(only=("keep", "recompute"), guard=False),
    )
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert RunConfig.load(tmp_path / "config.toml") == config


@given(
    directory=st.text(min_size=1).filter(lambda s: bool(s.strip())),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    names=st.lists(st.text(), max_size=3),
    width=st.none() | st.integers(1, 100).map(lambda n: 8 * n),
)
def test_any_config_survives_writing(directory, lr, names, width):
    config = RunConfig(
        run=JobConfig(directory=directory),
        optim=OptimConfig(lr=lr),
        plan=PlanConfig(only=tuple(names)),
        model=ModelConfig(hidden_size=width),
    )
    assert read(config.to_toml()) == config


def test_every_setting_is_written():
    text = RunConfig().to_toml()
    for section in fields(RunConfig):
        settings = getattr(RunConfig(), section.name)
        assert f"[{section.name}]" in text
        assert is_dataclass(settings)
        for entry in fields(settings):
            is_none = getattr(settings, entry.name) is None
            assert (f"\n{entry.name} = " in text) or is_none, entry.name


def test_settings_cannot_be_changed_or_given_by_position():
    with pytest.raises(AttributeError):
        RunConfig().run.steps = 3
    with pytest.raises(TypeError):
        DataConfig("stdlib")


def test_shape_of_our_gpt_is_the_preset_with_what_is_given():
    assert ModelConfig().gpt_fields() == PRESETS["deep"]
    given_width = ModelConfig(preset="tiny", hidden_size=32).gpt_fields()
    assert given_width == PRESETS["tiny"] | {"hidden_size": 32}
