import json

import pytest

from welore.errors import Refused
from welore.texts import SHARES, SPLITS, hashed_split, local_split, read_documents, shuffled, text_files


def write_jsonl(file, texts):
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def test_the_splits_of_a_pool_are_disjoint_and_together_complete(documents):
    parts = {split: hashed_split(documents, split) for split in SPLITS}
    assert sorted(text for part in parts.values() for text in part) == sorted(documents)
    for split, share in SHARES.items():
        assert len(parts[split]) / len(documents) == pytest.approx(share / 100, abs=0.06)


def test_the_copies_of_a_document_fall_on_one_side(documents):
    for split in SPLITS:
        once = hashed_split(documents, split)
        assert sorted(hashed_split(documents + documents[::-1], split)) == sorted(once + once)


def test_where_a_document_falls_does_not_depend_on_the_others(documents):
    assert hashed_split(documents[:50], "train") == [
        t for t in hashed_split(documents, "train") if t in documents[:50]
    ]


def test_shuffling_depends_on_the_seed_alone(documents):
    first = list(shuffled(iter(documents), 1))
    assert first == list(shuffled(iter(documents), 1)) != list(shuffled(iter(documents), 2))
    assert sorted(first) == sorted(documents) and first != documents


def test_a_jsonl_holds_a_document_on_each_line(tmp_path):
    """Separators that are no line feed (as in real web text) stay inside their document; empty ones are left out."""
    texts = ["one\ntwo", "a\u2028b\u0085c", "", "  \n", "last"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    assert read_documents(tmp_path / "a.jsonl", alone=True) == ["one\ntwo", "a\u2028b\u0085c", "last"]


def test_a_raw_file_holds_a_document_on_each_line_that_is_not_empty(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n First line . \n\n")
    assert read_documents(tmp_path / "wiki.test.raw", alone=True) == [" = Title = ", " First line . "]


def test_a_raw_file_as_it_is_holds_the_rows_that_the_hub_has_of_it(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n First line . \n\n")
    rows = ["", " = Title = \n", "", " First line . \n", ""]
    assert read_documents(tmp_path / "wiki.test.raw", alone=True, as_is=True) == rows


@pytest.mark.real
def test_wikitext_as_it_is_is_the_text_that_the_field_reports_on(configured, data):
    """Of 1,294,336 characters LLaMA-2's tokenizer makes the 341,469 tokens that others report for this text."""
    task = configured("task=wikitext2", f"task.path={data / 'wikitext2'}").task
    assert task.protocol.as_is
    assert len(task.protocol.joiner.join(task.documents("test", as_is=True))) == 1_294_336
    assert len(task.protocol.joiner.join(task.documents("test"))) == 1_288_511


def test_a_txt_file_is_one_document_or_alone_its_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("first\nparagraph\n\n\n\nsecond\n")
    assert read_documents(tmp_path / "a.txt", alone=False) == ["first\nparagraph\n\n\n\nsecond\n"]
    assert read_documents(tmp_path / "a.txt", alone=True) == ["first\nparagraph", "second\n"]


@pytest.mark.parametrize("line", ['{"body": "x"}', "plain text", "[1, 2]", '"x"'])
def test_a_jsonl_of_another_form_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(Refused, match=r"a\.jsonl is not a jsonl with a string in the field `text`"):
        read_documents(tmp_path / "a.jsonl", alone=True)


def test_one_file_is_divided_among_the_splits(text_file, documents):
    parts = [local_split(text_file, split) for split in SPLITS]
    assert sorted(sum(parts, [])) == sorted(documents)


def test_files_named_after_a_split_serve_it(tmp_path):
    for name in ("train-1", "train-2", "calibration", "val", "wiki.test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"a text of {name}"])
    found = {split: local_split(tmp_path, split) for split in SPLITS}
    assert found == {
        "train": ["a text of train-1", "a text of train-2"],
        "calibration": ["a text of calibration"],
        "validation": ["a text of val"],
        "test": ["a text of wiki.test"],
    }


def test_calibration_texts_are_taken_out_of_the_training_files_where_none_are_named(tmp_path, documents):
    write_jsonl(tmp_path / "train.jsonl", documents)
    write_jsonl(tmp_path / "test.jsonl", ["held out"])
    train, calibration = local_split(tmp_path, "train"), local_split(tmp_path, "calibration")
    assert calibration and set(train).isdisjoint(calibration)
    assert sorted(train + calibration) == sorted(documents)
    with pytest.raises(Refused, match="holds no validation text"):
        local_split(tmp_path, "validation")


def test_training_files_without_a_held_out_one_are_pooled(tmp_path, documents):
    write_jsonl(tmp_path / "train-1.jsonl", documents[:150])
    write_jsonl(tmp_path / "train-2.jsonl", documents[150:])
    assert sorted(sum((local_split(tmp_path, split) for split in SPLITS), [])) == sorted(documents)


def test_a_word_that_only_contains_the_name_of_a_split_names_none(tmp_path, documents):
    """`latest` is no test file, nor is `constraint` a training file."""
    write_jsonl(tmp_path / "latest.jsonl", documents[:150])
    write_jsonl(tmp_path / "constraints.jsonl", documents[150:])
    assert sorted(sum((local_split(tmp_path, split) for split in SPLITS), [])) == sorted(documents)


def test_missing_and_empty_paths_are_refused(tmp_path):
    with pytest.raises(Refused, match="does not exist"):
        text_files(tmp_path / "nowhere")
    with pytest.raises(Refused, match=r"no \.jsonl, \.txt or \.raw"):
        text_files(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(Refused, match="holds no test text"):
        local_split(tmp_path, "test")


@pytest.mark.real
def test_wikitext_2_is_read_as_its_lines_that_are_not_empty(data):
    file = data / "wikitext2" / "wiki.test.raw"
    lines = file.read_bytes().decode("utf-8").split("\n")
    assert len(lines) == 4359  # 4,358 lines and what follows the last line feed
    found = local_split(file.parent, "test")
    assert found == [line for line in lines if line.strip()] and len(found) == 2891


@pytest.mark.real
def test_c4_is_divided_without_loss(data):
    parts = [local_split(data / "c4", split) for split in SPLITS]
    texts = sum(parts, [])
    assert len(texts) == 2000 and all(parts)
    assert sum(len(set(part)) for part in parts) == len(set(texts))


def test_what_is_drawn_from_a_pool_has_one_place_among_the_splits_as_it_is_too(tmp_path):
    (tmp_path / "all.raw").write_text("".join(f" row {i} \n \n" for i in range(200)))
    parts = [set(local_split(tmp_path / "all.raw", split, as_is=True)) for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    assert parts[SPLITS.index("test")] == set(local_split(tmp_path / "all.raw", "test"))
