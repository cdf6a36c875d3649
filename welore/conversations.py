"""MT-Bench: conversations of two turns, and the published prompts of their judge (Section 4.1, appendix D.5).

The prompts rate one answer at a time from 1 to 10. Those of a second turn show the whole conversation.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from welore.chat import said
from welore.errors import Refused, refuse_below
from welore.judged import Case, Judged
from welore.judges import Request, rating
from welore.sources import parsed, reading_hub

T = TypeVar("T")
QUESTIONS, REFERENCES, PROMPTS = "question", "reference_gpt-4", "judge_prompts"
NEEDED = f"{QUESTIONS}.jsonl, {REFERENCES}.jsonl and {PROMPTS}.jsonl"
# Ours, for asking again: without a number, which weak judges repeat.
FORM = 'a rating from 1 to 10 in the form "Rating: [[rating]]"'
REFERENCED = ("math", "reasoning", "coding")  # the categories whose judge sees a reference
SHAPES = {"single-v1": "one turn", "single-math-v1": "one turn with a reference"} | {
    "single-v1-multi-turn": "two turns",
    "single-math-v1-multi-turn": "two turns with references",
}


@dataclass
class MtBench(Judged):
    """Its questions, references and judge prompts are files of one folder, or of a space of the hub.

    `limit` takes that many questions, spread evenly, for the file is sorted by category.
    """

    what: ClassVar[str] = "conversations"
    files: dict[str, str]
    limit: int | None

    def __post_init__(self):
        super().__post_init__()
        refuse_below("task", self, limit=1)
        self.prompts: dict[str, dict[str, str]] | None = None

    def cases(self) -> list[Case]:
        references = dict(self._records(REFERENCES, _reference))
        found = self._records(QUESTIONS, lambda raw: _case(raw, references))
        count = len(found) if self.limit is None else min(self.limit, len(found))
        return [found[place * len(found) // count] for place in range(count)]

    def requests(self, case: Case, answers: Sequence[str]) -> list[Request]:
        """One for each turn; a request rates the aspect `turn_1` or `turn_2`."""
        kind = "single-math-v1" if case.references else "single-v1"
        fields = {"question": case.turns[0], "answer": answers[0]}
        for number, (turn, answer) in enumerate(zip(case.turns, answers, strict=True), 1):
            fields |= {f"question_{number}": turn, f"answer_{number}": answer}
        fields |= {f"ref_answer_{number}": text for number, text in enumerate(case.references, 1)}
        return [self._request(kind, "turn_1", fields), self._request(f"{kind}-multi-turn", "turn_2", fields)]

    def _request(self, name: str, aspect: str, fields: dict[str, str]) -> Request:
        if self.prompts is None:
            self.prompts = self._judge_prompts()
        prompt = self.prompts[name]
        try:
            asked = prompt["prompt_template"].format(**fields)
        except (KeyError, IndexError, ValueError) as error:
            raise Refused(
                f"the judge prompt {name} of {self.source()} cannot be filled: {type(error).__name__}: {error}. Its "
                f"fields are {', '.join(fields)}."
            ) from error

        def read(text: str) -> dict[str, float] | None:
            found = rating(text, asked)
            return None if found is None else {aspect: found}

        return Request([said("system", prompt["system_prompt"]), said("user", asked)], (aspect,), FORM, read)

    def _judge_prompts(self) -> dict[str, dict[str, str]]:
        found = dict(self._records(PROMPTS, _judge_prompt))
        if missing := [f"{name} ({shape})" for name, shape in SHAPES.items() if name not in found]:
            raise Refused(f"{PROMPTS}.jsonl of {self.source()} lacks {', '.join(missing)}. It has {sorted(found)}.")
        return found

    def _records(self, name: str, parse: Callable[[Any], T]) -> list[T]:
        where = f"{name}.jsonl of {self.source()}"
        return [parsed(parse, raw, number, where, "MT-Bench's format") for number, raw in enumerate(self._lines(name))]

    def _lines(self, name: str) -> list[Any]:
        file = self._file(name)
        try:
            found = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise Refused(f"{file} is no JSON lines: {error}.") from error
        if not found:
            raise Refused(f"{file} is empty.")
        return found

    def _file(self, name: str) -> Path:
        if self.path is None:
            from huggingface_hub import hf_hub_download

            instead = f"Give a local folder, task.path=FOLDER, with {NEEDED}."
            with reading_hub("the files of MT-Bench", f"the space {self.repo}", instead):
                return Path(hf_hub_download(self.repo, self.files[name], repo_type="space"))
        file = Path(self.path) / f"{name}.jsonl"
        if not file.is_file():
            there = sorted(f.name for f in Path(self.path).iterdir()) if Path(self.path).is_dir() else "no folder"
            raise Refused(
                f"task.path={self.path} needs {name}.jsonl, and there is {there}. Give the folder with {NEEDED}."
            )
        return file


def _case(raw: dict[str, Any], references: dict[Any, tuple[str, ...]]) -> Case:
    first, second = _texts(raw["turns"])
    category = raw["category"]
    if category not in REFERENCED:
        return Case(str(raw["question_id"]), category, (first, second))
    if raw["question_id"] not in references:
        raise ValueError(f"a question of {category} needs a reference, and {REFERENCES}.jsonl has none for it")
    return Case(str(raw["question_id"]), category, (first, second), references[raw["question_id"]])


def _reference(raw: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    first, second = _texts(raw["choices"][0]["turns"])
    return raw["question_id"], (first, second)


def _judge_prompt(raw: dict[str, Any]) -> tuple[str, dict[str, str]]:
    keys = ("system_prompt", "prompt_template")
    return raw["name"], dict(zip(keys, _texts([raw[key] for key in keys]), strict=True))


def _texts(values: list[Any]) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values} are not texts")
    return values
