"""The paper's comparison: sparse fine-tuning by every metric and mask, LoRA, PiSSA and full fine-tuning.

    python tests/bench/compare.py prose              # run what is missing, then print the table
    python tests/bench/compare.py prose --jobs 0     # only the table
    python tests/bench/compare.py prose --rerun 3    # run the results file's third row again, and show both

Every cell is a fresh process of one thread, from the same base and in the same data order, whose result is
a line of data/results/STUDY.jsonl. Cells that are there already are skipped, so an interrupted study goes on.
A row of the table is one setting: its learning rate is the one of the lowest validation loss on seed 0, on a
grid that grows until the best rate is inside it; the other seeds then run at that rate. A few settings are
also swept over the rates that the paper tried.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

import baselines  # noqa: E402
import train  # noqa: E402

RATES = [f"{digit}e{power}" for power in range(-6, 1) for digit in (1, 3)]
# The rate to try first, by method or metric, and of all others by study.
START = {"lora": "1e-2", "pissa": "3e-3", "full": "3e-4", "random": "3e-2", "magnitude": "3e-2"}
START |= {"random block": "3e-2", "grad moved lines": "1e-2", "grad moved entries": "1e-2"}
START |= {"prose": "1e-2", "smollm2": "3e-3"}
ADAPT = {  # method: what takes the place of scoring and masking
    "lora": baselines.lora,
    "pissa": baselines.pissa,
    "random block": baselines.block,
    "grad moved lines": functools.partial(baselines.moved, lines=True),
    "grad moved entries": functools.partial(baselines.moved, lines=False),
    "grad after a warm-up": baselines.warmed,
    "grad at layers' rates": baselines.relative,
}
METRICS = ("grad", "snip", "force", "fisher", "grasp", "synflow", "magnitude", "random")  # taylor is snip
SETTING = ("method", "metric", "scope", "mask", "density", "flags")  # what makes a row of the table


def setting(method, density=0.01, metric=None, scope=None, mask=None, flags=""):
    """A row of the table; flags: more of train.py's, which come after the study's."""
    return dict(zip(SETTING, (method, metric, scope, mask, density, flags)))


def sparse(metric, scope="global", mask="static", density=0.01, flags=""):
    return setting("sparse", density, metric, scope, mask, flags)


def unique(settings):
    return list({json.dumps(one): one for one in settings}.values())


LORA_RANK_1 = 0.005859375  # the density that rank 1 in all layers of the base comes to
GSM = 0.005
SEEDS = (0, 1, 2)
# name: (train.py's flags, settings for all SEEDS, settings for the first seed alone), the most urgent first
STUDIES = {
    "prose": (
        "--device cpu --model base --data prose --steps 60 --batch-size 8 --seq-len 128 --score-examples 64 "
        "--refresh 20 --eval-every 1000 --eval-examples 64",
        unique(
            [sparse("grad"), setting("lora"), setting("full", None), sparse("random"), setting("pissa")]
            + [sparse("grad", density=d) for d in (0.001, 0.003, LORA_RANK_1, 0.03)]
            + [setting("lora", d) for d in (LORA_RANK_1, 0.03)]
            + [sparse(metric) for metric in METRICS]
            + [sparse(metric, "local") for metric in METRICS]
            + [sparse("random", density=d) for d in (0.001, 0.003, 0.03)]
            + [setting("grad moved lines"), setting("grad moved entries")]
            + [sparse(metric, "global", "dynamic") for metric in METRICS]
            + [sparse("grad", flags="--steps 240"), sparse("random", flags="--steps 240")]
            + [setting("lora", flags="--steps 240"), setting("grad after a warm-up")]
            + [sparse(metric, "local", "dynamic") for metric in METRICS]
            + [sparse("grad", flags="--score-examples 512"), sparse("grad", flags="--score-examples 8")]
            + [setting("grad at layers' rates"), setting("random block")]
        ),
        [],
    ),
    "smollm2": (
        "--device cpu --model smollm2 --data gsm --steps 40 --batch-size 4 --seq-len 192 --score-examples 32 "
        "--refresh 20 --eval-every 1000 --eval-examples 16",
        [sparse("grad", density=GSM), setting("lora", GSM), setting("full", None)]
        + [sparse("random", density=GSM), setting("random block", GSM)],
        [sparse(metric, density=GSM) for metric in ("snip", "magnitude", "force", "fisher")]
        + [sparse("grad", "local", density=GSM), sparse("grad", "global", "dynamic", density=GSM)]
        + [setting("pissa", GSM), setting("grad moved entries", GSM), setting("grad moved lines", GSM)],
    ),
}

SWEPT = [sparse("grad"), sparse("random"), setting("lora")]  # over rates about the paper's 5e-5 to 5e-4
SWEEP = ("1e-4", "3e-4", "1e-3")


def runs(study):
    """[(setting, its seeds)]"""
    _, settings, once = STUDIES[study]
    return [(chosen, SEEDS) for chosen in settings] + [(chosen, SEEDS[:1]) for chosen in once]


# --- one cell ---


def command(study, cell, out):
    """train.py's arguments for a cell: a setting with a seed and a learning rate."""
    flags = f"{STUDIES[study][0]} {cell['flags']} --seed {cell['seed']} --lr {cell['lr']} --out {out}"
    if cell["method"] == "full":
        return f"{flags} --method full".split()
    for name in ("density", "metric", "scope", "mask"):
        if cell[name] is not None:
            flags += f" --{name} {cell[name]}"
    return flags.split()


