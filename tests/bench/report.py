"""The README's tables and figures, made from the files in data/results/.

    python tests/bench/report.py              # write the tables into README.md
    python tests/bench/report.py --figures    # also draw data/results/*.png (needs matplotlib)

A table stands in the README between <!-- name --> and <!-- end of name -->.
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
import torch  # noqa: E402

# --- tables ---


def plain(table, **wanted):
    """The rows of the table that have these values and no flags of their own."""
    return [row for row in table if row["flags"] == "" and all(row[key] == wanted[key] for key in wanted)]


def study_table(study):
    """The study's table, and what it took: every cell is a run of one thread."""
    results = compare.Results(study)
    hours = sum(row.get("seconds", 0) for row in results.rows) / 3600
    took = f"{len(results.rows)} runs, {hours:.1f} hours of one core."
    return [*compare.table_lines(compare.summaries(results)), "", took]


def core_table(study, density):
    """Of the study's table full fine-tuning, and at this density the baselines and static global masks."""
    table = compare.summaries(compare.Results(study))
    rows = plain(table, method="sparse", density=density, scope="global", mask="static")
    for method in ("lora", "pissa", "random block"):
        rows += plain(table, method=method, density=density)
    rows += plain(table, method="full")
    return compare.table_lines(sorted(rows, key=lambda row: row["test_after"]))


def rates_table(study, settings):
    """Validation loss on seed 0 by learning rate, and forgetting in brackets."""
    results = compare.Results(study)
    tried = {row["lr"] for chosen in settings for row in results.find(chosen | {"seed": 0})}
    rates = sorted(rate for rate in tried if rate >= 1e-4)
    lines = ["| learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("| --- |" + " ---: |" * len(rates))
    for chosen in settings:
        rows = {row["lr"]: row for row in results.find(chosen | {"seed": 0})}
        if not rows:
            continue
        cells = [told(rows[rate]) if rate in rows else "" for rate in rates]
        lines.append(f"| {compare.name_of(chosen)} | " + " | ".join(cells) + " |")
    return lines


def told(row):
    if "val_after" not in row:
        return "diverged"
    forgetting = round(row["source_after"] - row["source_before"], 2) + 0.0  # no -0.00
    return f"{row['val_after']:.3f} ({forgetting:.2f})"


def rows_of(benchmark, device):
    """The rows of a benchmark's results that were measured on this kind of device."""
    rows = map(json.loads, (RESULTS / f"{benchmark}.jsonl").read_text().splitlines())
    return [row for row in rows if row.get("device", "cpu") == device]


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
        setting = f"{row['density']:g}, {row['mask']}"
        setting += ", memory kept" if on_cpu and row["allocator"] != "default" else ""
        setting += f", {row['model']}" if row["model"] != "smollm2" else ""
        setting += f", {row['run']} run" if "run" in row else ""
        counts = row["saved_bytes"], row["peak_memory_bytes"], row["page_faults"] * 4096
        cells = map(megabytes, counts if on_cpu else counts[:2])
        lines.append(
            f"| {setting} | {row['variant']} | {row['trained']:,} | {ratios} | {' | '.join(cells)} |"
        )
    return lines


def at_one_percent(row):
    """The rows for a first look: all variants with the gradient's 1%, and this project's layer otherwise."""
    if row["allocator"] != "default" or "run" in row:
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
    "rates": lambda: rates_table("prose", [*compare.SWEPT, compare.setting("full", None)]),
    "prose at 1%": lambda: core_table("prose", 0.01),
    "prose": lambda: study_table("prose"),
    "smollm2 rates": lambda: rates_table("smollm2", [chosen for chosen, _ in compare.runs("smollm2")]),
    "smollm2": lambda: study_table("smollm2"),
    "step at 1%": lambda: step_table("cpu", at_one_percent),
    "step": lambda: step_table("cpu"),
    "step on cuda at 1%": lambda: step_table("cuda", at_one_percent),
    "step on cuda": lambda: step_table("cuda"),
    "score": lambda: score_table("cpu"),
    "score on cuda": lambda: score_table("cuda"),
}


