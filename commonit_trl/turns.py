"""Count the assistant's tokens in conversations that are trained on every token.

A chat template may render a turn differently at the end of a conversation (Qwen3 drops earlier thoughts), so the
rendering is not the sum of its turns. Each turn is therefore found where the rendering of the whole changes when the
turn is put in: all assistant turns start as a mark and are put in one after the other.

Cost: one rendering per assistant turn, and a tokenisation of the text before and after each.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

ASSISTANT_ROLES = ("assistant", "gpt", "model")
_MARK = "\ue000"  # a private-use character: no conversation contains it


def count_assistant_tokens(
    dataset: Dataset, conversation: str, remaining: NDArray[np.int64], **options: Any
) -> NDArray[np.int64]:
    """Count the tokens of the assistant's turns that remain after truncation.

    Args:
        dataset: rows with the column `conversation`, and optionally `tools` and `chat_template_kwargs`.
        conversation: column of the messages.
        remaining: (rows,) tokens of each row after truncation.
        options: `tokenizer`, `chat_template`, and `keep_end`, whether truncation keeps the end of a row.

    Returns:
        (rows,) tokens.
    """
    columns = [conversation, *({"tools", "chat_template_kwargs"} & set(dataset.column_names))]
    counted = (
        dataset.select_columns(columns)
        .with_format(None)
        .map(
            _count_batch,
            with_indices=True,
            batched=True,
            fn_kwargs={"conversation": conversation, "remaining": remaining, **options},
            remove_columns=columns,
            desc="Measuring response lengths",
        )
    )
    return np.asarray(counted.with_format("numpy")["assistant_tokens"][:], dtype=np.int64)


def _count_batch(
    batch: dict[str, list[Any]],
    numbers: list[int],
    conversation: str,
    remaining: NDArray[np.int64],
    tokenizer: Any,
    chat_template: str,
    keep_end: bool,
) -> dict[str, list[int]]:
    wholes, spans = [], []
    for row, messages in enumerate(batch[conversation]):
        tools = batch["tools"][row] if "tools" in batch else None
        render = functools.partial(
            tokenizer.apply_chat_template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            chat_template=chat_template,
            tokenize=False,
            **((batch["chat_template_kwargs"][row] if "chat_template_kwargs" in batch else None) or {}),
        )
        whole, turns = _assistant_spans([_as_chatml(message) for message in messages or ()], render)
        wholes.append(whole)
        spans += [(row, start, end) for start, end in turns]
    edges = [wholes[row][:edge] for row, start, end in spans for edge in (start, end)]
    tokens = tokenizer([*wholes, *edges], add_special_tokens=False)["input_ids"]
    places = list(map(len, tokens[len(wholes) :]))
    special, counts = set(tokenizer.all_special_ids), [0] * len(wholes)
    for (row, _, _), start, end in zip(spans, places[::2], places[1::2], strict=True):
        whole, left = tokens[row], remaining[numbers[row]]
        end += end < len(whole) and whole[end] in special  # the token that ends the turn
        first = len(whole) - left if keep_end else 0
        counts[row] += max(0, min(end, first + left) - max(start, first))
    return {"assistant_tokens": counts}


def _assistant_spans(
    turns: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find the assistant's turns in it.

    Some templates refuse tool results without their calls; there, turns that call tools do not count.

    Returns:
        The text of the whole conversation, and the start and end, in characters, of each turn that it shows.
    """
    numbers = [number for number, turn in enumerate(turns) if turn["role"] in ASSISTANT_ROLES]
    try:
        given = _marked(turns, numbers)
        text = render(given)
    except Exception:  # templates raise errors of any kind
        numbers = [number for number in numbers if not turns[number].get("tool_calls")]
        given = _marked(turns, numbers)
        text = render(given)
    spans = []
    for number in numbers:
        given[number] = turns[number]
        before, text = text, render(given)
        if text != before:
            spans.append((_common_start(before, text), len(text) - _common_start(before[::-1], text[::-1])))
    return text, spans


def _marked(turns: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
    """The turns, with a mark instead of those of these numbers."""
    marked = list(turns)
    for number in numbers:
        in_parts = isinstance(turns[number].get("content"), list)
        content = [{"type": "text", "text": _MARK}] if in_parts else _MARK
        marked[number] = {"role": turns[number]["role"], "content": content}
    return marked


def _common_start(one: str, other: str) -> int:
    """Characters with which both texts start."""
    size = min(len(one), len(other))
    codes = (np.frombuffer(text[:size].encode("utf-32-le", "surrogatepass"), np.uint32) for text in (one, other))
    differ = np.flatnonzero(np.not_equal(*codes))
    return int(differ[0]) if len(differ) else size


def _as_chatml(message: dict[str, Any]) -> dict[str, Any]:
    return message if "role" in message else {"role": message["from"], "content": message["value"]}
