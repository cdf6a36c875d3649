"""Every benchmark with a local file, put to the compressed default model by the runner."""

import json

import pytest
import torch
from conftest import ROOT
from test_questions import FOLDERS

from welore.config import to_config
from welore.finished import composed
from welore.runner import run

LIMIT = 2
ASKED = {name: folder for name, (folder, *_) in FOLDERS.items()} | {"triviaqa": "triviaqa"}


def sentence(answer):
    """What docs/tasks.md says of an answer."""
    written, verdict = answer["written"].replace("\n", r"\n"), answer["verdict"]
    said = f"it writes `{written}`" + (f", of which `{answer['read']}` is read" if answer["read"] else "")
    said = f"{said}: `{verdict}`"
    if "option" in answer:
        said += f"; likeliest is `{max(answer['nats'], key=answer['nats'].get)}`: `{answer['option']}`"
    return " ".join(said.split())


def prose(guide):
    """The words of a guide, without the marks of its quotes."""
    return " ".join(word for word in (ROOT / "docs" / guide).read_text().split() if word != ">")


@pytest.fixture(scope="module")
def outputs(default_model, tmp_path_factory):
    """An empty folder for runs, with the weights and the spectra of the default model, which take long to make."""
    folder, kept = tmp_path_factory.mktemp("outputs"), default_model[2].folder
    (folder / ".cache").mkdir()
    for name in ("models", "components"):
        (kept / name).mkdir(exist_ok=True)
        (folder / ".cache" / name).symlink_to(kept / name)
    return folder


@pytest.mark.real
@pytest.mark.parametrize("name", ASKED)
def test_the_compressed_default_model_answers_the_first_test_questions(name, outputs, data):
    torch.set_num_threads(2)
    path = data / "tasks" / ASKED[name]
    options = [
        f"task={name}",
        f"task.path={path}",
        f"task.limit={LIMIT}",
        "err=0.1",
        "mode=none",
        f"outputs={outputs}",
    ]
    config = to_config(composed([*options, "trainer=cpu", "logger=none", "trainer.progress=false", "save=false"]))
    record = run(config, outputs / name)
    assert record.metrics["eval/examples"] == LIMIT
    asked = config.task.examples("test")[:LIMIT]
    guide = " ".join((ROOT / "docs" / "tasks.md").read_text().split())
    for stage in ("dense", "compressed"):
        lines = (outputs / name / f"answers-{stage}.jsonl").read_text().split("\n")[:-1]
        answers = [json.loads(line, parse_constant=pytest.fail) for line in lines]
        assert [answer["right"] for answer in answers] == [example.answer for example in asked]
        for answer, example in zip(answers, asked, strict=True):
            assert example.question in answer["prompt"] and example.passage in answer["prompt"]
            assert answer["verdict"] in ("right", "wrong", "unparsed") and answer["written"] is not None
            assert ("option" in answer) == bool(example.options)
        if record.environment["device"].startswith("AMD EPYC"):  # others may write otherwise in bfloat16
            assert sentence(answers[0]) in guide
        right = sum(answer["verdict"] == "right" for answer in answers)
        assert (record.metrics[f"{stage}/correct"], record.metrics[f"{stage}/accuracy"]) == (right, right / LIMIT)


@pytest.mark.real
def test_the_compressed_default_model_talks_as_the_guide_says(outputs, data):
    torch.set_num_threads(1)
    how = ["task=mt_bench", f"task.path={data / 'tasks' / 'mt_bench'}", "task.limit=1", "task.new_tokens=24"]
    options = [*how, "err=0.25", "mode=none", f"outputs={outputs}", "trainer=cpu", "logger=none", "save=false"]
    record = run(to_config(composed([*options, "trainer.progress=false"])), outputs / "mt_bench")
    assert (record.metrics["eval/examples"], record.metrics["dense/empty"]) == (1, 0)
    guide = prose("judged_tasks.md")
    for stage, quoted in {"dense": 2, "compressed": 1}.items():
        (answer,) = map(json.loads, (outputs / "mt_bench" / f"answers-{stage}.jsonl").read_text().split("\n")[:-1])
        assert len(answer["prompts"]) == len(answer["written"]) == 2
        assert " ".join(answer["prompts"][0].split()) in guide and answer["written"][0] in answer["prompts"][1]
        if record.environment["device"].startswith("AMD EPYC"):  # others may write otherwise in bfloat16
            assert all(" ".join(written.split()) in guide for written in answer["written"][:quoted])
