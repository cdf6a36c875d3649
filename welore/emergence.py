"""A probe over the checkpoints of a run: what each shows, and how alike they are, as one JSON file in its folder.

The file is `probe-NAME.json`. While it is made, what each checkpoint has shown lies beside it, so that a probe that is
cut short goes on where it was.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from welore.blocks import OPERATORS, check_attention, curvature, memory, products
from welore.cache import Cache, digest, whole
from welore.config import Config, fingerprint
from welore.errors import Refused
from welore.measure import GIB, peak_memory
from welore.observe import SIDES, Batch, Seen, alike, controls, gradients, look, truncations, weights_of
from welore.probe import Emergence
from welore.report import announce
from welore.subspace import cosine, similarity

FORMAT = "1"  # raised when a probe finds something else: files from before are then made again


def probe_file(name: str) -> str:
    return f"probe-{name}.json"


@dataclass
class Subject:
    """What a probe looks at: the snapshots of a run by step, or the one model of a run that trains nothing."""

    config: Config
    folder: Path
    cache: Cache

    @cached_property
    def snapshots(self) -> list[int]:
        """Empty for a model as it is loaded. A run that trained and left no snapshots is refused."""
        from welore import snapshots  # Lightning takes seconds to import

        if not (self.folder / snapshots.SNAPSHOTS).is_dir() and not self.config.mode.trains:
            return []
        return self.config.probe.chosen(snapshots.steps(self.folder))

    @property
    def steps(self) -> list[int]:
        return self.snapshots or [0]

    @cached_property
    def _as_loaded(self) -> tuple[PreTrainedModel, Any]:
        return self.config.model.load(self.cache.folder, self.config.task.training_texts)

    def model(self, step: int) -> PreTrainedModel:
        """In float32, every weight with a gradient, on the device of the run."""
        from welore import snapshots

        trust = self.config.model.runs_code
        model = snapshots.model_at(self.folder, step, trust) if self.snapshots else self._as_loaded[0]
        return model.float().to(self.config.trainer.place()).requires_grad_(True)

    def identity(self, step: int) -> str:
        """The content of a checkpoint."""
        from welore import snapshots

        if not self.snapshots:
            return self.config.model.identity()
        return digest((self.folder / snapshots.SNAPSHOTS / snapshots.file_name(step)).read_bytes())

    @cached_property
    def batches(self) -> tuple[Batch, Batch]:
        """Two disjoint batches of validation text, in the tokens of the model."""
        from welore import snapshots

        if self.snapshots:
            trust = {"trust_remote_code": self.config.model.runs_code}
            tokenizer = AutoTokenizer.from_pretrained(self.folder / snapshots.SNAPSHOTS, **trust)
        else:
            tokenizer = self._as_loaded[1]
        probe, task = self.config.probe, self.config.task
        task = replace(task, training=replace(task.training, length=probe.length))
        rows = task.rows(tokenizer, self.cache, 0, "validation", 2 * probe.windows)
        if len(rows) < 2 * probe.windows:
            raise Refused(
                f"task={task.name} has {len(rows)} validation sequences of {probe.length} tokens, and two batches of "
                f"probe.windows={probe.windows} need {2 * probe.windows}. Write probe.windows={len(rows) // 2}."
            )
        halves = torch.arange(2 * probe.windows).split(probe.windows)
        fixed, other = ({key: rows.batch(half)[key] for key in ("ids_BL", "labels_BL")} for half in halves)
        return fixed, other


def examine(config: Config, folder: Path, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Write what the probe of a config finds in the checkpoints of its run, where it is not there already: then within
    what `around` makes."""
    subject = Subject(config, folder, Cache(Path(config.outputs) / ".cache"))
    settings = digest(FORMAT, json.dumps(asdict(config.probe)), fingerprint(config))
    keys = {step: digest(settings, subject.identity(step)) for step in subject.steps}
    whole, file = digest(settings, *keys.values()), folder / probe_file(config.probe.name)
    if _key(file) != whole:
        with around():
            _examine(subject, keys, whole, file)


def _examine(subject: Subject, keys: dict[int, str], whole: str, file: Path) -> None:
    config, folder = subject.config, subject.folder
    parts = folder / f"probe-{config.probe.name}"
    bent = _with_curvature(config.probe, subject.steps)
    if todo := [step for step in subject.steps if _key(parts / f"{step}.json") != keys[step]]:
        expect(subject, todo, bent)
        parts.mkdir(exist_ok=True)
    for step in todo:
        announce(f"probe {config.model.name} at step {step}")
        _keep(_checkpoint(subject, step, bent), parts / str(step), keys[step])
    checkpoints = {step: json.loads((parts / f"{step}.json").read_text())["numbers"] for step in subject.steps}
    found = {"key": whole, "probe": asdict(config.probe), "model": config.model.name, "steps": subject.steps}
    found |= {"seed": config.seed, "device": str(config.trainer.place()), "checkpoints": checkpoints}
    started = time.perf_counter()
    names = list(checkpoints[subject.steps[0]]["weights"])
    found |= _between(parts, names, subject.steps, bent, config.probe)
    _write(found | {"seconds_between": time.perf_counter() - started}, file)
    shutil.rmtree(parts)


