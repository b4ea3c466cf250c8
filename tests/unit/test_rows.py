"""`Rows` reads every data format that TRL trains on.

1. Every format has prompts and responses; missing ones are empty; an unknown format is an error that names the columns.
2. Rows keep the dataset's order, with an indices mapping and in any `datasets` format.
3. Token counts equal a count by hand, for any list type, mask and truncation, without padding.
4. The assistant's tokens are those that the chat template marks; rows that TRL prepares alike have equal counts.
5. Rows that TRL prepared have the user's text.
6. Values that `datasets` stores as JSON are decoded.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Json, LargeList, List, Value, concatenate_datasets, load_dataset
from helpers.toys import tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from commonit_trl.rows import Rows


def texts(dataset: Dataset, tokenizer: Any = None, **options: Any) -> list[tuple[str, str]]:
    rows = Rows(dataset, tokenizer, **options)
    return list(zip(rows.texts("prompt"), rows.texts("response"), strict=True))


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


# --- texts --------------------------------------------------------------------------------------------------

TWO_TURNS = [
    turn("system", "S"),
    turn("user", "U"),
    turn("assistant", "A"),
    turn("user", "V"),
    turn("assistant", "B"),
]

FORMS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str]]]] = {
    "text": ([{"text": "all of it"}, {"text": None}], [("all of it", "all of it"), ("", "")]),
    "prompt and completion": (
        [
            {"prompt": "p", "completion": "c"},
            {"prompt": None, "completion": "c"},
            {"prompt": "p", "completion": None},
        ],
        [("p", "c"), ("", "c"), ("p", "")],
    ),
    "prompt and completion of messages": (
        [
            {"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]},
            {"prompt": [turn("user", None)], "completion": []},
        ],
        [("S\nU\nA\nV", "B"), ("", "")],
    ),
    "messages": (
        [
            {"messages": TWO_TURNS},
            {"messages": [turn("user", "U"), turn("assistant", None)]},
            {"messages": None},
        ],
        [("S\nU\nV", "A\nB"), ("U", ""), ("", "")],
    ),
    "messages with other names of the roles": (
        [{"messages": [turn("human", "U"), turn("gpt", "A"), turn("tool", "T"), turn("model", "B")]}],
        [("U\nT", "A\nB")],
    ),
    "messages of parts": (
        [
            {
                "messages": [
                    turn("user", [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]),
                    turn("assistant", [{"type": "text", "text": "a"}, {"type": "text", "text": "cat"}]),
                ]
            }
        ],
        [("what?", "a\ncat")],
    ),
    "ShareGPT": (
        [{"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]}],
        [("U", "A")],
    ),
    "instruction, input and output": (
        [
            {"instruction": "I", "input": "X", "output": "O"},
            {"instruction": "I", "input": "", "output": "O"},
            {"instruction": "I", "input": None, "output": None},
        ],
        [("I\nX", "O"), ("I", "O"), ("I", "")],
    ),
    "instruction and output": ([{"instruction": "I", "output": "O"}], [("I", "O")]),
    "Alpaca's text beside its parts": ([{"instruction": "I", "output": "O", "text": "I O"}], [("I", "O")]),
    "prompt and completion before messages": (
        [{"messages": TWO_TURNS, "prompt": "p", "completion": "c"}],
        [("p", "c")],
    ),
    "prompt, chosen and rejected": (
        [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": None, "chosen": "c", "rejected": None}],
        [("p", "c"), ("", "c")],
    ),
    "prompt, chosen and rejected of messages": (
        [{"prompt": TWO_TURNS[:4], "chosen": TWO_TURNS[4:], "rejected": [turn("assistant", "no")]}],
        [("S\nU\nA\nV", "B")],
    ),
    "chosen and rejected": (
        [{"chosen": "Q: yes", "rejected": "Q: no"}, {"chosen": "same", "rejected": "same"}],
        [("Q: ", "yes"), ("same", "")],
    ),
    "chosen and rejected of messages": (
        [{"chosen": TWO_TURNS, "rejected": [*TWO_TURNS[:4], turn("assistant", "no")]}],
        [("S\nU\nA\nV", "B")],
    ),
    "messages, which SFT trains, beside chosen and rejected": (
        [{"messages": TWO_TURNS, "chosen": "c", "rejected": "r"}],
        [("S\nU\nV", "A\nB")],
    ),
    "prompt, completion and label": ([{"prompt": "p", "completion": "c", "label": True}], [("p", "c")]),
    "text beside tokens": ([{"text": "t", "input_ids": [1, 2], "labels": [-100, 2]}], [("t", "t")]),
    "a column named messages that holds text": ([{"messages": "no list", "text": "t"}], [("t", "t")]),
}


@pytest.mark.parametrize("form", FORMS)
def test_prompt_and_response_of_every_format(form: str) -> None:
    rows, expected = FORMS[form]
    assert texts(Dataset.from_list(rows)) == expected


def test_both_joins_prompt_and_response() -> None:
    for form, expected in (("instruction, input and output", ["I\nX\nO", "I\nO", "I"]), ("text", ["all of it", ""])):
        assert Rows(Dataset.from_list(FORMS[form][0])).texts("both") == expected


def test_custom_text_field() -> None:
    assert texts(Dataset.from_dict({"body": ["b"], "text": ["t"]}), text_field="body") == [("b", "b")]


def test_tokens_are_decoded_and_masked_ones_are_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    prompt, response = tokenizer("Frage: ü?")["input_ids"], tokenizer("Antwort\n")["input_ids"]
    eos = tokenizer.eos_token_id
    rows = [
        {"input_ids": prompt + response + [eos], "labels": [-100] * len(prompt) + response + [eos]},
        {"input_ids": prompt, "labels": prompt},
        {"input_ids": prompt, "labels": [-100] * len(prompt)},
        {"input_ids": prompt, "labels": None},
        {"input_ids": [], "labels": []},
    ]
    expected = [
        ("Frage: ü?", "Antwort\n"),
        ("Frage: ü?",) * 2,
        ("Frage: ü?", ""),
        ("Frage: ü?",) * 2,
        ("", ""),
    ]
    dataset = Dataset.from_list(rows)
    assert texts(dataset, tokenizer) == expected
    assert texts(dataset.remove_columns("labels"), tokenizer)[1:3] == [("Frage: ü?",) * 2] * 2
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        texts(dataset)


PREFERENCE_TOKENS = {
    "DPO": {"prompt_ids": "Q: ", "chosen_ids": "yes", "rejected_ids": "no"},
    "reward": {"chosen_ids": "Q: yes", "rejected_ids": "Q: no"},
    "KTO": {"prompt_ids": "Q: ", "completion_ids": "yes", "label": True},
}


@pytest.mark.parametrize("kind", PREFERENCE_TOKENS)
def test_response_of_tokenised_preferences_is_the_chosen_one(kind: str) -> None:
    tokenizer = tiny_tokenizer()
    other = {name: value * 2 if isinstance(value, str) else value for name, value in PREFERENCE_TOKENS[kind].items()}
    dataset = Dataset.from_list(
        [
            {name: tokenizer(value)["input_ids"] if isinstance(value, str) else value for name, value in row.items()}
            for row in (PREFERENCE_TOKENS[kind], other, PREFERENCE_TOKENS[kind])
        ]
    ).select([1, 0])
    rows = Rows(dataset, tokenizer)
    first = ("Q: ", "yesQ: yes") if kind == "reward" else ("Q: Q: ", "yesyes")
    assert rows.tokenized
    assert texts(dataset, tokenizer) == [first, ("Q: ", "yes")]
    assert rows.token_counts("prompt").tolist() == [len(first[0]), 3]
    assert rows.token_counts("response").tolist() == rows.trained_counts().tolist() == [len(first[1]), 3]
    assert rows.token_counts("total").tolist() == [len("".join(first)), 6]
    for keep_end, response in ((False, [max(0, 4 - len(first[0])), 1]), (True, [4, 3])):
        cut = Rows(dataset, tokenizer, max_length=4, keep_end=keep_end)
        assert cut.token_counts("total").tolist() == [4, 4]
        assert cut.token_counts("response").tolist() == response


@pytest.mark.parametrize("columns", [["question", "answer"], ["prompt"], ["completion", "label"], ["instruction"]])
def test_unknown_format_is_an_error_that_names_the_columns(columns: list[str]) -> None:
    with pytest.raises(ValueError, match=f"The dataset has: {', '.join(columns)}") as caught:
        Rows(Dataset.from_dict({column: ["x"] for column in columns})).texts()
    assert "\n" not in str(caught.value)


def test_other_columns_beside_tokens_are_ignored() -> None:
    tokenizer = tiny_tokenizer()
    rows = {"prompt": ["p"], "input": ["i"], "input_ids": [tokenizer("both")["input_ids"]]}
    assert texts(Dataset.from_dict(rows), tokenizer) == [("both", "both")]


# --- order and format ---------------------------------------------------------------------------------------


def numbered(rows: int = 50) -> Dataset:
    return Dataset.from_dict(
        {
            "text": [f"row {row}" for row in range(rows)],
            "task": [f"task {row}" for row in range(rows)],
            "input_ids": [[1] * row for row in range(rows)],
            "labels": [[-100] * (row // 2) + [1] * (row - row // 2) for row in range(rows)],
        }
    )


@pytest.mark.parametrize("how", ["shuffle", "select", "repeat", "slice", "none"])
@pytest.mark.parametrize("format", [None, "numpy", "torch", "arrow", "transform"])
def test_rows_keep_the_dataset_order_in_any_format(how: str, format: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr("commonit_trl.rows._ROWS_AT_ONCE", 7)
    dataset = {
        "shuffle": lambda dataset: dataset.shuffle(seed=3),
        "select": lambda dataset: dataset.select([9, 2, 31, 4]),
        "repeat": lambda dataset: dataset.select([5, 5, 1, 5]),
        "slice": lambda dataset: dataset.select(range(10, 30)),
        "none": lambda dataset: dataset,
    }[how](numbered())
    order = [int(text.split()[1]) for text in dataset["text"]]
    if format == "transform":
        dataset.set_transform(lambda batch: {"text": ["transformed"] * len(batch["text"])})
    elif format:
        dataset = dataset.with_format(format)
    rows = Rows(dataset)
    assert rows.texts() == [f"row {row}" for row in order]
    assert rows.labels(["task"]) == [f"task {row}" for row in order]
    assert rows.token_counts("total").tolist() == order
    assert rows.token_counts("response").tolist() == [row - row // 2 for row in order]
    assert rows.token_counts("prompt").tolist() == [row // 2 for row in order]


# --- token counts -------------------------------------------------------------------------------------------

LISTS = {"list": List, "large list": LargeList, "int32": List, "bool": List}


@st.composite
def masked_rows(draw: Any) -> tuple[list[list[int] | None], list[list[int] | None]]:
    """Draw token ids and a 0/1 mask of equal length; some rows are empty or null."""
    sizes = draw(st.lists(st.one_of(st.none(), st.integers(0, 6)), min_size=1, max_size=12))
    ids = [None if size is None else list(range(size)) for size in sizes]
    masks = [
        None if size is None else draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)) for size in sizes
    ]
    return ids, masks


@settings(max_examples=60, deadline=None)
@given(
    rows=masked_rows(),
    kind=st.sampled_from(sorted(LISTS)),
    column=st.sampled_from(["labels", "completion_mask", "assistant_masks"]),
    max_length=st.one_of(st.none(), st.integers(1, 7)),
    keep_end=st.booleans(),
    truncated=st.booleans(),
    data=st.data(),
)
def test_token_counts_equal_a_count_by_hand(
    rows: Any, kind: str, column: str, max_length: int | None, keep_end: bool, truncated: bool, data: Any
) -> None:
    ids, masks = rows
    if column == "labels":  # TRL truncates labels with the tokens, but not masks
        truncated, kind = False, "list" if kind == "bool" else kind
        masks = [None if mask is None else [5 if bit else -100 for bit in mask] for mask in masks]
    value = Value({"int32": "int32", "bool": "bool"}.get(kind, "int64"))

    def cut(row: list[int] | None, limit: int | None) -> list[int]:
        row = row or []
        return row if limit is None else row[-limit:] if keep_end else row[:limit]

    def unmasked(row: list[int]) -> int:
        return sum(value != (-100 if column == "labels" else 0) for value in row)

    before = data.draw(st.integers(1, 6)) if truncated else None  # earlier truncation of tokens, but not of the mask
    stored = [None if row is None else cut(row, before) for row in ids]
    dataset = Dataset.from_dict(
        {"input_ids": stored, column: masks},
        features=Features({"input_ids": List(Value("int32")), column: LISTS[kind](value)}),
    )
    order = data.draw(st.permutations(range(len(ids))))
    dataset = dataset.select(order)
    counted = Rows(dataset, max_length=max_length, keep_end=keep_end)
    limits = [limit for limit in (before, max_length) if limit is not None]
    limit = min(limits) if limits else None
    total = [len(cut(ids[row], limit)) for row in order]
    response = [unmasked(cut(masks[row], limit)) for row in order]
    assert counted.token_counts("total").tolist() == total
    assert counted.token_counts("response").tolist() == response
    assert (counted.token_counts("prompt") + counted.token_counts("response")).tolist() == total
    for shifted in (False, True):
        trained = [unmasked(cut(masks[row], limit)[shifted:]) for row in order]
        assert counted.trained_counts(shifted).tolist() == trained


def test_token_counts_of_lists_of_fixed_size() -> None:
    features = Features({"input_ids": List(Value("int32"), length=3), "labels": List(Value("int64"), length=3)})
    rows = {"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [[-100, 2, 3], [-100, -100, 6]]}
    rows = Rows(Dataset.from_dict(rows, features=features).select([1, 0]))
    assert rows.token_counts("total").tolist() == [3, 3]
    assert rows.token_counts("response").tolist() == [1, 2]


def test_trl_masks_apply_if_labels_mask_nothing() -> None:
    rows = {"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]], "completion_mask": [[0, 0, 1, 1]]}
    assert Rows(Dataset.from_dict(rows)).token_counts("response").tolist() == [1]
    rows["labels"] = [[-100, 2, 3]]
    assert Rows(Dataset.from_dict(rows)).token_counts("response").tolist() == [2]


def test_unmasked_rows_count_as_response(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "commonit_trl")
    dataset = Dataset.from_dict({"input_ids": [[1, 2], [3], []], "messages": [[turn("assistant", "x")]] * 3})
    for rows in (Rows(dataset.remove_columns("messages")), Rows(dataset), Rows(dataset, object())):
        assert rows.token_counts("response").tolist() == [2, 1, 0]
    assert "the response is the whole row" in caplog.text


@pytest.mark.parametrize("count", [Rows.token_counts, Rows.trained_counts])
def test_token_counts_of_raw_rows_raise_with_the_columns(count: Any) -> None:
    with pytest.raises(ValueError, match=r"input_ids.*has only: text\."):
        count(Rows(Dataset.from_dict({"text": ["x"]})))


def test_empty_dataset_has_no_texts_labels_or_counts() -> None:
    rows = Rows(numbered().select([]))
    assert rows.token_counts("response").tolist() == rows.texts() == rows.labels(["task"]) == []


# --- the assistant's tokens ---------------------------------------------------------------------------------

CONVERSATIONS = [
    [turn("user", "hi"), turn("assistant", "hello")],
    [
        turn("system", "be kind"),
        turn("user", "a"),
        turn("assistant", "long answer"),
        turn("user", "b"),
        turn("assistant", "c"),
    ],
    [turn("user", "only a question")],
    [turn("user", "x"), turn("assistant", "y"), turn("user", "unanswered")],
    [turn("user", "x"), turn("assistant", ""), turn("assistant", "twice")],
]


def conversational(limit: int | None = None, keep_end: bool = False, **columns: Any) -> tuple[Dataset, list[int]]:
    """Return rows as TRL prepares them, trained on every token, and the number of tokens that the template marks."""
    tokenizer, ids, expected = tiny_tokenizer(), [], []
    part = slice(None) if limit is None else slice(-limit, None) if keep_end else slice(limit)
    for conversation in CONVERSATIONS:
        tokens = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, return_dict=True)
        ids.append(tokens["input_ids"][part])
        expected.append(sum(tokens["assistant_masks"][part]))
    return Dataset.from_dict({"messages": CONVERSATIONS, "input_ids": ids, "labels": ids, **columns}), expected


@pytest.mark.parametrize("limit", [None, 5, 12, 20, 25, 40, 60])
@pytest.mark.parametrize("keep_end", [False, True])
def test_assistant_tokens_equal_the_template_mask(limit: int | None, keep_end: bool) -> None:
    order = [2, 0, 4, 1, 3]  # the first row has no assistant turn
    dataset, expected = conversational(limit, keep_end)
    rows = Rows(dataset.select(order), tiny_tokenizer(), keep_end=keep_end)
    assert rows.token_counts("response").tolist() == [expected[row] for row in order]
    whole, _ = conversational()  # later truncation, as before packing, gives the same
    rows = Rows(whole.select(order), tiny_tokenizer(), keep_end=keep_end, max_length=limit)
    assert rows.token_counts("response").tolist() == [expected[row] for row in order]


def test_truncation_is_detected_per_conversation() -> None:
    whole, cut = conversational(), conversational(5)
    dataset = concatenate_datasets([part.select([0, 4] * 600) for part, _ in (cut, whole, cut)])
    expected = [marked[row] for _, marked in (cut, whole, cut) for row in [0, 4] * 600]
    assert Rows(dataset, tiny_tokenizer()).token_counts("response").tolist() == expected


def test_sharegpt_turns_count_as_messages() -> None:
    conversation = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    dataset = Dataset.from_dict({"conversations": [conversation], "input_ids": [list(range(99))]})
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    rows = Rows(dataset, tiny_tokenizer(), chat_template=template)
    assert rows.token_counts("response").tolist() == [len("hello")]


def test_template_receives_tools_and_arguments() -> None:
    template = (
        "{% if tools %}{{ tools[0]['name'] }}{% endif %}{% if thinking %}<think>{% endif %}"
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    messages = [turn("user", "q"), turn("assistant", "deep")]
    columns = {
        "messages": [messages] * 2,
        "input_ids": [list(range(99)), list(range(len("tool<user>q<assistant>de")))],
    }
    columns["tools"] = [json.dumps([{"name": "tool"}])] * 2
    plain = Rows(Dataset.from_dict(columns), tiny_tokenizer(), chat_template=template)
    assert plain.token_counts("response").tolist() == [len("deep"), len("de")]
    columns["chat_template_kwargs"] = [{"thinking": True}] * 2
    thinking = Rows(Dataset.from_dict(columns), tiny_tokenizer(), chat_template=template)
    assert thinking.token_counts("response").tolist() == [len("deep"), 0]


def shipped_template(name: str) -> str:
    """Return TRL's chat template of a model family."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def thought(text: str, answer: str) -> dict[str, Any]:
    return turn("assistant", f"<think>\n{text}\n</think>\n\n{answer}")


