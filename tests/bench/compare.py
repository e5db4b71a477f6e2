"""The paper's comparison: sparse fine-tuning by every metric and mask, LoRA, PiSSA and full fine-tuning.

    python tests/bench/compare.py prose              # run what is missing, then print the table
    python tests/bench/compare.py prose --jobs 0     # only the table
    python tests/bench/compare.py prose --only lora  # run what is missing of one setting
    python tests/bench/compare.py prose --rerun 3    # run the results file's third row again, and show both

Every cell is a fresh process of one thread, from the same base and in the same data order, whose result is
a line of data/results/STUDY.jsonl. Cells that are there already are skipped, so an interrupted study goes on.
A row of the table is one setting: its learning rate is the one of the lowest validation loss on the first
seed, on a grid that grows until the best rate is inside it; the other seeds then run at that rate. studies.py
says which settings, summaries.py makes the table.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from studies import ADAPT, OPTIMIZERS, RATES, REACH, SETTING, START, STUDIES, name_of  # noqa: E402
from summaries import summaries, table_lines  # noqa: E402

# --- one cell ---


def command(study, cell, out):
    """train.py's arguments for a cell: a setting with a seed and a learning rate."""
    flags = f"{STUDIES[study].flags} {cell['flags']} --seed {cell['seed']} --lr {cell['lr']} --out {out}"
    if cell["method"] == "full":
        return f"{flags} --method full".split()
    for name in ("density", "metric", "scope", "mask"):
        if cell[name] is not None:
            flags += f" --{name} {cell[name]}"
    return flags.split()


def run_here(study, cell, best=math.inf, before=None):
    """Run a cell in this process; returns its line of the results file.

    best: the lowest validation loss of its setting and seed so far. The study's own measure, which takes as
    long as the training, is only taken of a model as good as that. before: what is known of the untrained
    model, which is the same in all cells. For the time of the run what train.py calls AdamW is the method's
    optimizer, and the model that it loads is kept, so that it can be measured.
    """
    adapt = ADAPT.get(cell["method"])
    if adapt:
        adapt = functools.partial(adapt, density=cell["density"])
    loaded, load_model = [], data.load_model

    def load(*args):
        loaded.append(load_model(*args))
        return loaded[-1]

    evaluate = data.Report.__call__

    def report(self, model, when):
        return before if before and when == "before" else evaluate(self, model, when)

    optimizer = OPTIMIZERS.get(cell["method"], torch.optim.AdamW)
    with contextlib.ExitStack() as meanwhile:
        out = meanwhile.enter_context(tempfile.TemporaryDirectory())
        meanwhile.enter_context(mock.patch.object(torch.optim, "AdamW", optimizer))
        meanwhile.enter_context(mock.patch.object(data, "load_model", load))
        meanwhile.enter_context(mock.patch.object(data.Report, "__call__", report))
        result = train.main(command(study, cell, out), adapt)
        log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    result |= {name: cell[name] for name in SETTING}
    result["step_seconds"] = statistics.median(row["seconds"] for row in log)
    result["threads"] = torch.get_num_threads()
    result["study"] = study
    curve = [(row["step"], row["val"]) for row in log if "val" in row]
    result |= {"curve": curve} if curve else {}
    if STUDIES[study].measure and result["val_after"] <= best:
        result["answers"] = STUDIES[study].measure(loaded[-1], data.load_tokenizer(result["model"]))
    del result["out"]
    return result


def child(study, cell, best, before, out):
    """A process of its own: leaves the line in the folder `out`, and there all that it prints."""
    with open(Path(out) / "printed", "w", buffering=1) as printed:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            row = run_here(study, cell, best, before)
    (Path(out) / "row.json").write_text(json.dumps(row))


def run_cell(study, cell, best=math.inf, before=None):
    """Run a cell in a fresh process of one thread; a run whose loss diverges has no losses but a reason."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["preload"])  # forked cells read the corpora only once
    with tempfile.TemporaryDirectory() as out:
        process = processes.Process(target=child, args=(study, cell, best, before, out))
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

    def before(self):
        """What the last row says of the untrained model; None if there is none that does."""
        last = next((row for row in reversed(self.rows) if "val_before" in row), {})
        return {name: value for name, value in last.items() if name.endswith("_before")} or None

    def get(self, cell):
        found = self.find(cell | {"lr": float(cell["lr"])})
        if found:
            return found[0]
        rivals = self.find({name: value for name, value in cell.items() if name != "lr"})
        best = min((rival["val_after"] for rival in rivals if "val_after" in rival), default=math.inf)
        row = run_cell(self.study, cell, best, self.before())
        with self.lock:
            self.rows.append(row)
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        name = " ".join(str(value) for value in cell.values() if value not in (None, ""))
        print(f"{len(self.rows)}: {name}: validation {row.get('val_after', 'failed')}", flush=True)
        return row


def tune(results, chosen):
    """Find the learning rate with the lowest validation loss on the first seed; returns (rate, loss)."""
    losses = {}

    def loss(rate):
        if rate not in losses:
            row = results.get(chosen | {"seed": STUDIES[results.study].seeds[0], "lr": RATES[rate]})
            losses[rate] = row.get("val_after", float("inf"))
        return losses[rate]

    names = chosen["metric"], chosen["method"]
    known = (*((results.study, name) for name in names), *names, results.study)
    best = RATES.index(next(START[name] for name in known if name in START))
    while True:
        around = [best, *(rate for rate in (best - 1, best + 1) if 0 <= rate < len(RATES))]
        better = min(around, key=loss)
        if better == best:
            return RATES[best], losses[best]
        best = better


def complete(results, chosen, seeds):
    """Run all cells of a setting; of a candidate out of LoRA's reach only those of the first seed."""
    study, (rate, loss) = STUDIES[results.study], tune(results, chosen)
    if chosen in study.candidates and loss > tune(results, study.reference)[1] + REACH:
        return
    for seed in seeds[1:]:
        results.get(chosen | {"seed": seed, "lr": rate})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time; 0: only the table")
    parser.add_argument("--only", default=".*", help="settings to run: a regular expression for the name")
    parser.add_argument("--rerun", type=int, help="number of a row of the results file to run again")
    args = parser.parse_args()
    results = Results(args.study)
    if args.rerun:
        row = results.rows[args.rerun - 1]
        again = run_cell(args.study, {name: row[name] for name in (*SETTING, "seed", "lr")})
        for name in sorted(row):
            print(f"{name}: {row[name]} now {again.get(name)}")
        return
    study, wanted = STUDIES[args.study], re.compile(args.only).fullmatch
    with concurrent.futures.ThreadPoolExecutor(args.jobs or 1) as pool:
        if args.jobs:
            swept = [
                chosen | {"seed": seed, "lr": rate}
                for chosen, rates, seeds in study.swept if wanted(name_of(chosen))
                for rate in rates for seed in seeds
            ]  # fmt: skip
            list(pool.map(results.get, swept))
            tuned = [(chosen, seeds) for chosen, seeds in study.runs() if wanted(name_of(chosen))]
            list(pool.map(lambda run: complete(results, *run), tuned))
    print("\n".join(table_lines([row for row in summaries(results) if wanted(name_of(row))])))


if __name__ == "__main__":
    main()
