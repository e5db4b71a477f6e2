"""From the rows of a study to its table: means, standard errors, and differences from LoRA seed by seed."""

import statistics

from studies import STUDIES, name_of


def measured(row):
    """What the tables tell of a run, by name."""
    values = {name: row[name] for name in ("val_after", "test_after", "step_seconds", "score_seconds")}
    values["forgetting"] = row["source_after"] - row["source_before"]
    values["peak_memory_bytes"] = row["peak_memory_bytes"]
    task = row.get("accuracy_after") or row.get("exact_match_after") or {}  # the earlier rows' name
    if "strict" in task:
        values["strict"] = task["strict"]
    if "answers" in row:
        values |= {"accuracy": row["answers"]["accuracy"], "answer_loss": row["answers"]["loss"]}
    return values


def mean_and_error(values):
    """(mean, standard error of the mean or None for a single value)"""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def best_runs(results, chosen):
    """The runs of a setting at its best rate, {seed: row}; none where the grid does not yet go beyond it."""
    first = STUDIES[results.study].seeds[0]
    tried = results.find(chosen | {"seed": first})
    ended = [row for row in tried if "val_after" in row]
    if not ended:
        return {}
    best = min(ended, key=lambda row: row["val_after"])["lr"]
    rates = [row["lr"] for row in tried]
    if not min(rates) < best < max(rates):
        return {}
    return {row["seed"]: row for row in results.find(chosen | {"lr": best})}


def differences(runs, others):
    """{name: (mean, standard error) of run − other}, pair by pair over the seeds that both ended with."""
    pairs = [(measured(runs[seed]), measured(others[seed])) for seed in runs if seed in others]
    if not pairs:
        return {}
    shared = set(pairs[0][0]) & set(pairs[0][1])
    return {name: mean_and_error([one[name] - other[name] for one, other in pairs]) for name in shared}


def right_answers(row):
    """1 or 0 for each test example, an empty list where that was not kept."""
    return [int(bit) for bit in row.get("answers", {}).get("right", "")]


def error_by_examples(runs, others):
    """The standard error of run − other in accuracy that comes of the choice of test examples, or None.

    An example's difference is its mean over the seeds that both ended with; over examples these vary.
    """
    by_seed = []
    for seed in runs.keys() & others.keys():
        pairs = [*zip(right_answers(runs[seed]), right_answers(others[seed]))]
        by_seed += [[one - other for one, other in pairs]] if pairs else []
    by_example = [statistics.fmean(seeds) for seeds in zip(*by_seed)]
    return mean_and_error(by_example)[1] if by_example else None


def summaries(results):
    """A dict a setting that has its best rate: (mean, standard error) of all that was measured.

    "from_lora" holds the differences from LoRA of the same density and flags, where that was run.
    """
    study, table = STUDIES[results.study], []
    for chosen, _ in study.runs():
        runs = best_runs(results, chosen)
        ended = {seed: row for seed, row in runs.items() if "val_after" in row}
        if not ended:
            continue
        any_row = next(iter(ended.values()))
        summary = chosen | {"trained": any_row["trained"], "lr": any_row["lr"]}
        summary |= {"seeds": len(ended), "diverged": len(runs) - len(ended)}
        values = [measured(row) for row in ended.values()]
        summary |= {name: mean_and_error([one[name] for one in values]) for name in values[0]}
        rival = study.reference | {"flags": chosen["flags"]}
        rival |= {"density": chosen["density"]} if chosen["density"] else {}
        if chosen != rival:
            rivals = {seed: row for seed, row in best_runs(results, rival).items() if "val_after" in row}
            summary["from_lora"] = differences(ended, rivals)
            summary["error_by_examples"] = error_by_examples(ended, rivals)
        table.append(summary)
    return table


def said(mean, error, sign=""):
    """How the table writes a mean and its standard error."""
    return f"{mean:{sign}.3f}" if error is None else f"{mean:{sign}.3f} ± {error:.3f}"


def called(summary):
    """The name of a setting, and whether seeds of it diverged."""
    lost = f" ({summary['diverged']} seeds diverged)" if summary["diverged"] else ""
    return name_of(summary) + lost


def table_lines(table):
    """The table in Markdown."""
    match, answers = (any(name in row for row in table) for name in ("strict", "accuracy"))
    columns = ["method", "trained", "learning rate", "seeds", "test loss", "− LoRA's"]
    columns += ["forgetting", "− LoRA's"] + ["exact match"] * match
    columns += ["accuracy", "− LoRA's", "by examples", "answer's loss", "− LoRA's"] * answers
    columns += ["s a step", "scoring, s", "peak, MB"]
    lines = [" | ".join(columns), " | ".join(["---"] + ["---:"] * (len(columns) - 1))]
    for row in table:
        difference = row.get("from_lora", {})

        def both(name):
            return [said(*row[name]), said(*difference[name], sign="+") if name in difference else ""]

        cells = [called(row), f"{row['trained']:,}", f"{row['lr']:g}", str(row["seeds"])]
        cells += both("test_after") + both("forgetting")
        cells += [f"{row['strict'][0]:.1%}"] if match else []
        by_examples = row.get("error_by_examples")
        cells += both("accuracy") if answers else []
        cells += [f"± {by_examples:.3f}" if by_examples else "", *both("answer_loss")] if answers else []
        cells += [f"{row['step_seconds'][0]:.2f}", f"{row['score_seconds'][0]:.1f}"]
        cells += [f"{row['peak_memory_bytes'][0] / 1e6:,.0f}"]
        lines.append(" | ".join(cells))
    return [f"| {line} |" for line in lines]
