"""tests/bench/curves.py: what is drawn of which run, and what cannot be."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import curves  # noqa: E402


def write_run(folder, losses, every):
    """A run's folder with a log of these losses and a validation loss every so many steps."""
    rows = [{"step": n, "loss": loss, "lr": 0.1} for n, loss in enumerate(losses, 1)]
    for row in rows[every - 1 :: every]:
        row["val"] = row["loss"] / 2
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("steps", (1, 60, 199, 200, 1234))
def test_every_run_is_drawn_with_its_own_numbers(tmp_path, steps):
    pytest.importorskip("matplotlib")
    chance = random.Random(steps)
    losses = [[chance.uniform(2, 5) for _ in range(steps)] for _ in range(2)]
    runs = [write_run(tmp_path / name, values, every=10) for name, values in zip("ab", losses)]
    figure = curves.main([*runs, "--out", str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == runs
    for (training, validated), values in zip((axes.lines[:2], axes.lines[2:]), losses):
        assert training.get_color() == validated.get_color()
        assert validated.get_xydata().tolist() == [[n, values[n - 1] / 2] for n in range(10, steps + 1, 10)]
        drawn = training.get_xydata()
        assert min(steps, 100) <= len(drawn) < 200
        size = max(1, steps // 100)
        for (step, loss), start in zip(drawn, range(0, steps, size)):
            part = range(start, min(start + size, steps))
            assert step == pytest.approx(sum(part) / len(part) + 1)
            assert loss == pytest.approx(sum(values[n] for n in part) / len(part))
    assert axes.lines[0].get_color() != axes.lines[2].get_color()


@pytest.mark.parametrize(("content", "named"), (
    (None, "log.jsonl"), (b"", "no log"), (b'{"step": 1}\n', "no log"),
    (b'{"step": 1, "loss": 2}\n{"st', "line 2"),
))  # fmt: skip
def test_what_is_no_run_is_named(tmp_path, content, named):
    if content is not None:
        (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=f"^curves.py: error: .*{named}"):
        curves.main([str(tmp_path), "--out", str(tmp_path / "loss.png")])
    assert not (tmp_path / "loss.png").exists()


def test_it_names_the_package_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        curves.main([write_run(tmp_path / "a", [1.0], 1), "--out", str(tmp_path / "loss.png")])
