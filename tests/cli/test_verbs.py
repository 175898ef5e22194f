"""Every verb, run for real on something tiny: JSON, exit codes, messages of bad input."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from shoestring.cli import plan
from shoestring.cli.main import main
from shoestring.planner import Plan
from shoestring.training.config import RunConfig

RUN = """
[run]
directory = "{directory}"
steps = 3
budget = "100MiB"
[model]
preset = "tiny"
rule = "feistel"
num_hidden_layers = 2
hidden_size = 32
num_attention_heads = 1
[data]
source = "{source}"
vocabulary = 300
sequence_length = 32
batch_size = 2
held_out = 0.2
[evaluate]
batches = 1
sample_tokens = 4
[plan]
never = ["chunked_mlp"]  # nothing to win at this size, and a half of the planning
"""


def call(*args):
    """(exit code, JSON lines, text for people) of a verb called with --json."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, args), "--json"])
    return code, [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOESTRING_CACHE", str(folder / "cache"))
        (folder / "notes.txt").write_text("".join(f"line {i} of a text\n" for i in range(500)))
        text = RUN.format(directory=folder / "run", source=folder / "notes.txt")
        (folder / "run.toml").write_text(text)
        yield folder


@pytest.fixture(scope="module")
def trained(here):
    return call("train", here / "run.toml")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_train_tells_every_event_as_a_line_of_json(trained):
    code, events, _ = trained
    assert code == 0
    kinds = [event["event"] for event in events]
    assert kinds.count("step") == 3
    assert kinds.count("evaluation") == 2
    assert kinds[-1] == "done"
    assert {"data", "plan", "model", "sample", "saved"} <= set(kinds)


def test_train_keeps_to_its_budget_and_says_so(trained):
    memory = trained[1][-1]["receipt"]["memory"]
    assert memory["measured_bytes"] <= memory["promised_bytes"] <= memory["budget_bytes"]
    assert "peak of live tensors" in trained[2]


def test_config_that_a_run_leaves_is_the_config_it_had(trained, here):
    assert RunConfig.load(here / "run" / "config.toml") == RunConfig.load(here / "run.toml")


def test_generate_continues_a_prompt_and_repeats_with_the_seed(trained, here):
    args = ("generate", here / "run", "--prompt", "line 3", "--tokens", "5")
    code, lines, _ = call(*args, "--seed", "1")
    assert code == 0
    assert lines[0]["prompt"] == "line 3"
    assert 0 < lines[0]["tokens"] <= 5
    assert call(*args, "--seed", "1")[1] == lines


def test_generate_without_json_writes_text_to_stdout(trained, here, capsys):
    assert main(["generate", str(here / "run"), "--prompt", "line", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("line")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--tokens", "0"], 2, "--tokens 0 cannot be used"),
        (["--temperature", "-1"], 2, "--temperature -1.0 cannot be used"),
        (["--device", "tpu"], 2, "tpu"),
    ],
)
def test_generate_refuses_what_it_cannot_use(trained, here, args, code, message):
    got, lines, _ = call("generate", here / "run", *args)
    assert got == code
    assert message in lines[-1]["error"]["message"]


def test_generate_from_nothing_names_the_place(here):
    code, lines, _ = call("generate", here / "none")
    assert code == 1
    assert "none does not exist" in lines[-1]["error"]["message"]


def test_plan_works_from_a_config_alone(llama, here):
    saved = here / "plan.json"
    code, lines, text = call(
        "plan", llama / "config.json", "--budget", "20MiB", "--batch-size", "2",
        "--sequence-length", "32", "--steps", "10", "--save", saved,
    )  # fmt: skip
    assert code == 0
    [found] = lines
    assert not list(llama.glob("*.safetensors"))
    assert found["peak_bytes"] <= found["budget_bytes"] == 20 * 2**20
    assert found["seconds_to_finish"] == pytest.approx(10 * found["step_seconds"])
    assert sum(found["by_category"].values()) == found["peak_bytes"]
    assert {row["name"] for row in found["table"]} > {"keep everything", "this plan"}
    assert "this plan" in text
    assert Plan.from_json(saved.read_text()).peak_bytes == found["peak_bytes"]


def test_plan_counts_one_pass_through_the_data(llama, here):
    data = str(here / "notes.txt")
    arguments = plan.Arguments(models=(str(llama),), data=data, sequence_length=32)
    length = plan._length(arguments, plan.subject_of_model(arguments, str(llama)))
    assert length.steps == round((here / "notes.txt").stat().st_size / 4 / 32)
    assert "4 bytes a token assumed" in length.reason


def test_plan_measures_bytes_per_token_where_a_tokenizer_lies_beside(trained, here):
    from shoestring.data import open_source

    model, source = str(here / "run" / "model"), open_source(here / "notes.txt")
    per_token, reason = plan._bytes_per_token(model, source)
    assert 1 < per_token < 20
    assert "measured on a sample" in reason


def test_plan_of_a_run_is_the_plan_that_train_makes(trained, here):
    code, [found], _ = call("plan", here / "run.toml")
    assert code == 0
    assert found["steps"] == 3
    planned = next(event for event in trained[1] if event["event"] == "plan")
    assert found["peak_bytes"] == pytest.approx(planned["plan"]["peak_bytes"], rel=0.05)


@pytest.mark.slow  # planned twice
def test_plan_of_a_run_with_a_tokenizer_of_its_own_counts_its_vocabulary(trained, here):
    text = RUN.format(directory=here / "own", source=here / "notes.txt")
    tokenizer = f'tokenizer = "{here / "run" / "model"}"'
    file = here / "own.toml"
    file.write_text(text.replace("vocabulary = 300", tokenizer))
    code, [found], _ = call("plan", file)
    assert code == 0
    _, events, _ = call("train", file)
    planned = next(event for event in events if event["event"] == "plan")
    assert found["peak_bytes"] == planned["plan"]["peak_bytes"]
    file.write_text(file.read_text().replace("run/model", "none"))
    code, lines, _ = call("plan", file)
    assert code == 2
    assert "none" in lines[-1]["error"]["message"]


@pytest.mark.parametrize(
    ("flag", "value", "setting"),
    [
        ("--batch-size", "64", "data.batch_size"),
        ("--sequence-length", "64", "data.sequence_length"),
        ("--data", "stdlib", "data.source"),
        ("--optimizer", "sgd", "optim.name"),
        ("--precision", "bf16", "precision.compute"),
        ("--allow", "bitwise", "run.allow"),
        ("--steps", "7", "run.steps"),
        ("--device", "cpu", "run.device"),
    ],
)
def test_plan_of_a_run_refuses_flags_that_it_would_ignore(here, flag, value, setting):
    code, lines, _ = call("plan", here / "run.toml", flag, value)
    assert code == 2
    message = lines[-1]["error"]["message"]
    assert f"{flag} {value} is given beside" in message
    assert setting in message


def test_plan_counts_weights_as_train_makes_them_whatever_the_config_says(llama, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig.from_pretrained(llama, dtype="bfloat16").save_pretrained(tmp_path)
    assert '"bfloat16"' in (tmp_path / "config.json").read_text()
    args = ("--budget", "1GiB", "--sequence-length", "16")
    (_, [half], _), (_, [full], _) = call("plan", tmp_path, *args), call("plan", llama, *args)
    assert half["by_category"] == full["by_category"]


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_plan_of_what_is_no_language_model_is_bad_usage(tmp_path, kind):
    from transformers import BertConfig, ViTConfig

    if kind == "bert":
        BertConfig(num_hidden_layers=2, architectures=["BertModel"]).save_pretrained(tmp_path)
    else:
        ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    code, lines, text = call("plan", tmp_path, "--budget", "1GiB")
    assert code == 2
    assert "token ids" in lines[-1]["error"]["message"] or "labels" in text
    assert "Traceback" not in text


def test_train_refuses_a_broken_plan_file(trained, here):
    value = json.loads((here / "run" / "plan.json").read_text())
    (here / "bad.json").write_text(json.dumps({**value, "spans": [{"start": 0}]}))
    code, lines, _ = call(
        "train", here / "run.toml", "--run.directory", here / "bad", "--plan.file",
        here / "bad.json",
    )  # fmt: skip
    assert code == 2
    assert "this plan's spans cannot be read" in lines[-1]["error"]["message"]


def test_budget_that_cannot_work_says_what_would(llama):
    code, lines, text = call("plan", llama, "--budget", "100KiB", "--sequence-length", "32")
    error = lines[-1]["error"]
    assert code == error["exit_code"] == 3
    assert error["smallest_bytes"] > 100 * 2**10
    assert error["instant"]
    assert "smallest budget that works" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "6 cats"], "'6 cats' is not an amount of memory"),
        (["--budget", "6MiB", "--sequence-length", "1"], "--sequence-length 1 cannot be used"),
        (["--budget", "6MiB", "--optimizer", "adam"], "adam"),
    ],
)
def test_plan_refuses_what_it_cannot_use(llama, args, message):
    code, lines, _ = call("plan", llama, *args)
    assert code == 2
    assert message in lines[-1]["error"]["message"].replace("sequence_length", "sequence-length")


