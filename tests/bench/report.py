"""The tables of the reports, made from the files in data/results/.

    python tests/bench/report.py              # write the tables into the reports
    python tests/bench/report.py --figures    # also draw data/results/*.png (needs matplotlib)

A table stands in a report between <!-- name --> and <!-- end of name -->.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "data" / "results"
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import compare  # noqa: E402
import studies  # noqa: E402
import summaries  # noqa: E402
from studies import LONG, LONG_PAIRS, METRICS, OPTIMIZERS, STUDIES, SWEPT, setting, sparse  # noqa: E402

REPORTS = (RESULTS / "README.md", ROOT / "tests" / "bench" / "README.md")


def plain(table, **wanted):
    """The rows of the table that have these values and no flags of their own."""
    return [row for row in table if row["flags"] == "" and all(row[key] == wanted[key] for key in wanted)]


def summary_of(study):
    return summaries.summaries(compare.Results(study))


def study_table(study):
    """The study's table, and what it took: every cell is a run of one thread."""
    rows = compare.Results(study).rows
    hours = sum(row.get("seconds", 0) for row in rows) / 3600
    took = f"{len(rows)} runs, {hours:.1f} hours of one core."
    return [*summaries.table_lines(summary_of(study)), "", took]


def by_loss(table):
    return summaries.table_lines(sorted(table, key=lambda row: row["test_after"]))


def core_table(study, density):
    """Of the study's table full fine-tuning, and at this density the baselines and static global masks."""
    table = summary_of(study)
    rows = plain(table, method="sparse", density=density, scope="global", mask="static")
    for method in ("lora", "pissa", "random block"):
        rows += plain(table, method=method, density=density)
    return by_loss(rows + plain(table, method="full"))


def chosen_rows(study, settings):
    """The rows of these settings, by their loss."""
    wanted = [studies.name_of(chosen) + str(chosen["density"]) for chosen in settings]
    rows = [row for row in summary_of(study) if studies.name_of(row) + str(row["density"]) in wanted]
    return by_loss(rows)


KNOWN = [setting("lora"), sparse("random"), sparse("grad"), sparse("grad", "local")]
KNOWN += [sparse("magnitude"), sparse("magnitude", "local"), setting("random block")]


def recipes_table():
    """The candidates, and what they are to beat, at 1%."""
    candidates = [chosen for chosen in STUDIES["prose"].candidates if chosen["density"] == 0.01]
    return chosen_rows("prose", candidates + KNOWN)


def optimizers_table():
    """The same masks under other optimizers."""
    adam = [sparse("grad"), sparse("random"), sparse("magnitude"), setting("grad moved entries")]
    return chosen_rows("prose", adam + [setting(method) for method in OPTIMIZERS])


