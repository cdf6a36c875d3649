"""A W&B workspace for the runs of a project: python scripts/dashboard.py ENTITY/PROJECT [--print]

Runs are grouped by artefact. The workspace is made anew each time and its address is printed; `--print` prints what
would be sent as JSON instead, and needs neither key nor network. It needs pip install -e .[dashboard].
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from wandb_workspaces import workspaces
from wandb_workspaces.reports import v2 as panels

from welore import metrics
from welore.errors import Refused
from welore.metrics import Metric

NAME = "welore"
SECTIONS = ("Perplexity", "Budget", "Throughput", "Memory")
# Panels of lines by step, and of one point or bar a run, by section.
LINES = {
    "Perplexity": [metrics.VALIDATION_PERPLEXITY, metrics.TRAIN_LOSS],
    "Throughput": [metrics.TRAIN_TOKENS_PER_SECOND],
    "Memory": [metrics.TRAIN_PEAK_GIB],
}
POINTS = {
    "Perplexity": [
        (metrics.KEEP, metrics.COMPRESSED_PERPLEXITY),
        (metrics.KEEP, metrics.TUNED_PERPLEXITY),
        (metrics.ERR, metrics.TUNED_PERPLEXITY),
    ],
    "Budget": [(metrics.KEEP, metrics.ERR), (metrics.PREDICTED_NATS, metrics.NATS)],
}
BARS = {
    "Throughput": [
        metrics.FIT_TOKENS_PER_SECOND,
        metrics.EVAL_TOKENS_PER_SECOND,
        metrics.EVAL_QUESTIONS_PER_SECOND,
    ],
    "Memory": [metrics.FIT_PEAK_GIB, metrics.FIT_STATE_GIB, metrics.EVAL_PEAK_GIB],
    "Budget": [metrics.PARAMETERS, metrics.TRAINABLE_PARAMETERS],
}
LOGARITHMIC = (metrics.COMPRESSED_PERPLEXITY, metrics.TUNED_PERPLEXITY, metrics.VALIDATION_PERPLEXITY)


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The sections with their panels; runs without a group are single runs of `run.py`."""
    sections = [workspaces.Section(title, panels=_panels(title), is_open=True) for title in SECTIONS]
    grouped = workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")])
    return workspaces.Workspace(entity, project, NAME, sections, runset_settings=grouped)


def _panels(section: str) -> list[Any]:
    lines = [
        panels.LinePlot(title=metric.title, x="Step", y=[metric.key], log_y=metric in LOGARITHMIC)
        for metric in LINES.get(section, [])
    ]
    points = [
        panels.ScatterPlot(
            title=f"{y.title} against {x.title}", x=_result(x), y=_result(y), log_y=y in LOGARITHMIC or None
        )
        for x, y in POINTS.get(section, [])
    ]
    bars = [panels.BarPlot(title=metric.title, metrics=[_result(metric)]) for metric in BARS.get(section, [])]
    return [*points, *lines, *bars]


def _result(metric: Metric) -> panels.SummaryMetric:
    return panels.SummaryMetric(metric.key)


def spec(made: workspaces.Workspace) -> dict[str, Any]:
    """What the library sends. It shows this in no public way."""
    return made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--print", action="store_true", help="print the workspace as JSON and send nothing")
    asked = parser.parse_args(arguments)
    entity, slash, project = asked.project.partition("/")
    if not (entity and slash and project):
        raise Refused(f"{asked.project} names no project. Write ENTITY/PROJECT, such as me/welore.")
    made = workspace(entity, project)
    if asked.print:
        print(json.dumps(spec(made), indent=2))
        return 0
    made.save()
    print("made:", made.url)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
