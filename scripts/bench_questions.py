"""Measure questions per second: options by likelihood, in batches of similar length, against one by one.

usage: python scripts/bench_questions.py [--task boolq] [--questions 96] [--batch 32] [--rounds 2] [--out FILE.json]
           [overrides of run.py, such as task.path=FOLDER err=0.3]

One by one is what the published scripts do: every question alone, eight tokens written by `generate`, the answer read
from them. Both take turns on the same questions: whole batches of neighbours in length, spread over all lengths. The
verdicts of batches of one and of `--batch` are compared as well.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from welore.bench import compressed
from welore.cache import Cache
from welore.config import Config, compose, to_config
from welore.examine import Exam, Sitting
from welore.provenance import environment

ONE = "one by one"


def sample(items: list, count: int, batch: int) -> list:
    """Whole batches of neighbours in length, spread over all lengths, as a run of all questions would form them."""
    ordered = sorted(items, key=lambda item: len(item.prompt))
    groups = max(1, count // batch)
    last = max(0, len(ordered) - batch)
    starts = [round((place + 0.5) * last / groups) for place in range(groups)]
    return [item for start in starts for item in ordered[start : start + batch]]


def timed(exam: Exam, model, dtype: str | None) -> tuple[float, list[dict]]:
    start = time.perf_counter()
    answers = exam.measure(model, dtype, "bench").answers
    return len(answers) / (time.perf_counter() - start), answers


def ways(config: Config, asked: Exam, items: list, batch: int) -> dict[str, Exam]:
    """The same questions in all four ways: one by one and in batches, written and by likelihood."""
    task, found = config.task, {}
    for name, size in {ONE: 1, f"batches of {batch}": batch}.items():
        for scoring in ("written", "likelihood"):
            how = Sitting(task.style == "paper", size, task.new_tokens, scoring, task.read, task.right)
            found[f"{name}, {scoring}"] = Exam(items, [], asked.tokenizer, how, asked.title)
    return found


def agreement(answers: dict[str, list[dict]]) -> dict[str, int]:
    """How many verdicts of single questions and of batches are the same, by what was written and by likelihood."""
    one_written, one_likely, many_written, many_likely = answers.values()
    pairs = {"verdict": (one_written, many_written), "option": (one_likely, many_likely)}
    return {key: sum(a[key] == b[key] for a, b in zip(*pair, strict=True)) for key, pair in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="boolq", help="a benchmark whose questions have options")
    parser.add_argument("--questions", type=int, default=96, help="asked in each way in a round")
    parser.add_argument("--batch", type=int, default=32, help="questions of a pass")
    parser.add_argument("--rounds", type=int, default=2, help="of each way, in turns")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_questions.json"), help="where the figures go")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py: model=, err=, task.path=")
    arguments = parser.parse_intermixed_args()
    config = to_config(compose([f"task={arguments.task}", *arguments.overrides]))
    device, cache = config.trainer.place(), Cache(Path(config.outputs) / ".cache")
    _, tokenizer = config.model.load(cache.folder)
    model, _ = compressed(config, device, cache)
    asked = config.task.benchmark(tokenizer, cache)
    exams = ways(config, asked, sample(asked.items, arguments.questions, arguments.batch), arguments.batch)
    last = list(exams)[-1]
    timed(exams[last], model, config.model.autocast)  # a warm-up
    rates: dict[str, list[float]] = {name: [] for name in exams}
    answers: dict[str, list[dict]] = {}
    for _ in range(arguments.rounds):
        for name, exam in exams.items():
            rate, answers[name] = timed(exam, model, config.model.autocast)
            rates[name].append(rate)
    lengths = [len(ids) for ids in exams[last].prompts]
    found = {"questions per second": {n: median(r) for n, r in rates.items()}, "same verdicts": agreement(answers)}
    found |= {"task": asked.title, "questions": len(lengths), "tokens": sum(lengths)} | environment(device)
    first = found["questions per second"][f"{ONE}, written"]
    for name, rate in found["questions per second"].items():
        print(f"{name:32}{rate:8.2f} questions/s   {rate / first:5.2f} x {ONE}, written")
    print(f"same verdicts one by one and in batches, of {len(lengths)}: {found['same verdicts']}")
    print(f"{len(lengths)} questions of {min(lengths)} to {max(lengths)} tokens, median {median(lengths):g}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
