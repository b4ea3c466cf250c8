"""What a row says: its task label, the tokens of its prompt and response, and their text.

`Rows` reads a dataset in any of the forms that TRL trains on, raw or tokenised:

| columns | prompt | response |
|---|---|---|
| `prompt`, `completion` (text or messages) | the prompt | the completion |
| `messages`, or ShareGPT's `conversations` | all other turns | the assistant's turns |
| `instruction` (, `input`), `output` | instruction and input | the output |
| `text` | the text | the text |
| `input_ids`, `labels` | tokens whose label is -100 | the other tokens |

Token counts are those of the tokenised columns, so they are the ones that training sees, after chat template
and truncation. Cost for 10^6 rows of 100 tokens on one CPU core: lengths and labels 0.1 s, unmasked tokens
1 s, each 5 to 10 s more for shuffled rows; texts 10 to 30 s. Only conversations that are trained on every
turn have to be rendered again, to find the assistant's tokens.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 10_000
_ASSISTANT_ROLES = ("assistant", "gpt", "model")


class Rows:
    """A dataset as the groupers see it.

    Args:
        dataset: raw rows, tokenised rows, or tokenised rows that still have their raw columns.
        tokenizer: needed to read text out of `input_ids` and to find the assistant's turns in a conversation.
        max_length: cut token counts off here, for rows that will be truncated later.
        keep_end: truncation keeps the end of a row; default, its start.
        text_field: name of the column with plain text.
        chat_template: the template that training uses; default, the tokenizer's.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        keep_end: bool = False,
        text_field: str = "text",
        chat_template: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.keep_end = keep_end
        self.text_field = text_field
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self.columns = list(dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    # --- labels ---------------------------------------------------------------------------------------------

    def labels(self, columns: Sequence[str]) -> list[str | None]:
        """The task label of each row: its columns' text, joined by " / "; None where one is missing or empty.

        Raises:
            ValueError: on a column that the dataset lacks or whose values are lists or mappings.
        """
        parts = [self._label_column(column) for column in columns]
        if len(parts) == 1:
            return parts[0]
        return [None if None in row else " / ".join(row) for row in zip(*parts, strict=True)]

    def _label_column(self, column: str) -> list[str | None]:
        if column not in self.columns:
            raise ValueError(
                f"commonit_task_column={column!r} is not a column of the dataset, which has: {', '.join(self.columns)}."
            )
        feature = self.dataset.features[column]
        values = self._arrow(column)
        if pa.types.is_nested(values.type):
            raise ValueError(
                f"commonit_task_column={column!r} holds {values.type} values: name a column of text, numbers "
                "or class labels."
            )
        encoded = values.dictionary_encode().combine_chunks()
        names = [self._label_name(value, feature) for value in encoded.dictionary.to_pylist()]
        return [None if index is None else names[index] for index in encoded.indices.to_pylist()]

    @staticmethod
    def _label_name(value: Any, feature: Any) -> str | None:
        if isinstance(feature, ClassLabel):
            return feature.int2str(value) if value >= 0 else None  # -1 is how ClassLabel says "no label"
        if isinstance(value, float) and np.isnan(value):
            return None
        return str(value).strip() or None

    # --- tokens ---------------------------------------------------------------------------------------------

    @property
    def tokenized(self) -> bool:
        return "input_ids" in self.columns

    def token_counts(self, of: str = "total") -> NDArray[np.int64]:
        """(rows,) tokens of each row's `response`, `prompt` or `total`, after truncation to `max_length`.

        The response is what the labels (or TRL's completion and assistant masks) leave unmasked. Rows that
        are trained on every token count the completion or the assistant's turns where they can be told apart,
        else the whole row.

        Raises:
            ValueError: when the rows are not tokenised.
        """
        if not self.tokenized:
            raise ValueError(
                "Token counts need tokenised rows (a column input_ids), and the dataset has only: "
                f"{', '.join(self.columns)}."
            )
        total = self._list_lengths("input_ids")
        if of == "total":
            return total
        response = self._response_counts(total)
        return response if of == "response" else total - response

    def _response_counts(self, total: NDArray[np.int64]) -> NDArray[np.int64]:
        if "labels" in self.columns:
            counts = self._count_unmasked("labels", -100, total)
            if np.any(counts < total):
                return counts
        for column in ("assistant_masks", "completion_mask"):
            if column in self.columns:
                return self._count_unmasked(column, 0, total)
        conversation = self._conversation_column()
        if conversation is not None and self.chat_template is not None:
            return self._count_assistant_tokens(conversation, total)
        logger.info("Nothing tells prompt from response in these rows: the response length is that of the whole row.")
        return total

    def _list_lengths(self, column: str) -> NDArray[np.int64]:
        lengths = np.concatenate([np.empty(0, np.int64), *map(_lengths, self._chunks(column))])
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def _count_unmasked(self, column: str, mask: int, total: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows,) values other than `mask` in each row's list, of which truncation leaves `total` values."""
        counts = [np.empty(0, np.int64)]
        done = 0
        for chunk in self._chunks(column):
            lengths = _lengths(chunk)
            ends = np.cumsum(lengths)
            left = np.minimum(lengths, total[done : done + len(lengths)])
            first = ends - left if self.keep_end else ends - lengths
            unmasked = pc.list_flatten(chunk).cast(pa.int64()).fill_null(mask).to_numpy() != mask
            running = np.concatenate([[0], np.cumsum(unmasked)])
            counts.append(running[first + left] - running[first])
            done += len(lengths)
        return np.concatenate(counts)

    def _count_assistant_tokens(self, conversation: str, total: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows,) tokens of the assistant's turns, each from where the generation prompt ends, within what
        truncation leaves."""
        columns = [conversation, *({"tools", "chat_template_kwargs"} & set(self.columns))]
        rows = self.dataset.select_columns(columns).with_format(None)
        counted = rows.map(
            _count_assistant_tokens,
            with_indices=True,
            batched=True,
            fn_kwargs={
                "conversation": conversation,
                "tokens_left": total,
                "tokenizer": self.tokenizer,
                "chat_template": self.chat_template,
                "keep_end": self.keep_end,
            },
            remove_columns=columns,
            desc="Measuring response lengths",
        )
        return np.asarray(counted.with_format("numpy")["assistant_tokens"][:], dtype=np.int64)

    # --- texts ----------------------------------------------------------------------------------------------

    def texts(self, of: str = "prompt") -> list[str]:
        """The text of each row's `prompt`, `response` or `both`.

        Raises:
            ValueError: when the rows hold neither text nor tokens, or tokens without a tokenizer.
        """
        columns, read = self._reader()
        eos = getattr(self.tokenizer, "eos_token", None) or ""  # TRL writes it at the end of the text
        rows = self.dataset.select_columns(columns).with_format(None)
        parts = ([text.removesuffix(eos) for text in read(row)] for row in rows)
        if of == "both":
            # A text that is prompt and response at once is wanted once.
            return ["\n".join(dict.fromkeys(filter(None, part))) for part in parts]
        return [part[0 if of == "prompt" else 1] for part in parts]

    def _reader(self) -> tuple[list[str], Callable[[dict[str, Any]], tuple[str, str]]]:
        """The columns to read, and a function from such a row to the text of its prompt and its response."""
        present = set(self.columns)
        if {"prompt", "completion"} <= present:
            return ["prompt", "completion"], lambda row: (
                _plain_text(row["prompt"]),
                _plain_text(row["completion"]),
            )
        conversation = self._conversation_column()
        if conversation is not None:
            return [conversation], lambda row: split_conversation(row[conversation])
        if {"instruction", "output"} <= present:
            return ["instruction", "output", *({"input"} & present)], lambda row: (
                "\n".join(filter(None, (row["instruction"], row.get("input")))),
                row["output"] or "",
            )
        if self.text_field in present:
            return [self.text_field], lambda row: (row[self.text_field] or "",) * 2
        if self.tokenized:
            if self.tokenizer is None:
                raise ValueError("The rows hold tokens and no text: a tokenizer is needed to read them.")
            return ["input_ids", *({"labels"} & present)], self._decode
        raise ValueError(
            "No text found in the rows: give one of prompt and completion, messages, conversations, "
            f"instruction and output, {self.text_field}, or input_ids. The dataset has: "
            f"{', '.join(self.columns)}."
        )

    def _decode(self, row: dict[str, Any]) -> tuple[str, str]:
        tokens = np.asarray(row["input_ids"], dtype=np.int64)
        masked = np.asarray(row.get("labels") or (), dtype=np.int64) == -100
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        if not masked.any():
            return (decode(tokens.tolist()),) * 2
        return decode(tokens[masked].tolist()), decode(tokens[~masked].tolist())

    def _conversation_column(self) -> str | None:
        for column in ("messages", "conversations"):
            if column in self.columns and len(self.dataset):
                first = self.dataset.select_columns([column]).with_format(None)[0]
                if isinstance(first[column], list):
                    return column
        return None

    # --- reading --------------------------------------------------------------------------------------------

    def _arrow(self, column: str) -> pa.ChunkedArray:
        return pa.chunked_array(self._chunks(column), self.dataset.data.column(column).type)

    def _chunks(self, column: str) -> Iterator[pa.Array]:
        """The column in Arrow arrays, in row order; never as Python lists."""
        # The public ways through an indices mapping, which TRL's own filter leaves behind, gather row by row.
        values, indices = self.dataset.data.column(column), self.dataset._indices
        order = np.arange(len(self)) if indices is None else indices.column(0).to_numpy().astype(np.int64)
        for low in range(0, len(order), _ROWS_AT_ONCE):
            part = order[low : low + _ROWS_AT_ONCE]
            starts = np.flatnonzero(np.diff(part, prepend=-2) != 1).tolist()
            runs = (values.slice(part[start], end - start) for start, end in pairwise([*starts, len(part)]))
            yield pa.chunked_array(chain.from_iterable(run.chunks for run in runs)).combine_chunks()


def _lengths(lists: pa.Array) -> NDArray[np.int64]:
    return pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)


def split_conversation(messages: list[dict[str, Any]]) -> tuple[str, str]:
    """The text of a conversation's other turns and of the assistant's, each turn on lines of its own."""
    prompt: list[str] = []
    response: list[str] = []
    for message in messages or ():
        role = message.get("role", message.get("from"))
        (response if role in _ASSISTANT_ROLES else prompt).append(_content(message))
    return "\n".join(filter(None, prompt)), "\n".join(filter(None, response))


def _plain_text(value: str | list[dict[str, Any]] | None) -> str:
    if isinstance(value, list):
        return "\n".join(filter(None, map(_content, value)))
    return value or ""


def _content(message: dict[str, Any]) -> str:
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts of a multimodal message
        content = "\n".join(filter(None, (part.get("text") for part in content)))
    return content or ""


def _count_assistant_tokens(
    batch: dict[str, list[Any]],
    places: list[int],
    conversation: str,
    tokens_left: NDArray[np.int64],
    tokenizer: Any,
    chat_template: str,
    keep_end: bool,
) -> dict[str, list[int]]:
    rows, starts, ends, wholes = [], [], [], []
    for row, messages in enumerate(batch[conversation]):
        turns = [_as_chatml(message) for message in messages]
        tools = batch["tools"][row] if "tools" in batch else None
        render = functools.partial(
            tokenizer.apply_chat_template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            chat_template=chat_template,
            tokenize=False,
            **((batch["chat_template_kwargs"][row] if "chat_template_kwargs" in batch else None) or {}),
        )
        for place, turn in enumerate(turns):
            if turn["role"] in _ASSISTANT_ROLES:
                rows.append(row)
                starts.append(render(turns[:place], add_generation_prompt=True) if place else "")
                ends.append(render(turns[: place + 1]))
        wholes.append(render(turns) if keep_end else "")
    tokens = tokenizer([*starts, *ends, *wholes], add_special_tokens=False)["input_ids"]
    lengths = map(len, tokens)
    start, end, whole = ([next(lengths) for _ in texts] for texts in (starts, ends, wholes))
    counts = [0] * len(wholes)
    for row, low, high in zip(rows, start, end):
        left = tokens_left[places[row]]
        first = whole[row] - left if keep_end else 0
        counts[row] += max(0, min(high, first + left) - max(low, first))
    return {"assistant_tokens": counts}


def _as_chatml(message: dict[str, Any]) -> dict[str, Any]:
    return message if "role" in message else {"role": message["from"], "content": message["value"]}
