"""`shoestring plan`: the page, the inverse questions, and several models at once."""

import json

import pytest

from shoestring.cli.main import main

RUN = """
[run]
directory = "{directory}"
budget = "8MiB"
[model]
preset = "tiny"
num_hidden_layers = 2
hidden_size = 32
num_attention_heads = 1
[data]
vocabulary = 300
sequence_length = 32
batch_size = 2
[plan]
only = ["keep", "recompute"]
"""
# Bitwise: fewer methods, so less to measure where methods are not the question.
SIZES = ("--batch-size", "2", "--sequence-length", "16", "--allow", "bitwise")


@pytest.fixture
def call(capsys):
    """(exit code, JSON, text for people) of `plan` called with --json."""

    def plan(*args):
        code = main(["plan", *map(str, args), "--json"])
        out, err = capsys.readouterr()
        lines = [json.loads(line) for line in out.splitlines()]
        assert len(lines) <= 2
        return code, lines, err

    return plan


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Configs of three sizes, the largest first."""
    from transformers import LlamaConfig

    folder, paths = tmp_path_factory.mktemp("models"), []
    for width in (128, 64, 32):
        paths.append(folder / f"width-{width}")
        LlamaConfig(
            vocab_size=200, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=256, architectures=["LlamaForCausalLM"],
        ).save_pretrained(paths[-1])  # fmt: skip
    return paths


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(directory=tmp_path / "run"))
    return path


# ---- in turns -----------------------------------------------------------------------------------


def test_a_run_in_turns_is_planned_as_it_is_trained(call, run_file):
    with run_file.open("a") as file:
        file.write("\n[turns]\nblocks = 2\nsteps = 3\n[denoise]\nmode = 'mixed'\n")
    code, [found], _ = call(run_file, "--budget", "1GiB")
    assert code == 0
    turns = found["methods"][0]
    assert turns["method"] == "block_coordinate"
    assert turns["config"]["steps"] == 3
    code, [less], _ = call(run_file, "--budget", found["peak_bytes"] - 1)
    assert code == 0
    assert less["peak_bytes"] < found["peak_bytes"]
    assert call(run_file, "--budget", "1KiB")[0] == 3
    code, _, message = call(run_file, "--max", "batch")
    assert code == 2
    assert "--max is given beside turns.blocks = 2" in message


# ---- the page -----------------------------------------------------------------------------------


def test_page_is_written_and_has_the_plan(call, models, tmp_path):
    out = tmp_path / "plan.html"
    code, [found], _ = call(models[2], *SIZES, "--budget", "4MiB", "--page", out)
    assert code == 0
    assert found["page"] == str(out)
    text = out.read_text()
    assert "width-32 - Shoestring plan" in text
    assert f'data-peak="{found["peak_bytes"]}"' in text
    assert "torch 2." in text


def test_page_is_written_even_where_nothing_fits(call, models, tmp_path):
    out = tmp_path / "plan.html"
    code, [found], _ = call(models[2], *SIZES, "--budget", "10KiB", "--page", out)
    assert code == 3
    assert f'data-peak="{found["error"]["smallest_bytes"]}"' in out.read_text()


def test_page_of_a_run_is_that_of_its_plan(call, run_file, tmp_path):
    out = tmp_path / "plan.html"
    code, [found], _ = call(run_file, "--page", out)
    assert code == 0
    assert f'data-peak="{found["peak_bytes"]}"' in out.read_text()


def test_a_page_that_cannot_be_written_is_bad_usage(call, models, tmp_path):
    code, lines, _ = call(models[2], *SIZES, "--budget", "4MiB", "--page", tmp_path)
    assert code == 2
    assert "is a directory" in lines[-1]["error"]["message"]


# ---- the inverse questions ----------------------------------------------------------------------


def test_max_batch_plans_the_largest_that_fits(call, models):
    code, [found], text = call(models[2], *SIZES, "--budget", "2MiB", "--max", "batch")
    answer = found["max"]["batch"]
    assert code == 0
    assert answer["peak_bytes"] <= 2 << 20 < answer["next_bytes"]
    assert found["peak_bytes"] <= 2 << 20
    more = ("--batch-size", answer["size"] + 1, *SIZES[2:], "--budget", "2MiB")
    assert call(models[2], *more)[0] == 3
    assert f"largest batch: {answer['size']} rows" in text


def test_max_length_stops_at_the_positions_of_the_model(call, models):
    code, [found], text = call(models[2], *SIZES, "--budget", "1GiB", "--max", "length")
    assert code == 0
    assert found["max"]["length"]["size"] == 256
    assert found["max"]["length"]["next_bytes"] is None
    assert "the model has no more positions" in text


def test_max_budget_is_the_smallest_that_works(call, models):
    code, [found], _ = call(models[2], *SIZES, "--max", "budget")
    smallest = found["max"]["budget"]["size"]
    assert code == 0
    assert found["budget_bytes"] == found["peak_bytes"] == smallest
    assert call(models[2], *SIZES, "--budget", smallest - 1)[0] == 3


def test_max_without_a_name_answers_all_and_plans_nothing(call, models):
    code, [found], text = call(models[2], *SIZES, "--budget", "2MiB", "--max")
    assert code == 0
    assert set(found) == {"max"}
    assert set(found["max"]) == {"batch", "length", "budget"}
    assert text.count("simulated") == 2


@pytest.mark.slow  # half a dozen plans, as for a config
def test_max_of_a_run_uses_its_settings(call, run_file):
    code, [found], _ = call(run_file, "--max", "batch")
    assert code == 0
    assert found["max"]["batch"]["budget_bytes"] == 8 << 20
    assert found["peak_bytes"] <= 8 << 20 < found["max"]["batch"]["next_bytes"]


def test_max_says_what_would_do_where_no_size_fits(call, models):
    code, lines, _ = call(models[2], *SIZES, "--budget", "100KiB", "--max", "batch")
    assert code == 3
    assert lines[-1]["error"]["smallest_bytes"] > 100 << 10


# ---- several models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def needs(models):
    """Smallest budgets with all weights trained."""
    from shoestring.planner import planner_for_config

    return [
        planner_for_config(
            m, batch_size=2, sequence_length=16, seconds=False, allow="bitwise"
        ).smallest_bytes
        for m in models
    ]


def test_of_several_models_the_largest_that_fits_is_told(call, models, needs):
    budget = needs[1] + 1
    code, [found], text = call(*models, *SIZES, "--budget", budget, "--lora-rank", "0")
    assert code == 0
    assert [(f["model"], f["fits"]) for f in found["models"]] == [
        (str(models[0]), False), (str(models[1]), True), (str(models[2]), True)
    ]  # fmt: skip
    assert [f["smallest_bytes"] for f in found["models"]] == needs
    assert found["best"]["model"] == found["largest_in_full"]["model"] == str(models[1])
    assert "not tried: LoRA" in text
    assert f"largest that fits: {models[1]}" in text.replace("\n", "")


def test_a_model_that_does_not_fit_whole_may_with_an_adapter(call, models, needs):
    pytest.importorskip("peft")
    code, [found], _ = call(*models[:2], *SIZES, "--budget", needs[0] - 1, "--lora-rank", "4")
    assert code == 0
    first = [f for f in found["models"] if f["model"] == str(models[0])]
    assert [f["arm"]["rank"] for f in first] == [0, 4]
    assert found["best"]["arm"]["rank"] == 4
    assert found["best"]["trained"] < found["best"]["parameters"]
    assert found["largest_in_full"]["model"] == str(models[1])


@pytest.mark.slow  # planned twice
def test_fewer_bits_of_frozen_weights_need_less(call, models):
    pytest.importorskip("peft")
    lora = (models[0], *SIZES, "--lora-rank", "4", "--max", "budget")
    sizes = [call(*lora, "--bits", bits)[1][0]["max"]["budget"]["size"] for bits in (32, 16)]
    assert sizes[1] < sizes[0]


def test_without_peft_the_adapter_is_named_as_not_tried(call, models, monkeypatch, needs):
    monkeypatch.setattr("shoestring.planner.adapters.has_peft", lambda: False)
    code, [found], text = call(*models[1:], *SIZES, "--budget", max(needs))
    assert code == 0
    assert "LoRA: peft is not installed" in " ".join(found["not_tried"])
    assert "peft is not installed" in text


def test_what_a_loop_hands_over_may_be_planned(call, models):
    least = [
        call(models[0], *SIZES, "--max", "budget", *more)[1][0]["max"]["budget"]["size"]
        for more in ((), ("--hands-over", "optimizer"))
    ]
    assert least[1] < least[0]


def test_where_no_model_fits_the_least_need_is_told(call, models, needs):
    code, lines, _ = call(*models[1:], *SIZES, "--budget", "50KiB", "--lora-rank", "0")
    assert code == 3
    assert lines[-1]["error"]["smallest_bytes"] == needs[2]
    assert len(lines[0]["models"]) == 2


# ---- what cannot be used ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no MODEL is given"),
        (["a", "b", "--page", "x.html"], "--page is given where no single plan"),
        (["a", "b", "--max", "batch"], "--max is given beside several models"),
        (["a", "b.toml"], "b.toml is given beside other models"),
        (["a", "--max", "--save", "x.json"], "--save is given where no single plan"),
        (["a", "--bits", "16"], "--bits 16 is given without --lora-rank"),
        (["a", "--lora-rank", "-1"], "--lora-rank -1 cannot be used"),
        (["a", "--max", "size"], "size"),
    ],
)
def test_flags_that_do_not_go_together_are_bad_usage(call, args, message):
    code, lines, _ = call(*args)
    assert code == 2
    assert message in lines[-1]["error"]["message"]


def test_a_run_takes_no_adapter(call, run_file):
    code, lines, _ = call(run_file, "--hands-over", "optimizer")
    assert code == 2
    assert "a loop of its own" in lines[-1]["error"]["message"]
    code, lines, _ = call(run_file, "--lora-rank", "4")
    assert code == 2
    assert "train trains all weights" in lines[-1]["error"]["message"]


def test_a_run_that_brings_its_plan_has_no_page(call, run_file, tmp_path):
    saved = tmp_path / "plan.json"
    assert call(run_file, "--save", saved)[0] == 0
    text = run_file.read_text().replace("[plan]", f'[plan]\nfile = "{saved}"')
    run_file.write_text(text)
    code, [found], _ = call(run_file)
    assert (code, found["peak_bytes"]) == (0, json.loads(saved.read_text())["peak_bytes"])
    code, lines, _ = call(run_file, "--page", tmp_path / "x.html")
    assert code == 2
    assert "--page is given beside plan.file" in lines[-1]["error"]["message"]
