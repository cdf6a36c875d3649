"""Measure what this package claims about speed and memory, each figure beside its limit and in one run.

usage: python scripts/bench.py [--model smollm2_135m] [--batch 4] [--length 256] [--out FILE.json] [overrides]
       python scripts/bench.py --only spectra      one of them as JSON: spectra, together, welore, full, loss-49152

Ratios are of medians of alternating measurements, so that a machine that slows down slows both sides. Results are
printed and written as JSON with the device and the versions.
"""

import argparse
import json
import re
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from welore.bench import Steps, apart, at_least, compressed, exit_status, flops_limit, refuse_calibration, write
from welore.cache import Cache
from welore.compress import Coordinates, factorize, read_spectra, weight_digests
from welore.config import Config, compose, to_config
from welore.errors import Refused
from welore.loss import linear_cross_entropy
from welore.measure import GIB, peak_memory, seconds
from welore.models import components
from welore.modes import Mode
from welore.ranks import Budget
from welore.svd import singular_values


def spectra_against_svd(device: torch.device) -> dict[str, dict]:
    """Singular values from the float64 Gram matrix against a full float32 SVD, and how exact they are."""
    results = {}
    for shape in ((4096, 4096), (4096, 11008)):
        W = torch.randn(shape, device=device)
        ours = statistics.median(seconds(lambda W=W: singular_values(W), device) for _ in range(3))
        svd = seconds(lambda W=W: torch.linalg.svd(W), device)
        results[f"spectrum {shape[0]} x {shape[1]}"] = {
            "seconds": ours,
            "full SVD seconds": svd,
            "ratio": svd / ours,
            "limit": 3.0 if shape[0] == shape[1] else 6.0,
        }
    W = torch.randn(1024, 2752, device=device) * torch.logspace(0, -4, 1024, device=device)[:, None]
    exact = torch.linalg.svdvals(W.double()).cpu()
    error = float((singular_values(W) - exact).abs().max() / exact[0])
    results["largest error of a singular value / sigma_max"] = {"value": error, "limit": 1e-4}
    return results


def sweep_against_svds(config: Config, device: torch.device) -> dict[str, dict]:
    """Five values of err from one decomposition on disk, against a full SVD of every weight for each of them.

    As in a sweep, each cell loads the model and hashes its weights once; the first decomposes, the others read.
    """

    def cell(model: nn.Module, cache: Cache, err: float) -> None:
        coordinates = Coordinates(config.svd, weight_digests(model), cache)
        plan = config.ranks.plan(read_spectra(model, coordinates), Budget(err=err))
        factorize(model, plan, coordinates)

    ours = []
    with tempfile.TemporaryDirectory() as folder:
        for err in (0.1, 0.2, 0.3, 0.4, 0.5):
            model, _ = config.model.load(Path(config.outputs) / ".cache")
            ours.append(seconds(partial(cell, model, Cache(Path(folder)), err), device))
    model, _ = config.model.load(Path(config.outputs) / ".cache")
    matrices = [module.weight.detach().float() for module in components(model).values()]
    svds = sum(seconds(lambda: [torch.linalg.svd(W, full_matrices=False) for W in matrices], device) for _ in range(5))
    return {
        "sweep of five err": {
            "seconds": sum(ours),
            "seconds of the first": ours[0],
            "five full SVDs seconds": svds,
            "ratio": svds / sum(ours),
            "limit": 5.0,
        }
    }


