"""Artefacts declare cells and render records: whole, incomplete, with a broken model; and run what is missing."""

import json
import math
import os
import random
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from safetensors.torch import save_file

from experiments import (
    ablation,
    equal_budget,
    every_task,
    figure3,
    figure7,
    figure8,
    grid,
    scales,
    table1,
    table2,
    table3,
    table6,
    table7,
    v1_table6,
)
from experiments import cells as cells_module
from experiments.__main__ import SCALES, about, gather, listing, load, main, names, parse, write
from experiments.cells import Row, check_infrastructure, find, fingerprint_of, launch, overrides_of
from experiments.page import Claim, Page, verdict
from welore.config import compose, fingerprint, to_config
from welore.errors import Refused
from welore.finished import composed
from welore.models import count_parameters
from welore.plots import by_component, diagonal_figure, lines_figure
from welore.quizzes import coin_flips
from welore.records import Record, Sweep, sweeps
from welore.shapes import SHAPES, factor, on_meta, stand_in

COMPONENTS = ("q_proj", "k_proj", "up_proj", "down_proj")
LAYERS = 4
BREAKS_AT = "model.layers.1.mlp"


@pytest.fixture(autouse=True)
def no_texts(tmp_path, monkeypatch):
    """Laptop cells on the packaged speeches, whatever texts this machine has."""
    monkeypatch.setenv("WELORE_DATA", str(tmp_path / "no-texts"))
    monkeypatch.delenv("WELORE_JUDGE", raising=False)


