"""What the README shows works, and what it states is so."""

import re
import sys
from pathlib import Path

import pytest
import torch

import data
import speft
import train

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import report  # noqa: E402

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = {"jobs", "rerun", "figures", "kills", "metrics"}  # flags of the scripts in tests/bench/


@pytest.mark.slow
def test_every_python_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speft, "METRICS", dict(speft.METRICS))
    flags = "--steps 1 --batch-size 2 --seq-len 32 --score-examples 2 --eval-examples 2 --device cpu".split()
    train.main(flags)
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) == 5
    for snippet in snippets:
        names = {}
        exec(snippet, names)
        if "model" in names:
            assert not any(
                parameter.grad is not None and parameter.dim() > 1
                for parameter in names["model"].parameters()
            )
    assert set(torch.load("mine.pt", weights_only=True)) == {"0", "2"}
    for metric in ("block", "rows"):
        result = train.main([*flags, "--metric", metric, "--scope", "local"])
        assert result["metric"] == metric and result["trained"] == 47172


def test_the_table_of_metrics_is_complete():
    rows = re.findall(r"^\| `(\w+)` \|", README, re.M)
    assert rows == ["random", "magnitude", "grad", "snip", "force", "taylor", "synflow", "grasp", "fisher"]
    assert set(rows) == set(speft.METRICS)


def test_the_flags_it_mentions_exist():
    for flag in set(re.findall(r"(?<!\w)--([a-z][a-z-]+)", README)) - {"help", "no-deps"} - BENCHMARKS:
        assert flag in {*data.FLAGS, "resume"}, flag


def test_the_files_it_points_to_exist():
    for file in re.findall(r"\]\(([^):#]+)[^):]*\)", README):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("path", report.REPORTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_report_has_the_tables_of_the_results(path):
    text = path.read_text()
    assert text.count("<!-- ") == 2 * len(re.findall(r"<!-- end of ", text)) > 0
    assert report.with_tables(text) == text
    for file in re.findall(r"\]\(([^):#]+)[^):]*\)", text):
        assert (path.parent / file).exists(), file
