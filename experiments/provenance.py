"""The runs of the report: one line each in its list, and all that one is shown with when it is opened."""

import json
from html import escape
from pathlib import Path

import yaml

from experiments import markup
from experiments.cells import Runs
from experiments.tuning import curve
from welore import metrics
from welore.config import BUDGETS
from welore.records import Record, finite
from welore.report import STAGES, number

CURVES = (metrics.TRAIN_LOSS, metrics.VALIDATION_PERPLEXITY)
POINTS = 150  # of a curve, and of a small one
SMALL = 40


def _named(record: Record, group: str) -> str:
    """The option of a group; a dash where a record of another time, or one that failed early, names none."""
    try:
        return str(record.config[group]["name"])
    except (KeyError, TypeError):
        return "—"


def asked(record: Record) -> str:
    """The budget as it was asked for."""
    budgets = {key: record.config.get(key) for key in BUDGETS}
    given = [f"{key}={value:g}" for key, value in budgets.items() if isinstance(value, int | float)]
    return " ".join(given) or "as given"


def results(record: Record) -> list[str]:
    """Of the dense, compressed and tuned model: perplexity, or else the share of right answers or the score."""
    found = record.metrics
    measures = (("perplexity", 2, 1, ""), ("accuracy", 1, 100, " %"), ("score", 2, 1, " of 10"))
    for key, digits, factor, unit in measures:
        values = [found.get(f"{stage}/{key}") for stage in STAGES]
        if any(value is not None for value in values):
            return ["—" if v is None else f"{number(factor * v, digits)}{unit}" for v in values]
    return ["—"] * len(STAGES)


def line(folder: Path, record: Record) -> str:
    """A run in the list, with what the search looks at."""
    groups = {group: _named(record, group) for group in ("model", "svd", "ranks", "mode", "task")}
    words = [*(f"{group}={name}" for group, name in groups.items()), *asked(record).split()]
    words += [f"seed={record.config['seed']}"] if "seed" in record.config else []
    words += [f"group={record.config.get('group') or 'none'}", f"status={record.status}", record.fingerprint]
    loss = markup.thinned(curve(folder, metrics.TRAIN_LOSS.key), SMALL)
    failed = "" if record.status == "done" else " " + markup.badge("fails", record.status)
    name = escape(record.fingerprint)
    cells = [
        ("run", f'<a href="#run={name}">{name}</a>{failed}'),
        ("model", escape(groups["model"])),
        ("method", escape(f"{groups['svd']} · {groups['ranks']}")),
        ("budget", escape(asked(record))),
        ("mode", escape(groups["mode"])),
        ("task", escape(groups["task"])),
        *zip(STAGES, map(escape, results(record)), strict=True),
        ("loss", markup.sparkline(loss, "training loss by step")),
    ]
    shown = "".join(f'<td data-label="{label}"{_right(label)}>{content}</td>' for label, content in cells)
    return f'<tr data-run="{name}" data-words="{escape(" ".join(words).lower())}">{shown}</tr>'


def _right(label: str) -> str:
    return ' class="number"' if label in STAGES else ""


def data(runs: Runs) -> str:
    """What a run is shown with, as JSON; lines of configs are kept once, for most runs share most of theirs."""
    facts: dict[str, int] = {}
    shown = {}
    for folder, record in runs.latest.values():
        config = [facts.setdefault(fact, len(facts)) for fact in flat(record.config)]
        curves = {metric.key: markup.thinned(curve(folder, metric.key), POINTS) for metric in CURVES}
        shown[record.fingerprint] = {
            "folder": str(folder),
            "status": record.status,
            "error": record.error,
            "commit": record.commit,
            "started": record.started,
            "seconds": round(record.seconds, 1),
            "command": command(folder),
            "environment": record.environment,
            "metrics": record.metrics,
            "config": config,
            "curves": {key: points for key, points in curves.items() if points},
        }
    titles = {m.key: m.title for m in vars(metrics).values() if isinstance(m, metrics.Metric)}
    known = finite({"facts": list(facts), "titles": titles, "runs": shown})
    written = json.dumps(known, separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c")  # no text of a record ends the element that holds it


def flat(config: dict, prefix: str = "") -> list[str]:
    """Every key of a config with its value, such as `task.training.lr=0.0005`."""
    lines = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        lines += flat(value, f"{name}.") if isinstance(value, dict) else [f"{name}={json.dumps(value)}"]
    return lines


def command(folder: Path) -> str | None:
    """How the run was started, as Hydra noted it; None where it noted nothing."""
    try:
        overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return None
    return " ".join(["python run.py", *map(str, overrides)])
