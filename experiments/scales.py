"""The two scales of every artefact: `laptop`, a small model on a CPU, and `paper`, the paper's models and budgets."""

import os
from pathlib import Path

from experiments.cells import Cell

MODELS = {"laptop": ["smollm2_135m"], "paper": ["llama2_7b", "llama2_13b", "mistral_7b"]}


def setting(scale: str) -> Cell:
    """Text, protocol and training of a scale.

    At laptop scale the text is C4 where local files of it are there, and the packaged speeches where they are not: the
    protocol line under each artefact says which. At paper scale it is the authors' protocol and 0.7M tokens (Table 4).
    """
    if scale == "paper":
        return {"task": "c4", "task/protocol": "authors", "task/training": "matched"}
    text = {"task": "c4", "task.path": str(local_c4())} if local_c4().is_dir() else {"task": "sotu"}
    return text | {"task/protocol": "laptop", "task/training": "laptop"}


def local_c4() -> Path:
    return Path(os.environ.get("WELORE_DATA", "../shared/data")) / "c4"
