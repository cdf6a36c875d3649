import pytest
from transformers import AutoTokenizer

from welore.cache import Cache
from welore.compress import weight_digests
from welore.config import fingerprint
from welore.errors import Refused
from welore.models import byte_tokenizer, count_parameters
from welore.scratch import byte_pairs

SMALL = (
    "model=llama_5m",
    "model.config.vocab_size=300",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=1",
)
PARAMETERS = {"llama_9m": 9.0, "llama_20m": 19.5, "llama_60m": 58.1, "llama_130m": 134.1, "llama_350m": 368.0}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_published_shapes_have_the_published_number_of_parameters(configured, name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**configured(f"model={name}").model.config))
    assert count_parameters(model) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.06)
    assert model.config.rms_norm_eps == 1e-6 and model.config.initializer_range == 0.02
    assert not model.config.tie_word_embeddings and not model.config.attention_bias


def test_each_seed_starts_from_other_weights_with_the_same_tokenizer(configured, text_file, tmp_path):
    def load(seed):
        config = configured(*SMALL, f"task.path={text_file}", f"seed={seed}")
        return config.model.load(tmp_path, config.task.training_texts)

    (model, tokenizer), (again, _), (other, same) = load(0), load(0), load(1)
    assert weight_digests(model) == weight_digests(again) != weight_digests(other)
    assert tokenizer.get_vocab() == same.get_vocab() and len(tokenizer) == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_the_most_frequent_pair_becomes_one_token_and_every_text_comes_back(documents, tmp_path):
    text = "Grüße, 世界!\n\ttabs  and   blanks \U0001f600"
    tokenizer = byte_pairs([*documents, " the the the" * 5000], 300, Cache(tmp_path))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(" the the") == ["Ġthe", "Ġthe"]
    assert len(byte_tokenizer()(" the the")["input_ids"]) == 8
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>"]) == [0, 1, 2]
    assert not {"<s>", "</s>", "<pad>"} & set(tokenizer.tokenize(" ".join(documents)))


def test_a_tokenizer_depends_on_its_texts_and_size_and_not_on_their_order(documents, tmp_path, monkeypatch):
    first = byte_pairs(documents, 300, Cache(tmp_path / "one")).get_vocab()
    assert byte_pairs(documents[::-1], 300, Cache(tmp_path / "other")).get_vocab() == first
    assert byte_pairs(documents[:50], 300, Cache(tmp_path / "one")).get_vocab() != first
    assert len(byte_pairs(documents, 310, Cache(tmp_path / "one"))) == 310
    monkeypatch.setattr("tokenizers.Tokenizer.train_from_iterator", None)
    assert byte_pairs(documents, 300, Cache(tmp_path / "one")).get_vocab() == first  # kept from the first time


def test_the_tokenizer_of_another_model_is_taken_by_its_folder_and_counts_by_content(configured, tokenizer, tmp_path):
    folder = tmp_path / "theirs"
    tokenizer.save_pretrained(folder)
    config = configured(*SMALL, f"model.tokenizer={folder}")
    _, loaded = config.model.load(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    before = fingerprint(config)
    byte_pairs(["a b c " * 100], 270, Cache(tmp_path)).save_pretrained(folder)
    assert fingerprint(config) != before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.config.vocab_size=100"], ["vocab_size=100 has no room for 256 bytes", "Write 259 or more"]),
        (["model.tokenizer_texts=0"], ["tokenizer_texts=0 trains no tokenizer"]),
        (["model.tokenizer=/no/such/folder"], ["model.tokenizer=/no/such/folder cannot be loaded", "Or write bpe"]),
        (["model.tokenizer=nobody/nothing"], ["model.tokenizer=nobody/nothing", "model.tokenizer=FOLDER"]),
        (
            ["model.tokenizer=bytes", "model.config.vocab_size=258"],
            ["ids up to 258", "config.vocab_size=259"],
        ),
        (["task=coinflip"], ["task=coinflip has no running text", "model.tokenizer=NAME"]),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(configured, tmp_path, overrides, words):
    with pytest.raises(Refused) as refusal:
        config = configured(*SMALL, *overrides)
        config.model.load(tmp_path, config.task.training_texts)
    assert all(word in str(refusal.value) for word in words)


def test_a_model_from_scratch_without_texts_for_its_tokenizer_is_refused(configured, tmp_path):
    with pytest.raises(Refused, match="trains its tokenizer on the texts of a task, and here is none"):
        configured(*SMALL).model.load(tmp_path)


def test_the_trained_tokenizer_is_saved_with_the_run(configured, text_file, tmp_path):
    from welore.runner import run

    small = ["task/protocol=smoke", "task/training=smoke", "task.training.steps=1", "trainer.progress=false"]
    config = configured(*SMALL, *small, "mode=full", "err=0", f"task.path={text_file}", f"outputs={tmp_path}")
    run(config, tmp_path / "run")
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.get_vocab() == config.model.load(tmp_path / ".cache", config.task.training_texts)[1].get_vocab()