def test_plan_of_a_model_that_is_not_there_is_bad_usage(here):
    code, lines, _ = call("plan", here / "none", "--budget", "1GiB")
    assert code == 2
    assert "no model config can be had" in lines[-1]["error"]["message"]


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["--run.budget", "100KiB"], 3, "nothing fits into 100.0 KiB"),
        (["--run.budget", "6 cats"], 2, "'6 cats' is not an amount of memory"),
        (["--data.source", "none.txt"], 2, "there is no data at 'none.txt'"),
        (
            ["--run.budget", "none", "--model.rule", "residual", "--optim.lr", "1e30"],
            1,
            "step 2: the ",
        ),
    ],
)
def test_train_fails_with_a_message_and_its_exit_code(here, overrides, code, message):
    got, lines, text = call(
        "train", here / "run.toml", "--run.directory", here / "failed", *overrides
    )
    error = lines[-1]["error"]
    assert (got, error["exit_code"]) == (code, code)
    assert message in error["message"]
    assert "Traceback" not in text


def test_doctor_passes_its_self_test_here():
    code, [report], text = call("doctor")
    assert code == 0
    test = report["self_test"]
    assert test["passed"]
    assert test["equal"] == test["gradients"] > 50
    assert test["reversible_peak_bytes"] < test["stored_peak_bytes"]
    assert report["versions"]["torch"]
    assert report["devices"][0]["name"] == "cpu"
    assert "bit-identical" in text


