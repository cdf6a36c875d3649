"""Conversations put to a model: in its chat template, or in a plain form where it has none."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from welore.evaluate import float32_logits
from welore.examine import encode
from welore.greedy import Continuation, passes, write_greedily

Messages = list[dict[str, str]]  # of a conversation: each has a role (system, user, assistant) and a content

# The form of models without a template; an answer ends where the model begins to speak for the user.
PLAIN = {"system": "{}\n\n", "user": "### User:\n{}\n\n", "assistant": "### Assistant:\n{}\n\n"}
PLAIN_ANSWER = "### Assistant:\n"
PLAIN_END = "### User:"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(tokenizer: Any, messages: Messages) -> str:
    """All that stands before the next answer."""
    if tokenizer.chat_template is None:
        return "".join(PLAIN[m["role"]].format(m["content"]) for m in messages) + PLAIN_ANSWER
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates refuse in Jinja what they do not know
        if messages[0]["role"] != "system":
            raise
        # Gemma's and the first Mistral's know no system: what it says then opens what the user says.
        system, user, *rest = messages
        merged = said("user", f"{system['content']}\n\n{user['content']}")
        try:
            return conversation(tokenizer, [merged, *rest])
        except Exception:
            raise error from None


def longest(tokenizer: Any, prompts: Sequence[str]) -> int:
    """The tokens of the longest prompt."""
    return max(map(len, _encoded(tokenizer, prompts)))


def batches(tokenizer: Any, prompts: Sequence[str], batch: int, title: str) -> Iterator[list[int]]:
    """The places of the prompts that `replies` would answer in one pass."""
    return passes(_encoded(tokenizer, prompts), batch, title)


def replies(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    batch: int,
    new_tokens: int,
    dtype: str | None,
    title: str,
) -> list[Continuation]:
    """What the model says next, greedily, without white space around it."""
    with float32_logits(model):
        ids = _encoded(tokenizer, prompts)
        found = write_greedily(model, tokenizer, ids, batch, new_tokens, _ends(model, tokenizer), dtype, title)
    end = PLAIN_END if tokenizer.chat_template is None else None
    return [replace(reply, text=(reply.text.partition(end)[0] if end else reply.text).strip()) for reply in found]


def _encoded(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """A template writes the special tokens of a text's beginning itself."""
    special = tokenizer.chat_template is None
    return [ids for ids, _ in encode(tokenizer, prompts, prompts, special)]


def _ends(model: PreTrainedModel, tokenizer: Any) -> list[int] | None:
    """The tokens that end a turn: some models have several, which only their generation config lists."""
    config = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = config if isinstance(config, list) else [config]
    return sorted({end for end in (*listed, tokenizer.eos_token_id) if end is not None}) or None
