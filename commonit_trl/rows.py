"""Read prompts, responses, labels and token counts from the rows of a dataset.

`Rows` reads every form of data that TRL trains on, raw or tokenised:

| columns | prompt | response |
|---|---|---|
| `prompt`, `completion` (text or messages) | the prompt | the completion |
| `messages`, or ShareGPT's `conversations` | all other turns | the assistant's turns |
| `instruction` (, `input`), `output` | instruction and input | the output |
| `prompt`, `chosen` (text or messages) | the prompt | the chosen answer |
| `chosen`, `rejected` (text or messages) | their common start | the rest of `chosen` |
| `text` | the text | the text |
| `input_ids`, `labels` | tokens whose label is -100 | the other tokens |
| `input_ids`, `labels` of another length (seq2seq) | `input_ids` | labels other than -100 |
| `prompt_ids`, `completion_ids` or `chosen_ids` | `prompt_ids` | the other column |
| `chosen_ids`, `rejected_ids` | their common start | the rest of `chosen_ids` |
| `chosen_input_ids`, `chosen_labels` | tokens whose label is -100 | the other tokens |

Token counts come from the tokenised columns, so they include the chat template and truncation, and leave out padding.
Reading goes through Arrow and keeps the order of shuffled datasets; benchmarks/reading.py measures its cost. Three
forms are read row by row: tokens without text, messages whose contents are not plain text, and preference data without
a prompt. Conversations that are trained on every turn are rendered again, to find the assistant's tokens.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features
from numpy.typing import NDArray

from commonit_trl.turns import ASSISTANT_ROLES, count_assistant_tokens

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 10_000
_ROLE_FIELDS, _CONTENT_FIELDS = ("role", "from"), ("content", "value")
_MASKS = ("assistant_masks", "completion_mask")
_MASKED = {
    "labels": -100,
    "chosen_labels": -100,
    "attention_mask": 0,
    **dict.fromkeys(_MASKS, 0),
}  # the value of tokens that do not count


@dataclass(eq=False)
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

    dataset: Dataset
    tokenizer: Any = None
    _: KW_ONLY
    max_length: int | None = None
    keep_end: bool = False
    text_field: str = "text"
    chat_template: str | None = None

    def __post_init__(self) -> None:
        self.chat_template = self.chat_template or getattr(self.tokenizer, "chat_template", None)
        self.columns = list(self.dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def select(self, numbers: NDArray[np.integer[Any]]) -> Self:
        """Return the rows with these numbers, in this order."""
        selected = copy.copy(self)
        selected.dataset = self.dataset.select(numbers)
        return selected

    # --- labels ---------------------------------------------------------------------------------------------

    def labels(self, columns: Sequence[str]) -> list[str | None]:
        """Return the task label of each row: its columns' text, joined by " / "; None if one is missing or empty.

        Raises:
            ValueError: on a column that the dataset lacks or whose values are lists or mappings.
        """
        return self._labels(columns).to_pylist()

    def label_codes(self, columns: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
        """Return `labels` as (rows,) numbers of names, -1 for None, and the names, each once, in alphabetical order."""
        labels = self._labels(columns)
        names = sorted(labels.unique().drop_null().to_pylist())
        codes = pc.index_in(labels, pa.array(names, labels.type)).fill_null(-1)
        return codes.to_numpy().astype(np.int64), names

    def _labels(self, columns: Sequence[str]) -> pa.Array:
        return pc.binary_join_element_wise(*map(self._label_column, columns), pa.scalar(" / ", pa.large_string()))

    def _label_column(self, column: str) -> pa.Array:
        if column not in self.columns:
            raise ValueError(
                f"commonit_task_column={column!r} is not a column of the dataset, which has: {', '.join(self.columns)}."
            )
        values, order = self._column(column)
        if _is_nested(values.type):
            raise ValueError(
                f"commonit_task_column={column!r} holds {values.type} values: name a column of text, numbers "
                "or class labels."
            )
        encoded = values.dictionary_encode().combine_chunks()
        names = [_label(value, self.dataset.features[column]) for value in encoded.dictionary.to_pylist()]
        indices = encoded.indices if order is None else encoded.indices.take(pa.array(order))
        return pa.array(names, pa.large_string()).take(indices)

    # --- numbers and vectors --------------------------------------------------------------------------------

    def numbers(self, column: str) -> NDArray[np.float64]:
        """The (rows,) values of a column of numbers, NaN where there is none.

        Raises:
            ValueError: on values that are no finite numbers.
        """

        def read(values: pa.Array) -> NDArray[np.float64]:
            return values.cast(pa.float64()).to_numpy(zero_copy_only=False)

        kind = self._type(column)
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            raise ValueError(f"commonit_column={column!r}: values of type {kind}. Name a column of numbers.")
        values = self._per_row([column], read).astype(np.float64)
        if np.isinf(values).any():
            raise ValueError(f"commonit_column={column!r}: {np.isinf(values).sum()} infinite values. Remove them.")
        return values

    def vector_chunks(self, column: str) -> Iterator[NDArray[np.float32]]:
        """The (rows, dimensions) vectors of a column of lists, in chunks.

        Raises:
            ValueError: on values that are no lists of numbers, all of one length.
        """
        width: int | None = None
        for chunk in self._chunks(column):
            kind = chunk.type
            lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
            if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
                raise ValueError(
                    f"commonit_embedding_column={column!r}: values of type {kind}. Name a column of lists of numbers."
                )
            values = chunk.flatten()
            width = width or len(values) // max(len(chunk), 1)
            if chunk.null_count or values.null_count or np.any(_list_lengths(chunk) != width) or not width:
                raise ValueError(
                    f"commonit_embedding_column={column!r}: vectors are missing, or not all of {width} numbers. Give "
                    "every row a vector of the same length."
                )
            yield values.cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, width)

    # --- tokens ---------------------------------------------------------------------------------------------

    @property
    def tokenized(self) -> bool:
        """Whether the rows have token ids."""
        return "input_ids" in self.columns or self._answer_column is not None

    def token_counts(self, of: str = "total") -> NDArray[np.int64]:
        """Count the tokens of each row's `response`, `prompt` or `total`.

        Counts are those after truncation to `max_length`; padding, where `attention_mask` is 0, does not count. The
        response is the part that labels, or TRL's completion and assistant masks, leave unmasked. In rows that are
        trained on every token it is the assistant's turns where they can be found, else the whole row.

        Returns:
            (rows,) tokens; `prompt` and `response` add up to `total`.

        Raises:
            ValueError: when the rows are not tokenised.
        """
        self._check_tokenized()
        if "input_ids" not in self.columns:
            total, response = self._preference_counts()
        else:
            total, response = self._count(["input_ids", *self._padding]), None
            if self._labels_are_separate:
                response = self._count(["labels"])
                total = total + response
        if of == "total":
            return total
        if response is None:
            response = self._response_counts(total)
        return response if of == "response" else total - response

    def trained_counts(self, shifted: bool = True) -> NDArray[np.int64]:
        """Count the tokens of each row that the loss counts.

        These are the labels other than -100; without labels, the tokens that TRL's completion and assistant masks
        keep; without masks, all tokens. One label per row (classification, regression) masks nothing. Labels that are a
        sequence of their own (seq2seq) and the tokens of chosen answers are never shifted.

        Args:
            shifted: the loss is that of a causal language model, which does not predict the first token of a row.

        Returns:
            (rows,) tokens after truncation to `max_length`; 0 for rows without tokens.

        Raises:
            ValueError: when the rows are not tokenised.
        """
        self._check_tokenized()
        if "input_ids" not in self.columns:
            return self._preference_counts()[1]
        if self._labels_are_separate:
            return self._count(["labels"])
        if self._label_lists:
            return self._count(["labels", "input_ids"], shifted)
        if "labels" in self.columns:
            return self._count(["input_ids"])
        return self._count(["input_ids", *(mask for mask in _MASKS if mask in self.columns)], shifted)

    def _check_tokenized(self) -> None:
        if not self.tokenized:
            raise ValueError(
                "Token counts need tokenised rows (a column input_ids), and the dataset has only: "
                f"{', '.join(self.columns)}."
            )

    def is_trained(self, shifted: bool = True) -> NDArray[np.bool_]:
        """Return for each of the (rows,) whether it has a token to train on; True for rows without labels per token."""
        if not (self.tokenized and self._label_lists):
            return np.ones(len(self), dtype=bool)
        return self.trained_counts(shifted) > 0

    def _response_counts(self, total: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._label_lists:
            counts = self._count(["labels", "input_ids", *self._padding])
            if np.any(counts < total):
                return counts
        for mask in _MASKS:
            if mask in self.columns:
                return self._count([mask, "input_ids", *self._padding])
        conversation = self._conversation_column()
        if conversation is not None and self.chat_template is not None:
            return count_assistant_tokens(
                self.dataset,
                conversation,
                self._count(["input_ids"]),
                tokenizer=self.tokenizer,
                chat_template=self.chat_template,
                keep_end=self.keep_end,
            )
        logger.info("Nothing separates prompt from response in these rows: the response is the whole row.")
        return total

    def _preference_counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows,) tokens of prompt and answer together, and of the answer, after truncation."""
        assert self._answer_column is not None
        answer = self._per_row([self._answer_column], _list_lengths)
        if self._answer_column == "chosen_input_ids":
            answer, prompt = self._count(["chosen_labels"]), answer - self._count(["chosen_labels"])
        elif "prompt_ids" in self.columns:
            prompt = self._per_row(["prompt_ids"], _list_lengths)
        elif "rejected_ids" in self.columns:
            prompt = self._per_row([self._answer_column, "rejected_ids"], _common_starts)
            answer = answer - prompt
        else:
            prompt = np.zeros_like(answer)
        total = prompt + answer
        if self.max_length is None:
            return total, answer
        total = np.minimum(total, self.max_length)
        return total, np.minimum(answer, total) if self.keep_end else total - np.minimum(prompt, total)

    @property
    def _answer_column(self) -> str | None:
        """The column of response tokens that TRL's preference trainers make; ORPO's and CPO's has the prompt."""
        made = ("chosen_ids", "completion_ids", "chosen_input_ids")
        return next((column for column in made if column in self.columns), None)

    @property
    def _label_lists(self) -> list[str]:
        """`labels`, unless they are one class or number per row, or numbers per class."""
        return ["labels"] if "labels" in self.columns and _is_list_of_integers(self._type("labels")) else []

    @property
    def _padding(self) -> list[str]:
        """`attention_mask`, where every row has one."""
        given = "attention_mask" in self.columns and _is_list_of_integers(self._type("attention_mask"))
        return ["attention_mask"] if given and not self.dataset.data.column("attention_mask").null_count else []

    def _type(self, column: str) -> pa.DataType:
        return self.dataset.data.column(column).type

    @functools.cached_property
    def _labels_are_separate(self) -> bool:
        """Whether labels are a sequence of their own (seq2seq), not a mask over `input_ids`.

        They are where their length differs, or where padding of the input has another label than its own token.
        """
        if not self._label_lists or "input_ids" not in self.columns:
            return False
        return bool(self._per_row(["labels", "input_ids", *self._padding], _have_own_labels).any())

    def _count(self, columns: Sequence[str], shifted: bool = False) -> NDArray[np.int64]:
        """(rows,) tokens that no column masks, after truncation; with `shifted`, without each row's first token.

        Lists of a row are cut to the shortest of them: TRL truncates `input_ids` and `labels`, but not the masks.
        """

        def count(*lists: pa.Array) -> NDArray[np.int64]:
            lengths = functools.reduce(np.minimum, map(_list_lengths, lists))
            if self.max_length is not None:
                lengths = np.minimum(lengths, self.max_length)
            masks = [(_MASKED[name], values) for name, values in zip(columns, lists, strict=True) if name in _MASKED]
            if not masks and not shifted:
                return lengths
            kept = np.ones(lengths.sum(), dtype=bool)
            for masked, values in masks:
                kept &= _cut(values, lengths, self.keep_end, fill=masked) != masked
            ends = np.cumsum(lengths)
            if shifted:
                kept[(ends - lengths)[lengths > 0]] = False
            running = np.concatenate([[0], np.cumsum(kept)])
            return running[ends] - running[ends - lengths]

        return self._per_row(columns, count)

    # --- texts ----------------------------------------------------------------------------------------------

    def texts(self, of: str = "prompt") -> list[str]:
        """Return the text of each row's `prompt`, `response` or `both`.

        Raises:
            ValueError: when the rows hold neither text nor tokens, or tokens without a tokenizer.
        """
        return [text for chunk in self.text_chunks(of) for text in chunk.to_pylist()]

    def text_chunks(self, of: str = "prompt") -> Iterator[pa.Array]:
        """Yield the result of `texts` in Arrow arrays of at most `_ROWS_AT_ONCE` rows."""
        columns, read = self._reader()
        eos = getattr(self.tokenizer, "eos_token", None)  # TRL writes it at the end of the text
        for values in zip(*map(self._chunks, columns), strict=True):
            prompt, response = (_without_ending(text, eos) if eos else text for text in read(*values))
            if of == "both":  # not twice, if the text is both prompt and response
                yield pc.if_else(pc.equal(prompt, response), prompt, _joined(prompt, response))
            else:
                yield prompt if of == "prompt" else response

    def _reader(self) -> tuple[list[str], Callable[..., tuple[pa.Array, pa.Array]]]:
        """Return the columns to read, and a function from their arrays to the texts of prompts and of responses."""
        present = set(self.columns)
        if {"chosen", "chosen_ids"} <= present:
            return self._preference_reader()  # these rows may also have the messages that `chosen` was made of
        if {"prompt", "completion"} <= present:
            return ["prompt", "completion"], _two_columns
        conversation = self._conversation_column()
        if conversation is not None:
            return [conversation], _split_conversations
        if {"instruction", "input", "output"} <= present:
            return ["instruction", "input", "output"], lambda instruction, context, output: (
                _joined(_text(instruction), _text(context)),
                _text(output),
            )
        if {"instruction", "output"} <= present:
            return ["instruction", "output"], _two_columns
        if "chosen" in present:
            return self._preference_reader()
        if self.text_field in present:
            return [self.text_field], lambda text: (_text(text),) * 2
        if self.tokenized:
            if self.tokenizer is None:
                raise ValueError("The rows hold tokens and no text: a tokenizer is needed to read them.")
            return self._token_reader()
        raise ValueError(
            "No text found in the rows: give one of prompt and completion, messages, conversations, "
            f"instruction and output, prompt and chosen, {self.text_field}, or input_ids. The dataset has: "
            f"{', '.join(self.columns)}."
        )

    def _preference_reader(self) -> tuple[list[str], Callable[..., tuple[pa.Array, pa.Array]]]:
        # TRL's reward trainer puts the prompt in front of both answers and keeps its column.
        joined = "chosen_ids" in self.columns and "prompt_ids" not in self.columns
        if "prompt" in self.columns and not joined:
            return ["prompt", "chosen"], _two_columns
        if "rejected" in self.columns:
            return ["chosen", "rejected"], _split_preferences
        return ["chosen"], lambda chosen: (_text(chosen),) * 2

    def _token_reader(self) -> tuple[list[str], Callable[..., tuple[pa.Array, pa.Array]]]:
        """The columns of tokens, and a function that decodes them."""
        if "input_ids" not in self.columns:
            assert self._answer_column is not None
            if self._answer_column == "chosen_input_ids":
                return [self._answer_column, "chosen_labels"], self._decoded(_split_at_labels)
            if "prompt_ids" in self.columns:
                return ["prompt_ids", self._answer_column], self._decoded(lambda prompt, answer: (prompt, answer))
            if "rejected_ids" in self.columns:
                return [self._answer_column, "rejected_ids"], self._decoded(_split_at_difference)
            return [self._answer_column], self._decoded(_split_at_labels)
        if self._labels_are_separate:
            return ["input_ids", "labels"], self._decoded(lambda tokens, labels: (tokens, labels[labels != -100]))
        return ["input_ids", *self._label_lists], self._decoded(_split_at_labels)

    def _decoded(self, split: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[pa.Array, pa.Array]]:
        """A function from arrays of tokens to the text of the prompts and responses that `split` makes of each row."""
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)

        def read(*columns: pa.Array) -> tuple[pa.Array, pa.Array]:
            rows = zip(*(column.to_pylist() for column in columns), strict=True)
            parts = (split(*(np.asarray(tokens or (), dtype=np.int64) for tokens in row)) for row in rows)
            return _two_texts(
                (text := decode(prompt), text if response is prompt else decode(response)) for prompt, response in parts
            )

        return read

    def _conversation_column(self) -> str | None:
        for column in ("messages", "conversations"):
            if column in self.columns and len(self.dataset):
                first = self.dataset.select_columns([column]).with_format(None)[0]
                if isinstance(first[column], list):
                    return column
        return None

    # --- reading --------------------------------------------------------------------------------------------

    def _column(self, column: str) -> tuple[pa.ChunkedArray, NDArray[np.int64] | None]:
        """Return the stored values, and the (rows,) index of each row in them; None if they are the rows in order."""
        # The public ways through an indices mapping, which TRL's filter leaves, gather row by row.
        indices = self.dataset._indices
        order = None if indices is None else indices.column(0).to_numpy().astype(np.int64)
        return self.dataset.data.column(column), order

    def _chunks(self, column: str) -> Iterator[pa.Array]:
        """Yield the column in Arrow arrays, in row order."""
        values, order = self._column(column)
        starts = np.cumsum([0, *map(len, values.chunks)])
        for low in range(0, len(self), _ROWS_AT_ONCE):
            if order is None:
                yield values.slice(low, _ROWS_AT_ONCE).combine_chunks()
            else:
                yield _gathered(values, starts, order[low : low + _ROWS_AT_ONCE])

    def _per_row(self, columns: Sequence[str], measure: Callable[..., NDArray[Any]]) -> NDArray[Any]:
        """Return the (rows,) results of `measure` on arrays of these columns."""
        nothing = np.empty(0, dtype=np.int64)
        stored, orders = zip(*map(self._column, columns), strict=True)
        size, order = len(stored[0]), orders[0]
        if order is None or len(order) * 16 < size:
            return np.concatenate([nothing, *map(measure, *map(self._chunks, columns))])
        # Measuring all stored values and then selecting is faster than gathering lists.
        slices = ([values.slice(low, _ROWS_AT_ONCE) for values in stored] for low in range(0, size, _ROWS_AT_ONCE))
        measured = (measure(*(part.combine_chunks() for part in parts)) for parts in slices)
        return np.concatenate([nothing, *measured])[order]


