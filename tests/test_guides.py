"""The guides do what they say: their commands are run in a copy of this tree, and their diffs are applied to it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from welore.config import spell_out
from welore.finished import composed

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def blocks(guide):
    """The fenced blocks of a guide in their order, each with what stands behind its fence."""
    return FENCE.findall((ROOT / "docs" / guide).read_text())


@pytest.fixture
def copy(tmp_path):
    """A copy of this tree without what git ignores, in which commands can leave what they like."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for file in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / file).exists():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def shell(script, folder):
    """Run a block of commands as a reader would, who stops at the first that fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["guide.md", "contributing.md"])
def test_every_command_of_a_guide_runs_and_every_diff_applies(guide, copy):
    ran = 0
    for kind, content in blocks(guide):
        if kind == "diff":
            (copy / "change.diff").write_text(content)
            done = shell("git apply change.diff && rm change.diff", copy)
        elif kind == "sh":
            done = shell(content, copy)
        else:
            continue
        ran += 1
        assert done.returncode == 0, f"{content}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert ran >= 8


@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
def test_the_slurm_of_one_machine_does_what_the_guide_says(copy, slurm):
    """In a folder of its own; the fixture of the other tests skips where Slurm cannot be installed."""
    (script,) = [content for kind, content in blocks("cluster.md") if kind == "sh"]
    place = copy / "slurm"
    started = time.monotonic()
    try:
        done = shell(script.replace("/tmp/slurm", str(place)), copy)
    finally:
        shell(f"scripts/slurm_here.sh stop {place}", copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("record.json") == 4
    assert time.monotonic() - started < 300  # from nothing to four finished jobs


@pytest.mark.slow
def test_the_code_of_the_readme_runs_and_a_fused_model_writes_the_same(cli, tmp_path):
    done = cli("err=0.3", "mode=none")
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "outputs").rglob("record.json")
    (tmp_path / "RUN").symlink_to(record.parent)
    code = [content for kind, content in FENCE.findall((ROOT / "README.md").read_text()) if kind == "python"]
    assert len(code) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    prompt = "The state of the union is"
    written = done.stdout[len(prompt) : (len(prompt) + len(done.stdout)) // 2 - 1]
    assert written and done.stdout == f"{prompt}{written}\n{written}\n"


def test_a_block_is_run_or_says_that_it_is_not():
    kinds = {guide: {kind for kind, _ in blocks(guide)} for guide in ("guide.md", "contributing.md")}
    assert kinds == {"guide.md": {"sh", "sh not-run"}, "contributing.md": {"sh", "diff"}}


def values(override):
    return (
        override.sweep_string_iterator()
        if override.is_sweep_override()
        else iter([override.get_value_element_as_str()])
    )


def runs(page):
    """The overrides of every `python run.py` that no other test runs, with one value of each sweep."""
    parser = OverridesParser.create()
    for kind, content in FENCE.findall(page.read_text()):
        for line in content.replace("\\\n", " ").splitlines() if kind in ("", "sh not-run") else []:
            command = re.search(r"python run\.py (.*)", line)
            words = shlex.split(command[1], comments=True) if command else []
            if words and not {"...", "model=PATH"} & set(words):
                parsed = parser.parse_overrides(spell_out([word for word in words if not word.startswith("-")]))
                yield [f"{o.get_key_element()}={next(values(o))}" for o in parsed]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_of_a_command_that_is_shown_exists(page):
    for overrides in runs(page):
        composed(overrides)


@pytest.mark.parametrize("guide", PAGES, ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_somewhere(guide):
    text = re.sub(FENCE, "", guide.read_text())
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    lost = []
    for link in links:
        file, _, anchor = link.partition("#")
        page = (guide.parent / file) if file else guide
        titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M) if page.exists() else None
        if titles is None or anchor and anchor not in {slug(title) for title in titles}:
            lost.append(link)
    assert lost == []


def slug(title):
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
