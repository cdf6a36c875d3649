"""What benchmarks measure: a compressed model, steps of a mode on it, and what FLOPs and bytes allow."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welore.cache import Cache, whole
from welore.compress import Coordinates, factorize, read_spectra, weight_digests
from welore.config import Config, fingerprint
from welore.errors import Lost, Refused
from welore.evaluate import autocast, causal_loss, frozen_weights_in
from welore.explain import explain
from welore.fit import recomputed
from welore.inference import head_size
from welore.lowrank import LowRankLinear
from welore.measure import GIB, Flops, give_back, peak_memory, seconds, synchronize
from welore.memory import Footprint, Step, predict
from welore.models import components, count_bytes
from welore.modes import Mode, select
from welore.provenance import commit, environment
from welore.ranks import Plan
from welore.records import Record
from welore.rounds import compress
from welore.shapes import EVEN, drawn, factor, on_meta, sizes_of, stand_in

# Of AdamW: fused, as we run it, and a loop over the parameters, as it was before.
IMPLEMENTATIONS = {"fused": {"foreach": None, "fused": True}, "loop": {"foreach": False, "fused": False}}


def exit_status(script: Callable[[], object]) -> int:
    """0 where it ends; of one that is refused its status, said in one line as `run.py` says it."""
    try:
        script()
    except Exception as error:
        return explain(error)
    return 0


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number, and not below `least`."""

    def whole_number(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{number} is too small. Write {least} or more.")
        return number

    return whole_number


def memory(text: str) -> float:
    """The type of an argument that is a memory."""
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} GiB is no memory. Write a number above 0.")
    return number


def apart(command: Sequence[str]) -> dict:
    """What a script prints as JSON in its last line, run in a process so that nothing else is in its memory.

    Where it fails this process ends too, with its status: it has said why.
    """
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        raise Lost(f"signal {-done.returncode} ended {' '.join(command)}, as it does where memory runs out")
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def refuse_pruning(config: Config) -> None:
    """What compresses here prunes nothing."""
    if config.prune.prunes:
        raise Refused(f"prune={config.prune.name} is not measured here, and would be left out. Write prune=none.")


def refuse_calibration(config: Config) -> None:
    """What compresses here has no texts."""
    if config.needs:
        chosen = " ".join(f"{group}={getattr(config, group).name}" for group in ("svd", "ranks", "refine", "prune"))
        raise Refused(
            f"{chosen} needs calibration, which is not measured here: the record of every run says what it takes. "
            f"Write options that need none, such as svd=plain ranks=welore."
        )


def write(out: Path, found: dict, device: torch.device) -> None:
    """Figures as JSON with the device, the versions and the commit."""
    out.parent.mkdir(parents=True, exist_ok=True)
    known = environment(device) | {"commit": commit()}
    if find_spec("bitsandbytes"):
        known["bitsandbytes"] = version("bitsandbytes")
    with whole(out) as part:
        part.write_text(json.dumps(found | known, indent=2))


def compressed(config: Config, device: torch.device, cache: Cache) -> tuple[nn.Module, dict]:
    """The model of a config, compressed, and what that took in time and in memory beside the model."""
    refuse_calibration(config)
    refuse_pruning(config)
    model, _ = config.model.load(Path(config.outputs) / ".cache")
    model.to(device)
    coordinates = Coordinates(config.svd, weight_digests(model), cache)
    largest = max(module.weight.numel() for module in components(model).values())
    with peak_memory(device) as before:
        held = before.gib
    with peak_memory(device) as peak:
        spectra = {}
        spectra_seconds = seconds(lambda: spectra.update(read_spectra(model, coordinates)), device)
        plan = config.ranks.plan(spectra, config.budget)
        factor_seconds = seconds(lambda: factorize(model, plan, coordinates), device)
        extra = peak.gib - held
    found = {
        "spectra of all weights": {"seconds": spectra_seconds, "weights": len(spectra)},
        "factors of all LRCs": {"seconds": factor_seconds, "weights": len(plan.factored)},
        # The float64 copy of the largest weight, its Gram matrix and workspace are what one decomposition needs.
        "peak memory beside the model while compressing": {
            "GiB": extra,
            "largest weight in float64, GiB": largest * 8 / GIB,
        },
    }
    return model, found | {"plan": {"err": plan.err, "keep": plan.keep}}