def _with_curvature(probe: Emergence, steps: list[int]) -> list[int]:
    """The checkpoints with curvature: `curvature_at` of them, evenly, the last among them."""
    count = min(probe.curvature_at, len(steps))
    places = {len(steps) - 1 - i * len(steps) // count for i in range(count)}
    return [steps[place] for place in sorted(places)]


def _checkpoint(subject: Subject, step: int, bent: list[int]) -> Seen:
    """All that one checkpoint shows, and how long it took to see it. The last one is shuffled and truncated, too, and
    its curvature is that of both operators: of the Hessian alone at those before."""
    probe, (fixed, other), last = subject.config.probe, subject.batches, step == subject.steps[-1]
    model = subject.model(step)
    started = time.perf_counter()
    seen = look(model, probe, fixed, other)
    seconds = {"look": time.perf_counter() - started}
    small, apart = _first(fixed, probe.curvature_windows), _first(other, probe.curvature_windows)
    if last:
        started = time.perf_counter()
        seen.numbers["shuffled"] = controls(model, probe)
        seen.numbers["truncated"] = truncations(model, probe, _joined(small, apart))
        seconds["truncate"] = time.perf_counter() - started
    if step in bent:
        started = time.perf_counter()
        batches = {"same": small, "other": apart, "large": other}
        with peak_memory(next(model.parameters()).device) as peak:
            curved = curvature(model, probe, batches, OPERATORS if last else OPERATORS[:1])
        seen.numbers["curvature"], seen.numbers["curvature_peak_gib"] = curved.numbers, peak.gib
        seen.matrices |= curved.matrices
        seconds["curvature"] = time.perf_counter() - started
    seen.numbers["seconds"] = seconds
    if len(subject.steps) == 1:
        seen.matrices.clear()  # there is nothing to compare them with
    return seen


def _first(batch: Batch, count: int) -> Batch:
    return {key: value[:count] for key, value in batch.items()}


def _joined(one: Batch, two: Batch) -> Batch:
    return {key: torch.cat([one[key], two[key]]) for key in one}


def expect(subject: Subject, todo: list[int], bent: list[int]) -> None:
    """Say before it starts about how long the probe will take and how much memory, from one timed pass."""
    probe, (fixed, _) = subject.config.probe, subject.batches
    model, small = subject.model(todo[0]), _first(fixed, probe.curvature_windows)
    weights = weights_of(model, probe.layers)
    if bent:
        check_attention(model)
    started = time.perf_counter()
    gradients(model, weights, small)
    one = time.perf_counter() - started
    ratio = probe.windows / probe.curvature_windows
    operators = sum(len(OPERATORS) if step == subject.steps[-1] else 1 for step in todo if step in bent)
    seconds = one * (2 * ratio * len(todo) + operators * products(model, probe))
    basis = memory(model, probe, model.get_output_embeddings().weight.shape[0]) / GIB if operators else 0.0
    announce(
        f"probe {len(weights)} weights at {len(todo)} checkpoints, at {operators} times with curvature: about "
        f"{seconds / 60:.1f} minutes (beside the decompositions) and {basis:.2f} GiB beyond model and gradients"
    )


def _between(parts: Path, names: list[str], steps: list[int], bent: list[int], probe: Emergence) -> dict[str, Any]:
    """By weight, how alike the gradients of all pairs of checkpoints are, and the top eigenspaces of successive ones.

    `pairs` are symmetric matrices over the checkpoints, `eigenspaces` phi_k by the later checkpoint of each pair.
    """
    found: dict[str, dict[str, Any]] = {"pairs": {}, "eigenspaces": {}}
    for name in names:
        matrices = {step: _matrices(parts, step, name) for step in steps}
        table: dict[str, list[list[float]]] = {}
        for (i, s), (j, t) in combinations(enumerate(steps), 2):
            for key, value in _likeness(matrices[s], matrices[t], name, probe.ranks).items():
                rows = table.setdefault(key, [[float(a == b) for b in steps] for a in steps])
                rows[i][j] = rows[j][i] = float(f"{value:.5g}")
        found["pairs"][name] = table
        key = f"{name}/{OPERATORS[0]}"
        found["eigenspaces"][name] = {
            later: similarity(*(matrices[step][key].flatten(1).T.float() for step in (earlier, later)))
            for earlier, later in zip(bent, bent[1:], strict=False)
        }
    return found


def _matrices(parts: Path, step: int, name: str) -> dict[str, Tensor]:
    """What is kept of one weight at one checkpoint: all weights of all of them would fill the memory."""
    with safe_open(parts / f"{step}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys()) if key.startswith(f"{name}/")}


def _likeness(ours: dict, theirs: dict, name: str, ranks: list[int]) -> dict[str, float]:
    bases = [tuple(side[f"{name}/{which}"] for which in SIDES) for side in (ours, theirs)]
    key = f"{name}/gradient"
    return {"cosine": cosine(ours[key].float(), theirs[key].float())} | alike(*bases, ranks)


def _keep(seen: Seen, stem: Path, key: str) -> None:
    """The matrices first: a checkpoint whose numbers are there is whole."""
    with whole(stem.with_suffix(".safetensors")) as part:
        save_file({name: M.contiguous() for name, M in seen.matrices.items()}, part)
    _write({"key": key, "numbers": seen.numbers}, stem.with_suffix(".json"))


def _write(found: dict[str, Any], file: Path) -> None:
    with whole(file) as part:
        part.write_text(json.dumps(found))


def _key(file: Path) -> str | None:
    """What the content of a file was made from; None where it is absent or cut short."""
    try:
        return json.loads(file.read_text())["key"]
    except (OSError, ValueError, KeyError):
        return None