FACTORS = {"plain": 1.0, "asvd": 0.5, "whitened": 0.3, "kfac": 0.2}
RULES = {"uniform": 3.0, "owl": 2.0, "sensitivity": 1.5, "relative_energy": 1.2, "lagrange": 0.5}
PRUNERS = {"none": 0.0, "magnitude": 3.0, "wanda": 1.0, "sparsegpt": 0.9}


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder with a text each of C4 and WikiText-2, as laptop cells look for it."""
    for name in ("c4/train-1.jsonl", "wikitext2/wiki.test.raw", "wikitext2/wiki.valid.raw"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "a text"}')
    monkeypatch.setenv("WELORE_DATA", str(tmp_path / "texts"))
    return tmp_path / "texts"


def metrics_of(cell, tuned):
    """Perplexities as they are claimed: WeLore below uniform, guided below plain, tuned below compressed, rising with
    err and with sparsity, the more the less is factored; predicted damage is 0.8 of the measured."""
    removed = cell["err"] if "err" in cell else 1 - cell["keep"]
    compressed = 10 + 100 * removed**2 * FACTORS[cell.get("svd", "plain")] * RULES.get(cell["ranks"], 1.0)
    sparsity = cell.get("prune.sparsity", 0.0)
    compressed += 2 * sparsity * (1 - removed) * PRUNERS[cell.get("prune", "none")]
    nats = math.log(compressed / 10)
    found = {
        "dense/perplexity": 10.0,
        "compressed/perplexity": compressed,
        "compress/err": removed + 0.001,
        "compress/keep": cell.get("keep", 1.2 - removed),
        "compress/seconds": 60.0,
        "compress/parameters": 123_456_789,
        "compress/threshold": 0.3,
        "compress/nats": nats,
        "compress/predicted_nats": 0.8 * nats
        if cell.get("calibration.predict") or cell.get("svd") == "kfac"
        else None,
    }
    zeros = {"compress/sparsity": sparsity / 2, "compress/n_lrc_sparsity": sparsity} if sparsity else {}
    fit = {
        "tuned/perplexity": 9.0,
        "fit/trainable_parameters": 1000,
        "fit/tokens_per_second": 400.0,
        "fit/seconds": 100.0,
        "fit/peak_gib": 2.0,
    }
    return found | zeros | ANSWERED | (fit if tuned else {})


# Of 150 questions, one of two answers right in 90, by every mode.
ANSWERED = {
    "tuned/accuracy": 0.6,
    "tuned/correct": 90,
    "tuned/unparsed": 1,
    "tuned/option_accuracy": 0.6,
    "tuned/train_accuracy": 0.7,
    "eval/examples": 150,
    "eval/chance": 0.5,
    "eval/unparsed": 1,
    "compressed/correct": 15,
    "compressed/unparsed": 1,
    "dense/parameters": 130_000_000,
    "dense/correct": 75,
    "dense/unparsed": 0,
    "dense/accuracy": 0.5,
    "dense/option_accuracy": 0.5,
    "compressed/accuracy": 0.1,
    "compressed/score": 5.0,
    "compressed/judged": 160,
    "compressed/unjudged": 0,
    "compressed/rouge_l": 0.25,
}


def rated_twice(*ratings):
    """A judged answer with two ratings (None: could not be read)."""
    turns = [None if rating is None else {f"turn_{n}": rating} for n, rating in enumerate(ratings, 1)]
    return {"judgments": [{"ratings": turn} for turn in turns], "rouge_l": 0.25}


def record_of(cell, name="0000000000", config=None):
    config = config or {"model": {"name": cell["model"]}, "ranks": {"normalize": "minmax"}, "err": cell.get("err")}
    environment = {"protocol": f"{cell['task']} test: all documents, windows of 512", "device": "a CPU"}
    return Record(name, "done", config, metrics_of(cell, cell["mode"] != "none"), environment, started="2026-01-01")


def leave_spectra(folder):
    """A run folder in which q and k are cut to 1 of 10 ranks and the first layer of every component is an LRC."""
    folder.mkdir(parents=True, exist_ok=True)
    spectra, ranks = {}, {}
    for layer in range(LAYERS):
        for component in COMPONENTS:
            name, steep = f"model.layers.{layer}.block.{component}", component in ("q_proj", "k_proj")
            spectra[name] = torch.linspace(1, 0, 10) ** (20.0 if steep else 0.5)
            ranks[name] = 1 if steep or layer == 0 else None
    save_file(spectra, folder / "spectra.safetensors")
    line = {"step": 0, "train/loss": 3.0, "train/peak_gib": 2.0, "validation/perplexity": 20.0}
    (folder / "history.jsonl").write_text(json.dumps(line) + "\n")
    for stage in ("dense", "compressed", "tuned"):
        lines = [{"verdict": "right"} | rated_twice(6, None), {"verdict": "unparsed"} | rated_twice(6, 7)]
        (folder / f"answers-{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "ranks.json").write_text(json.dumps(ranks))
    for name, steps in (("trained", [0]), ("emergence", [0, 2, 5, 8, 16])):
        (folder / f"probe-{name}.json").write_text(json.dumps(probed(steps)))


PROBED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GAP_NAMES = ("first", "ratio", "fall", "dominance", "assumed", "relative", "share")


def probed(steps):
    """A probe as the claims have it: q, k and gate of the ends are low-rank, gapped and stable, more so later.

    Every number moves with `low`, the rank of a weight among all, from 0 for the most low-rank.
    """
    names = [f"model.layers.{layer}.block.{part}" for layer in range(LAYERS) for part in PROBED]
    low = {
        name: (0 if part in ("q_proj", "k_proj", "gate_proj") else 1) + (0.1 if layer in (1, 2) else 0) + i / 100
        for layer in range(LAYERS)
        for i, part in enumerate(PROBED)
        for name in [f"model.layers.{layer}.block.{part}"]
    }

    def described(value):
        return {
            "sigma": [1.0, 0.5, 0.25],
            "r_90": value,
            "stable_rank": 10 * value,
            "entropy_rank": value,
            "below_0.2_max": 1 - value,
            "above_edge": 3,
        }

    def seen(name, share):
        rank = 0.9 - share * (0.8 - 0.3 * low[name])
        return {
            "shape": [32, 48],
            "weight": described(rank),
            "gradient": described(0.1 + 0.3 * low[name]),
            "floor": {"cosine": 0.1, "left_16": 0.55, "right_16": 0.4},
        }

    def curved(name, share):
        gap, scatter = 2 - low[name], 0.3 * (sum(map(ord, name)) * 7919 % 13) / 13
        return {
            operator: {
                "values": [0.01 + low[name] + scatter, 0.005, 0.004, 0.003, 0.002, 0.001],
                "residuals": [1e-8] * 6,
                "gaps": dict.fromkeys(GAP_NAMES, gap),
                "stable_ranks": [1.2] * 5,
                "outside": {which: {"1": 1.0, "5": 0.9 - 0.8 * share} for which in ("same", "other", "large")},
            }
            for operator in ("hessian", "gauss_newton")
        }

    def checkpoint(step):
        share = step / steps[-1] if steps[-1] else 1.0
        shown = {
            "weights": {name: seen(name, min(1.0, 3 * share)) for name in names},
            "heads": {f"model.layers.{layer}.block": {k: described(0.5) for k in ("qk", "ov")} for layer in range(4)},
            "seconds": {"look": 1.0},
        }
        if step != steps[0] or len(steps) == 1:
            shown["curvature"] = {name: curved(name, share) for name in names}
            shown["seconds"]["curvature"] = 2.0
        if step == steps[-1]:
            shown["shuffled"] = {name: described(0.95) for name in names}
            shown["truncated"] = {name: {"0.25": low[name], "0.5": low[name] / 2} for name in names}
            shown["seconds"]["truncate"] = 1.0
        return shown

    tables = {
        name: {
            key: [[1.0 if s == t else value for t in steps] for s in steps]
            for key, value in (
                ("cosine", 0.6 * low[name] - 0.02),
                ("left_16", 0.95 - low[name] / 20),
                ("right_16", 0.95 - low[name] / 20),
            )
        }
        for name in names
    }
    return {
        "model": "tiny",
        "seed": 0,
        "steps": steps,
        "probe": asdict(to_config(composed(["mode=none", "probe=trained"])).probe),
        "checkpoints": {str(step): checkpoint(step) for step in steps},
        "pairs": tables,
        "eigenspaces": {name: {str(step): step / steps[-1] for step in steps[2:]} for name in names},
        "seconds_between": 1.0,
    }


def whole(name, scale, folder):
    """A row with a record for every cell."""
    leave_spectra(folder)
    find = SimpleNamespace(find=lambda cells, needs: [Row(cell, folder, record_of(cell)) for cell in cells])
    return gather(load(name), scale, find)


def fill(name, outputs, count=None):
    """Real run folders for the first `count` laptop cells of an artefact."""
    done = load(name).cells("laptop")[:count]
    for cell in done:
        config = to_config(composed(overrides_of(cell)))
        folder = outputs / fingerprint(config)
        leave_spectra(folder)
        record_of(cell, fingerprint(config), asdict(config)).save(folder)
    return done


def broken(row):
    """The same row where the model gives NaN, written and read as a run does it."""
    stage = {f"{row.stage}/perplexity": None, f"{row.stage}/breaks_at": BREAKS_AT}
    return replace(row, record=replace(row.record, metrics=row.record.metrics | stage))


def changed(row, **found):
    """The same row with other numbers."""
    return replace(row, record=replace(row.record, metrics=row.record.metrics | found))


def test_the_artefacts_of_the_paper_are_found():
    assert {
        "table1",
        "table2",
        "table3",
        "table7",
        "v1_table6",
        "figure3",
        "figure7",
        "figure8",
        "equal_budget",
        "ablation",
    } <= set(names())


@pytest.mark.parametrize("name", names())
def test_an_artefact_says_what_it_is_and_what_it_costs(name):
    caption, cost = about(load(name))
    assert caption.startswith(
        ("Table", "Figure", "Equal budgets", "Ablation", "Who learns", "Why low rank", "Recover", "Rates", "Every")
    ) and caption.endswith(".")
    assert cost.startswith("Cost: ") and "laptop" in cost and "paper" in cost


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", names())
def test_a_whole_artefact_is_written_as_markdown_latex_and_image(name, scale, tmp_path):
    page = load(name).render(whole(name, scale, tmp_path / "run"))
    paths = {path.suffix: path for path in write(page, "A caption.", f"{name}-{scale}", tmp_path)}
    markdown, latex = paths[".md"].read_text(), paths[".tex"].read_text()
    assert "missing" not in markdown and page.claims
    assert r"\toprule" in latex and latex.count(r"\begin{") == latex.count(r"\end{")
    assert bool(page.figures) == (".png" in paths) == (".png" in markdown) == (r"\includegraphics" in latex)
    assert not page.figures or paths[".png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", names())
def test_an_artefact_with_a_missing_cell_renders_and_leaves_its_claims_open(name, tmp_path):
    rows = whole(name, "laptop", tmp_path)
    complete = load(name).render(rows)
    rows[0] = Row(rows[0].cell, why="never run")
    page = load(name).render(rows)
    pairs = [(verdict(a.ours), verdict(b.ours)) for a, b in zip(page.claims, complete.claims, strict=True)]
    opened = [(now, before) for now, before in pairs if now != before]
    assert opened
    for now, before in opened:  # what one row refutes stays refuted by it, whatever is missing elsewhere
        assert now.startswith("cannot be said") or now.startswith(before[:13]) and before.startswith("does not hold")
    assert not page.figures


@pytest.mark.parametrize("column", list(table1.GRID.columns))
def test_a_model_that_breaks_stands_as_nan_with_its_layer(column, tmp_path):
    rows = whole("table1", "laptop", tmp_path)
    index = next(i for i, row in enumerate(rows) if table1.GRID.columns[column].items() <= row.cell.items())
    rows[index] = broken(rows[index])
    line = dict(zip(table1.render(rows).header, table1.render(rows).body[0], strict=False))
    assert line[column] == f"NaN ({BREAKS_AT}) (0.101, 1.100, 123.5M)"


def test_a_cell_shows_perplexity_err_achieved_keep_parameters_and_the_papers_number(tmp_path):
    page = table1.render(whole("table1", "laptop", tmp_path))
    assert page.body[0] == [
        *("smollm2_135m", "10.00", "7.03", "0.1", "13.00 (0.101, 1.100, 123.5M)", "10.58"),
        *("12.00 (0.101, 1.100, 123.5M)", "12.11", "11.00 (0.101, 1.100, 123.5M)", "7.13"),
        *("9.00 (0.101, 1.100, 123.5M)", "7.15"),
    ]
    assert "protocol: smollm2_135m on sotu test: all documents, windows of 512" in page.notes


def test_our_models_stand_beside_their_own_numbers_at_paper_scale(tmp_path):
    page = table1.render(whole("table1", "paper", tmp_path))
    assert [row[2] for row in page.body[::5]] == ["7.03", "6.53", "8.14"]
    assert page.body[-1][5] == "248,042.97" and page.body[-1][7] == "NaN"


def test_the_papers_own_numbers_bear_out_its_claims_but_for_tuning_at_ten_percent():
    verdicts = {claim.text: claim.row()[1] for claim in table1.claims([], {})}
    failing = {text: said for text, said in verdicts.items() if not said.startswith("holds")}
    assert failing == {
        "WeLore tuned is better than only compressed at every err (Table 4)": "does not hold: llama2_7b 0.1, "
        "llama2_13b 0.1"
    }


def test_a_probe_is_added_to_a_finished_run_and_other_files_need_it_again():
    watched = Row({"mode": "none", "probe": "trained"}, why="no probe-trained.json", again=True)
    assert "force" not in watched.asked("figure1", "elsewhere")
    assert replace(watched, cell={"mode": "none"}).asked("figure3", "elsewhere")["force"]


def test_a_claim_fails_on_rows_that_contradict_it(tmp_path):
    rows = whole("table1", "laptop", tmp_path)
    rows[2] = changed(rows[2], **{"compressed/perplexity": 99.0})
    said = [verdict(claim.ours) for claim in table1.render(rows).claims]
    assert said[0] == said[1] == "does not hold: smollm2_135m 0.1"
    assert said[2] == "holds (5 of 5)"
    assert said[4] == "does not hold: smollm2_135m WeLore 0.2"


def test_nan_is_worse_than_any_number_and_not_better_than_nan():
    key, nan = [("m", err, "A") for err in grid.ERRS], math.nan
    other = [("m", err, "B") for err in grid.ERRS]
    numbers = dict(zip(key, [1e9, nan, nan, 1.0, 2.0], strict=True)) | dict(
        zip(other[:4], [nan, 1e9, nan, 2.0], strict=True)
    )
    assert list(grid.better(numbers, ["m"], "A", "B").values()) == [True, False, False, True, None]


@pytest.mark.parametrize("name", names())
def test_an_artefact_says_err_keep_parameters_and_the_dense_baseline(name, tmp_path):
    rows = whole(name, "laptop", tmp_path)
    markdown = load(name).render(rows).markdown("A caption.", name)
    found = rows[-1].record.metrics
    assert f"{found['compress/err']:.3f}" in markdown and f"{found['compress/keep']:.3f}" in markdown
    asked = rows[0].cell["task"] not in ("sotu", "c4", "wikitext2")
    dense = ("10.0" if rows[0].cell["mode"] == "none" else "50.0") if asked else "10.00"  # accuracy or perplexity
    assert ("123.5M" in markdown or "123,456,789" in markdown) and "dense" in markdown and dense in markdown


def test_the_paper_claims_nothing_of_activation_guided_factors_that_its_numbers_do_not_bear_out():
    said = [claim.row()[1] for claim in table3.claims([], {}) + v1_table6.claims([], {})]
    assert said.count("holds (5 of 5)") == 9 and said.count("—") == 3  # it prints no numbers for ASVD proper


def test_every_task_sets_the_cut_model_beside_the_dense_one_on_the_same_questions(tmp_path):
    rows = whole("every_task", "laptop", tmp_path)
    rows[0] = changed(rows[0], **{"dense/correct": 90, "compressed/option_accuracy": 0.25})
    page = every_task.render(rows)
    dense, cut = (dict(zip(page.header, line, strict=True)) for line in page.body[:2])
    assert (dense["model"], dense["right / asked"], dense["parameters"]) == ("dense", "90 / 150", "130.0M")
    assert (cut["right, %"], cut["by likelihood, %"], cut["unparsed"]) == ("10.0", "25.0", "1")
    found = {claim.text: verdict(claim.ours) for claim in page.claims}
    assert found["the dense model answers more than the cut one"] == "holds (7 of 7)"
    # The answers of the two are the same in these folders, and 75 of 150 is chance.
    assert found["the same, McNemar p < 0.05"].startswith("does not hold: commonsenseqa, svamp")
    above = next(text for text in found if "most frequent" in text)
    assert found[above].startswith("does not hold: svamp")


def test_table_2_asks_the_papers_three_tasks_at_its_scale_and_a_judge_where_there_is_no_right_answer():
    cells = table2.cells("paper")
    judges = {cell["task"]: cell.get("judge") for cell in cells}
    assert judges == {"freebaseqa": None, "mt_bench": "openai", "cnn_dailymail": "openai"}
    assert len(cells) == 3 * len(table2.METHODS) and len({fingerprint_of(cell) for cell in cells}) == len(cells)


def test_table_2_compares_right_answers_and_ratings_each_with_its_own(tmp_path):
    rows = [
        changed(row, **{"compressed/correct": 20, "compressed/score": 6.5}) if row.cell["ranks"] == "owl" else row
        for row in whole("table2", "paper", tmp_path)
    ]
    page = table2.render(rows)
    lines = [dict(zip(page.header, line, strict=True)) for line in page.body if line[2] in ("OWL", "WeLore")]
    assert [(line["paper"], line["ours"], line["of"]) for line in lines] == [
        *(("54.42", "13.3", "20 / 150"), ("71.89", "10.0", "15 / 150")),
        *(("5.27", "6.50", "160 of 160 ratings"), ("6.09", "5.00", "160 of 160 ratings")),
        *(("5.16", "6.50", "160 of 160 ratings"), ("6.46", "5.00", "160 of 160 ratings")),
        *(("—", "0.2500", "150 summaries"), ("—", "0.2500", "150 summaries")),
    ]
    said = {claim.text: verdict(claim.ours) for claim in page.claims}
    assert said["WeLore is better than OWL ranks (Table 2)"].endswith("freebaseqa, mt_bench, cnn_dailymail")


def test_a_model_whose_ratings_cannot_be_read_leaves_the_claim_open(tmp_path):
    rows = [
        changed(row, **{"compressed/score": None if row.cell["task"] == "mt_bench" else 9.0})
        if row.cell["err"] and row.cell["ranks"] == "welore"
        else row
        for row in whole("table2", "paper", tmp_path)
    ]
    said = {claim.text: verdict(claim.ours) for claim in table2.render(rows).claims}
    assert said["WeLore is rated higher than SVD-LLM (Table 2)"] == "cannot be said: mt_bench"


def test_models_that_know_nothing_any_more_refute_nothing(tmp_path):
    rows = [changed(row, **{"compressed/correct": 0}) for row in whole("table2", "laptop", tmp_path)]
    assert all(verdict(claim.ours).startswith("cannot be said") for claim in table2.render(rows).claims)


def test_the_papers_numbers_bear_out_its_claims_of_table_2(tmp_path):
    page = table2.render(whole("table2", "paper", tmp_path))
    printed = [claim.row()[1] for claim in page.claims if claim.paper is not None]
    assert len(printed) == 5 and all(said.startswith("holds") for said in printed)


def test_calibration_on_wikitext_never_sees_the_text_that_is_measured(tmp_path, texts):
    for cell in table3.cells("laptop") + v1_table6.cells("laptop"):
        assert (cell["calibration"], cell["calibration.split"]) == ("wikitext2", "validation")
        assert cell["calibration.path"] == str(texts / "wikitext2")
    assert {cell["task"] for cell in table3.cells("laptop")} == {"c4"}
    assert {cell["task.path"] for cell in v1_table6.cells("laptop")} == {str(texts / "wikitext2")}


def test_the_increase_counts_from_the_same_model_before_pruning(tmp_path):
    rows = whole("figure8", "laptop", tmp_path)
    start = next(i for i, r in enumerate(rows) if r.cell["err"] == 0.5 and r.cell["prune"] == "none")
    rows[start] = changed(rows[start], **{"compressed/perplexity": 17.25})
    line = next(line for line in figure8.render(rows).body if line[:3] == ["0.5", "wanda", "0.4"])
    assert line[6:] == ["0.200", "0.400", "10.00", "17.25", "17.90", "+0.65"]


def test_a_pruned_model_that_breaks_has_no_increase_and_refutes_that_pruning_is_cheap(tmp_path):
    rows = [
        broken(r) if r.cell["err"] == 0.5 and r.cell["prune"] == "wanda" else r
        for r in whole("figure8", "laptop", tmp_path)
    ]
    page = figure8.render(rows)
    assert page.body[-5][-2:] == [f"NaN ({BREAKS_AT})", "—"]
    assert [verdict(claim.ours).split(":")[0] for claim in page.claims] == ["does not hold"] * 3
    assert page.figures


def test_equal_budgets_are_calibrated_on_one_text_and_measured_on_both(texts):
    cells = equal_budget.cells("laptop")
    assert len(cells) == 2 * len(equal_budget.KEEPS) * (len(equal_budget.PAIRS) - 1)
    assert {(cell["task"], cell["calibration"]) for cell in cells} == {("c4", "c4"), ("wikitext2", "c4")}
    assert all(cell["calibration.predict"] and cell["calibration.path"] == str(texts / "c4") for cell in cells)
    assert not any(cell["ranks"] == "sensitivity" for cell in cells)
    assert any(cell["ranks"] == "sensitivity" for cell in equal_budget.cells("paper"))


def test_equal_budgets_have_a_panel_for_each_text(tmp_path, texts):
    page = equal_budget.render(whole("equal_budget", "laptop", tmp_path))
    titles = [axis.get_title() for axis in page.figures[""].axes]
    assert titles == ["c4 (dense 10.00)", "wikitext2 (dense 10.00)"]
    assert all(verdict(claim.ours).startswith("holds") for claim in page.claims) and len(page.claims) == 6


def test_a_pair_that_misses_the_budget_is_not_compared(tmp_path):
    rows = whole("equal_budget", "laptop", tmp_path)
    index = next(i for i, r in enumerate(rows) if r.cell["ranks"] == "welore" and r.cell["svd"] == "plain")
    rows[index] = changed(rows[index], **{"compress/keep": 0.85})
    assert verdict(equal_budget.render(rows).claims[0].ours) == "cannot be said: sotu 0.9"


def test_an_ablation_pays_or_not_against_the_base_on_the_same_seeds(tmp_path):
    rows = whole("ablation", "laptop", tmp_path)
    for row in rows:
        row.record.metrics["compress/nats"] = 0.3 if row.cell.get("refine") == "block" else 0.4
        row.record.metrics["compress/predicted_nats"] = 0.3
    page = ablation.render(rows)
    said = {claim.text: verdict(claim.ours) for claim in page.claims}
    assert said["it pays: block refinement"] == "holds (2 of 2)"
    assert said["it pays: sequential, anchored"].startswith("does not hold: keep 0.8, keep 0.67")
    assert said["block refinement: at most 0.33 and 0.75 nats, mean of three seeds"] == "holds (2 of 2)"
    assert [line[7:9] for line in page.body if line[0] == "block refinement"] == [["0.300 ± 0.000", "-0.100"]] * 2


def test_a_prediction_out_of_bounds_is_named(tmp_path):
    rows = whole("equal_budget", "laptop", tmp_path)
    index = next(i for i, r in enumerate(rows) if r.cell["ranks"] == "lagrange" and r.cell["svd"] == "kfac")
    measured = rows[index].record.metrics["compress/nats"]
    rows[index] = changed(rows[index], **{"compress/predicted_nats": 1.1 * measured})
    page = equal_budget.render(rows)
    assert verdict(page.claims[3].ours) == "does not hold: sotu 0.9 kfac + lagrange"
    assert page.body[index][-1] == "1.10"


def test_a_broken_model_at_an_equal_budget_was_not_predicted(tmp_path):
    rows = whole("equal_budget", "laptop", tmp_path)
    rows[0] = changed(broken(rows[0]), **{"compress/nats": None})
    page = equal_budget.render(rows)
    assert page.body[0][-4] == f"NaN ({BREAKS_AT})" and page.body[0][-2:] == ["—", "—"]
    assert verdict(page.claims[0].ours).startswith("holds")
    assert verdict(page.claims[4].ours) == "does not hold: sotu 0.9 plain + uniform"


def test_lines_and_clouds_carry_the_numbers_and_one_key():
    panels = {"left": {"a": [(1.0, 2.0), (2.0, math.nan)]}, "right": {"a": [(1.0, 4.0), (2.0, 3.0)]}}
    for figure in (lines_figure(panels, "t", "x", "y", "log"), diagonal_figure(panels, "t", "x", "y")):
        left, right = figure.axes
        assert left.lines[0].get_xydata().tolist()[0] == [1.0, 2.0] and left.get_yscale() == "log"
        assert right.lines[0].get_xydata().tolist() == [[1.0, 4.0], [2.0, 3.0]]
        assert [text.get_text() for text in figure.legends[0].texts][0] == "a"


@pytest.mark.parametrize("name", ["equal_budget", "table3"])
def test_the_fingerprint_of_a_cell_is_that_of_its_command(name, texts):
    cell = load(name).cells("laptop")[-1]
    assert fingerprint_of(cell) == fingerprint(to_config(compose(overrides_of(cell))))


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ({"a": True, "b": True}, "holds (2 of 2)"),
        ({"a": True, "b": None}, "cannot be said: b"),
        ({"a": None, "b": False}, "does not hold: b"),
        ({}, "cannot be said: nothing is there"),
    ],
)
def test_one_exception_refutes_and_one_gap_leaves_open(outcomes, said):
    assert verdict(outcomes) == said


def test_figure_3_reads_heavy_tails_and_figure_7_the_kinds(tmp_path):
    rows = whole("figure3", "laptop", tmp_path)
    page3, page7 = figure3.render(rows), figure7.render(rows)
    assert [claim.row()[2] for claim in page3.claims] == ["holds (4 of 4)"]
    assert [line[1:3] for line in page7.body] == [["4", "0"], ["4", "0"], ["1", "3"], ["1", "3"]]
    assert verdict(page7.claims[0].ours).startswith("does not hold")  # a ratio of 0.1 is not below 0.1
    assert len(page3.figures[""].axes) == len(COMPONENTS) + 1  # and the scale of the layers


def test_the_figures_draw_cells_of_table_1_and_plain_columns_are_its_runs():
    for scale in SCALES:
        assert all(cell in table1.cells(scale) for cell in figure3.cells(scale) + figure7.cells(scale))
    plain = [cell for cell in table3.cells("laptop") if cell["svd"] == "plain" and cell["ranks"] == "welore"]
    assert fingerprint_of(plain[-1]) == fingerprint_of(figure3.cells("laptop")[0])


def test_laptop_cells_read_c4_where_it_is_there(tmp_path, monkeypatch):
    assert table1.cells("laptop")[0]["task"] == "sotu"
    (tmp_path / "c4").mkdir()
    monkeypatch.setenv("WELORE_DATA", str(tmp_path))
    cell = table1.cells("laptop")[0]
    assert (cell["task"], cell["task.path"]) == ("c4", str(tmp_path / "c4"))


@pytest.mark.slow
def test_a_printed_command_makes_the_cell_that_is_missing(tmp_path, capsys):
    done = fill("table1", tmp_path, count=18)
    assert main(["table1", f"outputs={tmp_path}"]) == 1
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python run.py ")]
    made = {fingerprint(to_config(compose(shlex.split(c, comments=True)[2:]))) for c in commands}
    wanted = {fingerprint_of(cell) for cell in table1.cells("laptop") if cell not in done}
    assert made == wanted and len(made) == 2
    assert all(f"outputs={tmp_path}" in command and "save=false" in command for command in commands)
    assert not (tmp_path / "artefacts").exists()


def test_a_whole_artefact_exits_with_0_and_is_written_beside_the_runs(tmp_path, capsys):
    fill("figure7", tmp_path)
    assert main(["figure7", f"outputs={tmp_path}"]) == 0
    assert {p.name for p in (tmp_path / "artefacts").iterdir()} == {
        f"figure7-laptop.{s}" for s in ("md", "tex", "png")
    }
    assert "# Figure 7" in capsys.readouterr().out


def test_a_reader_that_has_read_enough_is_no_defect(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "experiments", f"outputs={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_run_without_the_files_that_a_figure_draws_is_run_again(tmp_path):
    fill("figure3", tmp_path)
    next(tmp_path.rglob("spectra.safetensors")).unlink()
    (row,) = find(figure3.cells("laptop"), str(tmp_path), figure3.NEEDS)
    assert row.missing and "spectra.safetensors" in row.why
    assert "force=true" in row.command("figure3", str(tmp_path))
    assert not find(figure3.cells("laptop"), str(tmp_path))[0].missing


def test_a_run_that_failed_is_missing_and_says_why(tmp_path):
    (cell,) = figure3.cells("laptop")
    name = fingerprint_of(cell)
    Record(name, "failed", {}, error="OutOfMemoryError: too big\nand a trace").save(tmp_path / "run")
    (row,) = find([cell], str(tmp_path))
    assert row.missing and row.why == "failed: OutOfMemoryError: too big"


def test_a_failed_run_does_not_hide_a_finished_one(tmp_path):
    (cell,) = fill("figure3", tmp_path)
    Record(fingerprint_of(cell), "failed", {}, error="late", started="2027").save(tmp_path / "later")
    assert not find([cell], str(tmp_path))[0].missing


@pytest.mark.slow
def test_the_listing_counts_done_and_missing_cells(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.__main__.SCALES", ("laptop",))
    fill("figure3", tmp_path)
    assert main([f"outputs={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = {line.split()[0]: lines[i + 2].split(maxsplit=1)[1] for i, line in enumerate(lines) if line[0] != " "}
    assert counts["figure3"] == counts["figure7"] == "1 done, 0 missing"
    assert counts["table1"] == "1 done, 19 missing"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["tabel1"], "Did you mean table1?"),
        (["table1", "scale=huge"], "scale=laptop or scale=paper"),
        (["table1", "err=0.9"], "python run.py err=0.9"),
        (["table1", "+model.dtype=float16"], "measure"),
        (["logger=none"], "needs an artefact"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(arguments, hint, capsys):
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    ["hydra/launcher=basic", "hydra.job.env_copy=[]", "logger=none", "trainer.device=cpu", "save=true", "+group=mine"],
)
def test_how_the_cells_run_is_free(override):
    check_infrastructure([override])


@pytest.mark.parametrize(
    "override", ["err=0.3", "model=tiny", "task.path=x", "~seed", "task/protocol=field", "mode@mode=lora", "seed=1"]
)
def test_what_the_cells_measure_is_not(override):
    with pytest.raises(Refused, match="would change"):
        check_infrastructure([override])


def test_a_request_tells_what_is_read_from_what_is_launched():
    request = parse(["table1", "scale=paper", "outputs=here", "logger=none"])
    assert (request.name, request.scale, request.outputs, request.overrides) == (
        *("table1", "paper", "here"),
        ["logger=none"],
    )
    assert parse(["table1"]).scale == "laptop"


def test_sweeps_hold_the_missing_cells_and_no_other():
    cells = Sweep({"model": ["a", "b"], "err": [0.1, 0.2, 0.3], "ranks": ["uniform", "welore"]}).cells()
    assert len(sweeps(cells)) == 1
    chance = random.Random(0)
    for _ in range(50):
        some = chance.sample(cells, chance.randint(0, len(cells)))
        covered = [cell for sweep in sweeps(some) for cell in sweep.cells()]
        assert sorted(map(repr, covered)) == sorted(map(repr, some))


def test_a_launch_is_as_few_multiruns_as_the_missing_cells_allow(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(cells_module.subprocess, "run", lambda command, check: commands.append(command))
    rows = find(table1.cells("laptop"), str(tmp_path))
    launch(rows, "table1", str(tmp_path), ["hydra/launcher=basic"])
    assert len(commands) == 2  # uniform, OWL and WeLore as they are, WeLore tuned
    assert all(c[2] == "-m" and c[-1] == "hydra/launcher=basic" and "group=table1" in c for c in commands)
    assert "err=0.1,0.2,0.3,0.4,0.5" in commands[0] and "ranks=uniform,owl,welore" in commands[0]

    commands.clear()
    launch([replace(row, record=record_of(row.cell)) for row in rows], "table1", "outputs", [])
    assert commands == []


def test_values_with_signs_of_the_grammar_reach_hydra_unchanged():
    path = "a folder/it's {odd}, (really)=1"
    (override,) = Sweep({"task.path": [path]}).overrides()
    assert compose(["model=tiny", override]).task.path == path


def test_a_cell_whose_value_is_a_list_is_a_command():
    (cell,) = load("figure1").cells("paper")
    lists = {key: value for key, value in cell.items() if isinstance(value, list)}
    composed = compose(overrides_of(cell))
    assert lists and all(OmegaConf.select(composed, key) == value for key, value in lists.items())


def test_a_probe_that_left_out_what_is_drawn_is_refused_by_its_settings(tmp_path):
    rows = whole("figure2", "laptop", tmp_path)
    found = probed([0, 2, 5, 8, 16])
    found["probe"] |= {"ranks": [4], "eigenvalues": 2}
    (tmp_path / "probe-emergence.json").write_text(json.dumps(found))
    with pytest.raises(Refused, match=r"probe.ranks=\[4\], probe.eigenvalues=2, and the artefacts read r = 16"):
        load("figure2").render(rows)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["figure1", "why_low_rank"])
def test_the_large_batch_of_a_probe_is_some_times_that_of_its_curvature(name, scale):
    """Else the gradient of the large batch is that of the other one."""
    probe = compose(overrides_of(load(name).cells(scale)[0])).probe
    assert probe.windows >= 4 * probe.curvature_windows


@pytest.mark.slow
def test_a_launch_runs_the_missing_cells_and_finds_them(tmp_path):
    axes = {"model": ["tiny"], "mode": ["none"], "task/protocol": ["smoke"], "err": [0.3, 0.5]}
    cells = [cell | {"ranks": "uniform"} for cell in Sweep(axes).cells()]
    rows = find(cells, str(tmp_path))
    assert all(row.missing for row in rows)
    launch(rows, "table1", str(tmp_path), ["logger=none", "hydra/launcher=basic", "trainer=cpu"])
    found = find(cells, str(tmp_path), figure3.NEEDS)
    assert [row.record.config["err"] for row in found] == [0.3, 0.5]
    assert {row.record.config["group"] for row in found} == {"table1"}


def test_components_and_layers_come_from_the_names():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.decoder.layers.2.fc1"]
    assert by_component(dict.fromkeys(names, 1)) == {"q_proj": {0: 1, 11: 1}, "fc1": {2: 1}}


def test_a_page_says_where_the_paper_prints_no_numbers():
    page = Page(["a"], [["1"]], ["a note"], [Claim("so it is", None, {"x": True})])
    assert "| so it is           | —                      | holds (1 of 1) |" in page.markdown("A.", "x")


def test_memory_of_inference_is_parameters_and_cache_in_two_bytes(tmp_path):
    page = table7.render(whole("table7", "paper", tmp_path))
    dense, compressed = page.body[0], page.body[1]
    # LLaMA-2-7B has 6,738,415,616 parameters; 2 x 32 layers x 4096 numbers a token are 256 MiB at 512 tokens.
    assert dense[4:10] == ["6,738.4M", "6,738.4M", "12,853", "13,579", "13,109", "14,467"]
    assert dense[-2:] == ["14,901", "24,519"]
    assert (
        compressed[6] == f"{123_456_789 * 2 / 2**20:,.0f}" and compressed[8] == f"{123_456_789 * 2 / 2**20 + 256:,.0f}"
    )


def test_table_7_counts_the_parameters_of_the_paper_s_model_as_its_stand_in_has_them(tmp_path):
    lines = [line for line in table7.render(whole("table7", "laptop", tmp_path)).body if "stand-in" in line[0]]
    for line, err in zip(lines, [0.0, 0.3, 0.5, 0.7], strict=True):
        model = on_meta(SHAPES["llama2_7b"], "bfloat16")
        if err:
            factor(model, stand_in(model, err))
        assert line[4] == f"{count_parameters(model) / 1e6:,.1f}M"
    # At 0.5: 224 weights of 4,096 ranks, 175 of which keep 1,468.
    assert lines[2][1:4] == ["0.5", f"{175 * (4096 - 1468) / (224 * 4096):.3f}", "0.661"]


def test_table_7_says_that_the_dense_model_fits_a_consumer_gpu(tmp_path):
    rows = whole("table7", "paper", tmp_path)
    left = {0.3: 5_794_250_000, 0.5: 4_543_670_000, 0.7: 3_072_840_000}
    rows = [changed(row, **{"compress/parameters": left[row.cell["err"]]}) for row in rows]
    falls, shrinks, fits = table7.render(rows).claims
    assert verdict(falls.ours) == verdict(falls.paper) == "holds (12 of 12)"
    assert verdict(shrinks.ours) == "holds (3 of 3)" and verdict(shrinks.paper) == "does not hold: 0.3"
    assert verdict(fits.ours) == verdict(fits.paper) == "does not hold: dense does not fit"


def test_what_the_paper_prints_of_table_6_is_partly_impossible():
    """By enumeration: 28 of its 90 accuracies are k / N, none of those on BigBench's 74 questions."""
    assert (
        table6.impossible()[0].startswith("28 of the paper's 90 accuracies")
        and "date 0 of 15" in table6.impossible()[0]
    )


