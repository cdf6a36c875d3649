import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from welore.batches import Batches, Rows, evaluation_windows, frequency_perplexity, training_rows
from welore.errors import Refused
from welore.loss import IGNORED
from welore.models import byte_tokenizer

PROTOCOL = ("task/protocol=smoke", "task/training=smoke")


@pytest.fixture(scope="module")
def bos_tokenizer():
    """A byte tokenizer that begins a text with <s>, as LLaMA's does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def task(configured, text_file):
    return lambda *overrides: configured(f"task.path={text_file}", *PROTOCOL, *overrides).task


def test_windows_cut_the_joined_documents_one_after_the_other(task, tokenizer, cache):
    chosen = task("task.protocol.joiner=|", "task.protocol.windows=null", "task.protocol.window=50")
    windows_BL = evaluation_windows(chosen, tokenizer, cache)
    text = "|".join(chosen.documents("test"))
    whole = len(text) // 50
    assert windows_BL.shape == (whole, 50)
    assert tokenizer.decode(windows_BL.flatten().tolist()) == text[: whole * 50]


def test_only_the_first_documents_and_windows_are_scored(task, tokenizer, cache):
    chosen = task("task.protocol.documents=2", "task.protocol.windows=3", "task.protocol.window=20")
    windows_BL = evaluation_windows(chosen, tokenizer, cache)
    assert tokenizer.decode(windows_BL.flatten().tolist()) == "\n\n".join(list(chosen.documents("test"))[:2])[:60]


def test_bos_stands_at_the_start_of_the_text_of_every_window_or_nowhere(task, bos_tokenizer, cache):
    bos = bos_tokenizer.bos_token_id
    found = {
        where: evaluation_windows(task(f"task.protocol.bos={where}"), bos_tokenizer, cache)
        for where in ("text", "window", "none")
    }
    assert all(windows_BL.shape == (4, 128) for windows_BL in found.values())
    marks = {where: (windows_BL == bos).nonzero().tolist() for where, windows_BL in found.items()}
    assert marks == {"text": [[0, 0]], "window": [[row, 0] for row in range(4)], "none": []}
    text = found["none"].flatten()
    assert torch.equal(found["window"][:, 1:].flatten(), text[: 4 * 127])
    assert torch.equal(found["text"].flatten()[1:], text[:-1])


def test_bos_in_every_window_is_refused_where_the_tokenizer_has_none(task, cache):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(Refused, match="bos=window needs a begin-of-sequence token"):
        evaluation_windows(task("task.protocol.bos=window"), tokenizer, cache)


def test_a_text_shorter_than_a_window_is_refused(task, tokenizer, cache):
    with pytest.raises(Refused, match="fewer than one window of 100000"):
        evaluation_windows(task("task.protocol.window=100000"), tokenizer, cache)


def test_packing_loses_no_token_and_divides_documents_by_the_end_of_sequence(task, tokenizer, cache):
    chosen = task("task.training.steps=100000")
    rows = training_rows(chosen, tokenizer, cache, seed=3)
    eos = tokenizer.eos_token_id
    stream = [id for text in chosen.documents("train", 3) for id in [*tokenizer(text)["input_ids"], eos]]
    assert len(stream) - 64 < rows.ids_BL.numel() <= len(stream)
    assert rows.ids_BL.flatten().tolist() == stream[: rows.ids_BL.numel()]
    assert rows.lengths_B.tolist() == [64] * len(rows)


def test_without_packing_each_document_is_cut_or_padded_to_one_row(task, bos_tokenizer, cache):
    chosen = task("task.training.steps=100000", "task.training.pack=false", "task.training.length=200")
    rows = training_rows(chosen, bos_tokenizer, cache, seed=3)
    texts = list(chosen.documents("train", 3))
    assert len(rows) == len(texts)
    assert rows.lengths_B.tolist() == [min(200, len(text) + 1) for text in texts]
    assert len(set(rows.lengths_B.tolist())) > 10
    for text, ids, length in zip(texts, rows.ids_BL.tolist(), rows.lengths_B.tolist(), strict=True):
        assert ids[0] == bos_tokenizer.bos_token_id and bos_tokenizer.decode(ids[1:length]) == text[: length - 1]
        assert set(ids[length:]) <= {bos_tokenizer.pad_token_id}


def test_as_many_rows_are_made_as_the_budget_can_use(task, tokenizer, cache):
    assert len(training_rows(task("task.training.steps=7"), tokenizer, cache, 0)) == 14
    by_tokens = task("task.training.steps=null", "task.training.tokens=1000")
    assert 1000 <= training_rows(by_tokens, tokenizer, cache, 0).lengths_B.sum() <= 1000 + 2 * 64 + 64
    assert len(training_rows(by_tokens, tokenizer, cache, 0, "validation", limit=3)) == 3


def test_padding_is_not_scored():
    rows = Rows(torch.arange(12).view(3, 4).int(), torch.tensor([4, 2, 3]))
    batch = rows.batch(torch.tensor([2, 1]))
    assert batch["ids_BL"].tolist() == [[8, 9, 10], [4, 5, 6]]  # no wider than the longest of the batch
    assert batch["labels_BL"].tolist() == [[8, 9, 10], [4, 5, IGNORED]]
    assert batch["real"] == 5


@pytest.fixture
def uneven():
    """20 rows of 2 to 8 real tokens; each is recognized by its first token."""
    lengths_B = torch.randint(2, 9, (20,))
    return Rows(torch.arange(20)[:, None].expand(20, 8).int(), lengths_B)


def training(configured, *overrides):
    return configured("task/training=smoke", "task.training.length=8", *overrides).task.training


@pytest.mark.parametrize("tokens", [1, 30, 77, 400])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_token_budget_counts_real_tokens_and_ends_with_the_first_step_that_reaches_it(
    configured, uneven, tokens, accumulate
):
    budget = ("task.training.steps=null", f"task.training.tokens={tokens}", f"task.training.accumulate={accumulate}")
    batches = Batches(uneven, training(configured, *budget), seed=0)
    real = [int(batch["real"]) for batch in batches]
    assert len(real) == len(batches) == batches.steps * accumulate
    assert sum(real) >= tokens > sum(real[:-accumulate])


def test_the_mean_of_a_step_is_over_the_scored_tokens_of_all_its_passes(configured, uneven):
    batches = list(
        Batches(uneven, training(configured, "task.training.accumulate=2", "task.training.batch=4"), seed=0)
    )
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        scored = sum(int((batch["labels_BL"][:, 1:] != IGNORED).sum()) for batch in (first, second))
        assert first["scored"] == second["scored"] == scored


def test_rows_are_used_once_each_before_any_is_used_again_in_another_order(configured, uneven):
    batches = Batches(uneven, training(configured, "task.training.steps=20"), seed=0)
    rows = [int(row) for batch in batches for row in batch["ids_BL"][:, 0]]
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20))
    assert rows[:20] != rows[20:] and batches.epochs == 2
    assert rows[:20] != list(range(20))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("position", range(0, 11))
def test_resuming_at_any_position_gives_the_batches_that_remain(configured, uneven, position, accumulate):
    options = training(configured, "task.training.steps=5", f"task.training.accumulate={accumulate}")
    expected = list(Batches(uneven, options, seed=4))
    position = min(position, len(expected))
    interrupted = Batches(uneven, options, seed=4)
    taken = iter(interrupted)
    for _ in range(position):
        next(taken)
    resumed = Batches(uneven, options, seed=4)
    resumed.load_state_dict(interrupted.state_dict())
    rest = list(resumed)
    assert len(rest) == len(expected) - position
    for batch, other in zip(rest, expected[position:], strict=True):
        assert batch.keys() == other.keys() and all(torch.equal(batch[key], other[key]) for key in batch)


def test_the_order_depends_on_the_seed_alone(configured, uneven):
    def order(seed):
        return [batch["ids_BL"][:, 0].tolist() for batch in Batches(uneven, training(configured), seed)]

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_processes_make_up_every_pass(monkeypatch, count):
    """Their losses, divided by the scored tokens of the step, add up to the mean over the whole step."""
    rows = Rows.padded([[5] * length for length in (3, 9, 4, 7, 2, 8, 6, 5)], 9, pad=0)
    training = SimpleNamespace(batch=8, accumulate=2, steps=2, tokens=None)
    alone = list(Batches(rows, training, seed=0))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(count))
    shares = []
    for index in range(count):
        monkeypatch.setenv("SLURM_PROCID", str(index))
        shares.append(list(Batches(rows, training, seed=0)))
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sum(len(part["ids_BL"]) for part in parts) == len(whole["ids_BL"])
        assert sum(int((part["labels_BL"] != IGNORED).sum()) for part in parts) == int(whole["real"])
        assert {(int(part["real"]), int(part["scored"])) for part in parts} == {
            (int(whole["real"]), int(whole["scored"]))
        }


def test_more_processes_than_sequences_in_a_pass_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    monkeypatch.setenv("SLURM_PROCID", "0")
    rows = Rows.padded([[5, 6]] * 4, 2, pad=0)
    with pytest.raises(Refused, match="2 sequences to 3 processes"):
        Batches(rows, SimpleNamespace(batch=4, accumulate=2, steps=1, tokens=None), seed=0)


@pytest.mark.parametrize(("as_is", "joined"), [("true", " = T = \n|||one \n"), ("false", " = T = |one ")])
def test_a_protocol_takes_documents_as_they_are_or_without_empty_ones(
    tmp_path, configured, tokenizer, cache, as_is, joined
):
    (tmp_path / "wiki.test.raw").write_text(" = T = \n \n \none \n")
    size = f"task.protocol.window={len(joined)}"
    task = configured(
        f"task.path={tmp_path}", *PROTOCOL, "task.protocol.joiner=|", size, f"task.protocol.as_is={as_is}"
    )
    windows_BL = evaluation_windows(task.task, tokenizer, cache)
    assert tokenizer.decode(windows_BL.flatten().tolist()) == joined


def test_token_frequencies_predict_by_how_often_each_token_came():
    rows = Rows.padded([[0, 0, 0, 1], [1, 2]], 4, pad=3)  # padding is no token
    windows_BL = torch.tensor([[5, 0, 1], [2, 2, 3]])
    share = {token: (count + 0.1) / (6 + 0.6) for token, count in {0: 3, 1: 2, 2: 1, 3: 0}.items()}
    mean = -sum(math.log(share[token]) for token in (0, 1, 2, 3)) / 4
    assert frequency_perplexity(rows, windows_BL, 6) == pytest.approx(math.exp(mean))
    assert frequency_perplexity(rows, windows_BL, 4) == frequency_perplexity(rows, windows_BL, 6)
