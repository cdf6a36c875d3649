"""Measure tokens per second at an equal memory budget: each mode at the largest batch that is predicted to fit.

usage: python scripts/equal_memory.py [--gib 2 3] [--modes welore full lora galore] [--length 256] [--most 8]
           [--predict] [--out FILE.json] [overrides]

Every mode runs with and without recomputation, each in a process of its own; the faster of the two is marked, unless
--most cut a batch. On a GPU a process gets no more than the budget, and one that needs more fails. A CPU enforces
nothing: read the measured peak, which is that of the process without what it holds beside the weights before training.
"""

import argparse
import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from welore.bench import compressed, measured
from welore.cache import Cache
from welore.config import compose, to_config
from welore.measure import GIB
from welore.memory import Step, largest_batch
from welore.modes import select
from welore.provenance import environment


def without_storage(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the meta device, tied weights still tied, for a mode to change."""
    return deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()})


def one(arguments: argparse.Namespace) -> dict:
    """One mode in one budget: its largest batch, and two steps of it."""
    mode, gib, recompute = arguments.only.split(",")
    config = to_config(compose([*arguments.overrides, f"mode={mode}"]))
    device = config.trainer.place()
    if device.type == "cuda":
        share = float(gib) * GIB / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    step = Step(1, arguments.length, config.model.autocast, recompute == "True")
    model, _ = compressed(config, device, Cache(Path(config.outputs) / ".cache"))
    bare = without_storage(model)
    largest = largest_batch(bare, config.mode, select(bare, config.mode), step, float(gib))
    if largest == 0 or arguments.predict:
        return {"largest batch": largest}
    batch = min(largest, arguments.most or largest)
    try:
        _, found = measured(model, config, replace(step, batch=batch), steps=1)
    except torch.cuda.OutOfMemoryError:
        return {"largest batch": largest, "batch": batch, "out of memory": True}
    return {"largest batch": largest, "batch": batch} | found


def alone(arguments: list[str], what: str) -> dict:
    command = [sys.executable, __file__, f"--only={what}", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def best_of(pair: list[dict]) -> dict | None:
    """The faster one; None where one was measured at fewer sequences than fit, which says nothing of the budget."""
    done = [row for row in pair if "tokens_per_second" in row]
    if any(row["batch"] < row["largest batch"] for row in done):
        return None
    return max(done, key=lambda row: row["tokens_per_second"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, nargs="+", default=[2, 3], help="budgets")
    parser.add_argument(
        "--modes", nargs="+", default=["welore", "full", "lora", "galore"], help="options of conf/mode"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--most", type=int, default=0, help="sequences that are measured at most; 0: as many as fit")
    parser.add_argument("--predict", action="store_true", help="find the batches and measure nothing")
    parser.add_argument("--out", type=Path, default=Path("outputs/equal_memory.json"), help="where the figures go")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of run.py, such as err=0.5 (after a --)")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(one(arguments)))
        return
    rows = []
    for gib in arguments.gib:
        for mode in arguments.modes:
            pair = [
                {"gib": gib, "mode": mode, "recompute": on} | alone(sys.argv[1:], f"{mode},{gib},{on}")
                for on in (False, True)
            ]
            best = best_of(pair)
            for row in pair:
                row["best"] = row is best
                print(line(row), flush=True)
            rows += pair
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    device = to_config(compose(arguments.overrides)).trainer.place()
    shape = {"length": arguments.length, "overrides": arguments.overrides}
    arguments.out.write_text(json.dumps({"rows": rows, "shape": shape} | environment(device), indent=2))
    print(f"written to {arguments.out}")


def line(row: dict) -> str:
    head = f"{row['gib']:5g} GiB  {row['mode']:8} recompute={row['recompute']!s:5}  fits {row['largest batch']:4}"
    if "tokens_per_second" not in row:
        return f"{head}  {'out of memory' if 'out of memory' in row else ''}"
    return (
        f"{head}  batch {row['batch']:4}  {row['tokens_per_second']:8.1f} tokens/s  "
        f"predicted {row['predicted GiB']:.2f}  measured {row['measured GiB']:.2f} GiB"
        f"{'  <- best' if row['best'] else ''}"
    )


if __name__ == "__main__":
    main()