@pytest.fixture
def table_6(tmp_path):
    """A function of the rows of Table 6 that are there, by benchmark, err and mode, to all of them."""
    leave_spectra(tmp_path / "run")

    def table_6(filled=lambda task, err, mode: False):
        def row(cell):
            if table6.offered("laptop", cell) and not filled(cell["task"], cell["err"], cell["mode"]):
                return Row(cell, why="never run")
            return Row(cell, tmp_path / "run", record_of(cell))

        return gather(table6, "laptop", SimpleNamespace(find=lambda cells, needs: [row(cell) for cell in cells]))

    return table_6


def claimed(rows):
    """The places of each claim of Table 6 with what is said of them."""
    return [claim.ours for claim in table6.render(rows).claims]


def test_table_6_shows_what_it_offers_as_missing_and_claims_nothing_of_it(table_6):
    page = table6.render(table_6())
    shown = {(line[1], line[2]): line[page.header.index("ours, %")] for line in page.body}
    assert len(page.body) == 90 and len(shown) == 24
    there = {place for place, value in shown.items() if value != "missing"}
    assert there == {("coinflip", "0"), ("coinflip", "0.3"), ("coinflip", "0.5")}
    *ordered, near = [claim.ours for claim in page.claims]
    assert all(set(places) == {"coinflip 0.3", "coinflip 0.5"} for places in ordered) and set(near) == {"coinflip"}


