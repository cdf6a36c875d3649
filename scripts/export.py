"""Write the model of a run as a folder of its own: factored as it is, or with --merge as an ordinary dense model.

    python scripts/export.py RUN --merge                      a dense model for tools that know nothing of welore
    python scripts/export.py RUN --dtype bfloat16 --out DIR   the factored model in another dtype

RUN is a run folder, a model folder, or the fingerprint of a run under --outputs.
"""

import argparse
import re
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from welore.checkpoint import cast, merge, save
from welore.errors import Refused
from welore.explain import explain
from welore.lowrank import factored_ranks
from welore.models import DTYPES, count_bytes, count_parameters
from welore.records import FILE, Record, records
from welore.runner import MODEL


def main() -> None:
    options = _arguments()
    source = model_folder(options.run, Path(options.outputs))
    target = Path(options.out) if options.out else source.parent / ("merged" if options.merge else "factored")
    _claim(target)

    trust = {"trust_remote_code": options.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **trust)
    if options.merge:
        merge(model)
    if options.dtype:
        cast(model, DTYPES[options.dtype])
    save(model, AutoTokenizer.from_pretrained(source, **trust), target, max_shard_size=options.max_shard_size)
    kind = f"{len(factored_ranks(model))} factored weights" if factored_ranks(model) else "every weight dense"
    numbers = f"{count_parameters(model):,} parameters, {count_bytes(model):,} bytes in {model.dtype}"
    print(f"{target}: {kind}, {numbers}".replace("torch.", ""))


def _arguments() -> argparse.Namespace:
    lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lines)
    parser.add_argument("run", help="a run folder, a model folder, or a fingerprint such as 2817cfe4a1")
    parser.add_argument("--merge", action="store_true", help="multiply the factors out")
    parser.add_argument("--out", help="the folder to write; by default merged or factored in the run folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights; by default as they are")
    parser.add_argument("--max-shard-size", type=_size, default="50GB", help="of one weight file, such as 2GB")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python files in the model's folder")
    parser.add_argument("--outputs", default="outputs", help="where fingerprints are looked up")
    return parser.parse_args()


def model_folder(run: str, outputs: Path) -> Path:
    """The folder of the saved model that `run` names."""
    folder = Path(run).expanduser()
    if (folder / "config.json").exists():
        return folder
    if not folder.is_dir():
        folder = _run_folder(run, outputs)
    if not (folder / MODEL / "config.json").exists():
        raise Refused(f"{folder} holds no model. {_why(folder)}")
    return folder / MODEL


def _run_folder(fingerprint: str, outputs: Path) -> Path:
    found = [path.parent for path in sorted(outputs.rglob(FILE)) if path.parent.name.endswith(f"-{fingerprint}")]
    if not found:
        done = sum(1 for _ in records(outputs))
        raise Refused(
            f"{fingerprint} is no folder here, and the fingerprint of none of the {done} finished runs under "
            f"{outputs}. Give a run folder (it holds a {FILE}), or say where to look: --outputs FOLDER."
        )
    return found[0]


def _claim(target: Path) -> None:
    """Make the folder to write to, before minutes go into loading; one that holds anything is left alone."""
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{target} cannot be written: {error.strerror}. Give another folder: --out FOLDER.") from error
    if any(target.iterdir()):
        raise Refused(f"{target} is not empty. Remove it, or give another: --out FOLDER.")


def _size(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(KB|MB|GB)", text.upper()):
        raise argparse.ArgumentTypeError(f"{text} is no size; write a number with KB, MB or GB, such as 2GB")
    return text.upper()


def _why(folder: Path) -> str:
    record = Record.read(folder)
    if record is None:
        return f"It is no run folder either: it holds neither {FILE} nor config.json."
    if record.status != "done":
        return "Its run is not finished: repeat the same command to go on with it."
    if not record.config["save"]:
        return "Its run was made with save=false: repeat it with force=true save=true."
    return "Its run is finished and the model was removed since: repeat it with force=true."


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(explain(error))
