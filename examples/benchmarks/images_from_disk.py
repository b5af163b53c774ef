"""Images per second from disk by number of threads, and the share that overlaps with the network.

One pass of a random ResNet18 is timed three times: over decoded images, decoding alone, and over
the files, where the next batch is decoded while the network runs. The hidden share is the saving of
the last over the sum of the other two, relative to the time of decoding. A further pass finds the
outputs of the decoded images in the feature store.

    python examples/benchmarks/images_from_disk.py --data photos --output images_from_disk.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import PIL
import torch
import torchvision
from _setup import environment
from torchvision.transforms import v2

from sklearn_gradfeat import GradientFeatureClassifier, ImageFiles


def timed(function, *arguments, repeats):
    """Return the median of the seconds of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*arguments)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def decoding(files, size, threads, repeats):
    """Return one row for each number of threads."""
    rows = []
    for n_threads in threads:
        X = ImageFiles(files, size=size, n_threads=n_threads)
        seconds = timed(np.asarray, X, repeats=repeats)
        rows.append({"threads": n_threads, "images_per_second": len(X) / seconds})
    return rows


def hiding(files, size, batch_size, repeats):
    """Return the share of the decoding time that overlaps with the network."""
    X = ImageFiles(files, size=size, channels="first")
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    scale = v2.Compose([v2.ToDtype(torch.float32), v2.Normalize([116.0] * 3, [58.0] * 3)])
    model = GradientFeatureClassifier(
        network, preprocess=scale, features="activation", max_iter=1, tol=1,
        batch_size=batch_size, feature_store=None, activation_layer=None,
    )  # fmt: skip
    images = np.asarray(X)
    model.fit(images, np.arange(len(X)) % 2)
    decode = timed(np.asarray, X, repeats=repeats)
    compute = timed(model.predict, images, repeats=repeats)
    both = timed(model.predict, X, repeats=repeats)
    hidden = (decode + compute - both) / decode
    model.set_params(feature_store="auto").predict(X)
    stored = timed(model.predict, X, repeats=repeats)
    return {
        "decode": decode, "network": compute, "both": both, "hidden": hidden, "stored": stored,
    }  # fmt: skip


def versions():
    """Return the versions, the hardware and the load that the numbers depend on."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {**environment(), "pillow": PIL.__version__, "load": load}


def table(result):
    """Return the result as Markdown tables."""
    lines = ["| threads | images/s |", "|---:|---:|"]
    lines += [f"| {r['threads']} | {r['images_per_second']:.0f} |" for r in result["decoding"]]
    lines += ["", "| decode, s | network, s | both, s | hidden | from the store, s |"]
    lines.append("|---:|---:|---:|---:|---:|")
    h = result["hiding"]
    lines.append(
        f"| {h['decode']:.2f} | {h['network']:.2f} | {h['both']:.2f} | {100 * h['hidden']:.0f} % | "
        f"{h['stored']:.2f} |"
    )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of <class>/*.jpg")
    parser.add_argument("--n-images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("images_from_disk.json"))
    arguments = parser.parse_args()
    if arguments.data is None or not arguments.data.is_dir():
        sys.exit(print("--data must name a folder of <class>/*.jpg: nothing to measure."))
    X, _ = ImageFiles.from_folder(arguments.data, size=arguments.size)
    files = list(X.paths[:: max(1, len(X) // arguments.n_images)][: arguments.n_images])
    cores = joblib.cpu_count()
    threads = sorted({1, 2, cores, 2 * cores})
    result = {
        "environment": versions(),
        "n_images": len(files),
        "size": arguments.size,
        "decoding": decoding(files, arguments.size, threads, arguments.repeats),
        "hiding": hiding(files, arguments.size, arguments.batch_size, arguments.repeats),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