def test_what_table_6_offers_is_claimed_of_where_every_mode_is_there(table_6):
    *ordered, near = claimed(table_6(lambda task, err, mode: task == "boolq" and (err == 0.3 or mode == "welore")))
    assert all(set(places) == {"boolq 0.3", "coinflip 0.3", "coinflip 0.5"} for places in ordered)
    assert set(near) == {"coinflip"}  # there is no dense model to compare with
    *_, near = claimed(table_6(lambda task, err, mode: task == "boolq" and err < 0.4))
    assert set(near) == {"boolq", "coinflip"}


def test_a_needed_row_of_table_6_that_is_missing_leaves_its_claims_open(table_6):
    rows = [replace(row, record=None) if row.cell["task"] == "coinflip" else row for row in table_6()]
    assert all(verdict(outcomes).startswith("cannot be said: coinflip") for outcomes in claimed(rows))


@pytest.mark.parametrize(("missing", "status"), [(0, 0), (1, 1)])
def test_what_an_artefact_offers_is_printed_and_neither_run_nor_waited_for(
    table_6, tmp_path, monkeypatch, capsys, missing, status
):
    first = next(row.cell for row in table_6() if not row.offered)
    found = {json.dumps(row.cell): row for row in table_6()}
    if missing:
        found[json.dumps(first)] = Row(first, why="never run")
    runs = SimpleNamespace(find=lambda cells, needs: [found[json.dumps(cell)] for cell in cells])
    launched = []
    monkeypatch.setattr("experiments.__main__.read", lambda request, known: runs)
    monkeypatch.setattr("experiments.__main__.launch", lambda rows, *how: launched.extend(row.cell for row in rows))
    assert main(["table6", f"outputs={tmp_path}", "logger=none"]) == status
    assert launched == [first] * missing
    before, after = capsys.readouterr().out.split(" more rows, which two cores take long for, are made by:\n")
    offered = [line for line in after.splitlines() if line.startswith("python run.py ")]
    assert len(offered) == int(before.split()[-1]) == 60 + 3 * (4 - missing)  # grids; CoinFlip at err 0.4 by mode
    assert not any("task=coinflip" in line and "err=0.4" not in line for line in offered)
    assert before.count("python run.py ") == missing and ("written:" in before) is not bool(missing)