def rendered(conversations: list[list[dict[str, Any]]], template: str, limit: int | None, keep_end: bool) -> Rows:
    """Return conversations as TRL prepares them with `template`, trained on every token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    part = slice(None) if limit is None else slice(-limit, None) if keep_end else slice(limit)
    ids = [
        tokenizer.apply_chat_template(conversation, chat_template=template, return_dict=True)["input_ids"][part]
        for conversation in conversations
    ]
    tokens = List(Value("int64"))
    features = Features({"messages": List(Json()), "input_ids": tokens, "labels": tokens})
    columns = {"messages": conversations, "input_ids": ids, "labels": ids}
    return Rows(Dataset.from_dict(columns, features), tokenizer, keep_end=keep_end, chat_template=template)


@pytest.mark.parametrize("limit", [None, 60, 30])
@pytest.mark.parametrize("keep_end", [False, True])
def test_thoughts_dropped_by_the_template_do_not_count(limit: int | None, keep_end: bool) -> None:
    last = [turn("user", "b?"), thought("hm", "second")]
    with_thought = [turn("user", "a?"), thought("a long thought " * 9, "first"), *last]
    without = [turn("user", "a?"), turn("assistant", "first"), *last]
    rows = rendered([with_thought, without], shipped_template("qwen3"), limit, keep_end)
    first, second = rows.dataset["input_ids"]
    assert first == second, "the prepared rows are equal"
    counts = rows.token_counts("response").tolist()
    assert counts[0] == counts[1]
    if limit is None:  # the end of a turn is one token
        assert counts[0] == len("first") + 1 + len("hm\n</think>\n\nsecond") + 1
    if limit == 60 and not keep_end:
        assert counts[0] == len("first") + 1


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "get", "arguments": {"city": "x"}}}
TOOLS = [
    turn("user", "w?"),
    turn("assistant", "") | {"tool_calls": [CALL]},
    turn("tool", "3"),
    turn("assistant", "hot"),
]


@pytest.mark.parametrize(("family", "counted"), [("qwen3", True), ("llama3_1", True), ("gptoss", False)])
def test_tool_calls_count_if_the_template_supports_it(family: str, counted: bool) -> None:
    rows = rendered([TOOLS], shipped_template(family), None, False)
    response = rows.token_counts("response")[0]
    call = len('{"name": "get", "arguments": {"city": "x"}}')
    assert call < response < rows.token_counts()[0] if counted else len("hot") <= response < call


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5", "glm4moe", "phi3", "llama3", "gemma3", "deepseekv3"])
def test_assistant_tokens_differ_from_trl_masks_by_a_constant(family: str) -> None:
    marks = shipped_template(f"{family}_training")
    unmarked = []
    for text in ("first", "a longer text"):
        conversation = [turn("user", "a?"), thought("hm", text), turn("user", "b?"), turn("assistant", text * 2)]
        rows = rendered([conversation], marks, None, False)
        marked = rows.tokenizer.apply_chat_template(
            conversation, chat_template=marks, return_assistant_tokens_mask=True, return_dict=True
        )["assistant_masks"]
        unmarked.append(sum(marked) - rows.token_counts("response")[0])
    assert unmarked[0] == unmarked[1] >= 0


# --- prepared by TRL ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that prepares rows with TRL and wraps them in `Rows` as the trainer does."""
    from trl import SFTConfig, SFTTrainer

    def run(rows: list[dict[str, Any]], truncation_mode: str, **options: Any) -> Rows:
        args = SFTConfig(
            output_dir=str(tmp_path_factory.mktemp("out")),
            truncation_mode=truncation_mode,
            use_cpu=True,
            bf16=False,
            report_to=[],
            loss_type="nll",
            **options,
        )
        dataset, tokenizer = Dataset.from_list(rows), tiny_tokenizer()
        trainer = SFTTrainer(tiny_model(), args, train_dataset=dataset, processing_class=tokenizer)
        keep_end = truncation_mode == "keep_end"
        return Rows(trainer.train_dataset, tokenizer, keep_end=keep_end, chat_template=trainer.chat_template)

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_prepared_by_trl_for_all_tokens(prepare: Any, mode: str) -> None:
    _, expected = conversational(20, mode == "keep_end")
    rows = prepare([{"messages": conversation} for conversation in CONVERSATIONS], mode, max_length=20)
    assert rows.token_counts("response").tolist() == expected
    assert rows.texts("response") == ["hello", "long answer\nc", "", "y", "twice"]
    parts = [{"prompt": "a" * 8, "completion": "b" * 5}, {"prompt": "a", "completion": "b"}]
    rows = prepare(parts, mode, max_length=9, completion_only_loss=False)  # one more token, <eos>
    assert rows.token_counts("total").tolist() == [9, 3]
    assert rows.token_counts("response").tolist() == [1 if mode == "keep_start" else 6, 2]
    assert rows.texts("both") == ["aaaaaaaa\nbbbbb", "a\nb"]


