"""Measure the forward pass, backward pass and optimizer of a step of two modes, by the tokens of the step.

usage: python scripts/bench_steps.py [--model smollm2_135m] [--tokens 64 256 1024 2048] [--length 256] [--rounds 3]
           [--random [--multiple 8] [--plan even|paper]] [--out FILE.json] [overrides]
       python scripts/bench_steps.py --model llama2_7b --random --tokens 1024 4096 8192 --length 1024 -- err=0.5

WeLore against full tuning of the same compressed model: in turns on a CPU, whose clock changes; after each other on a
GPU, which has no room for two optimizers, with the peak of each beside its prediction. The optimizer is measured
twice: fused AdamW, as we run it, and a loop over the parameters (foreach=False, fused=False). `launched` is a whole
step by a clock that does not wait for the device. With --random nothing is loaded or decomposed.
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch import nn

from welore.bench import IMPLEMENTATIONS, Steps, at_least, exit_status, flops_limit, subject, write
from welore.config import compose, to_config
from welore.errors import Refused
from welore.measure import GIB, give_back, peak_memory
from welore.memory import Step, predict
from welore.models import count_parameters
from welore.modes import Mode
from welore.shapes import EVEN, PLANS, PLANS_HELP

OURS, FULL = MODES = ("welore", "full")
Parts = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of conf/model")
    parser.add_argument("--tokens", type=at_least(2), nargs="+", default=[64, 256, 1024, 2048], help="of a step")
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens of a sequence, at most")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="of two steps of each mode")
    parser.add_argument("--random", action="store_true", help="random weights in the model's shapes")
    parser.add_argument("--multiple", type=at_least(1), default=1, help="of which ranks are, with --random")
    parser.add_argument("--plan", choices=PLANS, default=EVEN, help=f"of the ranks, with --random: {PLANS_HELP}")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_steps.json"), help="where the figures go")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py, such as err=0.5")
    arguments = parser.parse_args()
    for tokens in arguments.tokens:
        check_whole(tokens, arguments.length)
    config = to_config(compose([f"model={arguments.model}", *arguments.overrides]))
    device = config.trainer.place()
    model = subject(config, device, arguments.random, arguments.multiple, arguments.plan).train()
    modes = {name: to_config(compose([f"mode={name}"])).mode for name in MODES}
    rows = []
    for tokens in arguments.tokens:
        length = min(tokens, arguments.length)
        step = Step(tokens // length, length, config.model.autocast)
        rows.append(measure(model, modes, step, arguments.rounds))
        print("\n".join(lines(rows[-1])), flush=True)
        how = {key: getattr(arguments, key) for key in ("rounds", "random", "multiple", "plan")}
        how |= {"model": config.model.name, "asked": config.asked, "parameters": count_parameters(model)}
        write(arguments.out, {"rows": rows} | how, device)
    print(f"written to {arguments.out}")


def check_whole(tokens: int, length: int) -> None:
    """Refuse a step of which a part of a sequence would be left over, and not be measured."""
    if tokens > length and tokens % length:
        below = tokens // length * length
        raise Refused(
            f"--tokens {tokens} is no number of whole sequences of --length {length}. Write {below} or "
            f"{below + length}, or another length."
        )


def measure(model: nn.Module, modes: dict[str, Mode], step: Step, rounds: int) -> dict:
    """The medians of every part for each mode, and how much faster WeLore's whole step is with each optimizer."""
    row: dict = {"tokens": step.tokens, "length": step.length}
    if next(model.parameters()).is_cuda:
        taken, row["GiB"] = after_each_other(model, modes, step, rounds)
    else:
        taken = in_turns(model, modes, step, rounds)
    row["seconds"] = {n: {p: statistics.median(f[p] for f in found) for p in found[0]} for n, found in taken.items()}
    return row | ({"ratios": ratios(model, step, row["seconds"])} if len(taken) == len(modes) else {})


def in_turns(model: nn.Module, modes: dict[str, Mode], step: Step, rounds: int) -> dict[str, list[Parts]]:
    steps = {name: Steps(model, mode, step.autocast, step.batch, step.length) for name, mode in modes.items()}
    taken: dict[str, list[Parts]] = {name: [] for name in modes}
    for _ in range(rounds):
        for name, turns in steps.items():
            taken[name] += turns.phases(2)
    return taken


def after_each_other(
    model: nn.Module, modes: dict[str, Mode], step: Step, rounds: int
) -> tuple[dict[str, list[Parts]], dict[str, dict[str, float]]]:
    """Each mode that fits the device, and what it took of its memory beside what was predicted."""
    device, taken, memory = next(model.parameters()).device, {}, {}
    for name, mode in modes.items():
        give_back(device)
        try:
            with peak_memory(device) as peak:
                steps = Steps(model, mode, step.autocast, step.batch, step.length)
                steps.turn(1)
                memory[name] = {"measured": peak.gib, "reserved": peak.reserved_gib}
            taken[name] = steps.phases(2 * rounds)
            predicted = predict(model, mode, steps.parameters, step).peak / GIB
            memory[name] |= {"predicted": predicted, "trained": sum(p.numel() for p in steps.parameters)}
        except torch.cuda.OutOfMemoryError:
            memory[name] = {"out of memory": True}
            taken.pop(name, None)
            model.zero_grad(set_to_none=True)
        steps = None
    return taken, memory


def ratios(model: nn.Module, step: Step, parts: dict[str, Parts]) -> dict[str, float]:
    """Of WeLore's tokens per second to those of full tuning, and the limits of it."""
    found = {}
    passes = {mode: part["forward"] + part["backward"] for mode, part in parts.items()}
    for name in IMPLEMENTATIONS:
        whole = {mode: passes[mode] + part[name] for mode, part in parts.items()}
        found[name] = whole[FULL] / whole[OURS]
    limits = flops_limit(model, step.length)
    found |= {"no optimizer": passes[FULL] / passes[OURS], **limits}
    found |= {f"limit, {name}": with_optimizer(limits["limit"], parts, name) for name in IMPLEMENTATIONS}
    return found | {"launched": parts[FULL]["launched"] / parts[OURS]["launched"]}


def with_optimizer(limit: float, parts: dict[str, Parts], name: str) -> float:
    """The ratio of whole steps that FLOPs and the optimizer allow: as if full tuning's passes took `limit` times
    WeLore's, and each optimizer what it was measured to take, which its bytes decide."""
    ours = parts[OURS]["forward"] + parts[OURS]["backward"]
    return (limit * ours + parts[FULL][name]) / (ours + parts[OURS][name])


def lines(row: dict) -> list[str]:
    found = []
    for mode, part in row["seconds"].items():
        times = "   ".join(f"{key} {1000 * value:8.1f} ms" for key, value in part.items())
        found.append(f"{row['tokens']:6} tokens  {mode:7}{times}")
    for mode, part in row.get("GiB", {}).items():
        found.append(f"{'':14}{mode}, GiB: " + "   ".join(f"{key} {value:.4g}" for key, value in part.items()))
    if "ratios" in row:
        known = "   ".join(f"{key} {value:.3f}" for key, value in row["ratios"].items())
        found.append(f"{'':14}welore / full, tokens/s: {known}")
    return found


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