def tuning(config: Config, modes: dict[str, Mode], device: torch.device, batch: int, length: int) -> dict[str, Any]:
    """Steps of each mode in turn on one compressed model: tokens per second; with one mode alone also its peak."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = compressed(config, device, Cache(Path(folder)))
    model.train()
    taken: dict[str, list[float]] = {name: [] for name in modes}
    with peak_memory(device) as peak:
        steps = {name: Steps(model, mode, config.model.autocast, batch, length) for name, mode in modes.items()}
        for _ in range(8 if len(modes) > 1 else 1):
            for name, step in steps.items():
                taken[name] += step.turn(3)
        gib = peak.gib
    results = {name: {"tokens_per_second": batch * length / statistics.median(taken[name])} for name in modes}
    if len(modes) == 1:
        results[next(iter(modes))]["peak GiB"] = gib
    return results | flops_limit(model, length)


def loss_memory(vocabulary: int, tokens: int = 1024, hidden: int = 576) -> dict[str, float]:
    """Peak memory of the loss and its gradient above its inputs, chunked and with the logits of the whole window."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    W = torch.randn(vocabulary, hidden, device=device)
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    found = {}
    for name in ("chunked", "whole window"):
        h = torch.randn(tokens, hidden, device=device, requires_grad=True)
        with peak_memory(device) as before:
            held = before.gib
        with peak_memory(device) as peak:
            if name == "chunked":
                linear_cross_entropy(h, W, None, labels).backward()
            else:
                F.cross_entropy(F.linear(h, W).float(), labels, reduction="sum").backward()
            found[f"{name} GiB"] = peak.gib - held
    whole = vocabulary * tokens * torch.float32.itemsize / GIB
    return found | {
        "ratio": found["chunked GiB"] / found["whole window GiB"],
        "float32 logits of the window GiB": whole,
    }


def alone(arguments: argparse.Namespace, what: str) -> dict:
    """One measurement in a process of its own, so that nothing else is in its memory."""
    command = [__file__, "--only", what, f"--batch={arguments.batch}", f"--length={arguments.length}"]
    return apart([*command, f"--model={arguments.model}", *arguments.overrides])


def measure(arguments: argparse.Namespace, config: Config, device: torch.device) -> dict[str, dict]:
    results = spectra_against_svd(device)
    with tempfile.TemporaryDirectory() as folder:
        results |= compressed(config, device, Cache(Path(folder)))[1]
    results |= sweep_against_svds(config, device)
    apart = alone(arguments, "welore") | alone(arguments, "full")
    together = alone(arguments, "together")
    speed = {name: together[name]["tokens_per_second"] for name in ("welore", "full")}
    ratio = speed["welore"] / speed["full"]
    results["LRC-only against full tuning, tokens/s"] = {
        **speed,
        "ratio": ratio,
        "limit": together["limit"],
        "share of the limit": ratio / together["limit"],
        "limit of the weights": together["limit of the weights"],
    }
    peaks = {name: apart[name]["peak GiB"] for name in ("welore", "full")}
    ratio = peaks["welore"] / peaks["full"]
    results["LRC-only against full tuning, peak GiB"] = peaks | {"ratio": ratio, "limit": 1.0}
    for vocabulary in (49_152, 256_000):
        results[f"loss over a vocabulary of {vocabulary}"] = alone(arguments, f"loss-{vocabulary}")
    return results


def only(arguments: argparse.Namespace, config: Config, device: torch.device) -> dict:
    modes = {name: to_config(compose([f"mode={name}"])).mode for name in ("welore", "full")}
    if not re.fullmatch(r"spectra|together|welore|full|loss-\d+", arguments.only):
        raise Refused(f"--only {arguments.only} is unknown. Write spectra, together, welore, full or loss-VOCABULARY.")
    if arguments.only == "spectra":
        return spectra_against_svd(device)
    if arguments.only.startswith("loss-"):
        return loss_memory(int(arguments.only.removeprefix("loss-")))
    chosen = modes if arguments.only == "together" else {n: m for n, m in modes.items() if n == arguments.only}
    return tuning(config, chosen, device, arguments.batch, arguments.length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of conf/model")
    parser.add_argument("--batch", type=at_least(1), default=4, help="sequences of a step")
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"), help="where the figures go")
    parser.add_argument("--only", metavar="WHAT", help="print one measurement as JSON")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py, such as err=0.5")
    arguments = parser.parse_args()
    config = to_config(compose([f"model={arguments.model}", *arguments.overrides]))
    refuse_calibration(config)
    device = config.trainer.place()
    if arguments.only:
        print(json.dumps(only(arguments, config, device)))
        return
    results = measure(arguments, config, device)
    for name, figures in results.items():
        print(f"{name:52}" + "   ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    shape = {"batch": arguments.batch, "length": arguments.length, "model": config.model.name}
    write(arguments.out, {"results": results, "shape": shape}, device)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