# --- labels of other models, and padding --------------------------------------------------------------------


def test_seq2seq_labels_are_a_separate_sequence() -> None:
    tokenizer = tiny_tokenizer()
    question, answer = tokenizer("q?")["input_ids"], tokenizer("a long answer")["input_ids"]
    dataset = Dataset.from_dict(
        {"input_ids": [question, answer, question], "labels": [answer, question, [*question[:1], -100]]}
    )
    rows = Rows(dataset.select([1, 0, 2]), tokenizer)
    assert rows.token_counts("response").tolist() == rows.trained_counts().tolist() == [2, 13, 1]
    assert rows.token_counts("prompt").tolist() == [13, 2, 2]
    assert rows.token_counts("total").tolist() == [15, 15, 3]
    assert list(zip(rows.texts("prompt"), rows.texts("response"), strict=True)) == [
        ("a long answer", "q?"),
        ("q?", "a long answer"),
        ("q?", "q"),
    ]


def test_padded_seq2seq_labels_may_exceed_the_prompt() -> None:
    rows = {
        "input_ids": [[5, 6, 0, 0], [5, 6, 7, 0]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 0]],
        "labels": [[7, 8, 9, -100], [7, -100, -100, -100]],
    }
    rows = Rows(Dataset.from_dict(rows))
    assert rows.token_counts("response").tolist() == [3, 1]
    assert rows.token_counts("prompt").tolist() == [2, 3]


