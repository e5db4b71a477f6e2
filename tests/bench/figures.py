"""The pictures of the reports, drawn from the files in data/results/ (report.py --figures)."""

import math

import data
import speft
import torch
from compare import Results
from model import GPT
from report import LONG, LONG_PAIRS, RESULTS, as_setting, plain, read_rows, summary_of
from studies import HALF, METRICS, name_of, setting, sparse
from summaries import best_runs, mean_and_error

try:
    import matplotlib
except ImportError:
    raise SystemExit("the figures need matplotlib: pip install matplotlib") from None
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def quality_against_density(axes):
    """Test loss over the number of trained weights."""
    table = summary_of("prose")
    groups = {
        "grad": plain(table, metric="grad", scope="global", mask="static"),
        "random": plain(table, metric="random", scope="global", mask="static"),
        "random block": plain(table, method="random block"),
        "LoRA": plain(table, method="lora"),
        "PiSSA": plain(table, method="pissa"),
        "full": plain(table, method="full"),
    }
    for label, rows in groups.items():
        rows.sort(key=lambda row: row["trained"])
        losses = [row["test_after"][0] for row in rows]
        errors = [row["test_after"][1] or 0 for row in rows]
        axes.errorbar([row["trained"] for row in rows], losses, errors, marker="o", label=label)
    axes.set(xscale="log", xlabel="trained weights", ylabel="test loss, nats a token")
    axes.set_title("More weights help every method alike (prose, each at its best rate)")
    axes.legend()


def by_rate(study):
    """{label: the runs of the first seed by learning rate}"""
    density = HALF if study == "smollm2" else 0.01
    chosen = {
        "grad": sparse("grad", density=density),
        "random": sparse("random", density=density),
        "LoRA": setting("lora", density),
        "PiSSA": setting("pissa", density),
        "full": setting("full", None),
    }
    rows = {label: Results(study).find(one | {"seed": 0}) for label, one in chosen.items()}
    return {label: sorted(found, key=lambda row: row["lr"]) for label, found in rows.items()}


def ended_well(row):
    return "val_after" in row and row["val_after"] < row["val_before"]


def line_to_the_edge(axes, label, points, top):
    """A line through (x, y) points, of which those above `top`, or None, stand at the edge as triangles."""
    x, y = zip(*((x, top if y is None else min(y, top)) for x, y in points))
    (line,) = axes.plot(x, y, label=label)
    for marker, lost in (("o", False), ("^", True)):
        shown = [(x, y) for x, y in zip(x, y) if (y >= top) == lost]
        if shown:
            axes.plot(*zip(*shown), marker, color=line.get_color(), clip_on=False)


def quality_against_rate(axes, study):
    """Validation loss over the learning rate; what ended worse than it began, at the edge."""
    groups = by_rate(study)
    top = max(row["val_before"] for rows in groups.values() for row in rows if "val_before" in row)
    for label, rows in groups.items():
        line_to_the_edge(axes, label, [(row["lr"], row.get("val_after")) for row in rows], top)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats a token", ylim=(None, top))
    axes.set_title(f"{study}, first seed; ▲: worse than before training, or diverged")
    axes.legend()


def quality_against_forgetting(axes, study):
    """Validation loss over forgetting, a line through each method's rates."""
    groups = by_rate(study)
    rows = [row for group in groups.values() for row in group if "val_before" in row]
    top = max(row["val_before"] for row in rows)
    right = 1.1 * max(row["source_after"] - row["source_before"] for row in rows if ended_well(row))
    for label, found in groups.items():
        points = [
            (min(row["source_after"] - row["source_before"], right), row["val_after"])
            for row in found if "val_after" in row
        ]  # fmt: skip
        line_to_the_edge(axes, label, points, top)
    axes.set(xlabel="forgetting, nats a token", ylabel="validation loss, nats a token", ylim=(None, top))
    axes.set_title(f"{study}, first seed, a line through each method's rates;\n▲: worse than before training")
    axes.legend()


def metrics(axes):
    """Test loss by metric, scope and mask."""
    table = summary_of("prose")
    kinds = [(scope, mask) for scope in ("global", "local") for mask in ("static", "dynamic")]
    for shift, (scope, mask) in enumerate(kinds):
        rows = plain(table, method="sparse", density=0.01, scope=scope, mask=mask)
        places = [METRICS.index(row["metric"]) + (shift - 1.5) / 5 for row in rows]
        losses, errors = zip(*(row["test_after"] for row in rows))
        axes.errorbar(places, losses, errors, fmt="o", label=f"{scope}, {mask}")
    (lora,) = plain(table, method="lora", density=0.01)
    axes.axhline(lora["test_after"][0], color="gray", linestyle="--", label="LoRA")
    axes.set(ylabel="test loss, nats a token")
    axes.set_xticks(range(len(METRICS)), METRICS, rotation=30)
    axes.set_title("1% of the weights of the base, prose, three seeds")
    axes.legend()


