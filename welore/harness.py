"""The tasks of lm-evaluation-harness, run on the model in memory, factors and all.

The package is an optional extra: pip install -e .[harness]
"""

import importlib.util
import json
import math
import time
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from welore import metrics
from welore.batches import tokenizer_identity
from welore.cache import Cache, digest
from welore.counts import wilson
from welore.errors import Refused, refuse_below
from welore.evaluate import Benchmark, Outcome, float32_logits
from welore.greedy import where_it_breaks
from welore.tasks import Task

PACKAGE = "lm_eval"


@dataclass
class Harness(Task):
    """`tasks` of the harness, `limit` questions of each (null for all), `shots` before each (null for the task's own).

    `path` is a folder with task files of your own; what they read should lie in it too, since its content is part of
    the identity of a run.
    """

    teaches: ClassVar[bool] = False
    tasks: list[str]
    shots: int | None
    limit: int | None
    batch: int

    def __post_init__(self):
        if not self.tasks:
            raise Refused(
                "task.tasks=[] asks nothing. Write the names of the harness, such as task.tasks=[piqa,boolq]."
            )
        refuse_below("task", self, shots=0, limit=1, batch=1)

    def benchmark(self, tokenizer: Any, cache: Cache) -> "HarnessRun":
        if importlib.util.find_spec(PACKAGE) is None:
            raise Refused(
                "task=lm_eval needs lm-evaluation-harness, which is not installed. Run: pip install -e .[harness]"
            )
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=self.path)
        return HarnessRun(self, tokenizer, manager, self._content(manager))

    def fetch(self) -> str | None:
        self.benchmark(None, None)  # whatever its tasks read, the clients that they read it with keep it
        return f"what {', '.join(self.tasks)} of lm-evaluation-harness read"

    def _content(self, manager: Any) -> str:
        """Of the questions that are asked; their data may lie on the hub or anywhere."""
        try:
            loaded = manager.load(list(self.tasks))["tasks"]
            asked = {name: list(islice(task.eval_docs, self.limit)) for name, task in loaded.items()}
        except Exception as error:  # task files are anyone's, code among them, and their data may be out of reach
            reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
            near = [n for name in self.tasks for n in get_close_matches(name, manager.all_tasks, 2) if n != name]
            hint = f" Did you mean {' or '.join(near)}?" if near and isinstance(error, KeyError) else ""
            raise Refused(
                f"task.tasks={list(self.tasks)} cannot be loaded: {type(error).__name__}: {reason}.{hint} Write names "
                f"of the harness, whose data must be in reach, or give a folder of task files: task.path=FOLDER."
            ) from error
        return digest(json.dumps(asked, sort_keys=True, default=str))

    def identity(self) -> str:
        """The content of the folder of task files."""
        if self.path is None:
            return ""
        folder = Path(self.path)
        if not folder.is_dir():
            raise Refused(f"task.path={self.path} is no folder of task files. The working folder is {Path.cwd()}.")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return digest(*(part for file in files for part in (str(file.relative_to(folder)), file.read_bytes())))


class HarnessRun(Benchmark):
    """The harness on one model after the other; it brings its own prompts, windows and metrics.

    What is longer than the positions of the model, the harness cuts at its beginning.
    """

    def __init__(self, task: Harness, tokenizer: Any, manager: Any, content: str):
        self.task, self.tokenizer, self.manager, self.content = task, tokenizer, manager, content
        asked = "all questions" if task.limit is None else f"the first {task.limit} questions"
        shots = "their own shots" if task.shots is None else f"{task.shots} shots"
        self.title = f"lm-evaluation-harness: {', '.join(task.tasks)}, {asked}, {shots}"

    @property
    def identity(self) -> tuple[str | bytes, ...]:
        from importlib.metadata import version

        how = f"{self.title} {version('lm-eval')} batch {self.task.batch} none of what is not finite, counts"
        return how, self.task.identity(), self.content, tokenizer_identity(self.tokenizer)

    def measure(self, model: PreTrainedModel, dtype: str | None, stage: str) -> Outcome:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # The harness opens an autocast of its own, which ends one around it.
        wrapped = HFLM(
            pretrained=model,
            tokenizer=self.tokenizer,
            batch_size=self.task.batch,
            mixed_precision_dtype=dtype,
            softmax_dtype="float32",
        )
        started = time.perf_counter()
        with float32_logits(model):
            found = simple_evaluate(
                wrapped,
                tasks=list(self.task.tasks),
                num_fewshot=self.task.shots,
                limit=self.task.limit,
                task_manager=self.manager,
                log_samples=True,
                bootstrap_iters=0,
            )
        seconds = time.perf_counter() - started
        samples = found["samples"]
        # Where a task has several filters, each of them lists every question.
        asked = sum(len({line["doc_id"] for line in lines}) for lines in samples.values())
        shared = {metrics.EVAL_EXAMPLES.key: asked, metrics.EVAL_QUESTIONS_PER_SECOND.key: asked / seconds}
        broken = broken_tasks(samples)
        stage = numbers(found["results"], with_groups(set(broken), found["group_subtasks"]))
        stage |= counts(samples, stage)
        if broken:
            ids_BL = torch.tensor([wrapped.tok_encode(next(iter(broken.values())))[-wrapped.max_length :]])
            stage[metrics.BREAKS_AT] = where_it_breaks(model, ids_BL.to(wrapped.device), dtype)
        return Outcome(stage, shared, answers(samples))


