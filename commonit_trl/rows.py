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
and truncation. Everything is read through Arrow, whose order of rows may be a shuffled one: benchmarks/reading.py has
the cost. Only rows of tokens without text, and conversations whose contents are lists of parts, are read one by one,
and only conversations that are trained on every turn are rendered again, to find the assistant's tokens.
"""

import copy
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, LargeList, List
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 10_000
_ASSISTANT_ROLES = ("assistant", "gpt", "model")
_ROLE_FIELDS, _CONTENT_FIELDS = ("role", "from"), ("content", "value")


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

    def select(self, numbers: NDArray[np.integer[Any]]) -> Self:
        """The rows of these numbers, in this order."""
        selected = copy.copy(self)
        selected.dataset = self.dataset.select(numbers)
        return selected

    # --- labels ---------------------------------------------------------------------------------------------

    def labels(self, columns: Sequence[str]) -> list[str | None]:
        """The task label of each row: its columns' text, joined by " / "; None where one is missing or empty.

        Raises:
            ValueError: on a column that the dataset lacks or whose values are lists or mappings.
        """
        codes, names = self.label_codes(columns)
        return [None if code < 0 else names[code] for code in codes.tolist()]

    def label_codes(self, columns: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
        """The same as (rows,) numbers of names, -1 for None, and the names, each once, in alphabetical order.

        Raises:
            ValueError: as `labels`.
        """
        codes, names = self._label_column(columns[0])
        for column in columns[1:]:
            more, endings = self._label_column(column)
            labelled = (codes >= 0) & (more >= 0)
            pairs, numbers = np.unique(codes[labelled] * len(endings) + more[labelled], return_inverse=True)
            codes = np.full(len(codes), -1)
            codes[labelled] = numbers
            starts_and_ends = (divmod(pair, len(endings)) for pair in pairs.tolist())
            names = [f"{names[start]} / {endings[end]}" for start, end in starts_and_ends]
        return _each_once(codes, names)

    def _label_column(self, column: str) -> tuple[NDArray[np.int64], list[str]]:
        if column not in self.columns:
            raise ValueError(
                f"commonit_task_column={column!r} is not a column of the dataset, which has: {', '.join(self.columns)}."
            )
        feature = self.dataset.features[column]
        values, order = self._column(column)
        if pa.types.is_nested(values.type) or isinstance(values.type, pa.BaseExtensionType):
            raise ValueError(
                f"commonit_task_column={column!r} holds {values.type} values: name a column of text, numbers "
                "or class labels."
            )
        encoded = values.dictionary_encode().combine_chunks()
        names = [self._label_name(value, feature) for value in encoded.dictionary.to_pylist()]
        codes = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
        return _each_once(codes if order is None else codes[order], names)

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
        total = self._per_row(["input_ids"], self._lengths)
        if of == "total":
            return total
        response = self._response_counts(total)
        return response if of == "response" else total - response

    def trained_counts(self, shifted: bool = True) -> NDArray[np.int64]:
        """Count the (rows,) tokens that training trains on, after truncation to `max_length`.

        Args:
            shifted: the loss predicts the next token, so it never trains on the first one.

        Raises:
            ValueError: when the rows are not tokenised.
        """
        if "labels" in self.columns:
            count = functools.partial(self._count_unmasked, mask=-100, skipped=int(shifted))
            return self._per_row(["labels", "input_ids"], count)
        return np.maximum(self.token_counts("total") - int(shifted), 0)

    def is_trained(self, shifted: bool = True) -> NDArray[np.bool_]:
        """Return for each of the (rows,) whether it has a token to train on; True for rows without labels per token."""
        labels = self.dataset.features.get("labels") if self.tokenized else None
        if not isinstance(labels, List | LargeList):
            return np.ones(len(self), dtype=bool)
        return self.trained_counts(shifted) > 0

    def _response_counts(self, total: NDArray[np.int64]) -> NDArray[np.int64]:
        if "labels" in self.columns:
            counts = self._per_row(["labels", "input_ids"], functools.partial(self._count_unmasked, mask=-100))
            if np.any(counts < total):
                return counts
        for column in ("assistant_masks", "completion_mask"):
            if column in self.columns:
                return self._per_row([column, "input_ids"], functools.partial(self._count_unmasked, mask=0))
        conversation = self._conversation_column()
        if conversation is not None and self.chat_template is not None:
            return self._count_assistant_tokens(conversation, total)
        logger.info("Nothing tells prompt from response in these rows: the response length is that of the whole row.")
        return total

    def _lengths(self, lists: pa.Array) -> NDArray[np.int64]:
        lengths = _list_lengths(lists)
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def _count_unmasked(self, lists: pa.Array, input_ids: pa.Array, mask: int, skipped: int = 0) -> NDArray[np.int64]:
        """Count the values other than `mask` of each list after truncation, without the first `skipped`."""
        lengths = _list_lengths(lists)
        left = np.minimum(lengths, self._lengths(input_ids))
        ends = np.cumsum(lengths)
        first = ends - left if self.keep_end else ends - lengths
        unmasked = pc.list_flatten(lists).cast(pa.int64()).fill_null(mask).to_numpy() != mask
        running = np.concatenate([[0], np.cumsum(unmasked)])
        return running[first + left] - running[first + np.minimum(left, skipped)]

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
        return [text for chunk in self.text_chunks(of) for text in chunk.to_pylist()]

    def text_chunks(self, of: str = "prompt") -> Iterator[pa.Array]:
        """The same in Arrow arrays of some thousand rows, one after another.

        Raises:
            ValueError: as `texts`.
        """
        columns, read = self._reader()
        eos = getattr(self.tokenizer, "eos_token", None)  # TRL writes it at the end of the text
        for values in zip(*map(self._chunks, columns), strict=True):
            prompt, response = (_without_ending(text, eos) if eos else text for text in read(*values))
            if of == "both":  # a text that is prompt and response at once is wanted once
                yield pc.if_else(pc.equal(prompt, response), prompt, _joined(prompt, response))
            else:
                yield prompt if of == "prompt" else response

    def _reader(self) -> tuple[list[str], Callable[..., tuple[pa.Array, pa.Array]]]:
        """The columns to read, and a function from arrays of them to the text of prompts and of responses."""
        present = set(self.columns)
        if {"prompt", "completion"} <= present:
            return ["prompt", "completion"], lambda prompt, completion: (_text(prompt), _text(completion))
        conversation = self._conversation_column()
        if conversation is not None:
            return [conversation], _split_conversations
        if {"instruction", "input", "output"} <= present:
            return ["instruction", "input", "output"], lambda instruction, context, output: (
                _joined(_text(instruction), _text(context)),
                _text(output),
            )
        if {"instruction", "output"} <= present:
            return ["instruction", "output"], lambda instruction, output: (_text(instruction), _text(output))
        if self.text_field in present:
            return [self.text_field], lambda text: (_text(text),) * 2
        if self.tokenized:
            if self.tokenizer is None:
                raise ValueError("The rows hold tokens and no text: a tokenizer is needed to read them.")
            return ["input_ids", *({"labels"} & present)], self._decode
        raise ValueError(
            "No text found in the rows: give one of prompt and completion, messages, conversations, "
            f"instruction and output, {self.text_field}, or input_ids. The dataset has: "
            f"{', '.join(self.columns)}."
        )

    def _decode(self, input_ids: pa.Array, labels: pa.Array | None = None) -> tuple[pa.Array, pa.Array]:
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        prompts, responses = [], []
        for row, values in enumerate(input_ids):
            tokens = np.asarray(values.as_py() or (), dtype=np.int64)
            masked = np.asarray((labels[row].as_py() if labels is not None else None) or (), dtype=np.int64) == -100
            split = masked.any()
            prompts.append(decode(tokens[masked] if split else tokens))
            responses.append(decode(tokens[~masked]) if split else prompts[-1])
        return pa.array(prompts, pa.string()), pa.array(responses, pa.string())

    def _conversation_column(self) -> str | None:
        for column in ("messages", "conversations"):
            if column in self.columns and len(self.dataset):
                first = self.dataset.select_columns([column]).with_format(None)[0]
                if isinstance(first[column], list):
                    return column
        return None

    # --- reading --------------------------------------------------------------------------------------------

    def _column(self, column: str) -> tuple[pa.ChunkedArray, NDArray[np.int64] | None]:
        """The values as they are stored, and which of them the rows are; None where they are all, in their order."""
        # The public ways through an indices mapping, which TRL's own filter leaves behind, gather row by row.
        indices = self.dataset._indices
        order = None if indices is None else indices.column(0).to_numpy().astype(np.int64)
        return self.dataset.data.column(column), order

    def _chunks(self, column: str) -> Iterator[pa.Array]:
        """The column in Arrow arrays, in row order; never as Python lists."""
        values, order = self._column(column)
        starts = np.cumsum([0, *map(len, values.chunks)])
        for low in range(0, len(self), _ROWS_AT_ONCE):
            if order is None:
                yield values.slice(low, _ROWS_AT_ONCE).combine_chunks()
            else:
                yield _gathered(values, starts, order[low : low + _ROWS_AT_ONCE])

    def _per_row(self, columns: Sequence[str], measure: Callable[..., NDArray[np.int64]]) -> NDArray[np.int64]:
        """(rows,) what `measure` gives for arrays of these columns."""
        nothing = np.empty(0, dtype=np.int64)
        stored, orders = zip(*map(self._column, columns), strict=True)
        size, order = len(stored[0]), orders[0]
        if order is None or len(order) * 16 < size:
            return np.concatenate([nothing, *map(measure, *map(self._chunks, columns))])
        # To measure all that is stored, and then to pick, is faster than to gather lists.
        slices = ([values.slice(low, _ROWS_AT_ONCE) for values in stored] for low in range(0, size, _ROWS_AT_ONCE))
        measured = (measure(*(part.combine_chunks() for part in parts)) for parts in slices)
        return np.concatenate([nothing, *measured])[order]


def _gathered(values: pa.ChunkedArray, starts: NDArray[np.int64], order: NDArray[np.int64]) -> pa.Array:
    """The values of these numbers; `starts` are the numbers at which the chunks of `values` start."""
    chunk_of = np.searchsorted(starts, order, side="right") - 1
    by_chunk = np.argsort(chunk_of, kind="stable")
    chunks, firsts = np.unique(chunk_of[by_chunk], return_index=True)
    runs = zip(chunks.tolist(), np.split(order[by_chunk], firsts[1:]), strict=True)
    taken = [values.chunk(chunk).take(pa.array(numbers - starts[chunk])) for chunk, numbers in runs]
    return taken[0] if len(taken) == 1 else pa.concat_arrays(taken).take(pa.array(np.argsort(by_chunk)))


def _each_once(codes: NDArray[np.int64], names: Sequence[str | None]) -> tuple[NDArray[np.int64], list[str]]:
    """The names that are used, each once and in order, and the codes that go with them, -1 for None."""
    used = [names[code] for code in np.flatnonzero(np.bincount(codes[codes >= 0], minlength=len(names))).tolist()]
    kept = sorted({name for name in used if name is not None})
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(kept)}
    return np.array([*(numbers.get(name, -1) for name in names), -1], dtype=np.int64)[codes], kept


def _list_lengths(lists: pa.Array) -> NDArray[np.int64]:
    return pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)


# --- text in Arrow arrays ---------------------------------------------------------------------------------------------


def _text(values: pa.Array) -> pa.Array:
    """Text, or the contents of messages, of each row."""
    if not pa.types.is_nested(values.type):
        return values.cast(pa.string()).fill_null("")
    if _messages_of_text(values.type):
        messages = pc.list_flatten(values)
        return _joined_per_row(values, _field(messages, _CONTENT_FIELDS), np.ones(len(messages), dtype=bool))
    return pa.array([_plain_text(value) for value in values.to_pylist()], pa.string())


def _split_conversations(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """`split_conversation` of each row."""
    if not _messages_of_text(values.type):
        prompts, responses = zip(*map(split_conversation, values.to_pylist()), strict=True)
        return pa.array(prompts, pa.string()), pa.array(responses, pa.string())
    messages = pc.list_flatten(values)
    contents, roles = _field(messages, _CONTENT_FIELDS), _field(messages, _ROLE_FIELDS)
    assistants = pc.is_in(roles, pa.array(_ASSISTANT_ROLES)).to_numpy(zero_copy_only=False)
    return _joined_per_row(values, contents, ~assistants), _joined_per_row(values, contents, assistants)


def _messages_of_text(kind: pa.DataType) -> bool:
    """Whether values of this type are lists of messages whose contents are text."""
    if not pa.types.is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    names = (_field_name(kind.value_type, names) for names in (_ROLE_FIELDS, _CONTENT_FIELDS))
    return all(name is not None and pa.types.is_string(kind.value_type.field(name).type) for name in names)


def _field_name(kind: pa.StructType, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if kind.get_field_index(name) >= 0), None)


def _field(messages: pa.Array, names: tuple[str, ...]) -> pa.Array:
    """The first of these fields that messages have."""
    return pc.struct_field(messages, _field_name(messages.type, names)).fill_null("")


def _joined_per_row(lists: pa.Array, contents: pa.Array, wanted: NDArray[np.bool_]) -> pa.Array:
    """The wanted contents of each list that are not empty, on lines of their own; `contents` are of all lists."""
    wanted = wanted & pc.not_equal(contents, "").to_numpy(zero_copy_only=False)
    before = np.concatenate([[0], np.cumsum(wanted)])
    ends = np.concatenate([[0], np.cumsum(_list_lengths(lists))])
    offsets = pa.array(before[ends], pa.int32())
    return pc.binary_join(pa.ListArray.from_arrays(offsets, contents.filter(pa.array(wanted))), "\n")


def _joined(first: pa.Array, second: pa.Array) -> pa.Array:
    """Both texts of each row on lines of their own, or the one that is not empty."""
    both = pc.binary_join_element_wise(first, second, "\n")
    return pc.if_else(pc.equal(second, ""), first, pc.if_else(pc.equal(first, ""), second, both))


def _without_ending(texts: pa.Array, ending: str) -> pa.Array:
    cut = pc.utf8_slice_codeunits(texts, 0, -len(ending))
    return pc.if_else(pc.ends_with(texts, ending), cut, texts)


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
