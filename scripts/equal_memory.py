"""Measure tokens per second at an equal memory budget: each mode at about the largest batch that fits.

usage: python scripts/equal_memory.py [--gib 2 3] [--modes welore full lora galore] [--length 256] [--steps 5]
           [--most 8] [--predict] [--random [--multiple 8] [--plan even|paper]] [--out FILE.json] [overrides]
       python scripts/equal_memory.py --random --gib 24 48 80 --length 1024 -- model=llama2_7b err=0.5      on a GPU

Every mode runs with and without recomputation, each by the median of --steps steps after one that does not count; the
faster of the two is marked, unless --most cut a batch. The file is written after each of them. On a GPU a process
gets no more than the budget: it begins with the batch that is predicted to fit, and where that runs out of memory with
an eighth less, until one fits; larger ones are not tried, and the budget is what torch may take, without its context.
A CPU enforces nothing, and gets a process for each: read the measured peak, which is that of the process without what
it holds beside the weights before training. With --random nothing is loaded or decomposed: random weights in the
model's shapes.
"""

import argparse
import json
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from welore.bench import (
    apart,
    at_least,
    exit_status,
    measured,
    memory,
    refuse_stand_in,
    stand_in_model,
    subject,
    write,
)
from welore.config import Config, compose, to_config
from welore.errors import Refused
from welore.measure import capacity, give_back
from welore.memory import Step, largest_batch, refuse_unforeseen
from welore.modes import select
from welore.shapes import EVEN, PLANS, PLANS_HELP

SHAPE = ("modes", "length", "steps", "most", "random", "multiple", "plan", "overrides")


def without_storage(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the meta device, tied weights still tied, for a mode to change."""
    return deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()})


def configured(arguments: argparse.Namespace, mode: str) -> Config:
    return to_config(compose([*arguments.overrides, f"mode={mode}"]))


def one(arguments: argparse.Namespace, mode: str, gib: float, recompute: bool) -> dict:
    """One mode in one budget: its largest batch, and what was measured of it."""
    config = configured(arguments, mode)
    device = config.trainer.place()
    if arguments.random:
        model, bare = None, stand_in_model(config, torch.device("meta"), arguments.multiple, arguments.plan)
    else:
        model = subject(config, device, False, arguments.multiple, arguments.plan)
        bare = without_storage(model)
    step = Step(1, arguments.length, config.model.autocast, recompute)
    largest = largest_batch(bare, config.mode, select(bare, config.mode), step, gib)
    if largest == 0 or arguments.predict:
        return {"largest batch": largest}
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(gib / capacity(device))
    batch = min(largest, arguments.most or largest)
    while batch > 0:
        found = tried(arguments, config, device, replace(step, batch=batch), model)
        model = None  # the mode has changed it
        if found is not None:
            return {"largest batch": largest, "batch": batch} | found
        batch = batch * 7 // 8
    return {"largest batch": largest, "out of memory": True}


def tried(
    arguments: argparse.Namespace, config: Config, device: torch.device, step: Step, model: PreTrainedModel | None
) -> dict | None:
    """What was measured of a step, on a model that is made here where there is none; None where memory ran out."""
    give_back(device)  # on a GPU what ran before
    try:
        if model is None:
            model = subject(config, device, arguments.random, arguments.multiple, arguments.plan)
        return measured(model, config, step, arguments.steps)[1]
    except torch.cuda.OutOfMemoryError:
        return None


def alone(mode: str, gib: float, recompute: bool) -> dict:
    """`one` in a process of its own."""
    return apart([__file__, f"--only={mode},{gib},{recompute}", *sys.argv[1:]])


def best_of(pair: list[dict], most: int) -> dict | None:
    """The faster one; None where --most cut one short of what fits, which says nothing of the budget."""
    done = [row for row in pair if "tokens_per_second" in row]
    if any(row["batch"] == most < row["largest batch"] for row in done):
        return None
    return max(done, key=lambda row: row["tokens_per_second"], default=None)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=memory, nargs="+", default=[2, 3], help="budgets")
    parser.add_argument(
        "--modes", nargs="+", default=["welore", "full", "lora", "galore"], help="options of conf/mode"
    )
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens of a sequence")
    parser.add_argument("--steps", type=at_least(1), default=5, help="whose median counts, after one more")
    parser.add_argument(
        "--most", type=at_least(0), default=0, help="sequences that are measured at most; 0: as many as fit"
    )
    parser.add_argument("--predict", action="store_true", help="find the batches and measure nothing")
    parser.add_argument("--random", action="store_true", help="random weights in the model's shapes")
    parser.add_argument("--multiple", type=at_least(1), default=1, help="of which ranks are, with --random")
    parser.add_argument("--plan", choices=PLANS, default=EVEN, help=f"of the ranks, with --random: {PLANS_HELP}")
    parser.add_argument("--out", type=Path, default=Path("outputs/equal_memory.json"), help="where the figures go")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of run.py, such as err=0.5 (after a --)")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if not arguments.random:
        refuse_stand_in(arguments.multiple, arguments.plan)
    if arguments.only:
        mode, gib, recompute = arguments.only.split(",")
        print(json.dumps(one(arguments, mode, float(gib), recompute == "True")))
        return
    for mode in [configured(arguments, name).mode for name in arguments.modes]:
        refuse_unforeseen(mode)
        if not arguments.predict:
            mode.check_machine()
    device = configured(arguments, arguments.modes[0]).trainer.place()
    if not arguments.predict and max(arguments.gib) > (there := capacity(device)):
        raise Refused(f"--gib {max(arguments.gib):g} is more than the {there:.1f} GiB here. Write less, or --predict.")
    run = partial(one, arguments) if device.type == "cuda" else alone
    shape = {key: getattr(arguments, key) for key in SHAPE}
    rows: list[dict] = []
    for gib in arguments.gib:
        for mode in arguments.modes:
            for on in (False, True):
                rows.append({"gib": gib, "mode": mode, "recompute": on} | run(mode, gib, on))
                if on:  # both are there
                    best = best_of(rows[-2:], arguments.most)
                    rows[-2:] = [row | {"best": row is best} for row in rows[-2:]]
                write(arguments.out, {"rows": rows, "shape": shape}, device)
            print("\n".join(map(line, rows[-2:])), flush=True)
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
    raise SystemExit(exit_status(main))