def broken_tasks(samples: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The tasks with a log p that is not finite, each with a text that has it.

    The harness takes NaN for the likeliest option, and an accuracy comes of it like any other.
    """
    found = {task: next(filter(None, map(_broken, lines)), None) for task, lines in samples.items()}
    return {task: text for task, text in found.items() if text is not None}


def _broken(line: dict[str, Any]) -> str | None:
    """The first text of a question whose log p is not finite. What a model writes freely has no log p."""
    for argument, response in zip(line["arguments"], line["filtered_resps"], strict=True):
        log_p = response[0] if isinstance(response, tuple) else response
        if isinstance(log_p, float) and not math.isfinite(log_p):
            return "".join(part for part in argument if isinstance(part, str))
    return None


def with_groups(tasks: set[str], groups: dict[str, list[str]]) -> set[str]:
    """The tasks, and every group that one of them counts in, also by way of another group."""
    more = {group for group, members in groups.items() if tasks & set(members)} - tasks
    return with_groups(tasks | more, groups) if more else tasks


def numbers(results: dict[str, dict[str, Any]], broken: set[str]) -> dict[str, float | None]:
    """`lm_eval/TASK/METRIC`, as the harness names them, without the filter where it is `none`; None for the broken."""
    return {
        _key(task, metric): None if task in broken else float(value)
        for task, measured in results.items()
        for metric, value in measured.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and metric not in ("sample_len",)
    }


def counts(samples: dict[str, list[dict[str, Any]]], told: dict[str, float | None]) -> dict[str, float]:
    """How many questions each task has, and of metrics that are a share of right answers how many those are, and the
    share's Wilson interval. The harness's own deviation is left out: it is one of the normal distribution."""
    found: dict[str, float] = {}
    for task, lines in samples.items():
        found[f"lm_eval/{task}/examples"] = len({line["doc_id"] for line in lines})
        by_metric: dict[str, list[Any]] = {}
        for line in lines:
            for metric in line["metrics"]:
                by_metric.setdefault(_key(task, f"{metric},{line['filter']}"), []).append(line[metric])
        for key, values in by_metric.items():
            verdicts = all(value in (0, 1) for value in values) and told.get(key) is not None
            if verdicts and math.isclose(sum(values) / len(values), told[key]):  # some are aggregated otherwise
                low, high = wilson(sum(values), len(values))
                found |= {f"{key}_correct": int(sum(values)), f"{key}_low": low, f"{key}_high": high}
    return found


def _key(task: str, metric: str) -> str:
    return f"lm_eval/{task}/{metric.removesuffix(',none')}"


def answers(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line a question and filter; one with a log p that is not finite is `broken` and has no metric."""
    return [
        {
            "task": task,
            "prompt": str(line["arguments"][0][0]),
            "right": str(line["target"]),
            "options": [str(argument[1]) for argument in line["arguments"] if isinstance(argument[1], str)],
            "answers": [str(answer) for answer in line["filtered_resps"]],
            "filter": line["filter"],
            **_measured(line),
        }
        for task, lines in samples.items()
        for line in lines
    ]


def _measured(line: dict[str, Any]) -> dict[str, Any]:
    found = {key: line[key] for key in line["metrics"] if isinstance(line[key], bool | int | float)}
    if _broken(line) is None:
        return {"metrics": found}
    return {"metrics": dict.fromkeys(found), "verdict": "broken"}