def _gathered(values: pa.ChunkedArray, starts: NDArray[np.int64], order: NDArray[np.int64]) -> pa.Array:
    """Return the values at these indices; `starts` are the indices at which the chunks of `values` start."""
    chunk_of = np.searchsorted(starts, order, side="right") - 1
    by_chunk = np.argsort(chunk_of, kind="stable")
    chunks, firsts = np.unique(chunk_of[by_chunk], return_index=True)
    runs = zip(chunks.tolist(), np.split(order[by_chunk], firsts[1:]), strict=True)
    taken = [values.chunk(chunk).take(pa.array(numbers - starts[chunk])) for chunk, numbers in runs]
    return taken[0] if len(taken) == 1 else pa.concat_arrays(taken).take(pa.array(np.argsort(by_chunk)))


def _label(value: Any, feature: Any) -> str | None:
    if isinstance(feature, ClassLabel):
        return feature.int2str(value) if value >= 0 else None  # ClassLabel stores -1 for "no label"
    if isinstance(value, float) and np.isnan(value):
        return None
    return str(value).strip() or None


def _list_lengths(lists: pa.Array) -> NDArray[np.int64]:
    return pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)


# --- text in Arrow arrays ---------------------------------------------------------------------------------------------


def _text(values: pa.Array) -> pa.Array:
    """Text, or the contents of messages, of each row."""
    if not _is_nested(values.type):
        return values.cast(pa.string()).fill_null("")
    if _messages_of_text(values.type):
        messages = pc.list_flatten(values)
        return _joined_per_row(values, _field(messages, _CONTENT_FIELDS), np.ones(len(messages), dtype=bool))
    return pa.array([_plain_text(value) for value in _python_values(values)], pa.string())