def as_a_run(config: Config, device: torch.device, cache: Cache) -> tuple[PreTrainedModel, Any, Plan]:
    """The model of a config as a run compresses it, calibrated where an option asks for that, its tokenizer, and the
    plan. Nothing is measured."""
    torch.manual_seed(config.seed)
    model, tokenizer = config.model.load(cache.folder, config.task.training_texts)
    weights = weight_digests(model)
    record = Record(fingerprint(config), "failed", asdict(config))
    with tempfile.TemporaryDirectory() as folder:
        plan = compress(model.to(device), tokenizer, weights, config, Path(folder), cache, record)
    return model, tokenizer, plan


def stand_in_model(config: Config, device: torch.device, multiple: int = 1, plan: str = EVEN) -> PreTrainedModel:
    """Random weights in the shapes of a config's model, cut to a stand-in for ranks of its err: nothing is loaded."""
    ranks = stand_in_ranks(config, multiple, plan)
    model = drawn(sizes_of(config.model), config.model.dtype, device)
    if ranks:
        factor(model, ranks)
    return model


def stand_in_ranks(config: Config, multiple: int = 1, plan: str = EVEN) -> dict[str, int | None]:
    """Of the stand-in for a config; empty at err=0. What cannot be known is refused here, before weights are drawn."""
    if config.err is None:
        raise Refused(f"{config.asked} needs spectra, and random weights have none of use. Write err=0.5.")
    refuse_pruning(config)
    bare = on_meta(sizes_of(config.model), config.model.dtype)
    return stand_in(bare, config.err, multiple, plan) if config.err else {}


def refuse_stand_in(multiple: int, plan: str) -> None:
    """What a model that is loaded does not follow."""
    if multiple > 1:
        raise Refused(f"--multiple {multiple} is of a stand-in. Write --random too, or ranks.multiple={multiple}.")
    if plan != EVEN:
        raise Refused(f"--plan {plan} is of a stand-in. Write --random too.")


def subject(
    config: Config, device: torch.device, random: bool, multiple: int = 1, plan: str = EVEN
) -> PreTrainedModel:
    """The compressed model of a config, or its stand-in; `multiple` and `plan` are of the ranks of a stand-in."""
    if random:
        return stand_in_model(config, device, multiple, plan)
    refuse_stand_in(multiple, plan)
    # The cache of all runs: the decomposition is not what is measured.
    return compressed(config, device, Cache(Path(config.outputs) / ".cache"))[0]