def test_doctor_fails_when_gradients_differ(monkeypatch):
    """The self test is one that can fail: another seed for one of the two trainings."""
    import torch

    from shoestring.cli import doctor

    real = doctor._trained

    def other(*, stores):
        found = real(stores=stores)
        if stores:
            found["gradients"][0] = torch.nextafter(
                found["gradients"][0], torch.full((), float("inf"))
            )
        return found

    monkeypatch.setattr(doctor, "_trained", other)
    code, [report], text = call("doctor")
    assert code == 1
    assert not report["self_test"]["passed"]
    assert "self test FAILED: 1 of" in " ".join(text.split())


def test_watcher_counts_by_the_clock_when_minutes_end_first():
    from shoestring.cli.progress import Watcher
    from shoestring.cli.terminal import Terminal
    from shoestring.training.config import JobConfig

    watch = Watcher(Terminal(json=True), JobConfig(steps=100, minutes=1))
    watch._first_step_at = 100.0
    assert watch._share_done(10, 130.0) == (0.5, 30.0)
    assert watch._share_done(80, 130.0)[0] == 0.8
    assert watch._share_done(100, 130.0) == (1.0, 0.0)


def test_run_directory_holds_what_the_design_says(trained, here):
    names = {path.name for path in Path(here / "run").iterdir()}
    assert {"config.toml", "plan.json", "metrics.jsonl", "receipt.json", "model"} <= names