def run_here(study, cell):
    """Run a cell in this process; returns its line of the results file."""
    adapt = ADAPT.get(cell["method"])
    if adapt:
        adapt = functools.partial(adapt, density=cell["density"])
    with tempfile.TemporaryDirectory() as out:
        result = train.main(command(study, cell, out), adapt)
        log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    result |= {name: cell[name] for name in SETTING}
    result["step_seconds"] = statistics.median(row["seconds"] for row in log)
    result["threads"] = torch.get_num_threads()
    result["study"] = study
    del result["out"]
    return result


def child(study, cell, out):
    """A process of its own: leaves the line in the folder `out`, and there all that it prints."""
    with open(Path(out) / "printed", "w", buffering=1) as printed:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            row = run_here(study, cell)
    (Path(out) / "row.json").write_text(json.dumps(row))


def run_cell(study, cell):
    """Run a cell in a fresh process of one thread; a run whose loss diverges has no losses but a reason."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["preload"])  # forked cells read the corpora only once
    with tempfile.TemporaryDirectory() as out:
        process = processes.Process(target=child, args=(study, cell, out))
        process.start()
        process.join()
        if process.exitcode == 0:
            return json.loads((Path(out) / "row.json").read_text())
        printed = (Path(out) / "printed").read_text()
    if "not finite" not in printed:
        raise RuntimeError(f"{cell}: exit code {process.exitcode}\n{printed}")
    return cell | {"lr": float(cell["lr"]), "failed": printed.splitlines()[-1], "study": study}


# --- a study ---


class Results:
    """The rows of data/results/STUDY.jsonl, which `get` runs where they are missing."""

    def __init__(self, study):
        self.study = study
        self.path = ROOT / "data" / "results" / f"{study}.jsonl"
        self.lock = threading.Lock()
        self.rows = []
        if self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines()]

    def find(self, wanted):
        """The rows with these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]

    def get(self, cell):
        found = self.find(cell | {"lr": float(cell["lr"])})
        if found:
            return found[0]
        row = run_cell(self.study, cell)
        with self.lock:
            self.rows.append(row)
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        name = " ".join(str(value) for value in cell.values() if value not in (None, ""))
        print(f"{len(self.rows)}: {name}: validation {row.get('val_after', 'failed')}", flush=True)
        return row


def tune(results, chosen):
    """Find the learning rate with the lowest validation loss on seed 0; returns it."""
    losses = {}

    def loss(rate):
        if rate not in losses:
            row = results.get(chosen | {"seed": 0, "lr": RATES[rate]})
            losses[rate] = row.get("val_after", float("inf"))
        return losses[rate]

    known = (chosen["metric"], chosen["method"], results.study)
    best = RATES.index(next(START[name] for name in known if name in START))
    while True:
        around = [best, *(rate for rate in (best - 1, best + 1) if 0 <= rate < len(RATES))]
        better = min(around, key=loss)
        if better == best:
            return RATES[best]
        best = better


