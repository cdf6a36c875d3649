"""The published prompts, written out on a record of each original file; where ours deviate, it is said there."""

import pytest
from test_questions import FOLDERS, task  # noqa: F401, a fixture

BLURB = "Below is a question that describes a task. Write a response that appropriately completes the request."

# By benchmark: the place of a test record, then all that stands between the blurb and the answer, then the answer.
PROMPTS = {
    "commonsenseqa": (
        0,
        "Question: A revolving door is convenient for two direction travel, but it also serves as a security measure "
        "at a what? Answer Choices: (A) bank (B) library (C) department store (D) mall (E) new york",
        "Among A through E, the answer is",
        "A",
    ),
    "svamp": (
        0,
        "Question: Every day Ryan spends 6 hours on learning english and 2 hours on learning chinese. How many more "
        "hours does he spend on learning english than he does on learning chinese?",
        "The answer (arabic numerals) is",
        "4",
    ),
    "boolq": (
        2644,
        "The season is set for release in 2019.\n\n"
        "Question: are they going to make a punisher season 2? Answer Choices: (a) True (b) False",
        "Among True and False, the answer is",
        "True",
    ),
    "coinflip": (
        0,
        "Question: A coin is heads up. Paris does not flip the coin. Jimmie does not flip the coin. Andrew flips the "
        'coin. Ramón flips the coin. Is the coin still heads up? Note that "flip" here means "reverse".',
        "The answer is",
        "yes",
    ),
    # In an order of our own, for that of the scripts hangs on all records before.
    "date": (
        0,
        "Question: The day before yesterday was 11/23/1933. What is the date one week from today in MM/DD/YYYY? "
        "Answer Choices: (A) 12/23/1933 (B) 12/02/1933 (C) 11/11/1933 (D) 12/16/1933 (E) 11/25/1933 (F) 12/02/1974",
        "Among A through F, the answer is",
        "B",
    ),
    # The record ends in two spaces and its choices in dots, which we leave out.
    "objects": (
        0,
        "Question: Alice, Bob, and Claire are dancers at a square dance. At the start of a song, they each have a "
        "partner: Alice is dancing with Patrick, Bob is dancing with Karl, and Claire is dancing with Izzi. \n\n"
        "Throughout the song, the dancers often trade partners. First, Bob and Claire switch partners. Then, Claire "
        "and Alice switch partners. Finally, Claire and Bob switch partners. At the end of the dance, Alice is "
        "dancing with \nWhich choice is true ? Answer Choices: (A) Patrick (B) Karl (C) Izzi",
        "Among A through C, the answer is",
        "B",
    ),
    "strategyqa": (
        0,
        "Question: Is the saltwater crocodile less endangered than the European otter?",
        "The answer is",
        "yes",
    ),
}


@pytest.mark.real
@pytest.mark.parametrize("name", FOLDERS)
def test_a_real_record_is_put_word_for_word_as_published(task, tokenizer, data, name):  # noqa: F811
    place, question, trigger, answer = PROMPTS[name]
    questions = task(name, f"task.path={data / 'tasks' / FOLDERS[name][0]}")
    example = questions.examples("test")[place]
    prompt = f"{BLURB}\n\n### \n{question}\n\n\n### Response:\n{trigger}"
    assert questions.prompt(example, tokenizer) == prompt
    assert example.answer == answer
    assert questions.ending(tokenizer) == ".\n\n### End"
