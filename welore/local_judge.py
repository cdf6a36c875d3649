"""A model on this machine as a judge."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from welore.cache import Cache
from welore.chat import Messages, conversation, longest, replies
from welore.errors import Refused, refuse_below
from welore.judges import Language
from welore.models import Pretrained
from welore.report import announce


class JudgeModel(Pretrained):
    group: ClassVar[str] = "judge"
    own_code: ClassVar[str] = "for a judge. Take another one."


@dataclass
class Local(Language):
    """A model on this machine, greedy, in its chat template."""

    changes_nothing: ClassVar[tuple[str, ...]] = ("path",)  # its identity counts in its place
    path: str
    revision: str | None
    dtype: str
    autocast: str | None
    batch: int

    def __post_init__(self):
        super().__post_init__()
        refuse_below("judge", self, batch=1)
        self.loaded: tuple[Any, Any] | None = None
        self.source = JudgeModel(self.name, self.dtype, self.autocast, self.path, self.revision, False)

    def title(self) -> str:
        return f"judged by {self.path.rstrip('/').rpartition('/')[2]}"

    def science(self) -> dict[str, Any]:
        place = Path(self.path).expanduser()
        model = place.name if place.exists() else self.path
        return super().science() | {"model": model, "content": self.source.identity()}

    def prepare(self) -> None:
        self.source.identity()

    def _ask(self, new, cache, device, title):
        """Pass by pass, so that a kill loses the answers of one alone."""
        keys = sorted(new, key=lambda key: -sum(len(message["content"]) for message in new[key]))
        for start in tqdm(range(0, len(keys), self.batch), desc=title, unit="pass", leave=False):
            part = keys[start : start + self.batch]
            texts = self._written([new[key] for key in part], cache, device)
            for key, text in zip(part, texts, strict=True):
                self._kept(key, cache, lambda text=text: {"text": text})

    def _one(self, talk, cache, device):
        return {"text": self._written([talk], cache, device)[0]}

    def _written(self, talks: list[Messages], cache: Cache, device) -> list[str]:
        if self.loaded is None:
            announce(f"load the judge {self.path}")
            self.loaded = self.source.load(cache.folder)
        model, tokenizer = self.loaded
        prompts = [conversation(tokenizer, talk) for talk in talks]
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        tokens = longest(tokenizer, prompts) + self.max_tokens
        if limit is not None and tokens > limit:
            raise Refused(
                f"a judgment takes {tokens} tokens, judge.max_tokens={self.max_tokens} of them, and the judge "
                f"{self.path} has {limit} positions. Lower judge.max_tokens or take another judge."
            )
        model.to(device)
        found = replies(model, tokenizer, prompts, self.batch, self.max_tokens, self.autocast, "judgments")
        model.cpu()  # the memory belongs to the model that is measured
        if breaks_at := next((reply.breaks_at for reply in found if reply.breaks_at), None):
            raise Refused(
                f"the judge {self.path} gives numbers that are not finite, which start in {breaks_at}. Write another "
                f"judge.dtype, such as judge.dtype=float32, or take another judge."
            )
        return [reply.text for reply in found]
