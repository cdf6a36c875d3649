"""Measure the forward pass, backward pass and optimizer of a step of two modes, by the tokens of the step.

usage: python scripts/bench_steps.py [--model smollm2_135m] [--tokens 64 256 1024 2048] [--length 256] [--rounds 3]
           [--out FILE.json] [overrides]

WeLore against full tuning of the same compressed model, in turns. The optimizer is measured twice: fused AdamW, as we
run it, and a loop over the parameters (foreach=False, fused=False).
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn

from welore.bench import Steps, compressed, flops_limit, seconds
from welore.cache import Cache
from welore.config import compose, to_config
from welore.evaluate import autocast, frozen_weights_in
from welore.modes import Mode
from welore.provenance import environment

MODES = ("welore", "full")
OPTIMIZERS = {"fused": {"fused": True}, "loop": {"foreach": False, "fused": False}}


class Phases(Steps):
    """Steps whose parts are measured apart."""

    def __init__(self, model: nn.Module, mode: Mode, dtype: str | None, batch: int, length: int):
        super().__init__(model, mode, dtype, batch, length)
        options = dict(lr=1e-8, betas=tuple(mode.betas), eps=mode.eps, weight_decay=0.0)
        self.optimizers = {
            name: torch.optim.AdamW(self.parameters, **options, **how) for name, how in OPTIMIZERS.items()
        }

    def turn(self, count: int) -> list[dict[str, float]]:
        self.model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        with frozen_weights_in(self.model, self.dtype):
            return [self._phases() for _ in range(count + 1)][1:]

    def _phases(self) -> dict[str, float]:
        device = self.ids_BL.device
        found = {"forward": seconds(self._forward, device), "backward": seconds(self._backward, device)}
        found |= {name: seconds(optimizer.step, device) for name, optimizer in self.optimizers.items()}
        self.model.zero_grad()
        return found

    def _forward(self) -> None:
        with autocast(self.ids_BL.device, self.dtype):
            total, scored = self.loss(self.ids_BL, self.ids_BL)
        self.mean = total / scored

    def _backward(self) -> None:
        self.mean.backward()
        self.mean = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of conf/model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 2048], help="of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, at most")
    parser.add_argument("--rounds", type=int, default=3, help="of two steps of each mode, in turns")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_steps.json"), help="where the figures go")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py, such as err=0.5")
    arguments = parser.parse_args()
    config = to_config(compose([f"model={arguments.model}", *arguments.overrides]))
    device = config.trainer.place()
    model, _ = compressed(config, device, Cache(Path(config.outputs) / ".cache"))
    model.train()
    modes = {name: to_config(compose([f"mode={name}"])).mode for name in MODES}
    rows = [measure(model, modes, config.model.autocast, tokens, arguments) for tokens in arguments.tokens]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"rows": rows, "model": config.model.name, "asked": config.asked} | environment(device)
    arguments.out.write_text(json.dumps(found, indent=2))
    print(f"written to {arguments.out}")


def with_optimizer(limit: float, parts: dict[str, dict[str, float]], name: str) -> float:
    """The ratio of whole steps that FLOPs and the optimizer allow: as if full tuning's passes took `limit` times
    WeLore's, and each optimizer what it was measured to take, which its bytes decide."""
    ours = parts["welore"]["forward"] + parts["welore"]["backward"]
    return (limit * ours + parts["full"][name]) / (ours + parts["welore"][name])


def measure(model: nn.Module, modes: dict[str, Mode], dtype: str | None, tokens: int, arguments) -> dict:
    """The medians of every part for each mode, and how much faster WeLore's whole step is with each optimizer."""
    length = min(tokens, arguments.length)
    steps = {name: Phases(model, mode, dtype, tokens // length, length) for name, mode in modes.items()}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            taken[name] += step.turn(2)
    parts = {n: {part: statistics.median(f[part] for f in found) for part in found[0]} for n, found in taken.items()}
    ratios = {}
    for name in OPTIMIZERS:
        whole = {mode: part["forward"] + part["backward"] + part[name] for mode, part in parts.items()}
        ratios[name] = whole["full"] / whole["welore"]
    passes = {mode: part["forward"] + part["backward"] for mode, part in parts.items()}
    limits = flops_limit(model, length)
    ratios |= {"no optimizer": passes["full"] / passes["welore"], **limits}
    ratios |= {f"limit, {name}": with_optimizer(limits["limit"], parts, name) for name in OPTIMIZERS}
    for mode, part in parts.items():
        print(
            f"{tokens:6} tokens  {mode:7}" + "   ".join(f"{key} {1000 * value:8.1f} ms" for key, value in part.items())
        )
    print(f"{'':14} welore / full, tokens/s: " + "   ".join(f"{key} {value:.3f}" for key, value in ratios.items()))
    return {"tokens": tokens, "seconds": parts, "ratios": ratios}


if __name__ == "__main__":
    main()
