"""tests/bench/compare.py: which cells a study runs, and what it makes of them."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import compare  # noqa: E402
import data  # noqa: E402
import report  # noqa: E402
import speft  # noqa: E402
import studies  # noqa: E402
import summaries  # noqa: E402


class Study:
    """Cells whose validation loss is `loss(rate, seed)`, or that of their method; and those that were run."""

    def __init__(self, monkeypatch, folder, loss):
        self.ran, self.best, self.before, self.loss = [], [], [], loss
        (folder / "data" / "results").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(compare, "ROOT", folder)
        monkeypatch.setattr(compare, "run_cell", self.run)

    def run(self, study, cell, best, before):
        self.ran.append(cell)
        self.best.append(best)
        self.before.append(before)
        rate = float(cell["lr"])
        of_method = self.loss[cell["method"]] if isinstance(self.loss, dict) else self.loss
        loss = of_method(rate, cell["seed"])
        if loss is None:
            return cell | {"lr": rate, "failed": "not finite"}
        measured = dict.fromkeys(("val_before", "source_before", "step_seconds", "score_seconds"), 1.0)
        losses = {"val_after": loss, "test_after": loss + 1, "source_after": loss + 3}
        return cell | losses | measured | {"lr": rate, "trained": 7, "peak_memory_bytes": 1e9}


@pytest.mark.parametrize("best", ("3e-5", "1e-3", "1e-2", "1e-1"))
def test_the_best_rate_is_found_and_lies_inside_the_grid(tmp_path, monkeypatch, capsys, best):
    far = studies.RATES.index(best)
    study = Study(monkeypatch, tmp_path, lambda rate, _: abs([*map(float, studies.RATES)].index(rate) - far))
    results = compare.Results("prose")
    assert compare.tune(results, studies.sparse("grad"))[0] == best
    tried = {row["lr"] for row in results.rows}
    assert min(tried) < float(best) < max(tried)
    assert len(study.ran) == len(tried)  # none of them twice


def test_an_interrupted_study_goes_on_and_its_table_counts_seeds(tmp_path, monkeypatch, capsys):
    def loss(rate, seed):
        return None if rate > 0.02 else abs(rate - 0.01) + seed / 10

    chosen = studies.sparse("grad")
    study = Study(monkeypatch, tmp_path, loss)
    compare.Results("prose").get(chosen | {"seed": 0, "lr": "1e-2"})
    compare.Results("prose").get(chosen | {"seed": 0, "lr": "3e-2"})
    assert summaries.summaries(compare.Results("prose")) == []  # a lower rate may be better
    compare.tune(compare.Results("prose"), chosen)
    (summary,) = summaries.summaries(compare.Results("prose"))
    assert summary["seeds"] == 1 and summary["test_after"] == (1.0, None)
    compare.complete(compare.Results("prose"), chosen, (0, 1, 2))
    assert [(cell["lr"], cell["seed"]) for cell in study.ran] == [
        ("1e-2", 0), ("3e-2", 0), ("3e-3", 0), ("1e-2", 1), ("1e-2", 2)
    ]  # fmt: skip
    assert study.best == [math.inf, 0.0, 0.0, math.inf, math.inf]  # of the setting and the seed, until then
    assert study.before == [None] + [{"val_before": 1.0, "source_before": 1.0}] * 4
    (summary,) = summaries.summaries(compare.Results("prose"))
    error = statistics.stdev((1.0, 1.1, 1.2)) / 3**0.5
    assert summary["seeds"] == 3 and summary["lr"] == 0.01
    assert summary["test_after"] == pytest.approx((1.1, error))
    assert summary["forgetting"] == pytest.approx((2.1, error))
    lines = (tmp_path / "data/results/prose.jsonl").read_text().splitlines()
    assert len(lines) == 5 and "failed" in json.loads(lines[1])


def test_a_sweep_runs_every_rate_with_every_seed_once(tmp_path, monkeypatch, capsys):
    study = Study(monkeypatch, tmp_path, lambda rate, seed: rate + seed)
    monkeypatch.setattr(sys, "argv", ["compare.py", "long", "--jobs", "1"])
    compare.main()
    cells = sorted((studies.name_of(cell), float(cell["lr"]), cell["seed"]) for cell in study.ran)
    expected = []
    for rate in (5e-5, 1e-4, 3e-4, 5e-4):
        expected += [(name, rate, seed) for name in ("grad global static", "lora") for seed in (0, 1, 2)]
        expected += [(name, rate, 0) for name in ("full", "random global static")]
    assert cells == sorted(expected)


@pytest.mark.parametrize("behind", (-0.1, 0.019, 0.021, 1.0))
def test_only_candidates_within_reach_of_lora_run_with_all_seeds(tmp_path, monkeypatch, capsys, behind):
    candidate = studies.STUDIES["prose"].candidates[0]
    losses = {"lora": lambda rate, seed: abs(rate - 0.01)}
    losses[candidate["method"]] = lambda rate, seed: abs(rate - 0.03) + behind
    study = Study(monkeypatch, tmp_path, losses)
    compare.complete(compare.Results("prose"), candidate, (0, 1, 2))
    ran = [cell["seed"] for cell in study.ran if cell["method"] == candidate["method"]]
    assert ran == ([0, 0, 0, 1, 2] if behind < studies.REACH else [0, 0, 0])
    assert {cell["seed"] for cell in study.ran if cell["method"] == "lora"} == {0}


def test_differences_from_lora_are_taken_seed_by_seed(tmp_path, monkeypatch, capsys):
    losses = {
        "lora": lambda rate, seed: abs(rate - 0.01) + (0.1, 0.5, 0.3)[seed],
        "sparse": lambda rate, seed: abs(rate - 0.01) + (0.2, 0.55, 0.45)[seed],
    }
    Study(monkeypatch, tmp_path, losses)
    results = compare.Results("prose")
    for chosen in (studies.setting("lora"), studies.sparse("grad"), studies.sparse("grad", density=0.03)):
        compare.complete(results, chosen, (0, 1, 2))
    table = {(row["method"], row["density"]): row for row in summaries.summaries(results)}
    apart = (0.1, 0.05, 0.15)
    wanted = statistics.fmean(apart), statistics.stdev(apart) / 3**0.5
    assert table["sparse", 0.01]["from_lora"]["test_after"] == pytest.approx(wanted)
    assert table["sparse", 0.03]["from_lora"] == {}  # no LoRA of that size
    assert "from_lora" not in table["lora", 0.01]
    assert "+0.100 ± 0.029" in summaries.table_lines([table["sparse", 0.01]])[-1]


@pytest.mark.parametrize("seed", range(3))
def test_the_error_by_examples_is_that_of_their_mean_differences(seed):
    torch.manual_seed(seed)
    bits = torch.randint(0, 2, (2, 3, 50))  # method, seed, example
    said = [["".join(map(str, row)) for row in rows] for rows in bits.tolist()]
    runs, others = ({n: {"answers": {"right": right}} for n, right in enumerate(rows)} for rows in said)
    differences = (bits[0] - bits[1]).double().mean(0)
    assert summaries.error_by_examples(runs, others) == pytest.approx((differences.std() / 50**0.5).item())
    first = (bits[0, 0] - bits[1, 0]).double()
    runs[1] = {"answers": {"accuracy": 1.0}}  # not taken example by example
    del others[2]
    assert summaries.error_by_examples(runs, others) == pytest.approx((first.std() / 50**0.5).item())
    assert summaries.error_by_examples(runs, {3: others[0]}) is None


def test_the_long_runs_are_compared_step_by_step_and_seed_by_seed(tmp_path, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    steps, losses = (60, 120, 240, 480, 960), torch.rand(2, 3, 5, generator=rng)  # method, seed, step
    study = Study(monkeypatch, tmp_path, lambda rate, seed: float(losses[0, seed, -1]))
    run = study.run

    def with_curve(name, cell, *known):
        curve = losses[int(cell["method"] == "lora"), cell["seed"]].tolist()
        return run(name, cell, *known) | {"curve": [*zip(steps, curve)]}

    monkeypatch.setattr(compare, "run_cell", with_curve)
    for chosen, seeds in zip(studies.LONG_PAIRS["long"], ((0, 2, 1), (1, 0))):
        for seed in seeds:  # LoRA lacks a seed
            compare.Results("long").get(chosen | {"seed": seed, "lr": "1e-4"})
    (line,) = report.long_table()[2:]
    name, rate, shared, *said = line.strip("| ").split(" | ")
    apart = (losses[0, :2] - losses[1, :2]).double()
    errors = apart.std(0) / 2**0.5
    wanted = [f"{mean:+.3f} ± {error:.3f}" for mean, error in zip(apart.mean(0).tolist(), errors.tolist())]
    assert (name, rate, shared) == ("long", "0.0001", "2") and said[:5] == wanted


def test_a_seed_that_diverges_is_counted_and_named(tmp_path, monkeypatch, capsys):
    def loss(rate, seed):
        return None if seed == 2 else abs(rate - 0.01) + seed / 10

    chosen = studies.sparse("grad")
    Study(monkeypatch, tmp_path, loss)
    compare.complete(compare.Results("prose"), chosen, (0, 1, 2))
    (summary,) = summaries.summaries(compare.Results("prose"))
    assert summary["test_after"] == pytest.approx((1.05, 0.05))
    assert "(1 seeds diverged)" in summaries.table_lines([summary])[-1]


@pytest.mark.parametrize("called", ("accuracy_after", "exact_match_after"))
def test_a_single_seed_has_no_error_and_a_task_has_its_exact_match(tmp_path, monkeypatch, capsys, called):
    study = Study(monkeypatch, tmp_path, lambda rate, seed: abs(rate - 3e-3))
    run = study.run
    strict = {called: {"strict": 0.125}}
    monkeypatch.setattr(compare, "run_cell", lambda *cell: run(*cell) | strict)
    results = compare.Results("smollm2")
    compare.complete(results, *studies.STUDIES["smollm2"].runs()[-1])
    header, _, line = summaries.table_lines(summaries.summaries(results))
    told = dict(zip(header.strip("| ").split(" | "), line.strip("| ").split(" | ")))
    assert told["exact match"] == "12.5%" and told["learning rate"] == "0.003"
    assert told["test loss"] == "1.000" and told["forgetting"] == "2.000"


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_cell_is_a_command_that_train_accepts(name):
    study = studies.STUDIES[name]
    for chosen, *_ in [*study.runs(), *study.swept]:
        args = data.parse_args(compare.command(name, chosen | {"seed": 1, "lr": "3e-3"}, "x"), speft.METRICS)
        assert args.seed == 1 and args.lr == 3e-3
        assert args.method == ("full" if chosen["method"] == "full" else "sparse")
        assert args.metric == (chosen["metric"] or "grad")


@pytest.mark.slow
def test_a_cell_has_its_own_optimizer_and_measures_the_trained_model(monkeypatch):
    def measure(model, tokenizer):
        examples = data.load_examples("prose", tokenizer, 32, only=["val"])["val"]
        return {"loss": data.mean_loss(model, examples.spread(2, 2))}

    made = []

    def optimizer(params, **adamw):
        made.append(torch.optim.SGD(params, lr=0.0))
        return made[-1]

    adamw = torch.optim.AdamW
    flags = "--device cpu --steps 2 --batch-size 2 --seq-len 32 --eval-examples 2 --eval-every 1"
    study = studies.Study(flags, studies.setting("lora"), measure=measure)
    monkeypatch.setitem(studies.STUDIES, "tiny", study)
    monkeypatch.setitem(studies.OPTIMIZERS, "lora", optimizer)
    row = compare.run_here("tiny", studies.setting("lora") | {"seed": 1, "lr": "1e0"})
    behind = compare.run_here("tiny", studies.setting("lora") | {"seed": 1, "lr": "1e0"}, best=0.1)
    assert "answers" not in behind and behind["val_after"] == row["val_after"]
    known = {"val_before": 7.0}
    spared = compare.run_here("tiny", studies.setting("lora") | {"seed": 1, "lr": "1e0"}, before=known)
    assert spared["val_before"] == 7.0 and "source_before" not in spared
    assert spared["val_after"] == row["val_after"] and spared["curve"] == row["curve"]
    assert len(made) == 3 and torch.optim.AdamW is adamw  # one a run
    assert row["answers"]["loss"] == row["val_after"] != row["val_before"]
    assert [step for step, _ in row["curve"]] == [1, 2] and row["curve"][-1][1] == row["val_after"]
    assert row["study"] == "tiny" and "out" not in row
