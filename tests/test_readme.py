"""What the README shows works, and what it states is so."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import data
import report
import speft
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FILES = (ROOT / "data" / "README.md").read_text()
TORCHRUN = {"nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint"}
OTHER_PROGRAMS = TORCHRUN | {"help", "no-deps"}
ROWS = {  # the short table's names: what its runs in prose.jsonl have in common, besides the rate
    "full fine-tuning": {"method": "full"},
    "magnitude": {"metric": "magnitude", "scope": "global", "mask": "static", "density": 0.01},
    "random": {"metric": "random", "scope": "global", "mask": "static", "density": 0.01},
    "LoRA": {"method": "lora", "density": 0.01},
    "block": {"method": "random block", "density": 0.01},
    "grad": {"metric": "grad", "scope": "global", "mask": "static", "density": 0.01},
}


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_it_can_be_read_at_a_sitting():
    assert len(README.splitlines()) <= 220 and len(README) <= 16_000


@pytest.mark.slow
def test_every_python_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speft, "METRICS", dict(speft.METRICS))
    flags = "--steps 2 --batch-size 2 --seq-len 32 --score-examples 2 --eval-examples 2 --device cpu".split()
    train.main(flags)
    add_a_metric, your_own_model = snippets(README)
    exec(add_a_metric, {})
    result = train.main([*flags, "--metric", "block", "--scope", "local", "--out", "block"])
    assert result["metric"] == "block" and result["trained"] == 47172

    capsys.readouterr()
    exec(your_own_model, {})
    expected = r"74 trained; loss (\d\.\d+) to (\d\.\d+); reloaded: True\n"
    before, after = re.fullmatch(expected, capsys.readouterr().out).groups()
    assert float(after) < 0.8 * float(before)
    assert set(torch.load("mine.pt", weights_only=True)) == {"0", "2"}

    plot, use_an_adapter = snippets(FILES)
    exec(use_an_adapter, {})
    learned = data.load_model("base")
    speft.load_adapter(learned, torch.load("out/adapter.pt", weights_only=True)["adapter"])
    assert data.load_model("merged").fingerprint() == speft.merge(learned).fingerprint()
    pytest.importorskip("matplotlib").use("Agg")
    exec(plot, {})
    assert Path("out/loss.png").stat().st_size > 0


def test_the_table_of_metrics_is_complete():
    rows = re.findall(r"^\| `(\w+)` \|", README, re.M)
    assert set(speft.METRICS) <= set(rows) and len(rows) == len(set(rows))


def test_the_map_names_every_file_of_the_project():
    section = re.search(r"## Where things are.*?\n## ", README, re.S)[0]
    modules = {path.stem for path in ROOT.glob("data/*.py")} - {"__init__"}
    named = re.findall(r"^\| `data/`: (.*?) \|", section, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(named))) == sorted(modules)
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"`(\w+\.py)`", section))


@pytest.mark.parametrize("text", (README, FILES), ids=("README", "data"))
def test_the_flags_it_mentions_exist(text):
    commands = re.sub(r"python tests/bench/.*", "", text)  # these have flags of their own
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", commands)) - OTHER_PROGRAMS:
        assert flag in {*data.FLAGS, "resume"}, flag


@pytest.mark.parametrize("path", ("README.md", "data/README.md"))
def test_the_files_it_points_to_exist(path):
    text = (ROOT / path).read_text()
    for file in re.findall(r"\]\(([^):#]+)[^):]*\)", text):
        assert ((ROOT / path).parent / file).exists(), file


def test_the_fields_of_a_log_s_row_are_listed():
    source = (ROOT / "train.py").read_text()
    first = re.search(r"row = {.*", source)[0]
    fields = {*re.findall(r'"(\w+)": ', first), *re.findall(r'row\["(\w+)"\]', source)}
    assert fields == set(re.findall(r"^\| `(\w+)` \|", FILES.split("## Files of a run")[1], re.M))


def mean_and_error(values):
    """As the table writes it."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def test_what_the_short_table_tells_was_measured():
    lines = (ROOT / "data" / "results" / "prose.jsonl").read_text().splitlines()
    runs = [run for run in map(json.loads, lines) if run["flags"] == "" and "test_after" in run]
    rows = [line for line in README.splitlines() if line.startswith("|") and " ± " in line]
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [row[0] for row in cells] == [*ROWS]
    for name, rate, loss, _, forgetting, _ in cells:
        wanted = ROWS[name] | {"lr": float(rate)}
        chosen = [run for run in runs if wanted.items() <= run.items()]
        assert sorted(run["seed"] for run in chosen) == [0, 1, 2]
        assert loss == mean_and_error([run["test_after"] for run in chosen])
        assert forgetting == mean_and_error([run["source_after"] - run["source_before"] for run in chosen])


@pytest.mark.parametrize("path", report.REPORTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_report_has_the_tables_of_the_results(path):
    text = path.read_text()
    assert text.count("<!-- ") == 2 * len(re.findall(r"<!-- end of ", text)) > 0
    assert report.with_tables(text) == text
    for file in re.findall(r"\]\(([^):#]+)[^):]*\)", text):
        assert (path.parent / file).exists(), file