def with_tables(readme):
    """The README's text with every table made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in readme:
            raise SystemExit(f"README.md has no place {begin}")
        between = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.S)
        readme = between.sub(lambda _: "\n" + "\n".join(make()) + "\n\n", readme)
    return readme


# --- figures ---


def quality_against_density(axes, results, table):
    """Test loss over the number of trained weights."""
    groups = {
        "grad": plain(table, metric="grad", scope="global", mask="static"),
        "random": plain(table, metric="random", scope="global", mask="static"),
        "LoRA": plain(table, method="lora"),
        "PiSSA": plain(table, method="pissa"),
        "full": plain(table, method="full"),
    }
    for label, rows in groups.items():
        rows.sort(key=lambda row: row["trained"])
        losses, errors = zip(*(row["test_after"] for row in rows))
        axes.errorbar([row["trained"] for row in rows], losses, errors, marker="o", label=label)
    axes.set(xscale="log", xlabel="trained weights", ylabel="test loss, nats a token")
    axes.legend()


def by_rate(results):
    """{label: the rows of seed 0 by learning rate}, without the runs that ended worse than they began."""
    density = compare.GSM if results.study == "smollm2" else 0.01
    chosen = {
        "grad": compare.sparse("grad", density=density),
        "random": compare.sparse("random", density=density),
        "LoRA": compare.setting("lora", density),
        "PiSSA": compare.setting("pissa", density),
        "full": compare.setting("full", None),
    }
    rows = {label: results.find(one | {"seed": 0}) for label, one in chosen.items()}
    for label, found in rows.items():
        found = [row for row in found if "val_after" in row and row["val_after"] < row["val_before"]]
        rows[label] = sorted(found, key=lambda row: row["lr"])
    return rows


def quality_against_rate(axes, results, table):
    """Validation loss over the learning rate."""
    for label, rows in by_rate(results).items():
        axes.plot([row["lr"] for row in rows], [row["val_after"] for row in rows], marker="o", label=label)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats a token")
    axes.legend()


def quality_against_forgetting(axes, results, table):
    """Validation loss over forgetting, a line through each method's rates."""
    for label, rows in by_rate(results).items():
        forgetting = [row["source_after"] - row["source_before"] for row in rows]
        axes.plot(forgetting, [row["val_after"] for row in rows], marker="o", label=label)
    axes.set(xlabel="forgetting, nats a token", ylabel="validation loss, nats a token")
    axes.legend()


def metrics(axes, results, table):
    """Test loss by metric, scope and mask."""
    kinds = [(scope, mask) for scope in ("global", "local") for mask in ("static", "dynamic")]
    for shift, (scope, mask) in enumerate(kinds):
        rows = plain(table, method="sparse", density=0.01, scope=scope, mask=mask)
        places = [compare.METRICS.index(row["metric"]) + (shift - 1.5) / 5 for row in rows]
        if rows:
            losses, errors = zip(*(row["test_after"] for row in rows))
            axes.errorbar(places, losses, errors, fmt="o", label=f"{scope}, {mask}")
    axes.set(ylabel="test loss, nats a token")
    axes.set_xticks(range(len(compare.METRICS)), compare.METRICS, rotation=30)
    axes.legend()


def masks():
    """Where each metric puts its 1% in the base: layers x kinds, and one layer's mask as a picture."""
    import data
    import speft
    from model import GPT

    model = data.load_model("base")
    train = data.load_examples("prose", data.load_tokenizer("base"), 128)["train"]
    batches = train.draw(0, 64, 1, 8)
    chosen = {}
    for metric in compare.METRICS:
        torch.manual_seed(0)
        scores = speft.salience(model, metric, batches, GPT.sample_losses)
        indices = speft.select(scores, 0.01, "global")
        chosen[metric] = {
            name: torch.zeros(scores[name].shape).view(-1).index_fill(0, index, 1).view_as(scores[name])
            for name, index in indices.items()
        }
    return chosen


def draw_masks(plt):
    chosen = masks()
    figure, axes = plt.subplots(2, len(chosen), figsize=(2.2 * len(chosen), 6), layout="constrained")
    for (metric, mask), (above, below) in zip(chosen.items(), axes.T):
        kinds = list(dict.fromkeys(name.split(".", 2)[2] for name in mask))
        share = torch.tensor([100 * float(part.mean()) for part in mask.values()]).view(-1, len(kinds))
        picture = above.imshow(share, vmin=0)
        above.set_title(metric)
        above.set_xticks(range(len(kinds)), kinds, rotation=90)
        figure.colorbar(picture, ax=above, orientation="horizontal", label="% trained")
        below.imshow(mask["blocks.3.attn.v"], cmap="gray_r", interpolation="antialiased")
    axes[0, 0].set_ylabel("block")
    axes[1, 0].set_ylabel("blocks.3.attn.v: outputs x inputs")
    figure.savefig(RESULTS / "masks.png", dpi=80)


def draw():
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for name, study, paint in (
        ("quality_against_density", "prose", quality_against_density),
        ("quality_against_rate", "prose", quality_against_rate),
        ("quality_against_rate_smollm2", "smollm2", quality_against_rate),
        ("quality_against_forgetting", "prose", quality_against_forgetting),
        ("quality_against_forgetting_smollm2", "smollm2", quality_against_forgetting),
        ("metrics", "prose", metrics),
    ):
        results = compare.Results(study)
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        paint(axes, results, compare.summaries(results))
        figure.savefig(RESULTS / f"{name}.png", dpi=80)
    draw_masks(plt)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figures", action="store_true", help="draw the figures as well")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    if args.figures:
        draw()


if __name__ == "__main__":
    main()
