"""Measure questions per second: options by likelihood, in batches of similar length, against one by one.

usage: python scripts/bench_questions.py [--task boolq] [--questions 96] [--batch 32] [--rounds 2] [--out FILE.json]
           [overrides of run.py, such as task.path=FOLDER err=0.3]

One by one is what the published scripts do: every question alone, eight tokens written by `generate`, the answer read
from them. Both take turns on the same questions, a sample over all lengths. The verdicts of batches of one and of
`--batch` are compared as well.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from bench import compressed

from welore.cache import Cache
from welore.config import compose, to_config
from welore.examine import Exam, Sitting
from welore.runner import environment


def sample(items: list, count: int) -> list:
    """Evenly spread over the lengths of the prompts."""
    ordered = sorted(items, key=lambda item: len(item.prompt))
    return [ordered[round(place * (len(ordered) - 1) / max(1, count - 1))] for place in range(min(count, len(items)))]


def timed(exam: Exam, model, dtype: str | None) -> tuple[float, list[dict]]:
    start = time.perf_counter()
    answers = exam.measure(model, dtype, "bench").answers
    return len(answers) / (time.perf_counter() - start), answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="boolq", help="a benchmark whose questions have options")
    parser.add_argument("--questions", type=int, default=96, help="asked of each way in a round")
    parser.add_argument("--batch", type=int, default=32, help="questions of a pass")
    parser.add_argument("--rounds", type=int, default=2, help="of each way, in turns")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_questions.json"), help="where the figures go")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py: model=, err=, task.path=")
    arguments = parser.parse_intermixed_args()
    config = to_config(compose([f"task={arguments.task}", *arguments.overrides]))
    device, cache = config.trainer.place(), Cache(Path(config.outputs) / ".cache")
    model, _ = compressed(config, device, cache)
    _, tokenizer = config.model.load(cache.folder)
    asked = config.task.benchmark(tokenizer, cache)
    items = sample(asked.items, arguments.questions)

    def ways(batch: int, scoring: str) -> Exam:
        task = config.task
        how = Sitting(task.style == "paper", batch, task.new_tokens, scoring, task.read, task.right)
        return Exam(items, [], tokenizer, how, asked.title)

    exams = {
        "one by one, written": ways(1, "written"),
        "one by one, likelihood": ways(1, "likelihood"),
        f"batches of {arguments.batch}, likelihood": ways(arguments.batch, "likelihood"),
        f"batches of {arguments.batch}, written": ways(arguments.batch, "written"),
    }
    dtype = config.model.autocast
    timed(ways(arguments.batch, "likelihood"), model, dtype)  # a warm-up
    rates: dict[str, list[float]] = {name: [] for name in exams}
    answers = {}
    for _ in range(arguments.rounds):
        for name, exam in exams.items():
            rate, answers[name] = timed(exam, model, dtype)
            rates[name].append(rate)
    found = {name: median(values) for name, values in rates.items()}
    first, one, many, together = exams
    same = {
        kind: sum(a[kind] == b[kind] for a, b in zip(answers[single], answers[batched], strict=True))
        for kind, single, batched in (("option", one, many), ("verdict", first, together))
    }
    for name, rate in found.items():
        print(f"{name:32}{rate:8.2f} questions/s   {rate / found[first]:5.2f} x {first}")
    print(f"verdicts of single questions and of batches agree, of {len(items)}: {same}")
    lengths = [len(ids) for ids in asked.prompts(items)]
    print(f"{len(items)} questions of {min(lengths)} to {max(lengths)} tokens, median {median(lengths):g}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    how = {"task": asked.title, "questions": len(items), "agree": same, "tokens": sum(lengths)}
    arguments.out.write_text(json.dumps(found | how | environment(device), indent=2))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
