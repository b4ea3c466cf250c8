"""What a row says: its task label, the tokens of its prompt and response, and their text.

`Rows` reads a dataset in any of the forms that TRL trains on, raw or tokenised:

| columns | prompt | response |
|---|---|---|
| `prompt`, `completion` (text or messages) | the prompt | the completion |
| `messages`, or ShareGPT's `conversations` | all other turns | the assistant's turns |
| `instruction` (, `input`), `output` | instruction and input | the output |
| `text` | the text | the text |
| `input_ids`, `labels` | tokens whose label is -100 | the other tokens |

Token counts are those of the tokenised columns, so they are the ones that training sees, after chat template and
truncation. Cost: counts are read from Arrow offsets (about 10 ns a token); texts are Python strings, a few microseconds a
row; only conversations that are trained on every turn have to be rendered again to find the assistant's tokens.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 10_000
_ASSISTANT_ROLES = ("assistant", "gpt", "model")
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


class Rows:
    """A dataset as the groupers see it.

    Args:
        dataset: raw rows, tokenised rows, or tokenised rows that still have their raw columns.
        tokenizer: needed to read text out of `input_ids`, and to find the assistant's tokens in a conversation.
        max_length: cut token counts off here, for rows that will be truncated later; the start of a row is kept.
        text_field: name of the column with plain text.
        chat_template: the template that training uses; default, the tokenizer's.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        text_field: str = "text",
        chat_template: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.text_field = text_field
        self.chat_template = chat_template
        self.columns = list(dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    # --- labels -----------------------------------------------------------------------------------------------------

    def labels(self, columns: Sequence[str]) -> list[str | None]:
        """The task label of each row: the text of its columns, joined by " / "; None where one is missing or empty.

        Raises:
            ValueError: on a column that the dataset lacks or whose values are lists or mappings.
        """
        parts = [self._label_column(column) for column in columns]
        if len(parts) == 1:
            return parts[0]
        return [None if None in row else " / ".join(row) for row in zip(*parts, strict=True)]  # type: ignore[arg-type]

    def _label_column(self, column: str) -> list[str | None]:
        if column not in self.columns:
            raise ValueError(
                f"commonit_task_column={column!r} is not a column of the dataset, which has: {', '.join(self.columns)}."
            )
        feature = self.dataset.features[column]
        values = self._arrow(column)
        if pa.types.is_nested(values.type):
            raise ValueError(
                f"commonit_task_column={column!r} holds {values.type} values: name a column of text, numbers or class "
                "labels."
            )
        encoded = values.combine_chunks().dictionary_encode()
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        names = [self._label_name(value, feature) for value in encoded.dictionary.to_pylist()]
        return [None if index is None else names[index] for index in encoded.indices.to_pylist()]

    @staticmethod
    def _label_name(value: Any, feature: Any) -> str | None:
        if isinstance(feature, ClassLabel):
            return feature.int2str(value) if value >= 0 else None  # -1 is how ClassLabel says "no label"
        if isinstance(value, float) and np.isnan(value):
            return None
        return str(value).strip() or None

    # --- tokens -----------------------------------------------------------------------------------------------------

    @property
    def tokenized(self) -> bool:
        return "input_ids" in self.columns

    def token_counts(self, of: str = "total") -> NDArray[np.int64]:
        """(rows,) tokens of each row's `response`, `prompt` or `total`, after truncation to `max_length`.

        The response is what the labels (or TRL's completion and assistant masks) leave unmasked. Rows that are trained
        on every token count the completion or the assistant's turns where they can be told apart, else the whole row.

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
            counts = self._count_in_lists("labels", lambda values: pc.not_equal(values, -100), total)
            if np.any(counts < total):
                return counts
        for column in ("assistant_masks", "completion_mask"):
            if column in self.columns:
                return self._count_in_lists(column, lambda values: pc.not_equal(values, 0), total)
        if self._conversation_column() is not None and self.tokenizer is not None:
            return np.minimum(self._assistant_token_counts(), total)
        logger.info("Nothing tells prompt from response in these rows: the response length is that of the whole row.")
        return total

    def _list_lengths(self, column: str) -> NDArray[np.int64]:
        lengths = [pc.fill_null(pc.list_value_length(chunk), 0).to_numpy() for chunk in self._chunks(column)]
        counts = np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)
        return counts if self.max_length is None else np.minimum(counts, self.max_length)

    def _count_in_lists(
        self, column: str, condition: Callable[[Any], Any], total: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """(rows,) values that meet `condition` in each row's list, within the row's first `total` values."""
        counts = []
        done = 0
        for chunk in self._chunks(column):
            lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy().astype(np.int64)
            row = np.repeat(np.arange(len(lengths)), lengths)
            place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            met = pc.fill_null(condition(pc.list_flatten(chunk)), False).to_numpy(zero_copy_only=False)
            met &= place < total[done : done + len(lengths)][row]
            counts.append(np.bincount(row[met], minlength=len(lengths)))
            done += len(lengths)
        return np.concatenate([np.empty(0, np.int64), *counts])

    def _assistant_token_counts(self) -> NDArray[np.int64]:
        """(rows,) tokens of the assistant's turns, each counted from where the generation prompt ends."""
        column = self._conversation_column()
        counted = self.dataset.select_columns([column, *({"tools"} & set(self.columns))]).map(
            _count_assistant_tokens,
            batched=True,
            fn_kwargs={
                "column": column,
                "tokenizer": self.tokenizer,
                "chat_template": self.chat_template,
                "max_length": self.max_length,
            },
            remove_columns=[column, *({"tools"} & set(self.columns))],
            desc="Measuring response lengths",
        )
        return np.asarray(counted.with_format("numpy")["assistant_tokens"][:], dtype=np.int64)

    # --- texts ------------------------------------------------------------------------------------------------------

    def texts(self, of: str = "prompt") -> list[str]:
        """The text of each row's `prompt`, `response` or `both`.

        Raises:
            ValueError: when the rows hold neither text nor tokens, or tokens without a tokenizer.
        """
        read = self._reader()
        if of == "both":
            return ["\n".join(filter(None, read(row))) for row in self._iterate()]
        part = 0 if of == "prompt" else 1
        return [read(row)[part] for row in self._iterate()]

    def _reader(self) -> Callable[[dict[str, Any]], tuple[str, str]]:
        """A function from a row to the text of its prompt and its response."""
        columns = set(self.columns)
        if {"prompt", "completion"} <= columns:
            return lambda row: (_plain_text(row["prompt"]), _plain_text(row["completion"]))
        conversation = self._conversation_column()
        if conversation is not None:
            return lambda row: split_conversation(row[conversation])
        if {"instruction", "output"} <= columns:
            return lambda row: (
                "\n".join(filter(None, (row["instruction"], row.get("input")))),
                row["output"] or "",
            )
        if self.text_field in columns:
            return lambda row: (row[self.text_field] or "",) * 2
        if self.tokenized:
            if self.tokenizer is None:
                raise ValueError("The rows hold tokens and no text: a tokenizer is needed to read them.")
            return self._decode
        raise ValueError(
            "No text found in the rows: give one of prompt and completion, messages, conversations, instruction and "
            f"output, {self.text_field}, or input_ids. The dataset has: {', '.join(self.columns)}."
        )

    def _decode(self, row: dict[str, Any]) -> tuple[str, str]:
        tokens = np.asarray(row["input_ids"], dtype=np.int64)
        labels = np.asarray(row["labels"]) if row.get("labels") is not None else tokens
        masked = labels == -100
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        if not masked.any():
            return (decode(tokens),) * 2
        return decode(tokens[masked]), decode(tokens[~masked])

    def _conversation_column(self) -> str | None:
        for column in ("messages", "conversations"):
            if column in self.columns and len(self.dataset) and isinstance(self.dataset[0][column], list):
                return column
        return None

    # --- reading ----------------------------------------------------------------------------------------------------

    _TEXT_COLUMNS = ("prompt", "completion", "messages", "conversations", "instruction", "input", "output", "labels")

    def _iterate(self) -> Iterator[dict[str, Any]]:
        wanted = [
            column for column in self.columns if column in (*self._TEXT_COLUMNS, self.text_field, "input_ids")
        ]
        if set(wanted) - {"input_ids", "labels"}:
            wanted = [column for column in wanted if column not in ("input_ids", "labels")]
        yield from self.dataset.select_columns(wanted).with_format(None)

    def _arrow(self, column: str) -> pa.ChunkedArray:
        chunks = list(self._chunks(column))
        if not chunks:
            return pa.chunked_array([], type=self.dataset.features.arrow_schema.field(column).type)
        return pa.chunked_array(chunks)

    def _chunks(self, column: str) -> Iterator[pa.Array]:
        """The column in Arrow arrays, in row order; never as Python lists."""
        table = self.dataset.select_columns([column]).with_format("arrow")
        for batch in table.iter(batch_size=_ROWS_AT_ONCE):
            yield from batch[column].chunks


def split_conversation(messages: list[dict[str, Any]]) -> tuple[str, str]:
    """The text of a conversation's other turns and of the assistant's, each turn on lines of its own."""
    prompt, response = [], []
    for message in messages or ():
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts of a multimodal message
            content = "\n".join(part.get("text") or "" for part in content if isinstance(part, dict))
        (response if role in _ASSISTANT_ROLES else prompt).append(content or "")
    return "\n".join(filter(None, prompt)), "\n".join(filter(None, response))


def _plain_text(value: str | list[dict[str, Any]] | None) -> str:
    if isinstance(value, list):
        return "\n".join(filter(None, split_conversation(value)))
    return value or ""


def _count_assistant_tokens(
    batch: dict[str, list[Any]], column: str, tokenizer: Any, chat_template: str | None, max_length: int | None
) -> dict[str, list[int]]:
    starts, ends, row_of_turn = [], [], []
    tools = batch.get("tools", [None] * len(batch[column]))
    for row, messages in enumerate(batch[column]):
        turns = [_as_chatml(message) for message in messages]
        render = functools.partial(
            tokenizer.apply_chat_template,
            tools=json.loads(tools[row]) if isinstance(tools[row], str) else tools[row] or None,
            chat_template=chat_template,
            tokenize=False,
        )
        for place, turn in enumerate(turns):
            if turn["role"] == "assistant":
                starts.append(render(turns[:place], add_generation_prompt=True) if place else "")
                ends.append(render(turns[: place + 1]))
                row_of_turn.append(row)
    counts = [0] * len(batch[column])
    if starts:
        limit = max_length if max_length is not None else np.iinfo(np.int64).max
        start_tokens = tokenizer(starts, add_special_tokens=False)["input_ids"]
        end_tokens = tokenizer(ends, add_special_tokens=False)["input_ids"]
        for row, start, end in zip(row_of_turn, start_tokens, end_tokens, strict=True):
            counts[row] += max(0, min(len(end), limit) - min(len(start), limit))
    return {"assistant_tokens": counts}


def _as_chatml(message: dict[str, Any]) -> dict[str, Any]:
    if "role" in message:
        return {key: value for key, value in message.items() if value is not None}
    return {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
