"""What the dense, the compressed and the tuned model score: measured once for the same weights."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from welore import metrics
from welore.cache import digest, whole
from welore.config import Config
from welore.evaluate import Benchmark, Outcome
from welore.measure import give_back, peak_memory
from welore.provenance import environment
from welore.records import finite
from welore.report import announce


def measure(model: PreTrainedModel, benchmark: Benchmark, config: Config, stage: str) -> Outcome:
    device = next(model.parameters()).device
    give_back(device)
    with peak_memory(device) as peak:
        outcome = benchmark.measure(model, config.model.autocast, stage)
        outcome.shared.update(peak.metrics(metrics.EVAL_PEAK_GIB, metrics.EVAL_RESERVED_GIB))
    return benchmark.rate(outcome, device, stage)


def measure_once(model, weights: dict[str, str], benchmark: Benchmark, config: Config, cache, stage: str) -> Outcome:
    """The same for weights that other runs have too, once for each device."""
    shape, *content = benchmark.identity
    device = environment(next(model.parameters()).device)["device"]
    key = digest(
        *(part for item in weights.items() for part in item),
        model.config.to_json_string(),
        f"{shape} {config.model.autocast} {device}",
        *content,
    )

    def make() -> Outcome:
        return measure(model, benchmark, config, stage)

    def read(path: Path) -> Outcome:
        return Outcome(**json.loads(path.read_text()))

    def write(outcome: Outcome, path: Path) -> None:
        path.write_text(json.dumps(asdict(outcome)))

    return cache.get("benchmark", key, read, write, make)


def noted(outcome: Outcome, folder: Path, stage: str) -> dict[str, Any]:
    """The metrics of a stage; its answers go to files for people to read."""
    if breaks_at := outcome.stage.get(metrics.BREAKS_AT):
        announce(f"the {stage} model gives numbers that are not finite; they start in {breaks_at}")
    for name, answers in {stage: outcome.answers, f"{stage}-training": outcome.practice}.items():
        if answers:
            lines = [json.dumps(finite(answer), ensure_ascii=False, allow_nan=False) for answer in answers]
            with whole(folder / f"answers-{name}.jsonl") as part:
                part.write_text("\n".join(lines) + "\n")
    return outcome.metrics(stage)
