import json
import re

import pytest
import torch

from welore.examine import Exam, Item, Sitting, encode

PROMPTS = ["The coin is", "A coin is heads up, and then somebody flips it. It is", "Is it so? The answer is", "Ada"]


def sitting(
    batch=2,
    scoring="both",
    read=lambda text: text.strip()[:1] or None,
    right=lambda read, item: read == item.answer,
    tokens=None,
):
    return Sitting(True, batch, 4, scoring, read, right, tokens)


def exam(tokenizer, items=None, **options):
    items = items or [Item(prompt, "yes", ("yes", "no", "perhaps so")) for prompt in PROMPTS]
    return Exam(items, [], tokenizer, sitting(**options), "questions")


@torch.no_grad()
def one_by_one(model, tokenizer, prompt, new):
    """Greedy tokens behind a prompt without padding, batch or cache."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)


@torch.no_grad()
def likelihood(model, tokenizer, prompt, option):
    ids = torch.tensor(tokenizer(f"{prompt} {option}")["input_ids"])
    start = len(tokenizer(prompt)["input_ids"])
    assert ids[:start].tolist() == tokenizer(prompt)["input_ids"]
    log_p = model(ids[None]).logits[0].double().log_softmax(-1)
    return float(sum(log_p[place - 1, ids[place]] for place in range(start, len(ids))))


def test_answers_in_batches_are_those_of_one_question_after_the_other(model, tokenizer):
    answers = exam(tokenizer, batch=3, scoring="written").measure(model, None, "dense").answers
    assert [a["written"] for a in answers] == [one_by_one(model, tokenizer, prompt, 4) for prompt in PROMPTS]


def test_likelihoods_are_those_of_whole_texts(model, tokenizer):
    answers = exam(tokenizer, batch=5).measure(model, None, "dense").answers
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        for option, nats in answer["nats"].items():
            assert nats == pytest.approx(likelihood(model, tokenizer, prompt, option), abs=2e-4)
        assert answer["likeliest"] == max(answer["nats"], key=answer["nats"].get)


def test_options_are_told_apart_in_bfloat16(model, tokenizer):
    """The logits are float32: those of bfloat16 would fall on one grid of 8 bits."""
    model.get_output_embeddings().weight.data *= 30
    fine, coarse = (exam(tokenizer, scoring="likelihood").measure(model, dtype, "x") for dtype in (None, "bfloat16"))
    for one, other in zip(fine.answers, coarse.answers, strict=True):
        for option, nats in one["nats"].items():
            assert other["nats"][option] == pytest.approx(nats, rel=0.05)
            assert other["nats"][option] * 64 % 1 != 0


@pytest.mark.parametrize("scoring", ["written", "likelihood", "both"])
def test_verdicts_do_not_depend_on_the_batch(model, tokenizer, scoring):
    one, many = (exam(tokenizer, batch=batch, scoring=scoring).measure(model, None, "x") for batch in (1, 32))
    verdicts = [[(a.get("verdict"), a.get("option")) for a in outcome.answers] for outcome in (one, many)]
    assert verdicts[0] == verdicts[1]
    assert {k: v for k, v in one.stage.items()} == many.stage


@pytest.mark.parametrize("scoring", ["written", "likelihood"])
def test_a_pass_holds_whole_batches_where_its_tokens_are_not_capped(model, tokenizer, scoring):
    items = [Item(f"{place} {'word ' * 70}It is", "yes", ("yes", "no")) for place in range(8)]
    rows = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)

    def found(tokens):
        rows.clear()
        answers = exam(tokenizer, items, batch=8, scoring=scoring, tokens=tokens).measure(model, None, "x").answers
        return [(a.get("verdict"), a.get("option")) for a in answers], max(rows)

    (capped, few), (whole, many) = found(800), found(10**9)
    assert (few, many) == (2, 8) and capped == whole
    assert exam(tokenizer, tokens=800).identity != exam(tokenizer).identity


def test_every_question_is_in_the_denominator_and_what_cannot_be_read_is_wrong(model, tokenizer):
    reads = iter(["yes", None, "no", None])
    outcome = exam(tokenizer, batch=1, scoring="written", read=lambda text: next(reads)).measure(model, None, "x")
    assert (outcome.stage["correct"], outcome.stage["unparsed"]) == (1, 2)
    assert outcome.stage["accuracy"] * outcome.shared["eval/examples"] == 1.0
    assert outcome.stage["accuracy_low"] < 0.25 < outcome.stage["accuracy_high"]
    assert [a["verdict"] for a in outcome.answers].count("unparsed") == 2


def test_a_model_that_breaks_has_no_likeliest_option_and_the_layer_is_named(model, tokenizer):
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    outcome = exam(tokenizer, batch=3).measure(model, None, "x")
    assert [(a["verdict"], a["read"], a["option"], a["likeliest"]) for a in outcome.answers] == [
        ("broken", None, "broken", None)
    ] * len(PROMPTS)
    found = outcome.stage
    assert (found["accuracy"], found["option_accuracy"], found["unparsed"]) == (0, 0, 0)
    assert found["broken"] == found["option_broken"] == outcome.shared["eval/examples"] == len(PROMPTS)
    assert found["breaks_at"] == "model.layers.1"


def test_only_the_questions_at_which_a_model_breaks_are_broken(model, tokenizer):
    items = [Item(prompt, "yes", ("yes", "no")) for prompt in (*PROMPTS[:3], "Ada #")]
    whole = exam(tokenizer, items, batch=4).measure(model, None, "x").answers
    (lone,) = set(tokenizer("#", add_special_tokens=False)["input_ids"])
    model.get_input_embeddings().weight.data[lone] = float("inf")
    outcome = exam(tokenizer, items, batch=4).measure(model, None, "x")
    assert outcome.answers[:3] == whole[:3]
    assert outcome.answers[3]["verdict"] == outcome.answers[3]["option"] == "broken"
    assert (outcome.stage["broken"], outcome.stage["breaks_at"]) == (1, "model.layers.0")


def test_answers_without_options_have_no_likelihood(model, tokenizer):
    outcome = exam(tokenizer, [Item("Two and two is", "4")]).measure(model, None, "x")
    assert "accuracy" in outcome.stage and "option_accuracy" not in outcome.stage


def test_the_model_may_not_sample_whatever_its_defaults_say(model, tokenizer):
    plain = exam(tokenizer, scoring="written").measure(model, None, "x").answers
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model.generation_config.repetition_penalty, model.generation_config.suppress_tokens = 9.0, list(range(100, 300))
    for seed in range(3):
        torch.manual_seed(seed)
        assert exam(tokenizer, scoring="written").measure(model, None, "x").answers == plain


def test_an_answer_has_the_tokens_that_it_has_inside_the_text(tokenizer):
    (ids, start), (_, other) = encode(tokenizer, PROMPTS[:2], [f"{p} yes" for p in PROMPTS[:2]], True)
    assert tokenizer.decode(ids[start:]) == " yes" and start < len(ids) and other > start


def test_another_question_or_answer_is_another_benchmark(tokenizer):
    first = exam(tokenizer)
    changed = exam(tokenizer, [Item(p, "no", ("yes", "no", "perhaps so")) for p in PROMPTS])
    assert first.identity == exam(tokenizer).identity != changed.identity


def test_a_run_keeps_every_prompt_answer_and_verdict_beside_its_record(configured, tmp_path):
    from welore.runner import run

    config = configured(
        "err=0.3", "mode=welore", "task=coinflip", "task/training=questions", "task.training.steps=2",
        "task.limit=7", "task.train_limit=3", "trainer.progress=false", "save=false", f"outputs={tmp_path}",
    )  # fmt: skip
    record = run(config, tmp_path / "run")
    found = record.metrics
    assert found["eval/examples"] == 7 and "dense/perplexity" not in found
    for stage in ("dense", "compressed", "tuned"):
        answers = [json.loads(line) for line in (tmp_path / "run" / f"answers-{stage}.jsonl").read_text().splitlines()]
        assert len(answers) == 7 and all("is the coin" in a["prompt"].lower() for a in answers)
        for key, prefix in {"verdict": "", "option": "option_"}.items():
            assert found[f"{stage}/{prefix}correct"] == sum(a[key] == "right" for a in answers)
            assert found[f"{stage}/{prefix}accuracy"] * 7 == pytest.approx(found[f"{stage}/{prefix}correct"])
    lines = (tmp_path / "run" / "answers-tuned-training.jsonl").read_text().splitlines()
    right = sum(json.loads(line)["option"] == "right" for line in lines)
    assert len(lines) == found["tuned/train_examples"] == 3 and found["tuned/train_option_correct"] == right
    assert found["tuned/train_option_accuracy"] == right / 3
    assert not (tmp_path / "run" / "answers-dense-training.jsonl").exists()


def test_the_answers_of_a_model_that_breaks_are_valid_json_and_its_record_and_summary_say_where(
    configured, tmp_path, monkeypatch
):
    from welore import runner
    from welore.report import summary

    def breaking(model, *arguments):
        plan = compress(model, *arguments)
        model.model.layers[1].input_layernorm.weight.data[0] = float("nan")
        return plan

    compress = runner.compress
    monkeypatch.setattr(runner, "compress", breaking)
    config = configured(
        "err=0.3", "mode=none", "task=coinflip", "task.limit=5", "save=false", f"outputs={tmp_path}"
    )  # fmt: skip
    record = runner.run(config, tmp_path / "run")
    found = record.metrics
    assert (found["compressed/breaks_at"], found["compressed/option_broken"]) == ("model.layers.1", 5)
    assert found["eval/accuracy"] == 0 and "dense/breaks_at" not in found and "dense/broken" not in found
    for line in (tmp_path / "run" / "answers-compressed.jsonl").read_text().splitlines():
        answer = json.loads(line, parse_constant=pytest.fail)  # called for NaN, which is no JSON
        assert answer["nats"] == {"yes": None, "no": None} and answer["breaks_at"] == "model.layers.1"
    assert re.search(r"^broken by likelihood +— +5 +—$", summary(record, tmp_path / "run"), re.M)