def accuracy(axes):
    """What each method gets right on `sentiment`, over what it forgets; an open circle is a single seed."""
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for row in summary_of("sentiment"):
        (right, error), (forgotten, spread) = row["accuracy"], row["forgetting"]
        bars = 100 * (error or 0), spread or 0
        fill = "none" if row["seeds"] == 1 else "full"
        axes.errorbar(forgotten, 100 * right, *bars, marker="o", fillstyle=fill, label=name_of(row))
    axes.set(xlabel="forgetting, nats a token", ylabel="accuracy on 2,000 test examples, %")
    axes.set_title("SmolLM2 on sentiment, 0.5% trained, each at its best rate")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw_long_runs():
    """Validation loss over steps at the paper's rates: a panel a study and rate, a line a seed."""
    panels = {}
    for study in LONG_PAIRS:
        rows = [row for row in Results(study).rows if "curve" in row]
        for row in sorted(rows, key=lambda row: (row["lr"], row["seed"])):
            panels.setdefault((study, row["lr"]), []).append(row)
    colors = dict(zip(map(name_of, LONG), ("C0", "C1", "C2", "C4")))
    figure = plt.figure(figsize=(12, 4.5 * math.ceil(len(panels) / 2)), layout="constrained")
    shown = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False).flat
    for axes, ((study, rate), rows) in zip(shown, panels.items()):
        for row in rows:
            label = None if row["seed"] else name_of(row)
            axes.plot(*zip(*row["curve"]), label=label, color=colors[name_of(row)])
        axes.set(title=f"{study}, learning rate {rate:g}")
        axes.set(xlabel="step", ylabel="validation loss, nats a token")
        axes.legend()
    figure.savefig(RESULTS / "long_runs.png", dpi=80)


def gains_of_a_step(axes):
    """The loss after one step of Adam's direction, over how far every entry moves."""
    rows = [row for row in read_rows("cause") if row["seed"] == 0]
    for row in rows:
        start = row["moved"]["0.0"]
        points = [(float(x), start - y) for x, y in row["moved"].items() if float(x)]
        axes.plot(*zip(*points), marker=".", label=row["mask"])
    axes.axhline(0, color="gray", linewidth=0.5)
    axes.set(xscale="log", ylim=(-0.05, 0.25), xlabel="how far every entry moves")
    axes.set(ylabel="fall of the training loss, nats a token")
    axes.set_title("One step by the sign of the gradient, 1% of the base's weights, first seed")
    axes.legend()


def price(axes):
    """Test loss over the measured time of a step, a line through each method's densities."""
    results = Results("prose")
    groups = {}
    for row in read_rows("price"):
        runs = best_runs(results, as_setting(row)) if row["model"] == "base" else {}
        losses = [run["test_after"] for run in runs.values() if "test_after" in run]
        if losses:
            groups.setdefault(row["method"], []).append((row, *mean_and_error(losses)))
    for label, found in groups.items():
        found.sort(key=lambda point: point[0]["density"])
        seconds, losses, errors = zip(*((row["seconds"], mean, error or 0) for row, mean, error in found))
        axes.errorbar(seconds, losses, errors, marker="o", label=label)
        for row, mean, _ in found:
            place = {"textcoords": "offset points", "xytext": (4, 4)}
            axes.annotate(f"{row['density']:g}", (row["seconds"], mean), **place)
    axes.set(xlabel="processor seconds a step", ylabel="test loss after 60 steps, nats a token")
    axes.set_title("prose on the base; beside the points: the share of the weights that is trained")
    axes.legend()


def masks():
    """{metric: {layer: its 1% of the base as a matrix of zeros and ones}}"""
    model = data.load_model("base")
    train = data.load_examples("prose", data.load_tokenizer("base"), 128)["train"]
    batches = train.draw(0, 64, 1, 8)
    chosen = {}
    for metric in METRICS:
        torch.manual_seed(0)
        scores = speft.salience(model, metric, batches, GPT.sample_losses)
        indices = speft.select(scores, 0.01, "global")
        chosen[metric] = {
            name: torch.zeros(scores[name].shape).view(-1).index_fill(0, index, 1).view_as(scores[name])
            for name, index in indices.items()
        }
    return chosen


def draw_masks():
    """Where each metric puts its 1%: layers x kinds on one colour scale, and a layer's mask as a picture."""
    chosen, shown = masks(), "blocks.3.attn.v"
    figure, axes = plt.subplots(4, 4, figsize=(14, 15), layout="constrained")
    pairs = zip(axes[[0, 2]].flat, axes[[1, 3]].flat)
    for (metric, mask), (above, below) in zip(chosen.items(), pairs):
        kinds = list(dict.fromkeys(name.split(".", 2)[2] for name in mask))
        share = torch.tensor([100 * float(part.mean()) for part in mask.values()]).view(-1, len(kinds))
        scale = matplotlib.colors.LogNorm(0.01, 20, clip=True)
        picture = above.imshow(share.clamp(min=0.01), norm=scale, aspect="auto")
        above.set_title(f"{metric}: % of each layer", fontsize=14)
        above.set_xticks(range(len(kinds)), kinds, rotation=45, fontsize=11)
        above.set_yticks(range(len(share)), [f"block {n}" for n in range(len(share))], fontsize=11)
        below.imshow(mask[shown], cmap="gray_r", interpolation="antialiased")
        below.set_xlabel(f"{shown}: inputs", fontsize=11)
        below.set_ylabel("outputs", fontsize=11)
    bar = figure.colorbar(picture, ax=axes, orientation="horizontal", shrink=0.6, aspect=50)
    bar.set_label("% of a layer's weights that is trained (0.01 stands for less, too)", fontsize=13)
    figure.savefig(RESULTS / "masks.png", dpi=80)


def draw():
    for name, paint, *study in (
        ("quality_against_density", quality_against_density),
        ("quality_against_rate", quality_against_rate, "prose"),
        ("quality_against_rate_smollm2", quality_against_rate, "smollm2"),
        ("quality_against_forgetting", quality_against_forgetting, "prose"),
        ("quality_against_forgetting_smollm2", quality_against_forgetting, "smollm2"),
        ("metrics", metrics),
        ("gains_of_a_step", gains_of_a_step),
        ("price", price),
        ("accuracy", accuracy),
    ):
        figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
        paint(axes, *study)
        figure.savefig(RESULTS / f"{name}.png", dpi=80)
    draw_long_runs()
    draw_masks()
