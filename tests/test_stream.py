import random

import pytest
import torch

from welore.batches import Batches, training_rows
from welore.errors import Refused
from welore.loss import IGNORED
from welore.stream import Stream


@pytest.fixture
def streamed(configured, text_file, tokenizer):
    """A function of overrides to the stream of a run with 12 steps of 4 sequences."""

    def streamed(*overrides, seed=0):
        sizes = [f"task.training.{value}" for value in ("steps=12", "batch=4", "length=96", "accumulate=2")]
        config = configured(f"task.path={text_file}", "task/training=pretrain", *sizes, *overrides)
        return Stream(config.task.training_texts, tokenizer, config.task.training, seed)

    return streamed


PACK = pytest.mark.parametrize("pack", ["true", "false"])


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@PACK
def test_a_stream_reads_the_sequences_that_are_otherwise_read_at_first_in_their_order(
    streamed, configured, text_file, tokenizer, cache, pack
):
    stream = streamed(f"task.training.pack={pack}")
    config = configured(f"task.path={text_file}", "task/training=pretrain", "task.training.length=96")
    config.task.training = stream.training
    rows = training_rows(config.task, tokenizer, cache, seed=0)
    assert len(rows) == 48
    for number, batch in enumerate(stream):
        expected = rows.batch(torch.arange(2 * number, 2 * number + 2))
        assert torch.equal(batch["ids_BL"], expected["ids_BL"]) and batch["real"] == expected["real"]
        assert torch.equal(batch["labels_BL"], expected["labels_BL"])


@PACK
@pytest.mark.parametrize("position", range(0, 25, 3))
def test_resuming_at_any_pass_gives_the_batches_that_remain(streamed, pack, position):
    expected = list(streamed(f"task.training.pack={pack}"))
    interrupted = streamed(f"task.training.pack={pack}")
    taken = iter(interrupted)
    for _ in range(position):
        next(taken)
    resumed = streamed(f"task.training.pack={pack}")
    resumed.load_state_dict(interrupted.state_dict())
    rest = list(resumed)
    assert len(expected) == len(resumed) == 24 and len(rest) == 24 - position
    assert all(equal(*pair) for pair in zip(rest, expected[position:], strict=True))


def test_resuming_makes_no_document_tokens_again(streamed, monkeypatch):
    interrupted = streamed("task.training.pack=false", "task.training.steps=200")
    taken = iter(interrupted)
    for _ in range(100):
        next(taken)
    read = []
    whole = Stream._ids
    monkeypatch.setattr(Stream, "_ids", lambda s, epoch, skipped: read.append(skipped) or whole(s, epoch, skipped))
    resumed = streamed("task.training.pack=false", "task.training.steps=200")
    resumed.load_state_dict(interrupted.state_dict())
    next(iter(resumed))
    assert read == [200]


def test_the_mean_of_a_step_is_over_the_scored_tokens_of_all_its_passes(streamed):
    batches = list(streamed("task.training.pack=false"))
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        scored = sum(int((batch["labels_BL"][:, 1:] != IGNORED).sum()) for batch in (first, second))
        assert first["scored"] == second["scored"] == scored


@PACK
def test_where_the_text_ends_it_is_read_again_in_another_order_also_by_a_resumed_run(streamed, pack):
    long = ("task.training.steps=200", f"task.training.pack={pack}")
    stream = streamed(*long)
    expected, states = [], []
    for batch in stream:
        expected.append(batch)
        states.append(stream.state_dict())
    assert stream.epochs >= 1
    first = next(n for n, state in enumerate(states) if state["place"]["epoch"] == 1)
    assert not torch.equal(expected[first + 1]["ids_BL"], expected[1]["ids_BL"])
    for position in (first - 1, first, first + 1):
        resumed = streamed(*long)
        resumed.load_state_dict(states[position])
        assert all(equal(*pair) for pair in zip(resumed, expected[position + 1 :], strict=True))


def test_the_order_depends_on_the_seed_alone(streamed):
    def order(seed):
        random.seed()
        return [batch["ids_BL"].tolist() for batch in streamed(seed=seed)]

    assert order(1) == order(1) != order(2)


def test_a_stream_holds_no_more_than_a_step_and_a_group_of_documents(streamed):
    stream = streamed("task.training.pack=false")
    read = []

    def documents(seed):
        for number in range(10**9):
            read.append(number)
            yield f"document {number} of a text without end"

    stream.documents = documents
    assert sum(1 for _ in stream) == 24
    assert len(read) <= 256


def test_text_without_one_sequence_is_refused_and_not_read_for_ever(streamed):
    stream = streamed("task.training.pack=true")
    stream.documents = lambda seed: iter(["short"])
    with pytest.raises(Refused, match="too little for one sequence of 96"):
        list(stream)


def test_a_stream_has_a_number_of_steps_and_running_text(configured, tokenizer, cache):
    with pytest.raises(Refused, match="stream=true reads as many steps as it is told"):
        configured("task/training=pretrain", "task.training.steps=null", "task.training.tokens=1000")
    config = configured("task=coinflip", "task/training=pretrain")
    with pytest.raises(Refused, match="task=coinflip has no running text"):
        list(config.task.training.batches(config.task, tokenizer, cache, 0))


def test_pretraining_without_a_stream_reads_all_sequences_at_first(configured, text_file, tokenizer, cache):
    config = configured(f"task.path={text_file}", "task/training=pretrain_laptop", "task.training.steps=2")
    assert type(config.task.training.batches(config.task, tokenizer, cache, 0)) is Batches