@pytest.mark.parametrize("masked", [False, True], ids=["padding is trained", "padding is masked"])
@pytest.mark.parametrize("prompt", [0, 1])
def test_padding_does_not_count(masked: bool, prompt: int) -> None:
    sizes = [2, 3, 4]
    ids = [[9] * size + [0] * (4 - size) for size in sizes]
    attention = [[1] * size + [0] * (4 - size) for size in sizes]
    labels = [[-100] * prompt + [9] * (size - prompt) + [-100 if masked else 0] * (4 - size) for size in sizes]
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": attention, "labels": labels}).select([2, 0, 1])
    rows = Rows(dataset)
    assert rows.token_counts("total").tolist() == [4, 2, 3]
    assert rows.token_counts("response").tolist() == [4 - prompt, 2 - prompt, 3 - prompt]
    cut = Rows(dataset, max_length=3)
    assert cut.token_counts("total").tolist() == [3, 2, 3]
    end = Rows(dataset, max_length=3, keep_end=True)
    assert end.token_counts("total").tolist() == [3, 1, 2]


ONE_LABEL = {
    "class": [1, 0],
    "name of a class": ["good", None],
    "number": [0.5, -100.0],
    "number of each class": [[0.5, 1.0, 0.0], [0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("kind", ONE_LABEL)
def test_labels_per_row_mask_nothing(kind: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in ("one", "seven")]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ONE_LABEL[kind]})
    rows = Rows(dataset, tokenizer)
    for counts in (rows.token_counts(), rows.token_counts("response"), rows.trained_counts()):
        assert counts.tolist() == [3, 5]
    assert texts(dataset, tokenizer) == [("one", "one"), ("seven", "seven")]


# --- trained tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, [2, 0, 0, 0]),
        ({"labels": [[1, 2, 3], [4], [], None]}, [2, 0, 0, 0]),
        ({"labels": [[1, -100, 3], [4], [], None]}, [1, 0, 0, 0]),
        ({"labels": [[-100] * 3, [-100], [], None]}, [0, 0, 0, 0]),
        ({"completion_mask": [[0, 1, 1, 1], [1], [], None]}, [2, 0, 0, 0]),
        ({"assistant_masks": [[1, 1, 1], [1], [], None], "completion_mask": [[0, 0, 1], [1], [], None]}, [1, 0, 0, 0]),
    ],
)
def test_trained_tokens_exclude_the_first_label(columns: dict[str, Any], expected: list[int]) -> None:
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [], None], **columns})
    order = [3, 0, 2, 1]
    counts = Rows(dataset.select(order)).trained_counts()
    assert counts.tolist() == [expected[row] for row in order]
    assert counts.dtype == np.int64


