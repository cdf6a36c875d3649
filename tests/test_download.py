"""What a run reads from the hub is fetched on one machine, and read without a network on another."""

import json
import sys
from pathlib import Path

import pytest

from welore import models, tasks
from welore.config import compose, to_config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import download  # noqa: E402


@pytest.mark.parametrize("overrides", [["model=tiny"], ["model=tiny", "task=coinflip", "task/training=smoke"]])
def test_what_is_on_this_machine_needs_nothing(overrides, capsys):
    assert download.main(overrides) == 0
    assert "nothing is needed" in capsys.readouterr().out


def test_what_cannot_be_composed_or_fetched_is_told(capsys):
    assert download.main(["model=nothing"]) == 2
    assert "model=nothing is no option" in capsys.readouterr().err
    assert download.main(["model=tiny", "task=c4"]) == 2  # the tests have no network
    assert "allenai/c4" in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder; what was asked of it is in `hub.asked`."""

    class Hub:
        asked: list[tuple[str, dict]] = []

        def snapshot(self, repo, **options):
            self.asked.append((repo, options))
            return str(tmp_path / repo)

    found = Hub()
    for module in (models, tasks):
        monkeypatch.setattr(module, "snapshot_download", found.snapshot)
    monkeypatch.setattr(models.HfApi, "list_repo_files", lambda *_, **__: ["model.safetensors", "code.py"])
    found.asked = []
    found.folder = tmp_path
    return found


def test_weights_tokenizer_and_the_files_of_every_split_are_fetched_and_no_code(hub, capsys):
    assert download.main(["model=llama2_7b", "task=c4", "svd=whitened", "calibration=wikitext2"]) == 0
    fetched = {repo: options["allow_patterns"] for repo, options in hub.asked}
    assert fetched["meta-llama/Llama-2-7b-hf"][0] == "*.safetensors"
    assert not any(pattern in ("*", "*.py", "*.bin") for pattern in fetched["meta-llama/Llama-2-7b-hf"])
    assert "en/c4-train.00000-of-01024.json.gz" in fetched["allenai/c4"]
    assert fetched["Salesforce/wikitext"] == ["README.md", "wikitext-2-raw-v1/*"]
    assert capsys.readouterr().out.count("fetched") == 3


def test_the_code_of_a_model_is_fetched_where_the_config_trusts_it(hub):
    (hub.folder / "owner" / "name").mkdir(parents=True)
    auto = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "other/code--modeling.Model"}
    (hub.folder / "owner" / "name" / "config.json").write_text(json.dumps({"auto_map": auto}))
    assert download.main(["model=owner/name", "model.trust_remote_code=true", "task=sotu"]) == 0
    code = [repo for repo, options in hub.asked if options["allow_patterns"] == ["*.py"]]
    assert code == ["owner/name", "other/code"]


def test_of_a_model_from_scratch_only_a_tokenizer_of_the_hub_is_fetched(hub):
    assert download.main(["model=llama_9m", "model.tokenizer=owner/name", "task=sotu"]) == 0
    assert [(repo, "*.safetensors" in options["allow_patterns"]) for repo, options in hub.asked] == [
        ("owner/name", False)
    ]


def test_statistics_that_a_run_does_not_take_are_not_fetched(hub):
    assert download.main(["model=tiny", "task=wikitext2", "svd=plain", "ranks=uniform", "calibration=c4"]) == 0
    assert [repo for repo, _ in hub.asked] == ["Salesforce/wikitext"]


def test_the_texts_that_were_fetched_are_read_without_a_network(hub):
    """HF_HUB_OFFLINE is set for all tests."""
    texts = {"train": ["one", "two"], "validation": ["three"], "test": ["four", "", "five"]}
    folder = hub.folder / "owner" / "texts"
    folder.mkdir(parents=True)
    for split, lines in texts.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    files = {"train": "train", "calibration": "train", "validation": "validation", "test": "test"}
    splits = ",".join(f"{split}:'{file}:{file}.jsonl'" for split, file in files.items())
    task = to_config(compose(["model=tiny", "task=c4", "task.repo=owner/texts", f"task.splits={{{splits}}}"])).task
    assert list(task.documents("test")) == ["four", "five"]
    assert list(task.documents("test", as_is=True)) == ["four", "", "five"]
    assert sorted(task.documents("train", 0)) == ["one", "two"]
    assert all(options["local_files_only"] for _, options in hub.asked)
