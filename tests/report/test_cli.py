"""`shoestring report`: where the page goes, JSON, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

from shoestring.cli import main as command


def test_report_writes_into_the_run_and_says_where(run, capsys):
    directory = run()
    assert command.main(["report", str(directory), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(directory / "report.html")
    assert found["runs"] == [str(directory)]
    assert found["bytes"] == (directory / "report.html").stat().st_size


def test_report_of_several_runs_goes_where_it_is_told(run, tmp_path, capsys):
    out = tmp_path / "both.html"
    assert command.main(["report", str(run("a")), str(run("b")), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert "2 runs" in out.read_text()


def test_report_of_no_run_fails_with_a_message(tmp_path, capsys):
    assert command.main(["report", str(tmp_path), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "CheckpointError"
    assert "is no run" in error["message"]
    assert command.main(["report"]) == 2


def test_style_and_script_are_data_of_the_package():
    """Found as an installed package finds them, and without torch."""
    code = (
        "import sys\nfrom importlib.resources import files\n"
        "from shoestring.report import page\n"
        "assert all((files('shoestring.report') / n).is_file() for n in ('style.css', 'page.js'))\n"
        "sys.exit('torch' in sys.modules)"
    )
    source = Path(command.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(source)})
    assert done.returncode == 0
