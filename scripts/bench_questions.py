"""Measure questions per second: in batches of similar lengths against one by one, written and by likelihood.

usage: python scripts/bench_questions.py [--task boolq] [--questions 96] [--batch 32] [--rounds 2] [--whole]
           [--skip WAY] [--out FILE.json] [overrides of run.py, such as task.path=FOLDER err=0.3]
       python scripts/bench_questions.py --questions all --rounds 1 --skip "written, in batches" ...      all of BoolQ

Written one by one is what the published scripts do: every question alone, eight tokens by `generate`, the answer read
from them. All four ways, but for those of --skip, take turns on the same questions: whole batches of neighbours in
length, spread over all lengths, or the whole test split. The file is written after each way. A pass holds fewer than
`--batch` of them where their tokens would be too many for the device; with --whole they are asked once more in passes
that hold `--batch` of them whatever their length.

The verdicts in batches are compared with those one by one. Two answers in which nothing can be read have the same
verdict and say nothing, so that those that can be read are counted by themselves.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from welore.bench import as_a_run, at_least, exit_status, write
from welore.cache import Cache
from welore.config import compose, to_config
from welore.errors import Refused
from welore.examine import Exam, Item

ONE, MANY, WHOLE = "one by one", "in batches", "in whole batches"
VERDICTS = {"written": "verdict", "likelihood": "option"}  # where an answer has its verdict, by scoring
READABLE = {"right", "wrong"}
WAYS = [f"{scoring}, {how}" for how in (ONE, MANY, WHOLE) for scoring in VERDICTS]
RATIOS = [("likelihood", "written"), ("likelihood", "likelihood"), ("written", "written")]  # batches, one by one
UNCAPPED = 2**40  # tokens of a pass
WARM_UP = 4  # questions

Answers = list[dict]


def sample(items: list[Item], count: int, batch: int) -> list[Item]:
    """Whole batches of neighbours in length, spread over all lengths, as a run of all questions would form them.

    All questions where `count` is 0 or no less than there are.
    """
    if not 0 < count < len(items):
        return items
    ordered = sorted(items, key=lambda item: len(item.prompt))
    groups = max(1, count // batch)
    last = max(0, len(ordered) - batch)
    starts = [round((place + 0.5) * last / groups) for place in range(groups)]
    return [item for start in starts for item in ordered[start : start + batch]]


def exam(asked: Exam, items: list[Item], scoring: str, how: str, batch: int) -> Exam:
    """These questions in one of the six ways."""
    size, tokens = 1 if how == ONE else batch, UNCAPPED if how == WHOLE else None
    sitting = replace(asked.sitting, batch=size, scoring=scoring, tokens=tokens)
    return Exam(items, [], asked.tokenizer, sitting, asked.title)


def timed(exam: Exam, model: PreTrainedModel, dtype: str | None, name: str) -> tuple[float, Answers]:
    """Questions per second, which are printed, and the answers."""
    start = time.perf_counter()
    with torch.inference_mode():
        answers = exam.measure(model, dtype, name).answers
    rate = len(answers) / (time.perf_counter() - start)
    print(f"{name:32}{len(answers):6} questions {rate:8.2f} questions/s", flush=True)
    return rate, answers


def agreement(one: Answers, many: Answers, key: str) -> dict[str, int | float | None]:
    """How many verdicts are the same in both ways, of all questions and of those that were readable in one or both.

    Likelihoods are stored to 4 decimals, so that a difference below 1e-4 nats may read 0.
    """
    pairs = list(zip(one, many, strict=True))
    readable = [(a, b) for a, b in pairs if READABLE & {a[key], b[key]}]
    gaps = [abs(nats - b["nats"][option]) for a, b in pairs for option, nats in a.get("nats", {}).items()]
    found = {
        "questions": len(pairs),
        "same": sum(a[key] == b[key] for a, b in pairs),
        "readable": len(readable),
        "readable and same": sum(a[key] == b[key] for a, b in readable),
    }
    if key == "option":
        found["largest difference in nats"] = max(filter(math.isfinite, gaps), default=None)
    return found


def figures(rates: dict[str, list[float]], answers: dict[str, Answers]) -> dict[str, dict]:
    """What the ways that were asked have found."""
    speed = {name: median(found) for name, found in rates.items()}
    ratios = [(f"{many}, {MANY}", f"{one}, {ONE}") for many, one in RATIOS]
    pairs = [(scoring, how) for scoring in VERDICTS for how in (MANY, WHOLE)]
    return {
        "questions per second": speed,
        "ratios": {
            f"{many} / {one}".replace(",", ""): speed[many] / speed[one]
            for many, one in ratios
            if {many, one} <= set(speed)
        },
        "verdicts": {
            name: Counter(answer[VERDICTS[name.partition(",")[0]]] for answer in found)
            for name, found in answers.items()
        },
        f"agreement with {ONE}": {
            f"{scoring}, {how}": agreement(
                answers[f"{scoring}, {ONE}"], answers[f"{scoring}, {how}"], VERDICTS[scoring]
            )
            for scoring, how in pairs
            if {f"{scoring}, {how}", f"{scoring}, {ONE}"} <= set(answers)
        },
    }


def show(found: dict) -> None:
    print("\n".join(f"{ratio:6.2f} = {name}" for name, ratio in found["ratios"].items()))
    for name, same in found[f"agreement with {ONE}"].items():
        gap = same.get("largest difference in nats")
        print(
            f"{name}: {same['same']} of {same['questions']} verdicts as {ONE}, {same['readable and same']} of"
            f" {same['readable']} that can be read" + ("" if gap is None else f", at most {gap:.4f} nats apart")
        )


def count(text: str) -> int:
    return 0 if text == "all" else at_least(0)(text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="boolq", help="a benchmark whose questions have options")
    parser.add_argument("--questions", type=count, default=96, help="asked in each way in a round; 0 or all: all")
    parser.add_argument("--batch", type=at_least(1), default=32, help="questions of a pass")
    parser.add_argument("--rounds", type=at_least(1), default=2, help="of each way, in turns")
    parser.add_argument("--whole", action="store_true", help="ask once more in batches of any number of tokens")
    parser.add_argument("--skip", action="append", default=[], choices=WAYS, help="a way that is not asked")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_questions.json"), help="where the figures go")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py: model=, err=, task.path=")
    return parser.parse_intermixed_args()


def race(arguments: argparse.Namespace) -> None:
    rounds = [(ONE, MANY)] * arguments.rounds + ([(WHOLE,)] if arguments.whole else [])
    turns = [(scoring, how) for hows in rounds for how in hows for scoring in VERDICTS]
    turns = [turn for turn in turns if ", ".join(turn) not in arguments.skip]
    if not turns:
        raise Refused("--skip leaves nothing to ask. Leave one out.")
    config = to_config(compose([f"task={arguments.task}", *arguments.overrides]))
    device, dtype = config.trainer.place(), config.model.autocast
    cache = Cache(Path(config.outputs) / ".cache")  # of all runs: nothing here measures the decomposition
    model, tokenizer, plan = as_a_run(config, device, cache)
    asked = config.task.benchmark(tokenizer, cache)
    if not asked.items[0].options:
        raise Refused(f"the questions of task={arguments.task} have no options. Write --task boolq or coinflip.")
    items = sample(asked.items, arguments.questions, arguments.batch)

    def ask(scoring: str, how: str, chosen: Sequence[Item]) -> tuple[float, Answers]:
        return timed(exam(asked, chosen, scoring, how, arguments.batch), model, dtype, f"{scoring}, {how}")

    print("warm-up, which does not count")
    for scoring in VERDICTS:
        ask(scoring, MANY, items[:WARM_UP])
    lengths = [len(ids) for ids in exam(asked, items, "likelihood", ONE, 1).prompts]
    shape = {"task": asked.title, "questions": len(items), "tokens": sum(lengths), "batch": arguments.batch}
    shape |= {"model": config.model.name, "overrides": arguments.overrides, "err": plan.err, "keep": plan.keep}
    rates: dict[str, list[float]] = {}
    answers: dict[str, Answers] = {}
    for scoring, how in turns:
        rate, answers[f"{scoring}, {how}"] = ask(scoring, how, items)
        rates.setdefault(f"{scoring}, {how}", []).append(rate)
        write(arguments.out, figures(rates, answers) | shape, device)
    show(figures(rates, answers))
    print(f"{len(items)} questions of {min(lengths)} to {max(lengths)} tokens, median {median(lengths):g}")
    print(f"written to {arguments.out}")


def main() -> None:
    race(parsed())


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
