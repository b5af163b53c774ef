"""Plot tables 2 and 3 of paper_tables.py.

    python examples/benchmarks/plot_tables.py table3.json table2.json --output tables.svg

Bars are one standard error over the test images. Hollow circles are the published figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt


def groups(paths):
    """Return the rows by model of every (table, network, data, number of images) in the files."""
    found = {}
    for path in paths:
        content = json.loads(path.read_text())
        for row in content["rows"]:
            number, name = row["table"], Path(row["encoder"]).stem
            if number != 1:
                size = content["setting"]["sizes"][f"table_{number}"]
                key = (number, name, size["data"], size["n_train"])
                first = found.setdefault(key, {}).setdefault(row["model"], row)
                if first["score"] != row["score"]:
                    sys.exit(f"{path}: {row['model']} has another score in an earlier file.")
    return found


def draw(found):
    """Return a figure with a panel for each network."""
    figure, panels = plt.subplots(
        1, len(found), figsize=(4.5 * len(found), 2.8), squeeze=False, layout="constrained"
    )
    for axes, ((number, name, data, n_train), rows) in zip(panels[0], found.items(), strict=True):
        places = range(len(rows))[::-1]
        for place, row in zip(places, rows.values(), strict=True):
            axes.errorbar(row["score"], place, xerr=row["error"], fmt="o", color="C0", capsize=3)
            if row["published"] is not None:
                axes.plot(row["published"], place, "o", mfc="none", color="0.5")
        axes.set_yticks(places, list(rows))
        metric = "mean average precision" if number == 2 else "accuracy"
        axes.set_xlabel(f"{metric}, %")
        axes.set_title(f"{name}\n{data}, {n_train:,} images", fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
    return figure


def main():
    """Read the tables and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", type=Path, nargs="+", help="JSON files of paper_tables.py")
    parser.add_argument("--output", type=Path, default=Path("tables.svg"))
    arguments = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "tables"  # equal tables give equal bytes
    figure = draw(groups(arguments.tables))
    figure.savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