def test_the_listing_tells_what_is_offered_from_what_is_missing(table_6, monkeypatch):
    monkeypatch.setattr("experiments.__main__.names", lambda: ["table6"])
    find = SimpleNamespace(find=lambda cells, needs: [Row(cell, why="never run") for cell in cells])
    *_, laptop, paper = listing(find).splitlines()
    assert "0 done, 12 missing, 60 more offered, more may follow" in laptop
    assert "0 done, 270 missing, more may follow" in paper


def test_table_6_counts_the_answers_of_the_puzzles_that_are_generated():
    puzzles = [puzzle["answer"] for puzzle in coin_flips(500, 0)]
    said = f"yes is right for {puzzles[:350].count('yes')} of 350 that are for training"
    assert said in table6.generated() and f"no for the other {puzzles[350:].count('no')};" in table6.generated()


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Folders of the tasks of Table 2, as laptop cells look for them, and a judge."""
    for name in ("triviaqa", "mt_bench", "cnn_dailymail"):
        (tmp_path / "texts" / "tasks" / name).mkdir(parents=True)
    monkeypatch.setenv("WELORE_DATA", str(tmp_path / "texts"))
    monkeypatch.setenv("WELORE_JUDGE", "judge=openai judge.model=m judge.temperature=null judge.max_tokens=99")
    return tmp_path / "texts" / "tasks"


def test_table_2_asks_a_judge_where_there_is_one(tasks, monkeypatch):
    paper, laptop = table2.cells("paper"), table2.cells("laptop")
    assert [cell["task"] for cell in laptop[::5]] == ["triviaqa", "mt_bench", "cnn_dailymail"] and len(laptop) == 15
    assert [cell["task"] for cell in paper[::5]] == ["freebaseqa", "mt_bench", "cnn_dailymail"] and len(paper) == 15
    for cell in laptop[5:] + paper[5:]:
        assert (cell["judge.model"], cell["judge.temperature"], cell["judge.max_tokens"]) == ("m", None, 99)
    assert not any("judge" in cell for cell in laptop[:5] + paper[:5])
    monkeypatch.delenv("WELORE_JUDGE")
    unjudged = [{key: value for key, value in cell.items() if not key.startswith("judge")} for cell in laptop[10:]]
    assert table2.cells("laptop") == laptop[:5] + unjudged  # summaries have their ROUGE, conversations nothing
    assert {cell.get("judge") for cell in table2.cells("paper")} == {None, "openai"}


def test_the_facts_of_table_2_are_the_same_cells_whatever_else_is_there(tasks, monkeypatch):
    told = {"task.path": str(tasks / "triviaqa"), "calibration": "sotu"}
    shared = {"model": "smollm2_135m", "mode": "none", "task": "triviaqa", "task.limit": 300} | told
    facts = [shared | method for method in table2.METHODS.values()]
    assert table2.cells("laptop")[:5] == facts
    monkeypatch.delenv("WELORE_JUDGE")
    assert table2.cells("laptop")[:5] == facts
    (tasks / "cnn_dailymail").rmdir()
    assert table2.cells("laptop") == facts


def test_rouge_is_no_rating(tasks, tmp_path, monkeypatch):
    """WeLore has the better ROUGE-L and OWL the better ratings: neither counts for a claim about the other."""

    def page():
        better = {"owl": {"compressed/score": 9.0}, "welore": {"compressed/rouge_l": 0.5}}
        rows = whole("table2", "laptop", tmp_path)
        return table2.render([changed(row, **better.get(row.cell["ranks"], {})) for row in rows])

    def said(page):
        return {claim.text: (claim.paper is not None, claim.ours) for claim in page.claims}

    judged = said(page())
    assert judged["WeLore is better than OWL ranks (Table 2)"] == (
        *(True, {"triviaqa": False, "mt_bench": False, "cnn_dailymail": False}),
    )
    assert judged["WeLore has a higher ROUGE-L than OWL ranks"] == (False, {"cnn_dailymail": True})
    monkeypatch.delenv("WELORE_JUDGE")
    alone = said(page())
    assert alone["WeLore is better than OWL ranks (Table 2)"] == (True, {"triviaqa": False})
    assert alone["WeLore has a higher ROUGE-L than OWL ranks"] == (False, {"cnn_dailymail": True})
    assert {place for place in alone["the dense model is best (Table 2)"][1]} == {
        f"triviaqa {method}" for method in table2.METHODS if method != "dense"
    }
    assert not any("rated" in text for text in alone)
    assert any(line.startswith("not asked here, summaries, of 10") for line in page().notes)


def test_a_model_that_breaks_in_some_answers_has_no_mean_of_the_others(tasks, tmp_path):
    rows = whole("table2", "laptop", tmp_path)
    page = table2.render(
        [changed(row, **{"compressed/broken": 7}) if row.cell["ranks"] == "owl" else row for row in rows]
    )
    claim = next(claim for claim in page.claims if claim.text == "WeLore is better than OWL ranks (Table 2)")
    assert claim.ours["mt_bench"] is None is claim.ours["cnn_dailymail"] and claim.ours["triviaqa"] is not None
    owl = [line for line in page.body if line[2] == "OWL" and line[0] != "triviaqa"]
    assert len(owl) == 3 and all(line[7] == "—" == line[-1] for line in owl)


def test_a_command_of_table_2_makes_its_cell(tasks):
    tasks.joinpath("triviaqa", "a.jsonl").write_text("{}")  # the content of the files is part of a run's name
    tasks.joinpath("mt_bench", "a.jsonl").write_text("{}")
    tasks.joinpath("cnn_dailymail", "a.jsonl").write_text("{}")
    for cell in table2.cells("laptop")[::5]:
        assert fingerprint_of(cell) == fingerprint(to_config(compose(overrides_of(cell))))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("openai", ["'openai' holds openai", "judge=local judge.path=FOLDER"]),
        ("judge=openai err=0.5", ["holds err", "of the judge alone"]),
        ("judge=none", ["names no judge"]),
        ("judge.model=m", ["names no judge"]),
    ],
)
def test_a_judge_that_is_none_is_refused(monkeypatch, told, words):
    monkeypatch.setenv("WELORE_JUDGE", told)
    with pytest.raises(Refused) as stopped:
        scales.judge("laptop")
    assert all(word in str(stopped.value) for word in words)


def rated(folder, *pairs):
    """A run folder with the answers to as many questions, each with two ratings (None: could not be read)."""
    folder.mkdir()
    (folder / "answers-compressed.jsonl").write_text("".join(json.dumps(rated_twice(*pair)) + "\n" for pair in pairs))
    return folder


def test_ratings_are_compared_question_by_question(tmp_path):
    cell = {"task": "mt_bench"}
    high = Row(cell, rated(tmp_path / "high", *[(8, 9)] * 6, (2, None), (5, 5)))
    low = Row(cell, rated(tmp_path / "low", *[(8, 8)] * 6, (9, 9), (4, 6)))
    assert table2.ratings(high.folder) == [8.5] * 6 + [None, 5]
    # A tie, and one that could not be read, do not count.
    assert table2.CONVERSATION.differs(high, low) == pytest.approx(2 / 2**6)
    assert table2.CONVERSATION.differs(low, low) == 1


def test_rouge_is_compared_article_by_article(tmp_path):
    def row(name, *values):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "answers-compressed.jsonl").write_text("".join(json.dumps({"rouge_l": v}) + "\n" for v in values))
        return Row({"task": "cnn_dailymail"}, folder)

    high, low = row("high", *[0.4] * 6, 0.1, 0.3), row("low", *[0.2] * 7, 0.3)
    # Six of one, one of the other and a tie: by enumeration 2 (1 + 7) / 2^7.
    assert table2.ROUGE.differs(high, low) == pytest.approx(2 * 8 / 2**7)
