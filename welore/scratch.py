"""Models to be trained from scratch, and the tokenizers that are trained for them."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from welore.cache import Cache, digest
from welore.errors import Refused
from welore.models import Random, TrainingTexts, byte_tokenizer, fetch_from_hub, hub_answers, reason

SPECIALS = ["<s>", "</s>", "<pad>"]
TRAINED_HERE = ("bytes", "bpe")


@dataclass
class Scratch(Random):
    """A model of the given architecture with random weights, and a tokenizer of its own or of another model.

    `tokenizer` is `bytes`; `bpe`, byte pairs trained in the run on the first `tokenizer_texts` training texts of the
    task, to `config.vocab_size` tokens; or else the name of a tokenizer on the hub, or its folder.
    """

    tokenizer: str
    tokenizer_texts: int

    def __post_init__(self):
        super().__post_init__()
        if self.tokenizer_texts < 1:
            raise Refused(f"model.tokenizer_texts={self.tokenizer_texts} trains no tokenizer. Write 1 or more.")

    def fetch(self) -> str | None:
        if self.tokenizer in TRAINED_HERE or Path(self.tokenizer).expanduser().exists():
            return None
        return fetch_from_hub(self.tokenizer, key="model.tokenizer", weights=False)

    def tokenizer_of(self, folder: Path, texts: TrainingTexts | None) -> Any:
        tokenizer, rows = self._made(folder, texts), self.config["vocab_size"]
        if (highest := max(tokenizer.get_vocab().values())) >= rows:
            raise Refused(
                f"model.tokenizer={self.tokenizer} has ids up to {highest}, and model.config.vocab_size={rows} embeds "
                f"fewer. Write model.config.vocab_size={highest + 1} or more, or model.tokenizer=bpe."
            )
        return tokenizer

    def _made(self, folder: Path, texts: TrainingTexts | None) -> Any:
        if self.tokenizer == "bytes":
            return byte_tokenizer()
        if self.tokenizer != "bpe":
            return _named(self.tokenizer)
        if texts is None:
            raise Refused(
                f"model={self.name} trains its tokenizer on the texts of a task, and here is none. Write "
                f"model.tokenizer=NAME, or give a model that is trained already: model=FOLDER."
            )
        return byte_pairs(list(islice(texts(), self.tokenizer_texts)), self.config["vocab_size"], Cache(folder))

    def identity(self) -> str:
        """The content of a tokenizer in a local folder; one that is trained follows from the task and this config."""
        file = Path(self.tokenizer).expanduser() / "tokenizer.json"
        return digest(file.read_bytes()) if file.exists() else ""


def byte_pairs(texts: list[str], vocabulary: int, cache: Cache) -> PreTrainedTokenizerFast:
    """<s>, </s>, <pad>, the 256 bytes, and the merges of the most frequent pairs, `vocabulary` in all.

    Fewer where the texts hold no more pairs. The order of the texts does not matter.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < len(alphabet) + len(SPECIALS):
        raise Refused(
            f"model.config.vocab_size={vocabulary} has no room for {len(alphabet)} bytes and {len(SPECIALS)} special "
            f"tokens. Write {len(alphabet) + len(SPECIALS)} or more, such as 4096."
        )

    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options = dict(special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, **options))
        return tokenizer

    def read(path: Path) -> Tokenizer:
        return Tokenizer.from_file(str(path))

    def write(tokenizer: Tokenizer, path: Path) -> None:
        tokenizer.save(str(path))

    found = cache.get("tokenizers", digest(json.dumps([vocabulary, SPECIALS]), *sorted(texts)), read, write, make)
    bos, eos, pad = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token=bos, eos_token=eos, pad_token=pad)


def _named(name: str) -> Any:
    local = Path(name).expanduser().exists()
    known = {} if local or hub_answers(name) else {"local_files_only": True}
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **known)
    except (OSError, ValueError) as error:
        why = reason(error, local, "model.tokenizer")
        raise Refused(f"model.tokenizer={name} cannot be loaded: {why} Or write bpe, or bytes.") from error
