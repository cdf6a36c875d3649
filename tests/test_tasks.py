import math

import pytest

from welore.errors import Refused
from welore.tasks import SHUFFLED, Protocol
from welore.texts import SPLITS

C4 = "task=c4"


@pytest.fixture
def hub(monkeypatch):
    """The data sets library answers with three rows and remembers what it was asked."""
    import datasets

    asked = []

    class Rows(list):
        def shuffle(self, **options):
            asked.append(("shuffle", options))
            return self

    def load_dataset(*names, **options):
        asked.append((names, options))
        return Rows({"text": text} for text in ["one\n", "", "\n", "two\nlines"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("task", "split", "names", "options"),
    [
        (
            "c4",
            "test",
            ("allenai/c4", None),
            {"split": "validation", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        ),
        (
            "c4",
            "calibration",
            ("allenai/c4", None),
            {"split": "train", "data_files": {"train": "en/c4-train.00001-of-01024.json.gz"}},
        ),
        ("wikitext2", "test", ("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"}),
        ("wikitext2", "validation", ("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation"}),
    ],
)
def test_a_hub_task_streams_the_split_that_its_config_names(configured, hub, task, split, names, options):
    texts = list(configured(f"task={task}", "task.revision=abc").task.documents(split))
    assert texts == ["one", "two\nlines"]
    assert hub[0] == (names, options | {"streaming": True, "revision": "abc"})
    assert ("shuffle" in [what for what, _ in hub]) == (split in SHUFFLED)


def test_the_training_texts_of_a_hub_task_are_shuffled_by_the_seed(configured, hub):
    list(configured(C4).task.documents("train", seed=5))
    assert hub[1] == ("shuffle", {"seed": 5, "buffer_size": 10_000})


@pytest.mark.parametrize("error", [ConnectionError("no route\nat all"), ConnectionError(), ValueError("gone")])
def test_a_hub_that_cannot_be_reached_points_at_a_local_copy(configured, monkeypatch, error):
    def load_dataset(*names, **options):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(Refused, match=r"texts of c4 are read from allenai/c4 .*task\.path=.*calibration\.path="):
        next(configured(C4).task.documents("test"))


@pytest.mark.parametrize("task", ["c4", "wikitext2", "sotu"])
def test_a_local_path_takes_the_place_of_the_source(configured, text_file, documents, task):
    task = configured(f"task={task}", f"task.path={text_file}").task
    assert sorted(text for split in SPLITS for text in task.documents(split)) == sorted(documents)
    assert list(task.documents("train", 1)) != list(task.documents("train", 2))
    assert list(task.documents("test", 1)) == list(task.documents("test", 2))


def test_the_speeches_are_divided_by_speech(configured):
    task = configured("task=sotu").task
    parts = {split: list(task.documents(split)) for split in SPLITS}
    speeches = [text for part in parts.values() for text in part]
    assert len(speeches) == len(set(speeches)) == 249 and all(parts.values())
    assert list(task.documents("train", 1)) != list(task.documents("train", 2))


def test_a_package_that_is_not_installed_is_named(configured):
    with pytest.raises(Refused, match="pip install not_installed_texts"):
        next(configured("task=sotu", "task.package=not_installed_texts").task.documents("test"))


def test_a_protocol_says_in_one_line_what_it_measures():
    line = Protocol("authors", 1100, " ", False, 4096, 256, "text").title()
    assert all(part in line for part in ("first 1100 documents", "' '", "4096", "first 256", "bos: text"))
    assert "all documents as they are" in Protocol("field", None, "\n\n", True, 2048, None, "text").title()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.protocol.bos=start", "text, window or none"),
        ("task.protocol.window=1", "Write 2 or more"),
        ("task.protocol.windows=0", "Write 1 or more"),
        ("task.training.tokens=100", "exactly one"),
        ("task.training.steps=null", "exactly one"),
        ("task.training.steps=0", "trains nothing"),
        ("task.training.accumulate=3", "multiple of 3"),
        ("task.training.schedule=step", "cosine, linear or constant"),
        ("task.training.warmup=1", "warmup < 1"),
        ("task.training.lr=0", "lr > 0"),
    ],
)
def test_what_cannot_be_measured_or_trained_is_refused(configured, override, message):
    with pytest.raises(Refused, match=message):
        configured("task/training=smoke", override)


@pytest.mark.parametrize(("task", "steps"), [("svamp", 500), ("boolq", 2000), ("commonsenseqa", 5000)])
def test_downstream_training_is_that_of_the_paper_or_of_its_code(configured, task, steps):
    of = {
        name: configured(f"task={task}", f"task/training={name}").task.training
        for name in ("downstream", "downstream_code")
    }
    assert {name: (training.steps, training.lr) for name, training in of.items()} == {
        "downstream": (steps, 1e-4),
        "downstream_code": (steps, 5e-5),
    }


@pytest.mark.parametrize("steps", [500, 147])  # 10 / 147 * 147 is above 10 in floating point
def test_the_downstream_script_warms_up_for_ten_steps(configured, steps):
    overrides = "task=svamp", "task/training=downstream_code", f"task.training.steps={steps}"
    training = configured(*overrides).task.training
    factors = [training.lr_factor(step, steps) for step in range(12)]
    assert factors.index(1) == 10 and factors[9] < 1 > factors[11]


def test_the_learning_rate_rises_then_follows_its_schedule_down_to_the_floor(configured):
    def rates(schedule, steps=1000):
        training = configured("task/training=authors", f"task.training.schedule={schedule}").task.training
        return [training.lr_factor(step, steps) for step in range(steps)]

    for schedule, middle in {"cosine": 0.1 + 0.9 * 0.5, "linear": 0.1 + 0.9 * 0.5, "constant": 1.0}.items():
        factors = rates(schedule)
        rise, fall = factors[:50], factors[50:]  # warmup 0.05
        assert rise == sorted(rise) and 0 < rise[0] < rise[-1] < 1
        assert fall == sorted(fall, reverse=True) and fall[0] == 1
        assert fall[len(fall) // 2] == pytest.approx(middle)
        assert fall[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=2e-3)
    quarter = rates("cosine")[50 + 950 // 4]
    assert quarter == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)), abs=1e-3)
