"""A compressed model saved and loaded again is the same model, whatever its family, dtype, shards and placement."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from welore.batches import evaluation_windows
from welore.cache import Cache
from welore.checkpoint import VERSION, cast, merge, save
from welore.errors import Refused
from welore.evaluate import perplexity
from welore.lowrank import LowRankLinear, factored_ranks
from welore.models import components, count_parameters
from welore.records import Record
from welore.runner import MODEL, run

DOCS = Path(__file__).parent.parent / "docs" / "models.md"
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def factored(family, compress):
    """A function of a family's name to a random model of it that holds LRCs and N-LRCs."""

    def factored(name):
        model = family(name)
        plan = compress(model)
        assert 0 < len(plan.factored) < len(plan.ranks)
        return model

    return factored


@pytest.fixture
def saved(compressed, tokenizer, tmp_path):
    """The folder of the compressed tiny model."""
    save(compressed, tokenizer, tmp_path / "saved")
    return tmp_path / "saved"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model):
    ids = torch.arange(48).reshape(2, 24)
    return model(ids % model.config.vocab_size).logits


def greedy(model):
    ids = torch.tensor([[5, 7, 11]])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False).tolist()


def same(one, other):
    """Equal logits to the bit, equal parameter count, equal ranks."""
    assert torch.equal(logits(one), logits(other))
    assert count_parameters(one) == count_parameters(other)
    assert factored_ranks(one) == factored_ranks(other) != {}


@every_family
def test_a_reloaded_model_is_the_same_model(factored, tokenizer, tmp_path, name):
    model = factored(name)
    save(model, tokenizer, tmp_path)
    again, report = load(tmp_path, output_loading_info=True)
    same(again, model)
    assert not any(report.values())
    assert not again.training and all(p.requires_grad for p in again.parameters())


@every_family
def test_shards_and_placement_change_nothing(factored, tokenizer, tmp_path, name):
    model = factored(name)
    save(model, tokenizer, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for device_map in ("cpu", "auto"):
        same(load(tmp_path, device_map=device_map), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_family
def test_loading_in_another_dtype_casts_the_weights_and_nothing_else(factored, tokenizer, tmp_path, name, dtype):
    model = factored(name)
    save(model, tokenizer, tmp_path / "float32")
    cast(model, dtype)
    save(model, tokenizer, tmp_path / "cast")
    for again in (
        load(tmp_path / "float32", dtype=dtype),
        load(tmp_path / "cast", dtype="auto"),
        load(tmp_path / "cast"),
    ):
        assert again.dtype == dtype
        same(again, model)


@every_family
def test_a_second_save_by_plain_transformers_writes_the_same_folder(factored, tokenizer, tmp_path, name):
    save(factored(name), tokenizer, tmp_path / "one")
    load(tmp_path / "one", device_map="auto").save_pretrained(tmp_path / "two")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@every_family
def test_merging_leaves_an_ordinary_dense_model_of_the_same_function(family, factored, tokenizer, tmp_path, name):
    model = factored(name)
    save(model, tokenizer, tmp_path)
    merged = load(tmp_path).dequantize()
    assert {type(module) for module in components(merged).values()} == {nn.Linear}
    assert count_parameters(merged) == count_parameters(family(name))
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert greedy(merged) == greedy(model)


def test_a_model_without_its_head_loads_from_the_same_folder_and_back(compressed, saved, tmp_path):
    decoder = AutoModel.from_pretrained(saved)
    assert len(factored_ranks(decoder)) == len(factored_ranks(compressed))
    decoder.save_pretrained(tmp_path / "decoder")
    again = load(tmp_path / "decoder")
    again.lm_head.weight = compressed.lm_head.weight
    same(again, compressed)


def test_a_model_offloaded_to_the_disk_computes_the_same(compressed, saved, tmp_path):
    again = load(saved, device_map="auto", max_memory={"cpu": "150KB"}, offload_folder=tmp_path / "offload")
    assert "disk" in again.hf_device_map.values()
    assert torch.equal(logits(again), logits(compressed))


def test_a_reloaded_model_can_be_cast_and_trained(saved):
    model = load(saved)
    assert not hasattr(model.config, "_is_quantized")  # else flash attention casts to the dtype of loading
    assert model.half().dtype == torch.float16
    assert model.float().dtype == model.to(torch.float32).dtype == torch.float32
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(32)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {f"{name}.{factor}.weight" for name in factored_ranks(model) for factor in "AB"} <= moved


def test_saving_after_the_ranks_changed_writes_the_ranks_that_are_there(saved, tokenizer, tmp_path):
    model = load(saved)
    name = next(iter(factored_ranks(model)))
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    fewer = LowRankLinear.of(layer.A.weight[:, :2].clone(), layer.B.weight[:2].clone())
    setattr(parent, name.rpartition(".")[2], fewer)
    save(model, tokenizer, tmp_path / "again")
    same(load(tmp_path / "again"), model)


def test_a_dense_model_is_saved_without_a_trace_of_welore(saved, family, tokenizer, tmp_path):
    for name, dense in {"merged": merge(load(saved)), "never factored": family("llama")}.items():
        save(dense, tokenizer, tmp_path / name)
        assert "welore" not in (tmp_path / name / "config.json").read_text()


def test_the_tokenizer_and_the_generation_config_come_along(compressed, tokenizer, tmp_path):
    compressed.generation_config.max_new_tokens = 3
    save(compressed, tokenizer, tmp_path)
    text = "We the people"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = torch.tensor([[5, 6]])
    assert load(tmp_path).generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None).shape == (1, 5)


def test_weights_are_readable_by_whoever_can_read_the_config(saved):
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


def test_the_snippet_of_the_docs_runs(saved, monkeypatch, capsys):
    (saved.parent / "RUN").mkdir()
    saved.rename(saved.parent / "RUN" / MODEL)
    monkeypatch.chdir(saved.parent)
    exec(re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1], {})
    written = capsys.readouterr().out
    assert written.startswith("The state of the union is") and len(written) > len("The state of the union is\n")


