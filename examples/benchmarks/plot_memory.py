"""Plot peak memory and CPU time of a pass of larger_than_memory.py against the number of images.

python examples/benchmarks/plot_memory.py larger_than_memory.json --output memory.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

KINDS = {"memory": "in memory", "streamed": "streamed", "search": "streamed search"}


def draw(rows):
    """Return a figure with a panel for the memory and one for the passes."""
    figure, (memory, passes) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    for number, (kind, label) in enumerate(KINDS.items()):
        style = {"marker": "o", "color": f"C{number}", "label": label}
        found = {row["n_samples"]: row[kind]["peak"] for row in rows if kind in row}
        if found:
            memory.plot(list(found), list(found.values()), **style)
        if kind != "search":
            seconds = {row["n_samples"]: row["streamed"][f"{kind}_pass_cpu"] for row in rows}
            passes.plot(list(seconds), list(seconds.values()), **style)
    memory.set(ylabel="peak memory, MiB", ylim=(0, None), xscale="log")
    passes.set(ylabel="a pass, s of CPU", xscale="log", yscale="log")
    for axes in (memory, passes):
        axes.set(xlabel="images")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main():
    """Read the result and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON file of larger_than_memory.py")
    parser.add_argument("--output", type=Path, default=Path("memory.svg"))
    arguments = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "memory"  # equal results give equal bytes
    figure = draw(json.loads(arguments.result.read_text())["rows"])
    figure.savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
