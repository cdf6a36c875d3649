"""What the artefacts on emergence read: the probes of a few pretraining runs, or of one model as it is loaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cells import Cell, Row
from experiments.compare import dense
from experiments.page import Outcomes
from experiments.scales import setting
from welore import metrics
from welore.correlation import Interval
from welore.errors import Refused
from welore.observe import SIDES, layer_of
from welore.report import number
from welore.subspace import above_chance

FILES = ("probe-emergence.json",)
SEEDS = (0, 1, 2)
RANK = 16  # r of the subspaces in tables and claims
THRESHOLD = "below_0.2_max"
VECTORS = 5  # eigenvectors of the alignment
KEPT = 0.25  # of its ranks, by a truncated weight
LOW = ("q_proj", "k_proj", "gate_proj")  # what the paper calls low-rank (Figure 1, Section 2.4)
HIGH = ("v_proj", "up_proj", "down_proj")
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pretraining(scale: str) -> list[Cell]:
    """The same pretraining on three seeds, with the probe of its snapshots."""
    shared: Cell = {"ranks": "welore", "mode": "full", "err": 0, "probe": "emergence"}
    if scale == "paper":
        shared |= {"model": "llama_130m", "task": "c4", "task/training": "pretrain", "task/protocol": "pretrain"}
        shared |= {"task.splits.train": "train:en/c4-train.000*-of-01024.json.gz"}  # one has 3 % of what is read
        shared |= {"probe.snapshots": 26, "probe.windows": 512, "probe.curvature_windows": 16, "probe.steps": 60}
    else:
        shared |= {"model": "llama_2m", "task": "sotu", "task/training": "pretrain_laptop"}
        shared |= {"task/protocol": "pretrain_laptop", "task.training.steps": 500, "task.training.length": 128}
        shared |= {"task.training.snapshot_every": 50, "probe.length": 128}
    return [shared | {"seed": seed} for seed in SEEDS]


def trained(scale: str) -> Cell:
    """A model as it is loaded, with the probe of some of its layers; a cell of Table 1 too."""
    shared = {"ranks": "welore", "mode": "none", "err": 0.5, "probe": "trained"} | setting(scale)
    if scale == "laptop":
        return {"model": "smollm2_135m"} | shared
    more = {"probe.layers": [0, 8, 16, 24, 31], "probe.length": 256, "probe.windows": 128}
    return {"model": "llama2_7b"} | shared | more | {"probe.curvature_windows": 4, "probe.steps": 30}


def read(row: Row, file: str = FILES[0]) -> dict[str, Any]:
    """What a probe has found. Refuses one that was told to leave out what is read here: that is no part of its run."""
    path = Path(row.folder) / file
    found = json.loads(path.read_text())
    probe = found["probe"]
    wanted = {"ranks": RANK in probe["ranks"], "thresholds": 0.2 in probe["thresholds"], "kept": KEPT in probe["kept"]}
    wanted |= {"eigenvalues": probe["eigenvalues"] == VECTORS, "curvature_at": probe["curvature_at"] > 0}
    if odd := [f"probe.{key}={probe[key]}" for key, there in wanted.items() if not there]:
        raise Refused(
            f"{path} was made with {', '.join(odd)}, and the artefacts read r = {RANK}, {VECTORS} eigenvalues at one "
            f"checkpoint or more, k = 0.2 and truncation to {KEPT}. Probe the run again with probe={probe['name']} as "
            f"it comes."
        )
    return found


@dataclass(frozen=True)
class Weight:
    """One weight at the last checkpoint of one run, with all that is correlated."""

    seed: int
    layer: int
    component: str
    numbers: dict[str, float]

    @property
    def block(self) -> tuple[int, int]:
        """Weights of one layer of one run, which are not independent."""
        return self.seed, self.layer


def weights(found: dict[str, Any], seed: int) -> list[Weight]:
    """The weights at the last checkpoint.

    What says how low-rank one is stands against the same entries in a random order, for it depends on the shape too:
    of random matrices a square one has the lower r_90. `r_90` and `entropy rank` are ratios to that control, `below`
    is the difference; `gradient r_90` is a ratio to the control of the weight.
    """
    steps, last = found["steps"], found["checkpoints"][str(found["steps"][-1])]
    rows = []
    for name, shown in last["weights"].items():
        control = last["shuffled"][name]
        numbers = {
            "r_90": shown["weight"]["r_90"] / control["r_90"],
            "entropy rank": shown["weight"]["entropy_rank"] / control["entropy_rank"],
            "below": shown["weight"][THRESHOLD] - control[THRESHOLD],
            "gradient r_90": shown["gradient"]["r_90"] / control["r_90"],
        }
        numbers |= {f"nats at {share}": nats for share, nats in last["truncated"][name].items()}
        for operator, curved in last["curvature"][name].items():
            numbers |= {f"{operator} {gap}": value for gap, value in curved["gaps"].items()}
            numbers[f"{operator} lambda_1"] = curved["values"][0]
        if len(steps) > 1:
            numbers |= {"subspace": stability(found, name), "cosine": mean(late(found["pairs"][name]["cosine"]))}
        rows.append(Weight(seed, layer_of(name), name.rpartition(".")[2], numbers))
    return rows


def shown(
    found: Sequence[dict[str, Any]], component: str, place: int, of: str = "weight", key: str = "r_90"
) -> list[float]:
    """One number of every weight of a component at one checkpoint: of the `weight`, its `gradient` or the `floor`."""
    at = [one["checkpoints"][str(one["steps"][place])]["weights"] for one in found]
    return [one[name][of][key] for one in at for name in one if name.endswith(component)]


def stability(found: dict[str, Any], name: str) -> float:
    """phi_r of the gradients of successive checkpoints in the second half, above chance, the mean of both sides."""
    shape = found["checkpoints"][str(found["steps"][-1])]["weights"][name]["shape"]
    values = [
        above_chance(phi, RANK, size)
        for side, size in zip(SIDES, shape, strict=True)
        for phi in late(found["pairs"][name][f"{side}_{RANK}"])
    ]
    return mean(values)


def floor(found: dict[str, Any], name: str) -> float:
    """The same between two batches at one checkpoint, the mean over the second half."""
    steps = found["steps"][len(found["steps"]) // 2 :]
    shown = [found["checkpoints"][str(step)]["weights"][name] for step in steps]
    return mean(
        [
            above_chance(one["floor"][f"{side}_{RANK}"], RANK, size)
            for one in shown
            for side, size in zip(SIDES, one["shape"], strict=True)
        ]
    )


def late(table: Sequence[Sequence[float]]) -> list[float]:
    """Beside the diagonal of a matrix over checkpoints: successive ones, in the second half."""
    successive = [table[i][i + 1] for i in range(len(table) - 1)]
    return successive[len(successive) // 2 :]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def decided(interval: Interval, sign: int, what: str) -> Outcomes:
    """Whether an interval lies on the claimed side of 0; open where it holds 0."""
    if interval.sign is None:
        return {f"significance of {what} {interval}": None}
    return {f"{what} {interval}": interval.sign == sign}


def cost(rows: Sequence[Row]) -> list[str]:
    """What each probe took beside the pretraining that it watches, as notes."""
    lines = []
    for row in rows:
        found = read(row)
        shown = [checkpoint["seconds"] for checkpoint in found["checkpoints"].values()]
        spent = {part: sum(one[part] for one in shown if part in one) for part in ("look", "truncate", "curvature")}
        trained = row.record.metrics["fit/seconds"]
        lines.append(
            f"seed {row.cell['seed']}: pretraining {trained:,.0f} s; spectra and gradients {spent['look']:,.0f} s "
            f"({spent['look'] / trained:.1%}), truncation {spent['truncate']:,.0f} s, curvature "
            f"{spent['curvature']:,.0f} s, comparing checkpoints {found['seconds_between']:,.0f} s"
        )
    return lines


def measured(rows: Sequence[Row]) -> list[str]:
    """The text and the device behind the numbers, each said once."""
    texts = dict.fromkeys(f"text: the validation split of {row.cell['task']}" for row in rows)
    devices = dict.fromkeys(f"device: {row.record.environment['device']}" for row in rows)
    models = [
        f"err {row.number(metrics.ERR):.3f}, keep {row.number(metrics.KEEP):.3f}, "
        f"{row.number(metrics.PARAMETERS) / 1e6:,.1f}M parameters; perplexity dense {dense([row])}"
        + (f", trained {number(row.found(metrics.TUNED_PERPLEXITY), 2)}" if row.stage == "tuned" else "")
        for row in rows
    ]
    return [*dict.fromkeys(models), *texts, *devices]