def _two_columns(prompt: pa.Array, response: pa.Array) -> tuple[pa.Array, pa.Array]:
    return _text(prompt), _text(response)


def _split_conversations(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """`split_conversation` of each row."""
    if not _messages_of_text(values.type):
        return _two_texts(map(split_conversation, _python_values(values)))
    messages = pc.list_flatten(values)
    contents, roles = _field(messages, _CONTENT_FIELDS), _field(messages, _ROLE_FIELDS)
    assistants = pc.is_in(roles, pa.array(ASSISTANT_ROLES)).to_numpy(zero_copy_only=False)
    return _joined_per_row(values, contents, ~assistants), _joined_per_row(values, contents, assistants)


def _split_preferences(chosen: pa.Array, rejected: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The text that both answers start with, and the rest of `chosen`, of each row."""
    pairs = zip(_python_values(chosen), _python_values(rejected), strict=True)
    parts = (_split_at_difference(one or (), other or ()) for one, other in pairs)
    return _two_texts((_plain_text(prompt), _plain_text(response)) for prompt, response in parts)


def _split_at_difference(one: Any, other: Any) -> tuple[Any, Any]:
    """The start that two texts, lists or arrays share, and the rest of the first."""
    shared = min(len(one), len(other))
    at = next((place for place in range(shared) if one[place] != other[place]), shared)
    return one[:at], one[at:]


def _split_at_labels(tokens: NDArray[np.int64], labels: Sequence[int] | NDArray[np.int64] = ()) -> tuple[Any, Any]:
    """The masked tokens and the trained ones; all tokens twice where none is masked."""
    masked = np.asarray(labels) == -100
    return (tokens[masked], tokens[~masked]) if masked.any() else (tokens, tokens)


def _two_texts(pairs: Iterable[tuple[str, str]]) -> tuple[pa.Array, pa.Array]:
    prompts, responses = zip(*pairs, strict=True)
    return pa.array(prompts, pa.string()), pa.array(responses, pa.string())


def _python_values(values: pa.Array) -> list[Any]:
    """Return the values as Python objects; `datasets` stores values of several types or keys as JSON, decoded here."""
    return Features.from_arrow_schema(pa.schema({"values": values.type})).decode_column(values.to_pylist(), "values")


def _is_nested(kind: pa.DataType) -> bool:
    """Return whether values are lists or mappings, or JSON."""
    return pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)


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
        (response if role in ASSISTANT_ROLES else prompt).append(_content(message))
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


# --- tokens in Arrow arrays -------------------------------------------------------------------------------------------


def _is_list_of_integers(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and (pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type))


def _cut(lists: pa.Array, lengths: NDArray[np.int64], keep_end: bool = False, fill: int = -1) -> NDArray[Any]:
    """The first, or with `keep_end` the last, `lengths` values of each list, row after row; `fill` for null."""
    values = pc.list_flatten(lists)
    if values.null_count:
        values = values.cast(pa.int64()).fill_null(fill)
    flat, stored = values.to_numpy(zero_copy_only=False), _list_lengths(lists)
    if np.array_equal(stored, lengths):
        return flat
    firsts = np.cumsum(stored) - (lengths if keep_end else stored)
    return flat[np.arange(lengths.sum()) + np.repeat(firsts - np.cumsum(lengths) + lengths, lengths)]


def _common_starts(one: pa.Array, other: pa.Array) -> NDArray[np.int64]:
    """(rows,) values with which both lists of a row start."""
    lengths = np.minimum(_list_lengths(one), _list_lengths(other))
    starts = np.cumsum(lengths) - lengths
    differ = np.append(np.flatnonzero(_cut(one, lengths) != _cut(other, lengths)), lengths.sum())
    return np.minimum(differ[np.searchsorted(differ, starts)] - starts, lengths)


def _have_own_labels(labels: pa.Array, input_ids: pa.Array, attention: pa.Array | None = None) -> NDArray[np.bool_]:
    """(rows,) whether a row's labels cannot be those of its `input_ids`."""
    given = pc.and_(pc.is_valid(labels), pc.is_valid(input_ids)).to_numpy(zero_copy_only=False)
    lengths = _list_lengths(labels)
    own = given & (lengths != _list_lengths(input_ids))
    if attention is None or own.any():
        return own
    lengths = np.minimum(lengths, _list_lengths(attention))
    label, token, attended = (_cut(lists, lengths) for lists in (labels, input_ids, attention))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    own[rows[(attended == 0) & (label != -100) & (label != token)]] = True
    return own