def test_a_pipeline_generates_from_the_folder(saved):
    assert pipeline("text-generation", str(saved), max_new_tokens=4)("We")[0]["generated_text"].startswith("We")


def edit(change):
    """Damage that changes the quantization config in a folder's config.json."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def cut(size):
    """Damage that leaves so many bytes of the weights."""

    def damage(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return damage


NAME = "model.layers.9.mlp.up_proj"
DAMAGES = {
    "a newer format": (edit(lambda q: q.update(version=VERSION + 1)), rf"version {VERSION + 1} of the format"),
    "an older format": (edit(lambda q: q.update(version=0)), "version 0 of the format"),
    "a weight too many": (edit(lambda q: q["ranks"].update({NAME: 3})), "belong to different models"),
    "a weight too few": (edit(lambda q: q["ranks"].popitem()), "belong to different models"),
    "no ranks": (edit(lambda q: q.update(ranks={})), "belong to different models"),
    "another rank": (edit(lambda q: q["ranks"].update({next(iter(q["ranks"])): 1})), "belong to different models"),
    "another name": (
        edit(lambda q: q["ranks"].update({NAME: q["ranks"].popitem()[1]})),
        f"lists {NAME} .* no linear layer of that name",
    ),
    "rank 0": (edit(lambda q: q["ranks"].update({NAME: 0})), "no positive integers"),
    "rank as text": (edit(lambda q: q["ranks"].update({NAME: "3"})), "no positive integers"),
    "truncated weights": (cut(-1000), "damaged or not whole"),
    "a truncated header": (cut(5), "damaged or not whole"),
    "empty weights": (cut(0), "damaged or not whole"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(saved, damage):
    spoil, message = DAMAGES[damage]
    spoil(saved)
    with pytest.raises(Refused, match=message):
        load(saved)


def test_a_folder_without_a_version_is_read_as_the_first_one(compressed, saved):
    edit(lambda q: q.pop("version"))(saved)
    same(load(saved), compressed)


SMOKE = ("task/protocol=smoke", "task/training=smoke")


@pytest.mark.slow
@pytest.mark.parametrize("lora_on", ["factors", "merged"])
def test_a_lora_run_saves_the_model_that_it_measured(configured, tmp_path, lora_on):
    config = configured("mode=lora", f"mode.lora_on={lora_on}", "err=0.5", *SMOKE, f"outputs={tmp_path}")
    record = run(config, tmp_path / "run")
    again, tokenizer = load(tmp_path / "run" / MODEL), AutoTokenizer.from_pretrained(tmp_path / "run" / MODEL)
    windows_BL = evaluation_windows(config.task, tokenizer, Cache(tmp_path / ".cache"))
    score = perplexity(again, windows_BL, config.model.autocast, "reloaded")
    assert score.perplexity == pytest.approx(record.metrics["tuned/perplexity"], rel=1e-6)
    assert score.perplexity != pytest.approx(record.metrics["compressed/perplexity"], rel=1e-3)
    assert count_parameters(again) == record.metrics["tuned/parameters"]
    planned = {k: r for k, r in json.loads((tmp_path / "run" / "ranks.json").read_text()).items() if r is not None}
    grown = config.mode.rank if lora_on == "merged" else 0
    assert factored_ranks(again) == {name: rank + grown for name, rank in planned.items()}


def further(configured, folder, tmp_path, *overrides):
    """The record of a run over a model that is compressed already, and the ranks of what it saved."""
    config = configured(f"model={folder}", "model.dtype=float32", *SMOKE, f"outputs={tmp_path}", *overrides)
    record = run(config, tmp_path / "further")
    return record, factored_ranks(load(tmp_path / "further" / MODEL))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [["err=0"], ["keep=1"]])
def test_a_compressed_model_trains_on_with_the_ranks_that_it_has(configured, compressed, saved, tmp_path, budget):
    record, ranks = further(configured, saved, tmp_path, "mode=full", *budget)
    assert ranks == factored_ranks(compressed)
    assert record.metrics["compressed/perplexity"] == pytest.approx(record.metrics["dense/perplexity"], rel=1e-6)
    assert record.metrics["tuned/perplexity"] < record.metrics["dense/perplexity"]
    assert record.metrics["compress/err"] == pytest.approx(0.3, abs=0.05)


@pytest.mark.slow
def test_a_compressed_model_is_cut_further_and_gets_no_rank_back(configured, compressed, saved, tmp_path):
    before = factored_ranks(compressed)
    record, after = further(configured, saved, tmp_path, "mode=none", "err=0.6")
    assert record.metrics["compress/err"] == pytest.approx(0.6, abs=0.02)
    assert before.keys() <= after.keys() and all(after[name] <= rank for name, rank in before.items())
    assert sum(after.values()) < sum(before.values()) + sum(after[name] for name in after.keys() - before.keys())


@pytest.mark.slow
def test_less_than_what_is_lost_is_refused(configured, saved, tmp_path):
    with pytest.raises(Refused, match="Ask for more, or write err=0"):
        further(configured, saved, tmp_path, "mode=none", "err=0.1")
    assert Record.read(tmp_path / "further").status == "failed"