# --- values that datasets stores as JSON --------------------------------------------------------------------

USER, ANSWER = turn("user", "U"), turn("assistant", "A")
PARTS = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
JSON_FORMS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str]]]] = {
    "tool calls": (
        [
            {"messages": [USER, ANSWER]},
            {"messages": [USER, turn("assistant", None) | {"tool_calls": [CALL]}, turn("tool", "T"), ANSWER]},
        ],
        [("U", "A"), ("U\nT", "A")],
    ),
    "names": ([{"messages": [USER | {"name": "Ann"}, ANSWER]}, {"messages": [USER, ANSWER]}], [("U", "A")] * 2),
    "text and parts": (
        [{"messages": [USER, ANSWER]}, {"messages": [turn("user", PARTS), ANSWER]}],
        [("U", "A"), ("one\ntwo", "A")],
    ),
    "ShareGPT": (
        [{"conversations": [{"from": "human", "value": "U", "weight": 0}, {"from": "gpt", "value": "A"}]}],
        [("U", "A")],
    ),
    "prompts and completions": (
        [{"prompt": [USER | {"name": "Ann"}, turn("user", PARTS)], "completion": [ANSWER]}] * 2,
        [("U\none\ntwo", "A")] * 2,
    ),
    "text or messages": (
        [{"prompt": "P", "completion": "C"}, {"prompt": [USER], "completion": [ANSWER]}],
        [("P", "C"), ("U", "A")],
    ),
    "preferences": (
        [{"chosen": [USER | {"name": "Ann"}, ANSWER], "rejected": [USER | {"name": "Ann"}, turn("assistant", "B")]}],
        [("U", "A")],
    ),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_values_are_decoded(form: str, tmp_path: Path) -> None:
    rows, expected = JSON_FORMS[form]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + os.linesep for row in rows), encoding="utf-8")
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(dataset.features), "datasets stores these values as JSON"
    assert texts(dataset) == expected
    assert texts(dataset.select([len(rows) - 1, 0])) == [expected[-1], expected[0]]
