"""Draw the losses of training runs over each other, from their log.jsonl. Needs matplotlib.

python tests/bench/curves.py out/a out/b --out loss.png

A run is its folder. Its training loss is the thin line, the mean of neighbouring steps where there are many;
its validation loss is the thick one.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from data.files import InputError, parse_json  # noqa: E402

POINTS = 100  # about as many means of the training loss are drawn


def read_log(folder):
    """The rows of a run's log.jsonl; InputError if these are none."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_bytes().splitlines()
    rows = [parse_json(f"{path}, line {n}", line) for n, line in enumerate(lines, 1)]
    if not rows or not all({"step", "loss"} <= row.keys() for row in rows):
        raise InputError(f"{path} is no log of a run: it wants a step and a loss a line")
    return rows


def smoothed(rows):
    """(steps, training losses): the means of as many rows in a row as leave about POINTS points."""
    size = max(1, len(rows) // POINTS)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    means = [[sum(row[key] for row in group) / len(group) for group in groups] for key in ("step", "loss")]
    return tuple(means)


def draw(logs, path):
    """Draw {label: rows} into the picture `path`, whose ending says in which format."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("the curves need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (label, rows) in enumerate(logs.items()):
        color = f"C{number % 10}"
        axes.plot(*smoothed(rows), color=color, linewidth=0.8, alpha=0.6)
        validated = [(row["step"], row["val"]) for row in rows if "val" in row]
        axes.plot(*zip(*validated) if validated else ([], []), "o-", color=color, markersize=4, label=label)
    axes.set(title="Training (thin) and validation (thick)", xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="loss.png", help="the picture to write (default: loss.png)")
    args = parser.parse_args(argv)
    try:
        figure = draw({run: read_log(run) for run in args.runs}, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"curves.py: error: {error}")
    print(args.out)
    return figure


if __name__ == "__main__":
    main()