class Steps:
    """Optimizer steps of one mode on one compressed model, on which other modes may have their turns in between."""

    def __init__(self, model: nn.Module, mode: Mode, dtype: str | None, batch: int, length: int):
        self.model, self.mode, self.dtype = model, mode, dtype
        self.parameters = select(model, mode)
        self.optimizer = mode.optimizer(self.parameters)
        self.optimizer.release()
        self.loss = causal_loss(model)
        device = self.parameters[0].device
        rows = model.get_input_embeddings().weight.shape[0]
        self.ids_BL = torch.randint(0, rows, (batch, length), device=device)

    def turn(self, count: int) -> list[float]:
        """The seconds of `count` steps after one that does not count."""
        with self._attached():
            return [seconds(self._step, self.ids_BL.device) for _ in range(count + 1)][1:]

    def phases(self, count: int) -> list[dict[str, float]]:
        """The seconds of the parts of `count` steps after one that does not count, each with a wait for the device.

        The optimizer steps once in every way of `IMPLEMENTATIONS`, from one gradient and with one set of moments.
        `launched` is what a whole step took before the device was waited for.
        """
        with self._attached():
            return [self._phases() for _ in range(count + 1)][1:]

    def flops(self) -> dict[str, float]:
        """Of a token in the forward and the backward pass of the first step: products of matrices, as torch runs them.

        Elementwise work, attention and the optimizer are not in it. The gradient of the inputs of the head counts as
        forward, where the loss forms it.
        """
        with self._attached():
            self.mode.begin_step(0, self.optimizer)
            with Flops() as forward:
                loss = self._forward()
            with Flops() as backward:
                loss.backward()
            self.optimizer.zero_grad()
        if None in (forward.total, backward.total):
            raise Refused(
                "torch counts no FLOPs of an operation of this model. Measure seconds: scripts/bench_steps.py."
            )
        return {
            "forward": forward.total / self.ids_BL.numel(),
            "backward": backward.total / self.ids_BL.numel(),
        }

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """This mode's parameters train, in the place of those of the mode before it."""
        self.model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer.attach()
        try:
            with frozen_weights_in(self.model, self.dtype):
                yield
        finally:
            self.optimizer.release()

    def _step(self) -> None:
        self._forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _forward(self) -> Tensor:
        with autocast(self.ids_BL.device, self.dtype):
            total, scored = self.loss(self.ids_BL, self.ids_BL)
        return total / scored

    def _phases(self) -> dict[str, float]:
        device, found, losses = self.ids_BL.device, {}, []
        found["forward"] = seconds(lambda: losses.append(self._forward()), device)
        found["backward"] = seconds(lambda: losses.pop().backward(), device)
        for name in IMPLEMENTATIONS:
            self._step_as(name)
            found[name] = seconds(self.optimizer.step, device)
        self._step_as("fused")
        self.optimizer.zero_grad()
        start = time.perf_counter()
        self._step()
        found["launched"] = time.perf_counter() - start
        synchronize(device)
        return found

    def _step_as(self, name: str) -> None:
        for group in self.optimizer.param_groups:
            group.update(IMPLEMENTATIONS[name])
        for parameter, state in self.optimizer.state.items():
            # A loop reads the step count of every parameter, and would wait for a GPU each time.
            state["step"] = state["step"].to("cpu" if name == "loop" else parameter.device)


def flops_limit(model: nn.Module, length: int) -> dict[str, float]:
    """How much faster LRC-only steps could be than full ones, by the FLOPs of a token, halved.

    A stored number takes part in the forward product, in the gradient of the inputs and, where it trains, in its own
    gradient. `limit` also counts causal attention, length / 2 positions for each of two products forward and four
    backward; `limit of the weights` leaves it out. Elementwise work, the same in both modes, is in neither.
    """
    modules = components(model).values()
    lrc = sum(p.numel() for m in modules if isinstance(m, LowRankLinear) for p in (m.A.weight, m.B.weight))
    dense = sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear))
    through = 2 * (lrc + dense + model.get_output_embeddings().weight.numel())
    config = model.config
    attention = 3 * length * config.num_hidden_layers * config.num_attention_heads * head_size(config)

    def limit(rest: float) -> float:
        return (through + rest + lrc + dense) / (through + rest + lrc)

    return {"limit": limit(attention), "limit of the weights": limit(0)}


def measured(model: PreTrainedModel, config: Config, step: Step, steps: int = 2) -> tuple[Footprint, dict[str, float]]:
    """The predicted footprint of a step, and what was measured, without what the process holds beside its weights."""
    device = config.trainer.place()
    give_back(device)
    with peak_memory(device) as now:
        besides = now.gib - count_bytes(model) / GIB
    model.train()
    with peak_memory(device) as peak, recomputed(model, step.recompute):
        trained = Steps(model, config.mode, config.model.autocast, step.batch, step.length)
        taken = trained.turn(steps)
        found = peak.gib - besides
    footprint = predict(model, config.mode, trained.parameters, step)
    return footprint, {
        "measured GiB": found,
        "predicted GiB": footprint.peak / GIB,
        "tokens_per_second": step.tokens / median(taken),
    }