def rates_table(study, settings):
    """Validation loss on the first seed by learning rate, and forgetting in brackets."""
    results = compare.Results(study)
    tried = {row["lr"] for chosen in settings for row in results.find(chosen | {"seed": 0})}
    rates = sorted(tried)
    lines = ["| learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("| --- |" + " ---: |" * len(rates))
    for chosen in settings:
        rows = {row["lr"]: row for row in results.find(chosen | {"seed": 0})}
        if not rows:
            continue
        cells = [told(rows[rate]) if rate in rows else "" for rate in rates]
        lines.append(f"| {studies.name_of(chosen)} | " + " | ".join(cells) + " |")
    return lines


def long_table():
    """How far the gradient's mask is behind LoRA (below 0: ahead) in the long runs, at the same rate.

    Validation loss after as many steps, with the same seeds and examples; then what was measured at the end.
    The error is that over seeds, in accuracy that over the test examples.
    """
    steps = (60, 120, 240, 480, 960)
    head = ["study", "learning rate", "seeds", *(f"{step} steps" for step in steps)]
    head += ["test loss", "forgetting", "accuracy"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for study, (grad, lora) in LONG_PAIRS.items():
        results = compare.Results(study)
        for rate in sorted({row["lr"] for row in results.find(lora)}):
            runs, others = (by_seed(results, one | {"lr": rate}) for one in (grad, lora))
            if not runs.keys() & others.keys():
                continue
            ended = summaries.differences(runs, others)
            apart = [behind(runs, others, step) for step in steps]
            apart += [ended["test_after"], ended["forgetting"]]
            if "accuracy" in ended:
                apart.append((ended["accuracy"][0], summaries.error_by_examples(runs, others)))
            said = [summaries.said(*one, sign="+") for one in apart]
            seeds = len(runs.keys() & others.keys())
            cells = [study, f"{rate:g}", str(seeds), *said] + [""] * ("accuracy" not in ended)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def by_seed(results, wanted):
    """{seed: row} of the runs that ended."""
    return {row["seed"]: row for row in results.find(wanted) if "curve" in row}


def behind(runs, others, step):
    """(mean, standard error) of run − other in validation loss after so many steps, over shared seeds."""
    shared = sorted(runs.keys() & others.keys())
    losses = [[dict(one[seed]["curve"])[step] for seed in shared] for one in (runs, others)]
    return summaries.mean_and_error([one - other for one, other in zip(*losses)])


def told(row):
    if "val_after" not in row:
        return "diverged"
    forgetting = round(row["source_after"] - row["source_before"], 2) + 0.0  # no -0.00
    return f"{row['val_after']:.3f} ({forgetting:.2f})"


def read_rows(name):
    """The rows of data/results/NAME.jsonl; none if there is no such file."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cause_table():
    """The loss along the entries of each mask, means over the seeds.

    A parabola of slope a and curvature b falls by a² / 2b at its lowest point, a / b away.
    """
    head = ["mask of 1%", "seeds", "steepness", "curvature", "best distance", "gain", "gain as measured"]
    head += ["gain of a gradient step", "mean diagonal", "directions"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    rows = read_rows("cause")
    for mask in dict.fromkeys(row["mask"] for row in rows):
        mine = [row for row in rows if row["mask"] == mask]
        columns = zip(*([*along_a_step(row), row["diagonal"]] for row in mine))
        means = [summaries.mean_and_error(column)[0] for column in columns]
        measured = summaries.said(*summaries.mean_and_error([best_move(row) for row in mine]))
        directions = summaries.mean_and_error([row["directions"] for row in mine])[0]
        cells = [f"{mean:.2g}" for mean in means]
        cells = [mask, str(len(mine)), *cells[:4], measured, *cells[4:], f"{directions:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def along_a_step(row):
    """Of a step by the signs: steepness, curvature, best distance, gain; and the gain of a gradient step."""
    slope, curvature = row["steepness"], row["along_signs"]
    gain = row["entries"] * slope**2 / curvature / 2
    return slope, curvature, slope / curvature, gain, row["power"] / row["along_gradient"] / 2


def best_move(row):
    """What the best of the distances tried gains, in nats."""
    return row["moved"]["0.0"] - min(row["moved"].values())


def price_table(model):
    """What a step costs by method and density, and the test loss on prose where it was measured."""
    head = ["method", "density", "step / LoRA's", "saved, MB", "peak, MB"]
    results, with_loss = compare.Results("prose"), model == "base"
    head += ["test loss on prose", "− LoRA's at 1%"] if with_loss else []
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    lora = summaries.best_runs(results, setting("lora"))
    for row in [row for row in read_rows("price") if row["model"] == model]:
        cells = [row["method"], f"{row['density']:g}", f"{row['ratio']:.2f}"]
        cells += [megabytes(row["saved_bytes"]), megabytes(row["peak_memory_bytes"])]
        if with_loss:
            runs = summaries.best_runs(results, as_setting(row))
            apart = summaries.differences(runs, lora).get("test_after")
            losses = [one["test_after"] for one in runs.values() if "test_after" in one]
            cells += [summaries.said(*summaries.mean_and_error(losses)) if losses else ""]
            cells += [summaries.said(*apart, sign="+") if apart else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def as_setting(priced):
    """The setting of the study `prose` that a row of price.py tells the price of."""
    if priced["method"] in METRICS:
        return sparse(priced["method"], density=priced["density"])
    return setting(priced["method"], None if priced["method"] == "full" else priced["density"])


def rows_of(benchmark, device):
    """The rows of a benchmark's results that were measured on this kind of device, by the latest run."""
    rows = [row for row in read_rows(benchmark) if row.get("device", "cpu") == device]
    return [row for row in rows if row.get("run") != "earlier"]


def megabytes(count):
    return "not measured" if count is None else f"{count / 1e6:,.0f}"


def step_table(device, chosen=lambda row: True):
    """The step benchmark's rows, a density and mask after the other; those that are `chosen`."""
    on_cpu = device == "cpu"
    head = "| density, mask | variant | trained | step / LoRA's | / full | / frozen | saved, MB | peak, MB |"
    lines = [head + " faulted, MB |" * on_cpu, "| --- | --- |" + " ---: |" * (6 + on_cpu)]
    for row in filter(chosen, rows_of("step", device)):
        ratios = [row["ratios"].get(name) for name in ("lora", "full", "frozen")]
        ratios = " | ".join("not timed" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        named = f"{row['density']:g}, {row['mask']}"
        named += ", memory kept" if on_cpu and row["allocator"] != "default" else ""
        named += f", {row['model']}" if row["model"] != "smollm2" else ""
        counts = row["saved_bytes"], row["peak_memory_bytes"], row["page_faults"] * 4096
        cells = map(megabytes, counts if on_cpu else counts[:2])
        lines.append(f"| {named} | {row['variant']} | {row['trained']:,} | {ratios} | {' | '.join(cells)} |")
    return lines


def at_one_percent(row):
    """The rows for a first look: all variants with the gradient's 1%, and this project's layer otherwise."""
    if row["allocator"] != "default":
        return False
    return (row["mask"], row["density"]) == ("grad", 0.01) or row["variant"].startswith("cover")


def score_table(device):
    """The scoring benchmark's rows."""
    lines = ["| metric | s | × the backward pass | peak above the model, MB |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for row in rows_of("score", device):
        peak = row["peak_memory_bytes"]
        above = megabytes(peak and peak - row["loaded_bytes"])
        lines.append(f"| {row['metric']} | {row['seconds']:.2f} | {row['ratio']:.2f} | {above} |")
    return lines


TABLES = {
    "rates": lambda: rates_table("prose", [*SWEPT, setting("full", None)]),
    "prose at 1%": lambda: core_table("prose", 0.01),
    "prose": lambda: study_table("prose"),
    "long": lambda: rates_table("long", LONG),
    "long behind LoRA": long_table,
    "recipes": recipes_table,
    "optimizers": optimizers_table,
    "cause": cause_table,
    "price": lambda: price_table("base"),
    "price on smollm2": lambda: price_table("smollm2"),
    "sentiment": lambda: study_table("sentiment"),
    "sentiment rates": lambda: rates_table("sentiment", [one for one, _ in STUDIES["sentiment"].runs()]),
    "smollm2 rates": lambda: rates_table("smollm2", [one for one, _ in STUDIES["smollm2"].runs()]),
    "smollm2": lambda: study_table("smollm2"),
    "step at 1%": lambda: step_table("cpu", at_one_percent),
    "step": lambda: step_table("cpu"),
    "step on cuda at 1%": lambda: step_table("cuda", at_one_percent),
    "step on cuda": lambda: step_table("cuda"),
    "score": lambda: score_table("cpu"),
    "score on cuda": lambda: score_table("cuda"),
}


def with_tables(text):
    """A report's text with every table in it made anew. Raises SystemExit for a name that is no table's."""
    for name in re.findall(r"<!-- (?!end of )(.+?) -->", text):
        if name not in TABLES:
            raise SystemExit(f"there is no table {name}")
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        between = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.S)
        made = "\n" + "\n".join(TABLES[name]()) + "\n\n"
        text, found = between.subn(lambda _: made, text)
        if found != 1:
            raise SystemExit(f"{begin} has no {end}")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figures", action="store_true", help="draw the figures as well")
    args = parser.parse_args()
    for path in REPORTS:
        path.write_text(with_tables(path.read_text()))
    if args.figures:
        import figures  # needs matplotlib

        figures.draw()


if __name__ == "__main__":
    main()
