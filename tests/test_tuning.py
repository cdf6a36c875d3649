"""Modes at learning rates of their own: what is run, what is chosen, what is flagged, and what is claimed of it."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from experiments import every_mode, figure4, figure5, rates, recover, table4, table5, table6, tuned, tuning, who_learns
from experiments.__main__ import gather, load, main
from experiments.cells import Row, Runs, find, fingerprint_of, overrides_of
from experiments.page import verdict
from experiments.scales import VOCABULARY
from experiments.tuning import other_seeds, studies, surely_below
from welore import metrics
from welore.config import CONF, compose, to_config
from welore.finished import composed
from welore.plots import save
from welore.records import Record, records
from welore.runner import run

NAMES = ["table4", "table5", "figure4", "figure5", "who_learns", "recover", "every_mode"]
UNTUNED = 500.0
START = {"model": "smollm2_135m", "err": 0.3, "mode": "welore", "task/training": "laptop"}


@pytest.fixture(autouse=True)
def no_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("WELORE_DATA", str(tmp_path / "no-texts"))


def made(folder, cell, perplexity, validation=None, **found):
    """A row whose run has this perplexity, and the same on validation text unless another is given."""
    place = folder / f"{abs(hash(json.dumps(cell, sort_keys=True)))}"
    place.mkdir(parents=True, exist_ok=True)
    held_out = perplexity if validation is None else validation
    lines = [
        {"step": 9, "train/loss": 5.0},
        {"step": 9, "validation/perplexity": 2 * held_out},
        {"step": 19, "train/loss": 4.0, "train/peak_gib": 2.0},
        {"step": 19, "validation/perplexity": held_out},
    ]
    (place / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = {
        "dense/perplexity": 30.0,
        "compressed/perplexity": UNTUNED,
        "tuned/perplexity": perplexity,
        "compress/err": 0.3,
        "compress/keep": 0.86,
        "compress/parameters": 120_000_000,
        "compress/flops_per_token": 239_000_000,
        "fit/trainable_parameters": 10_000_000,
        "fit/state_gib": 120_000_000 / 2**30,
        "fit/tokens": 30_000,
        "fit/tokens_per_second": 400.0,
        "fit/peak_gib": 3.0,
    }
    environment = {"protocol": "c4 test: windows of 512", "device": "a CPU"}
    return Row(cell, place, Record("0", "done", {"model": {"name": "smollm2_135m"}}, numbers | found, environment))


def diverged(cell):
    return Row(cell, why="failed: FloatingPointError: the loss of step 3 is nan", diverged=True)


def study(folder, perplexities, start=START, seeds=(), validation=None):
    """The study of a grid with these perplexities, by multiple of the default rate, and those of the other seeds."""
    cells = tuning.grid(start)
    held_out = validation or perplexities
    rows = [
        diverged(cell) if value is None else made(folder, cell, value, score)
        for cell, value, score in zip(cells, perplexities, held_out, strict=True)
    ]
    more = [made(folder, cell, value) for cell, value in zip(other_seeds("laptop", rows), seeds, strict=False)]
    (found,) = studies(rows + more)
    return found


def test_a_grid_is_multiples_of_the_default_rate_of_the_mode():
    rates = {mode: [cell["mode.lr"] for cell in tuning.grid(START | {"mode": mode})] for mode in ("welore", "lora")}
    assert rates == {"welore": [0.000125, 0.0005, 0.002], "lora": [0.00125, 0.005, 0.02]}


def test_the_run_at_the_default_rate_is_the_plain_run():
    plain = {"ranks": "welore", **START}
    assert fingerprint_of(tuning.grid(plain)[1]) == fingerprint_of(plain)


def test_the_rate_is_chosen_on_validation_and_not_on_the_test_text(tmp_path):
    found = study(tmp_path, [100.0, 200.0, 300.0], validation=[60.0, 50.0, 70.0])
    assert found.chosen == 0.0005 and found.edge == "no"
    assert [row.perplexity for row in found.runs] == [200.0]


@pytest.mark.parametrize(
    ("perplexities", "edge"), [([1.0, 2.0, 3.0], "lowest"), ([3.0, 1.0, 2.0], "no"), ([3.0, 2.0, 1.0], "highest")]
)
def test_a_best_rate_at_the_edge_of_the_grid_is_said(tmp_path, perplexities, edge):
    found = study(tmp_path, perplexities)
    assert found.edge == edge and edge in tuned.values(found)


def test_the_other_seeds_follow_once_the_grid_is_done(tmp_path):
    cells = tuning.grid(START)
    rows = [made(tmp_path, cell, 100.0 + i) for i, cell in enumerate(cells)]
    assert other_seeds("laptop", [*rows[:2], Row(cells[2], why="never run")]) == []
    assert other_seeds("laptop", rows) == [START | {"mode.lr": 0.000125, "seed": seed} for seed in (1, 2)]
    assert other_seeds("paper", rows) == []


@pytest.mark.parametrize(
    ("best", "order"),
    [
        (0.000125, [0.00003125]),  # worse: back to the edge, which is one no more
        (0.00003125, [0.00003125, 7.8125e-06]),
        (0.0, [0.00003125, 7.8125e-06]),  # better and better, as far as it goes
        (0.0005, []),
        (0.002, [0.008]),
        (1.0, [0.008, 0.032]),
    ],
)
def test_a_grid_that_is_best_at_its_edge_is_widened_before_the_other_seeds_run(tmp_path, best, order):
    rows, tried = [made(tmp_path, cell, abs(cell["mode.lr"] - best)) for cell in tuning.grid(START)], []
    for _ in range(tuning.WIDEST):
        cells = tuning.then("laptop", rows)
        if cells[0]["seed"] != 0:
            break
        assert tuning.then("laptop", [*rows, Row(cells[0], why="never run")]) == []
        tried += [cell["mode.lr"] for cell in cells]
        rows += [made(tmp_path, cell, abs(cell["mode.lr"] - best)) for cell in cells]
    assert tried == pytest.approx(order)
    closest = min((row.cell["mode.lr"] for row in rows), key=lambda rate: abs(rate - best))
    assert [(cell["mode.lr"], cell["seed"]) for cell in cells] == [(closest, 1), (closest, 2)]


def test_a_grid_of_which_every_rate_diverged_is_widened_downwards():
    rows = [diverged(cell) for cell in tuning.grid(START)]
    (next_one,) = tuning.then("laptop", rows)
    assert next_one["mode.lr"] == pytest.approx(0.00003125)


def test_a_mean_over_seeds_with_its_standard_error(tmp_path):
    found = study(tmp_path, [200.0, 100.0, 300.0], seeds=[104.0, 108.0])
    assert found.perplexity == pytest.approx(104.0)
    assert found.error == pytest.approx(4.0 / math.sqrt(3))
    values = dict(zip(tuned.COLUMNS, tuned.values(found), strict=True))
    assert values["tuned"] == "104.00 ± 2.31" and values["seeds"] == "3"
    assert values["learning rate"] == "0.0005 of 0.000125, 0.0005, 0.002"
    assert (values["optimizer MB"], values["peak GiB"], values["device"]) == ("80.0", "2.00", "a CPU")
    assert (values["MFLOPs/token"], values["training MFLOPs/token"], values["tokens/s"]) == ("239", "—", "400")
    assert (values["untuned"], values["dense"], values["flag"]) == ("500.00", "30.00", "—")


def test_padding_and_reserved_memory_stand_beside_what_they_are_larger_than(tmp_path):
    more = {"fit/padded_tokens_per_second": 512.4, "fit/reserved_gib": 2.75, "eval/peak_gib": 1.5}
    rows = [made(tmp_path, cell, 100.0 + i, **more) for i, cell in enumerate(tuning.grid(START))]
    values = dict(zip(tuned.COLUMNS, tuned.values(studies(rows)[0]), strict=True))
    assert values["tokens/s"] == "400 (512)" and values["peak GiB"] == "2.00 (2.75)"
    assert values["evaluation peak GiB"] == "1.50"
    unpadded = [made(tmp_path, row.cell, 100.0, **{"fit/padded_tokens_per_second": 400.0}) for row in rows]
    assert dict(zip(tuned.COLUMNS, tuned.values(studies(unpadded)[0]), strict=True))["tokens/s"] == "400"


def test_what_newer_records_say_of_optimizer_and_flops_is_taken_as_it_is(tmp_path):
    state = {"fit/state_gib": 90_000_000 / 2**30, "fit/optimizer_gib": 64_000_000 / 2**30}
    newer = state | {"fit/flops_per_token": 521_353_044.9}
    rows = [made(tmp_path, cell, 100.0 + i, **newer) for i, cell in enumerate(tuning.grid(START))]
    (found,) = studies(rows)
    values = dict(zip(tuned.COLUMNS, tuned.values(found), strict=True))
    assert (values["optimizer MB"], values["training MFLOPs/token"]) == ("64.0", "521")


def test_seeds_that_are_there_are_shown_and_decide_nothing(tmp_path):
    whole = study(tmp_path, [200.0, 100.0, 300.0], seeds=[104.0, 108.0])
    found = replace(whole, rows=(*whole.rows[:-1], replace(whole.rows[-1], record=None, why="never run")))
    values = dict(zip(tuned.COLUMNS, tuned.values(found), strict=True))
    assert (values["tuned"], values["seeds"]) == ("102.00 ± 2.00", "2 of 3")
    assert found.perplexity is None and found.flag == "" and tuning.surely_below(found, whole) is None
    grid = replace(whole, rows=(replace(whole.rows[0], record=None, why="never run"), *whole.rows[1:]))
    values = dict(zip(tuned.COLUMNS, tuned.values(grid), strict=True))
    assert (values["tuned"], values["seeds"]) == ("missing", "—")


def test_a_run_that_recomputed_its_layers_says_so_beside_its_device(tmp_path):
    found = study(tmp_path, [200.0, 100.0, 300.0])
    found.first.record.environment["recompute"] = True
    assert dict(zip(tuned.COLUMNS, tuned.values(found), strict=True))["device"] == "a CPU, recompute"
    found.first.record.environment["recompute"] = False
    assert dict(zip(tuned.COLUMNS, tuned.values(found), strict=True))["device"] == "a CPU"


def test_a_seed_that_is_missing_leaves_a_study_open(tmp_path):
    found = study(tmp_path, [200.0, 100.0, 300.0])
    (opened,) = studies([*found.rows, Row(START | {"mode.lr": 0.0005, "seed": 1}, why="never run")])
    assert opened.missing and opened.perplexity is None and "1 of 2" in tuned.values(opened)


def guessed(folder, perplexities, guess=440.0, start=START, seeds=()):
    """The study of a grid whose test text is guessed so well by the frequencies of tokens."""
    return studies([replace(row, guess=guess) for row in study(folder, perplexities, start, seeds).rows])[0]


def test_a_model_that_knows_token_frequencies_and_no_more_did_not_train(tmp_path):
    assert guessed(tmp_path, [470.0, 450.0, 460.0]).flag == "did not train: no better than token frequencies"
    assert guessed(tmp_path, [470.0, 430.0, 460.0]).flag == ""


def test_how_well_token_frequencies_guess_a_text_is_told_by_any_record_of_it(tmp_path, monkeypatch):
    """Older records do not hold it; those of another seed, text or length read other tokens."""
    config = {"seed": 0, "model": {"name": "m", "trust_remote_code": False}}
    config |= {
        "task": {"name": "c4", "protocol": {"windows": 4}, "training": {"length": 512, "pack": True, "lr": 1.0}}
    }
    monkeypatch.setenv("WELORE_DATA", "/texts")
    config["task"]["path"] = "/texts/c4"
    older = config | {"model": {"name": "m"}, "task": config["task"] | {"subset": None, "path": "$WELORE_DATA/c4"}}
    older["task"] = older["task"] | {"training": {"length": 512, "pack": True, "lr": 2.0}}
    others = [
        config | {"seed": 1},
        config | {"task": config["task"] | {"protocol": {"windows": 8}}},
        config | {"task": config["task"] | {"training": {"length": 256, "pack": True}}},
    ]
    told = {"tuned/perplexity": 9.0, "eval/frequency_perplexity": 440.0}
    held = [Record(str(i), "done", one, {"tuned/perplexity": 9.0}) for i, one in enumerate([older, *others])]
    runs = Runs.of([(tmp_path, record) for record in [*held, Record("teller", "done", config, told)]], str)
    assert [runs.find([name])[0].guess for name in ("teller", "0", "1", "2", "3")] == [440.0, 440.0, None, None, None]
    assert Runs.of([(tmp_path, held[0])], str).find(["0"])[0].guess is None


@pytest.mark.parametrize(
    ("one", "other", "outcome"),
    [(430.0, 450.0, True), (450.0, 430.0, False), (450.0, 460.0, None), (460.0, 450.0, None), (430.0, 420.0, False)],
)
def test_of_two_that_did_not_train_nothing_is_claimed(tmp_path, one, other, outcome):
    """A model that knows no more than token frequencies, 440, is not the better one of anything."""
    seeds = {"welore": [one + 1, one + 2], "galore": [other + 1.5, other + 2]}
    pair = {
        ("", mode): guessed(tmp_path, [490.0, value, 495.0], start=START | {"mode": mode}, seeds=seeds[mode])
        for mode, value in (("welore", one), ("galore", other))
    }
    for compared in (tuned.better, tuned.surely_lower):
        assert compared(pair, [""], "welore", "galore") == {"": outcome}


def test_a_cost_that_no_record_holds_has_no_column_and_one_seed_is_enough(tmp_path):
    cells = tuning.grid(START)
    rows = [made(tmp_path, cell, 100.0 + i) for i, cell in enumerate(cells)]
    (found,) = studies(rows)
    page = tuned.page(["mode"], [(["welore"], found)], rows, [])
    assert "training MFLOPs/token" not in page.header and "tokens/s" in page.header and page.header[-1] == "flag"
    assert [len(line) for line in page.body] == [len(page.header)]
    other = made(tmp_path, cells[0] | {"seed": 1}, 100.0, **{"fit/flops_per_token": 521_353_044.9})
    page = tuned.page(["mode"], [(["welore"], studies([*rows, other])[0])], rows, [])
    assert dict(zip(page.header, page.body[0], strict=True))["training MFLOPs/token"] == "521"


@pytest.mark.parametrize(
    ("perplexities", "seeds", "flag"),
    [
        ([90.0, 80.0, None], [81.0, 82.0], ""),
        ([None, None, None], [], "did not train: diverged"),
        ([UNTUNED, 600.0, 700.0], [400.0, 400.0], "did not train: no better than untuned, 1 of 3 seeds"),
        ([VOCABULARY["smollm2_135m"] + 1.0, 1e7, 1e7], [1e6, 1e6], "did not train: at chance"),
    ],
)
def test_what_did_not_train_is_flagged(tmp_path, perplexities, seeds, flag):
    found = study(tmp_path, perplexities, seeds=seeds)
    assert found.flag == flag and (flag or "—") in tuned.values(found)[-1]
    assert not found.missing and "missing" not in tuned.values(found)


def test_a_tuned_model_that_breaks_did_not_train(tmp_path):
    rows = [
        made(tmp_path, c, 90.0, **{"tuned/perplexity": None, "tuned/breaks_at": "h.1"}) for c in tuning.grid(START)
    ]
    (found,) = studies(rows)
    assert found.flag == "did not train: breaks in h.1" and math.isnan(found.perplexity)


def test_a_rate_that_diverges_is_an_outcome_and_is_not_run_again(tmp_path):
    cell = tuning.grid(START | {"ranks": "welore"})[2]
    config = asdict(to_config(composed(overrides_of(cell))))
    error = "FloatingPointError: the loss of step 3 is nan; it starts in model.layers.1\ntrace"
    Record(fingerprint_of(cell), "failed", config, error=error).save(tmp_path / "run")
    (row,) = find([cell], str(tmp_path))
    assert row.diverged and not row.missing and math.isnan(row.perplexity)
    Record(fingerprint_of(cell), "failed", config, error="OutOfMemoryError: too big").save(tmp_path / "run")
    (row,) = find([cell], str(tmp_path))
    assert row.missing and not row.diverged


@pytest.mark.parametrize(
    ("low", "high", "sure"),
    [
        ([100, 101, 102], [110, 111, 112], True),
        ([100, 110, 120], [103, 112, 122.5], True),  # seeds differ more than studies, and alike in both
        ([100, 110, 120], [109, 110, 121], False),
        ([100, 101, 102], [99, 100, 101], False),
        ([100, 101], [110, 111.5], True),
        ([100], [110], None),
    ],
)
def test_a_difference_counts_where_the_seeds_agree_on_it(tmp_path, low, high, sure):
    ours, other = (
        study(tmp_path / name, [900.0, values[0], 900.0], seeds=values[1:])
        for name, values in (("a", low), ("b", high))
    )
    assert surely_below(ours, other) is sure
    assert surely_below(ours, study(tmp_path / "c", [None] * 3)) is None  # it is the worse one, but no test says so
    assert surely_below(ours, None) is None


def test_the_quantiles_are_those_of_students_t():
    """The density integrated up to the quantile, from 0, is 0.45."""
    for freedom in range(1, len(tuning.T_QUANTILES) + 1):
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        width = tuning.t_quantile(freedom) / 10_000
        points = [(i + 0.5) * width for i in range(10_000)]
        area = sum(scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2) for t in points) * width
        assert area == pytest.approx(0.45, abs=1e-5)
    with pytest.raises(ValueError, match="10 degrees of freedom"):
        tuning.t_quantile(10)


def whole(name, folder, perplexity, validation=None):
    """All rows of an artefact at laptop scale, with perplexities from a function of the cell; None: it diverged."""
    artefact = load(name)

    def row(cell):
        value, held_out = perplexity(cell), validation and validation(cell)
        return diverged(cell) if value is None else made(folder, cell, value + cell["seed"], held_out)

    return gather(artefact, "laptop", SimpleNamespace(find=lambda cells, needs: [row(cell) for cell in cells]))


def best_at_default(cell):
    """Training helps, the middle of the grid most."""
    default = tuning.default_rate(cell["mode"], cell["task/training"])
    return 100.0 + 100.0 * abs(math.log(cell["mode.lr"] / default))


def said(page):
    return {claim.text: verdict(claim.ours) for claim in page.claims}


@pytest.mark.parametrize("name", NAMES)
def test_every_study_has_three_seeds_at_its_best_rate(name, tmp_path):
    rows = whole(name, tmp_path, best_at_default)
    found = studies(rows)
    assert all(len(s.runs) == 3 and not s.missing for s in found)
    assert all(s.edge == ("no" if len(s.grid) > 1 else "—") for s in found)
    assert len(rows) == sum(len(study.grid) + 2 for study in found)
    page = load(name).render(rows)
    assert len(page.body) == len(found) and all(len(line) == len(page.header) for line in page.body)


@pytest.mark.parametrize("name", NAMES)
def test_an_artefact_in_which_everything_diverged_says_so(name, tmp_path):
    page = load(name).render(whole(name, tmp_path, lambda cell: None))
    assert all(line[-1] == "did not train: diverged" for line in page.body)
    assert not any(verdict(claim.ours).startswith("holds") for claim in page.claims)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_the_cells_of_a_comparison_are_distinct_and_compose(name, scale):
    cells = load(name).cells(scale)
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
    config = to_config(compose(overrides_of(cells[-1])))
    assert config.mode.lr == cells[-1]["mode.lr"] and config.task.training.name == cells[-1]["task/training"]
    assert len({json.dumps({k: v for k, v in c.items() if k.startswith("task/")}) for c in cells}) == 1


def test_the_papers_numbers_bear_out_what_it_claims_of_tables_4_and_5():
    paper = {claim.text: claim.row()[1] for claim in table4.claims([]) + table5.claims([])}
    assert paper["tuning the LRCs lowers perplexity at every err (Table 4)"] == (
        "does not hold: llama2_7b 0.1, llama2_13b 0.1"
    )
    assert paper["the benefit of tuning grows with err (Section 4.2, 1)"] == "holds (12 of 12)"
    assert paper["WeLore is better than LoRA at every err (Table 5)"] == "holds (8 of 8)"
    assert paper["WeLore is better than GaLore at every err (Table 5)"] == "holds (8 of 8)"
    assert paper["memory is close to LoRA's, at most 1.2 of it (Section 4.2, 3)"] == "holds (8 of 8)"


def test_table_5_compares_modes_at_their_own_rates(tmp_path):
    better = {"lora": 20.0, "galore": -20.0, "welore": 0.0}
    page = table5.render(whole("table5", tmp_path, lambda cell: best_at_default(cell) + better[cell["mode"]]))
    found = said(page)
    assert found["WeLore is better than LoRA at every err (Table 5)"] == "holds (5 of 5)"  # four of K-FAC, one plain
    assert found[f"the same, below lora {tuning.SURELY}"] == "holds (5 of 5)"
    assert found["WeLore is better than GaLore at every err (Table 5)"].startswith("does not hold")
    line = dict(zip(page.header, page.body[0], strict=True))
    assert (line["paper, tuned"], line["paper, MB"]) == ("8.21", "26,859")


def test_table_5_takes_the_rates_of_err_05_to_the_models_that_are_cut_deeper(tmp_path):
    best = {("lora", 0.3): 0.0003125, ("lora", 0.5): 0.005, ("galore", 0.5): 0.0005, ("welore", 0.5): 0.000125}
    rows = whole(
        "table5", tmp_path, lambda c: 100.0 + 50.0 * (c["mode.lr"] != best.get((c["mode"], c["err"]), 0.0005))
    )
    deeper = [row.cell for row in rows if row.cell["err"] in (0.6, 0.7)]
    assert len(deeper) == 18 and all(cell["mode.lr"] == best[cell["mode"], 0.5] for cell in deeper)
    assert {cell["seed"] for cell in deeper} == {0, 1, 2} and all(cell["svd"] == "kfac" for cell in deeper)


def test_who_learns_tells_repair_from_learning(tmp_path):
    """Whatever was compressed learns best; where nothing was, all learn alike."""

    def perplexity(cell):
        damage = "lrc" if cell["ranks"] == "welore" else cell["ranks.cut"]
        return best_at_default(cell) - 50.0 * (cell["mode.who"] in (damage, "all"))

    found = said(who_learns.render(whole("who_learns", tmp_path, perplexity)))
    held = {text for text, outcome in found.items() if outcome.startswith("holds")}
    repaired = {
        "LRCs learn better than N-LRCs where LRCs were compressed (the paper's case)",
        "what was compressed learns better than what was not: N-LRCs",
    }
    assert held == repaired | {f"{text}, {tuning.SURELY}" for text in repaired}
    says = found["LRCs learn better than N-LRCs where they were not compressed (C8)"]
    assert says == "does not hold: N-LRC, N-LRC by K-FAC, nothing"


def test_recover_counts_from_the_model_that_was_not_tuned(tmp_path):
    gain = {"welore": 0.0, "lagrange": 40.0}

    def perplexity(cell):
        return best_at_default(cell) - gain[cell["ranks"]] - 10.0 * (cell["svd"] == "whitened")

    page = recover.render(whole("recover", tmp_path, perplexity))
    found = said(page)
    first = "welore + whitened is better than welore + plain, before and after tuning"
    assert found[first] == "does not hold: 0"  # all start from the same number here
    assert found[f"lagrange + kfac is better than welore + plain after tuning, {tuning.SURELY}"] == "holds (2 of 2)"
    (axis,) = page.figures[""].axes
    assert axis.lines[0].get_xydata().tolist() == [[0.0, 500.0], [30.0, 101.0], [300.0, 101.0]]


def test_the_more_tokens_are_run_at_the_rate_that_the_fewer_have_chosen(tmp_path):
    best = {"plain": 0.000125, "whitened": 0.0005, "kfac": 0.002}
    rows = whole("recover", tmp_path, lambda cell: 100.0 + 50.0 * (cell["mode.lr"] != best[cell["svd"]]))
    longer = [row.cell for row in rows if row.cell["task.training.tokens"] == 300_000]
    assert {cell["svd"]: cell["mode.lr"] for cell in longer if cell["seed"] == 0} == best
    assert len(longer) == 9 and all(cell["mode.lr"] == best[cell["svd"]] for cell in longer)
    first = [row for row in rows if row.cell["seed"] == 0 and row.cell["task.training.tokens"] == 30_000]
    assert len(recover.then("paper", first)) == 3


def test_every_mode_holds_all_that_train_on_any_machine_and_shares_the_cells_of_table_5():
    written = {file.stem for file in (CONF / "mode").glob("*.yaml")}
    # `chosen` with who=random is `random`; with who=lrc and nlrc it is a control of who_learns.
    eight_bit = {mode for mode in written if mode.endswith("_8bit")}  # which need a GPU
    assert set(every_mode.MODES) == written - eight_bit - {"none", "chosen"}
    cells = every_mode.cells("laptop")
    assert len(cells) == 57 and sum(cell in table5.cells("laptop") for cell in cells) == 9


def test_every_mode_is_drawn_by_what_it_trains(tmp_path):
    page = every_mode.render(whole("every_mode", tmp_path, best_at_default))
    (axis,) = page.figures[""].axes
    assert [text.get_text() for text in axis.texts] == every_mode.MODES
    assert axis.lines[0].get_xydata().tolist() == [[10.0, 101.0]]
    save(page.figures[""], tmp_path / "picture.png")
    assert said(page)["tuning the LRCs alone is better than every other mode"].startswith("does not hold")


def misled(cell):
    """Few windows choose the highest rate of Muon; more of them the one that the test text prefers."""
    if cell["mode"] == "muon" and rates.WINDOWS not in cell:
        return 1.0 / cell["mode.lr"]
    return best_at_default(cell)


def test_the_rates_that_two_texts_dispute_run_again_on_more_validation_text(tmp_path):
    rows = whole("rates", tmp_path, best_at_default, misled)
    again = [row.cell for row in rows if rates.WINDOWS in row.cell]
    default = tuning.default_rate("muon", "laptop")
    assert [cell["mode.lr"] / default for cell in again] == pytest.approx([1, 4, 16, 64])
    assert all(cell["mode"] == "muon" and cell["seed"] == 0 and cell[rates.WINDOWS] == 32 for cell in again)
    followed = [row.cell for row in rows if row.cell["mode"] == "muon" and row.cell["seed"] and row.cell not in again]
    assert sorted((cell["mode.lr"] / default, cell["seed"]) for cell in followed) == [(1, 1), (1, 2), (64, 1), (64, 2)]

    page = rates.render(rows)
    lines = {line[0]: line[1:] for line in page.body}
    assert lines["muon"][4:6] == ["0.0005", "100.00"] and lines["muon"][6] == "0.032"
    assert lines["muon"][9:] == ["0.0005", "100.00", "101.00 ± 0.58"]
    assert lines["lora"][9:] == ["—"] * 3 and "lagrange + kfac" in lines
    assert said(page) == {
        "4 windows choose the rate that the test text prefers": "does not hold: muon",
        "where they do not, 32 windows do": "holds (1 of 1)",
        "where these choose another, its mean over seeds is lower": "holds (1 of 1)",
        "the same, by a paired t test over seeds, p < 0.05": "holds (1 of 1)",
    }
    (axis,) = page.figures[""].axes
    assert axis.get_title() == "muon" and len(axis.lines) == 3
    save(page.figures[""], tmp_path / "picture.png")


def test_rates_that_the_test_text_agrees_with_are_not_run_again(tmp_path):
    rows = whole("rates", tmp_path, best_at_default)
    assert not any(rates.WINDOWS in row.cell for row in rows)
    page = rates.render(rows)
    assert page.figures == {} and said(page)["4 windows choose the rate that the test text prefers"].startswith(
        "holds"
    )


def test_a_grid_that_diverged_agrees_with_nobody(tmp_path):
    page = rates.render(
        whole("rates", tmp_path, lambda cell: None if cell["mode"] == "muon" else best_at_default(cell))
    )
    assert said(page)["4 windows choose the rate that the test text prefers"] == "cannot be said: muon"
    assert next(line for line in page.body if line[0] == "muon")[5:7] == ["missing"] * 2
    rows = whole("rates", tmp_path, best_at_default)
    large = [row for row in rows if row.cell["mode"] == "muon" and row.cell["mode.lr"] == 0.002]
    for row in large:
        row.record.metrics["tuned/perplexity"] = None  # too large for a number
    assert large and said(rates.render(rows))["4 windows choose the rate that the test text prefers"].startswith(
        "holds"
    )


def test_rates_that_are_missing_are_said(tmp_path):
    rows = [Row(cell, why="never run") for cell in rates.cells("laptop")]
    page = rates.render(rows)
    assert all("missing" in line for line in page.body) and page.figures == {}
    assert not any(verdict(claim.ours).startswith(("holds", "does")) for claim in page.claims)


def test_more_validation_text_trains_the_same_model(tmp_path):
    shared = {"model": "tiny", "task": "sotu", "task/protocol": "smoke", "task/training": "smoke", "mode": "welore"}
    where = ["trainer=cpu", "logger=none", "save=false", "trainer.progress=false", f"outputs={tmp_path}"]
    for name, cell in {"few": shared, "more": shared | {rates.WINDOWS: 8} | rates.ONCE}.items():
        run(to_config(composed([*overrides_of(cell), *where])), tmp_path / name)
    found = {folder.name: record.metrics["tuned/perplexity"] for folder, record in records(tmp_path)}
    assert found["few"] == found["more"]
    held_out = [tuning.validation(Row(shared, tmp_path / name)) for name in ("few", "more")]
    assert held_out[0] != held_out[1]


def test_table_6_tunes_every_model_at_the_rate_that_a_mode_has_chosen_at_err_03(tmp_path):
    best = {"full": 0.000025, "lora": 0.001, "galore": 0.0016, "welore": 0.0001}
    rows = whole("table6", tmp_path, lambda cell: 100.0 + 50.0 * (cell["mode.lr"] != best[cell["mode"]]))
    assert sum(not row.offered for row in rows) == 12 + 29 and sum(row.offered for row in rows) == 277
    others = [row.cell for row in rows if row.cell["err"] != 0.3 or row.cell["seed"] > 0]
    assert all(cell["mode.lr"] == pytest.approx(best[cell["mode"]]) for cell in others)
    runs = Counter((cell["task"], cell["err"], cell["mode"]) for cell in others)
    assert runs == {(t, err, mode): 2 if err == 0.3 else 3 for t in table6.TASKS for err, mode in table6.PAPER}
    page = table6.render([Row(row.cell, why="never run") for row in rows])
    assert [line[2] for line in page.body] == (["0"] * 3 + ["0.3"] * 4 + ["0.4"] * 4 + ["0.5"] * 4) * 6


@pytest.mark.parametrize(("artefact", "labels"), [(figure4, ["LRC", "N-LRC"]), (figure5, ["WeLore", "full"])])
def test_the_pictures_draw_the_runs_at_the_chosen_rates(artefact, labels, tmp_path):
    rows = whole(artefact.__name__.rpartition(".")[2], tmp_path, best_at_default)
    page = artefact.render(rows)
    loss, validation, speed, trained = page.figures[""].axes
    assert loss.lines[0].get_xydata().tolist() == [[10.0, 5.0], [20.0, 4.0]]
    assert validation.lines[1].get_xydata().tolist() == [[10.0, 200.0], [20.0, 100.0]]
    assert [bar.get_height() for bar in speed.patches] == [400.0, 400.0]
    assert [bar.get_height() for bar in trained.patches] == [10.0, 10.0]
    assert [text.get_text() for text in page.figures[""].legends[0].texts] == labels
    save(page.figures[""], tmp_path / "picture.png")
    broken = artefact.render([diverged(row.cell) for row in artefact_rows(artefact)])
    assert not broken.figures


def artefact_rows(artefact):
    return [Row(cell) for cell in artefact.cells("laptop")]


def test_the_seeds_are_asked_for_after_the_grid(tmp_path, capsys):
    """Real run folders for the grid of Figure 4: its page then prints the commands of the other seeds."""
    for cell in figure4.cells("laptop"):
        row = made(tmp_path / "made", cell, best_at_default(cell))
        row.record.fingerprint = fingerprint_of(cell)
        row.record.save(row.folder)
    rows = gather(figure4, "laptop", Runs.of(records(tmp_path)))
    assert [row.missing for row in rows] == [False] * 6 + [True] * 4
    assert main(["figure4", f"outputs={tmp_path}"]) == 1
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python run.py ")]
    assert len(commands) == 4 and all("mode.lr=0.0005" in c and ("seed=1" in c or "seed=2" in c) for c in commands)


@pytest.mark.slow
def test_a_grid_and_its_seeds_run_on_the_tiny_model(tmp_path):
    def run_all(cells):
        for cell in cells:
            where = ["trainer=cpu", "logger=none", "save=false", "trainer.progress=false", f"outputs={tmp_path}"]
            config = to_config(composed([*overrides_of(cell), *where]))
            run(config, tmp_path / fingerprint_of(cell))
        return find(cells, str(tmp_path), tuning.NEEDS)

    small = {"model": "tiny", "task": "sotu", "task/protocol": "smoke", "task/training": "smoke"}
    rows = run_all([cell | small for cell in figure4.cells("laptop")])
    while more := [cell for cell in tuning.then("laptop", rows) if cell not in [row.cell for row in rows]]:
        rows += run_all(more)
    assert len(rows) >= 10 and not any(row.missing for row in rows)
    page = figure4.render(rows)
    assert page.figures and all(line[page.header.index("seeds")] == "3" for line in page.body)


@pytest.fixture
def runs_of(tmp_path):
    """A function of devices and tokens/s by seed to a study."""

    def runs_of(mode, devices, speeds):
        rows = []
        for seed, (device, speed) in enumerate(zip(devices, speeds, strict=True)):
            record = Record("0", "done", {}, {"fit/tokens_per_second": speed}, {"device": device})
            rows.append(Row({"mode": mode, "mode.lr": 1.0, "seed": seed}, tmp_path, record))
        return tuning.Study({"mode": mode}, tuple(rows))

    (tmp_path / "history.jsonl").write_text('{"step": 0, "validation/perplexity": 20.0}\n')
    return runs_of


def test_costs_are_compared_seed_by_seed_on_a_device_that_the_modes_share(runs_of):
    def speeds(ours, theirs):
        found = [runs_of("welore", ours, [1, 2, 3]), runs_of("nlrc", theirs, [4, 5, 6])]
        return tuned.costs(found, metrics.FIT_TOKENS_PER_SECOND)

    assert speeds("abb", "bbb") == [None, [2, 5], [3, 6]]
    assert speeds("aaa", "bbb") == [None] * 3


@pytest.mark.parametrize(
    ("ours", "theirs", "devices", "lower"),
    [
        ([132.1, 134.0, 142.0], [155.0, 127.8, 131.7], "aaa", None),  # seed 0 alone would say it, as of Figure 6
        ([132.1, 120.0, 130.0], [155.0, 127.8, 131.7], "aaa", True),
        ([155.0, 134.0, 142.0], [132.1, 127.8, 131.7], "aaa", False),
        ([132.1, 134.0, 142.0], [155.0, 127.8, 131.7], "abb", None),  # where the other two were run elsewhere
        ([132.1, 134.0, 142.0], [155.0, 127.8, 131.7], "acc", None),  # the modes share the device of seed 0 alone
        ([132.1, 134.0, 142.0], [155.0, 127.8, 131.7], "ccc", None),
    ],
)
def test_a_claim_on_costs_is_made_of_all_seeds(runs_of, ours, theirs, devices, lower):
    found = {("x", "lora"): runs_of("lora", devices, ours)}
    found["x", "welore"] = runs_of("welore", devices.replace("c", "b"), theirs)
    assert tuned.cheaper(found, metrics.FIT_TOKENS_PER_SECOND, ["x"], "lora", "welore") == {"x": lower}
    ratio = tuned.within(found, metrics.FIT_TOKENS_PER_SECOND, ["x"], "lora", "welore", 0.0, 1.0)
    assert ratio == {"x": lower}
