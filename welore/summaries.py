"""Summaries of news articles of three lengths (appendix D.4.2), rated in four aspects and compared by ROUGE.

The paper prints neither its prompt nor that of its judge, and has a judge compare summaries with those of another
model. Both prompts here are ours, and a summary is rated alone, with the article before it.
"""

import importlib.util
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from welore.chat import said
from welore.errors import Refused, refuse_below
from welore.judged import Case, Judged
from welore.judges import Request, in_range
from welore.sources import Raw, alone_or_named, parsed, read_files, reading_hub

PROMPT = "Summarize the following news article in three sentences. Write the summary and nothing else.\n\n{article}"
ASPECTS = {
    "coherence": "it is well organized, and its sentences build on one another",
    "consistency": "everything it says is supported by the article",
    "fluency": "its sentences are grammatical and easy to read",
    "relevance": "it holds what is important in the article, and little else",
}
SYSTEM = "You are a careful and impartial judge of summaries."
JUDGE = (
    "Rate the summary of a news article below in four aspects, each on a scale of 1 (worst) to 10 (best).\n"
    "{aspects}\n"
    "Do not let the length of the summary influence you. Explain your ratings in a few sentences, then end with "
    "exactly these four lines:\n{lines}\n\n"
    "[The Start of the Article]\n{article}\n[The End of the Article]\n\n"
    "[The Start of the Summary]\n{summary}\n[The End of the Summary]"
)
LINES = "\n".join(f"{aspect}: [[rating]]" for aspect in ASPECTS)
FORM = "the four lines " + ", ".join(f'"{aspect}: [[rating]]"' for aspect in ASPECTS) + " with ratings from 1 to 10"
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}  # ours, and the names of the package
SMALL, LARGE = 470, 790  # words: at most, and at least


@dataclass
class CnnDailyMail(Judged):
    """`per_class` articles of each class of length, which `choice_seed` chooses among all of the split.

    A local file has records with the fields `article` and `highlights`; of a folder the file is read that is named
    after `split`. Articles of more than `most_words` words are not chosen (null for any).
    """

    what: ClassVar[str] = "articles"
    shorter: ClassVar[str] = "a lower task.new_tokens or task.most_words"
    subset: str
    split: str
    per_class: int
    choice_seed: int
    most_words: int | None
    rouge: bool

    def __post_init__(self):
        super().__post_init__()
        refuse_below("task", self, per_class=1, most_words=LARGE)

    def cases(self) -> list[Case]:
        classes: dict[str, list[Case]] = {"small": [], "medium": [], "large": []}
        for number, raw in enumerate(self._raws()):
            article, highlights = parsed(_texts, raw, number, self.source(), "the format of summaries")
            if self.most_words is None or len(article.split()) <= self.most_words:
                name, category = str(raw.get("id", number)), length_class(article)
                classes[category].append(Case(name, category, (PROMPT.format(article=article),), (highlights,)))
        if short := {name: len(cases) for name, cases in classes.items() if len(cases) < self.per_class}:
            raise Refused(
                f"{self.source()} has too few articles for task.per_class={self.per_class}: {short}. Write "
                f"task.per_class={min(short.values())} or give more articles."
                if min(short.values())
                else f"{self.source()} lacks articles of a class ({short}): small has at most {SMALL} words, large at "
                f"least {LARGE}, medium lies between. Give articles of all three."
            )
        draw = random.Random(self.choice_seed)
        return [case for cases in classes.values() for case in draw.sample(cases, self.per_class)]

    def _raws(self) -> list[Raw]:
        if self.path is not None:
            return self._of_split(read_files(Path(self.path)))
        from datasets import load_dataset

        instead = "Give a local file of JSON lines with the fields article and highlights: task.path=FILE."
        with reading_hub(f"the articles of {self.name}", self.repo, instead):
            return list(load_dataset(self.repo, self.subset, split=self.split))

    def _of_split(self, raws: dict[str, list[Raw]]) -> list[Raw]:
        try:
            return alone_or_named(raws, self.path, self.split)
        except Refused as error:
            raise Refused(f"{self.source()} does not hold the articles of task.split={self.split}: {error}") from error

    def requests(self, case: Case, answers: Sequence[str]) -> list[Request]:
        aspects = "\n".join(f"* {aspect.capitalize()}: {meaning}." for aspect, meaning in ASPECTS.items())
        article = case.turns[0].removeprefix(PROMPT.format(article=""))
        asked = JUDGE.format(aspects=aspects, lines=LINES, article=article, summary=answers[0])
        return [Request([said("system", SYSTEM), said("user", asked)], tuple(ASPECTS), FORM, read_ratings)]

    def benchmark(self, tokenizer, cache, judge):
        if self.rouge and importlib.util.find_spec("rouge_score") is None:
            raise Refused("task.rouge=true needs a package. Run: pip install -e .[tasks], or write task.rouge=false.")
        return super().benchmark(tokenizer, cache, judge)

    @property
    def measures(self):
        return tuple(ROUGE) if self.rouge else ()

    def measured(self, cases, answers):
        if not self.rouge:
            return super().measured(cases, answers)
        return rouge([case.references[0] for case in cases], [written[0] for written in answers])


def _texts(raw: Any) -> tuple[str, str]:
    found = [raw.get(key) for key in ("article", "highlights")]
    if not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError("it lacks a text in `article` or `highlights`")
    return found[0].strip(), found[1].strip()


def length_class(article: str) -> str:
    words = len(article.split())
    return "small" if words <= SMALL else "large" if words >= LARGE else "medium"


def read_ratings(text: str) -> dict[str, float] | None:
    """The last rating of each aspect, which follows the explanation; None where one is missing or out of range."""
    found = {aspect: re.findall(rf"(?i)\b{aspect}\b[^\[\n]*\[\[(\d+\.?\d*)\]\]", text) for aspect in ASPECTS}
    ratings = {aspect: in_range(digits[-1]) for aspect, digits in found.items() if digits}
    return ratings if len(ratings) == len(ASPECTS) and None not in ratings.values() else None


def rouge(references: Sequence[str], summaries: Sequence[str]) -> list[dict[str, float]]:
    """F1 of ROUGE-1, -2 and -L with stemming, from 0 to 1, of each summary."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE.values()), use_stemmer=True)
    scores = [scorer.score(reference, summary) for reference, summary in zip(references, summaries, strict=True)]
    return [{key: score[name].fmeasure for key, name in ROUGE.items()} for score in scores]
