"""Shared parts of the pretext tasks: command line, training loop, checkpoints, log and export.

A task is a module with an ``encoder``, a list of ``optimizers``, and a method ``step``, which takes
a batch of uint8 images, updates the weights, and returns a dict of values for the log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path

import torch
from _images import load_images
from safetensors.torch import save_file
from tqdm.auto import tqdm

from sklearn_gradfeat.backbones._builtin import SLOPE


def parser(description, epochs, batch_size):
    """Return the parser of the options that all tasks share."""
    result = argparse.ArgumentParser(description=description.splitlines()[0])
    add = result.add_argument
    add("--data", type=Path, required=True, help="zip file or folder, train/<class>/*.jpg")
    add("--output", type=Path, required=True, help="folder of the checkpoint and the log")
    add("--export", type=Path, help="write the encoder to this .safetensors file")
    add("--epochs", type=int, default=epochs)
    add("--batch-size", type=int, default=batch_size)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return result


def run(make_task, arguments):
    """Train a task, resuming from its checkpoint if it exists, and export its encoder."""
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    pixels, _ = load_images(arguments.data)
    pixels = pixels.to(device)
    task = make_task().to(device, memory_format=torch.channels_last)
    arguments.output.mkdir(parents=True, exist_ok=True)
    history = _resume(task, arguments)
    for epoch in range(len(history), arguments.epochs):
        history.append(_epoch(task, pixels, epoch, arguments))
        _save(task, history, arguments)
    if arguments.export:
        export(task.encoder, arguments.export)


def mixed_precision(device):
    """Return the context of the forward pass: bfloat16 on a GPU; it did not speed up a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _epoch(task, pixels, epoch, arguments):
    """Train on every image once, and return the record for the log."""
    task.train()
    start = time.perf_counter()
    n_batches = max(1, len(pixels) // arguments.batch_size)
    batches = torch.randperm(len(pixels)).to(pixels.device)[: n_batches * arguments.batch_size]
    values = {}
    bar = tqdm(batches.chunk(n_batches), f"epoch {epoch + 1}/{arguments.epochs}")
    for i, batch in enumerate(bar):
        _anneal(task.optimizers, (epoch + i / n_batches) / arguments.epochs)
        for name, value in task.step(pixels[batch]).items():
            values.setdefault(name, []).append(value.detach())
        if i % 50 == 0:
            bar.set_postfix({name: f"{float(v[-1]):.4g}" for name, v in values.items()})
    means = {name: float(torch.stack(v).mean()) for name, v in values.items()}
    return {"epoch": epoch + 1, **means, "seconds": round(time.perf_counter() - start, 1)}


def _anneal(optimizers, progress):
    """Lower the learning rates along a cosine, from their initial values to zero."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            initial = group.setdefault("initial_lr", group["lr"])
            group["lr"] = initial * (1 + math.cos(math.pi * progress)) / 2


def _save(task, history, arguments):
    """Write the checkpoint, then the log; an interruption leaves no incomplete file."""
    state = {
        "task": task.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in task.optimizers],
        "history": history,
        "rng": torch.get_rng_state(),
    }
    if arguments.device.startswith("cuda"):
        state["cuda_rng"] = torch.cuda.get_rng_state(arguments.device)
    checkpoint, log = arguments.output / "checkpoint.pt", arguments.output / "log.jsonl"
    torch.save(state, checkpoint.with_suffix(".new"))
    os.replace(checkpoint.with_suffix(".new"), checkpoint)
    log.with_suffix(".new").write_text("".join(json.dumps(line) + "\n" for line in history))
    os.replace(log.with_suffix(".new"), log)


def _resume(task, arguments):
    """Load the checkpoint, if it exists, and return the records of its epochs."""
    path = arguments.output / "checkpoint.pt"
    if not path.exists():
        return []
    state = torch.load(path, map_location=arguments.device, weights_only=True)
    task.load_state_dict(state["task"])
    for optimizer, saved in zip(task.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"].cpu())
    if "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"].cpu(), arguments.device)
    print(f"Resuming {path} after epoch {len(state['history'])}.")
    return state["history"]


def export(encoder, path):
    """Write an encoder as the weights of a ConvNet, in float16, and print their hash.

    The metadata of the file hold the slope of its leaky ReLUs unless that is the default.
    """
    network = encoder.folded()
    weights = {n: value.half().cpu().contiguous() for n, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    slope = network.negative_slope
    metadata = None if slope == SLOPE else {"slope": str(slope)}
    save_file(weights, path, metadata=metadata)
    print(f"{path}  SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