def complete(results, chosen, seeds):
    """Run all cells of a setting."""
    rate = tune(results, chosen)
    for seed in seeds[1:]:
        results.get(chosen | {"seed": seed, "lr": rate})


# What the table tells of a setting; strict is the exact match of a study that has one.
MEASURED = "val_after test_after forgetting strict step_seconds score_seconds peak_memory_bytes".split()


def summaries(results):
    """A dict a setting that is complete: its rate, and (mean, standard error) of all that was measured."""
    table = []
    for chosen, seeds in runs(results.study):
        tried = [row for row in results.find(chosen | {"seed": 0}) if "val_after" in row]
        if not tried:
            continue
        best = min(tried, key=lambda row: row["val_after"])
        rates = {row["lr"] for row in results.find(chosen | {"seed": 0})}
        rows = results.find(chosen | {"lr": best["lr"]})
        diverged = [row for row in rows if "val_after" not in row]
        if len(rows) < len(seeds) or not min(rates) < best["lr"] < max(rates):
            continue
        summary = chosen | {"trained": best["trained"], "lr": best["lr"], "diverged": len(diverged)}
        rows = [row for row in rows if row not in diverged]
        for row in rows:
            row["forgetting"] = row["source_after"] - row["source_before"]
            row["strict"] = row["exact_match_after"]["strict"] if "exact_match_after" in row else None
        for name in MEASURED:
            if best[name] is not None:
                summary[name] = mean_and_error([row[name] for row in rows])
        table.append(summary)
    return table


def mean_and_error(values):
    """(mean, standard error of the mean or None for a single value)"""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def said(mean, error):
    """How the table writes a mean and its standard error."""
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def name_of(summary):
    """How the table calls a setting."""
    parts = [summary["method"]]
    if summary["method"] == "sparse":
        metric = "snip = taylor" if summary["metric"] == "snip" else summary["metric"]
        parts = [metric, summary["scope"], summary["mask"]]
    if summary.get("diverged"):
        parts.append(f"({summary['diverged']} seeds diverged)")
    return " ".join([*parts, summary["flags"]]).strip()


def table_lines(table):
    """The table in Markdown."""
    match = any("strict" in row for row in table)
    columns = ["method", "trained", "learning rate", "test loss", "forgetting"]
    columns += ["exact match"] * match + ["s a step", "scoring, s", "peak, MB"]
    lines = [" | ".join(columns), " | ".join(["---"] + ["---:"] * (len(columns) - 1))]
    for row in table:
        cells = [name_of(row), f"{row['trained']:,}", f"{row['lr']:g}"]
        cells += [said(*row["test_after"]), said(*row["forgetting"])]
        if match:
            cells += [f"{row['strict'][0]:.1%}"]
        cells += [f"{row['step_seconds'][0]:.2f}", f"{row['score_seconds'][0]:.1f}"]
        cells += [f"{row['peak_memory_bytes'][0] / 1e6:,.0f}"]
        lines.append(" | ".join(cells))
    return [f"| {line} |" for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time; 0: only the table")
    parser.add_argument("--rerun", type=int, help="number of a row of the results file to run again")
    args = parser.parse_args()
    results = Results(args.study)
    if args.rerun:
        row = results.rows[args.rerun - 1]
        again = run_cell(args.study, {name: row[name] for name in (*SETTING, "seed", "lr")})
        for name in sorted(row):
            print(f"{name}: {row[name]} now {again.get(name)}")
        return
    if args.jobs:
        settings = [chosen for chosen, _ in runs(args.study)]
        swept = [chosen | {"seed": 0, "lr": rate} for chosen in SWEPT if chosen in settings for rate in SWEEP]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(results.get, swept))
            list(pool.map(functools.partial(complete, results), *zip(*runs(args.study))))
    print("\n".join(table_lines(summaries(results))))


if __name__ == "__main__":
    main()
