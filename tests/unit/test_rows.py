"""`Rows`: what a dataset says, in every form that TRL trains on.

1. Prompt and response come out of each form; missing ones are empty; no form is an error with the columns.
2. Rows come in the dataset's order, through an indices mapping and in any format.
3. Token counts are those of a count by hand, for any list type, mask and truncation.
4. The assistant's tokens are those that the chat template itself marks.
5. What TRL prepares is read as what the user gave.
"""

import json
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import tiny_model, tiny_tokenizer

from commonit_trl.rows import Rows, split_conversation


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
    "text beside tokens": ([{"text": "t", "input_ids": [1, 2], "labels": [-100, 2]}], [("t", "t")]),
    "a column named messages that holds text": ([{"messages": "no list", "text": "t"}], [("t", "t")]),
}


@pytest.mark.parametrize("form", FORMS)
def test_prompt_and_response_of_every_form(form: str) -> None:
    rows, expected = FORMS[form]
    assert texts(Dataset.from_list(rows)) == expected


def test_both_is_prompt_and_response_and_a_text_once() -> None:
    assert Rows(Dataset.from_list(FORMS["instruction, input and output"][0])).texts("both") == [
        "I\nX\nO",
        "I\nO",
        "I",
    ]
    assert Rows(Dataset.from_list(FORMS["text"][0])).texts("both") == ["all of it", ""]


def test_a_text_field_of_another_name() -> None:
    assert texts(Dataset.from_dict({"body": ["b"], "text": ["t"]}), text_field="body") == [("b", "b")]


def test_tokens_alone_are_decoded_and_the_masked_ones_are_the_prompt() -> None:
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


@pytest.mark.parametrize("columns", [["question", "answer"], ["prompt"], ["completion", "label"], ["instruction"]])
def test_no_form_is_an_error_that_names_the_columns(columns: list[str]) -> None:
    with pytest.raises(ValueError, match=f"The dataset has: {', '.join(columns)}") as caught:
        Rows(Dataset.from_dict({column: ["x"] for column in columns})).texts()
    assert "\n" not in str(caught.value)


def test_leftover_columns_beside_tokens_do_no_harm() -> None:
    tokenizer = tiny_tokenizer()
    rows = {"prompt": ["p"], "input": ["i"], "input_ids": [tokenizer("both")["input_ids"]]}
    assert texts(Dataset.from_dict(rows), tokenizer) == [("both", "both")]


def test_split_conversation_of_nothing_is_empty() -> None:
    assert split_conversation([]) == ("", "")


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
def test_rows_are_read_in_the_datasets_order_and_in_any_format(how: str, format: str | None, monkeypatch: Any) -> None:
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
    """Token ids and a mask of 0 and 1 of the same length; some rows are empty or null."""
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
def test_token_counts_are_those_of_a_count_by_hand(
    rows: Any, kind: str, column: str, max_length: int | None, keep_end: bool, truncated: bool, data: Any
) -> None:
    ids, masks = rows
    if column == "labels":
        truncated, kind = (
            False,
            "list" if kind == "bool" else kind,
        )  # TRL cuts the labels with the tokens, not the masks
        masks = [None if mask is None else [5 if bit else -100 for bit in mask] for mask in masks]
    value = Value({"int32": "int32", "bool": "bool"}.get(kind, "int64"))

    def cut(row: list[int] | None, limit: int | None) -> list[int]:
        row = row or []
        return row if limit is None else row[-limit:] if keep_end else row[:limit]

    def unmasked(row: list[int]) -> int:
        return sum(value != (-100 if column == "labels" else 0) for value in row)

    before = data.draw(st.integers(1, 6)) if truncated else None  # the tokens were cut before, the mask was not
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


def test_token_counts_of_lists_of_fixed_size() -> None:
    features = Features({"input_ids": List(Value("int32"), length=3), "labels": List(Value("int64"), length=3)})
    rows = {"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [[-100, 2, 3], [-100, -100, 6]]}
    rows = Rows(Dataset.from_dict(rows, features=features).select([1, 0]))
    assert rows.token_counts("total").tolist() == [3, 3]
    assert rows.token_counts("response").tolist() == [1, 2]


def test_labels_that_mask_nothing_leave_the_word_to_the_masks_of_trl() -> None:
    rows = {"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]], "completion_mask": [[0, 0, 1, 1]]}
    assert Rows(Dataset.from_dict(rows)).token_counts("response").tolist() == [1]
    rows["labels"] = [[-100, 2, 3]]
    assert Rows(Dataset.from_dict(rows)).token_counts("response").tolist() == [2]


def test_rows_in_which_nothing_is_masked_count_whole(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "commonit_trl")
    dataset = Dataset.from_dict({"input_ids": [[1, 2], [3], []], "messages": [[turn("assistant", "x")]] * 3})
    for rows in (Rows(dataset.remove_columns("messages")), Rows(dataset), Rows(dataset, object())):
        assert rows.token_counts("response").tolist() == [2, 1, 0]
    assert "is that of the whole row" in caplog.text


def test_token_counts_of_raw_rows_are_an_error_that_names_the_columns() -> None:
    with pytest.raises(ValueError, match=r"input_ids.*has only: text\."):
        Rows(Dataset.from_dict({"text": ["x"]})).token_counts()


def test_an_empty_dataset_has_empty_answers() -> None:
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
    """Rows as TRL prepares them, trained on every token; and how many tokens the template marks in each."""
    tokenizer, ids, expected = tiny_tokenizer(), [], []
    part = slice(None) if limit is None else slice(-limit, None) if keep_end else slice(limit)
    for conversation in CONVERSATIONS:
        tokens = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, return_dict=True)
        ids.append(tokens["input_ids"][part])
        expected.append(sum(tokens["assistant_masks"][part]))
    return Dataset.from_dict({"messages": CONVERSATIONS, "input_ids": ids, "labels": ids, **columns}), expected


@pytest.mark.parametrize("limit", [None, 5, 12, 20, 25, 40, 60])
@pytest.mark.parametrize("keep_end", [False, True])
def test_the_assistants_tokens_are_those_that_the_template_marks(limit: int | None, keep_end: bool) -> None:
    order = [3, 0, 4, 1, 2]
    dataset, expected = conversational(limit, keep_end)
    rows = Rows(dataset.select(order), tiny_tokenizer(), keep_end=keep_end)
    assert rows.token_counts("response").tolist() == [expected[row] for row in order]
    whole, _ = conversational()  # truncation that is still to come, as before packing, gives the same
    rows = Rows(whole.select(order), tiny_tokenizer(), keep_end=keep_end, max_length=limit)
    assert rows.token_counts("response").tolist() == [expected[row] for row in order]


def test_the_first_rows_may_have_no_turn_of_the_assistant() -> None:
    dataset, expected = conversational()
    rows = Rows(dataset.select([2, 2]), tiny_tokenizer())
    assert rows.token_counts("response").tolist() == [0, 0] == [expected[2]] * 2


def test_many_conversations_each_have_their_own_truncation() -> None:
    whole, cut = conversational(), conversational(5)
    dataset = concatenate_datasets([part.select([0, 4] * 600) for part, _ in (cut, whole, cut)])
    expected = [marked[row] for _, marked in (cut, whole, cut) for row in [0, 4] * 600]
    assert Rows(dataset, tiny_tokenizer()).token_counts("response").tolist() == expected


def test_sharegpt_turns_count_like_messages() -> None:
    conversation = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    dataset = Dataset.from_dict({"conversations": [conversation], "input_ids": [list(range(99))]})
    # Rendered as <human>hi<gpt>hello, and this template has no generation prompt that would be the prompt's.
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    rows = Rows(dataset, tiny_tokenizer(), chat_template=template)
    assert rows.token_counts("response").tolist() == [len("<gpt>hello")]


def test_tools_and_template_arguments_are_given_to_the_template() -> None:
    template = (
        "{% if tools %}{{ tools[0]['name'] }}{% endif %}{% for m in messages %}<{{ m['role'] }}>"
        "{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% if thinking %}<think>{% endif %}{% endif %}"
    )
    messages = [turn("user", "q"), turn("assistant", "<think>deep")]
    columns = {
        "messages": [messages] * 2,
        "input_ids": [list(range(99)), list(range(len("tool<user>q<assistant><t")))],
    }
    columns["tools"] = [json.dumps([{"name": "tool"}])] * 2
    plain = Rows(Dataset.from_dict(columns), tiny_tokenizer(), chat_template=template)
    assert plain.token_counts("response").tolist() == [len("<think>deep"), len("<t")]
    columns["chat_template_kwargs"] = [{"thinking": True}] * 2
    thinking = Rows(Dataset.from_dict(columns), tiny_tokenizer(), chat_template=template)
    assert thinking.token_counts("response").tolist() == [len("deep"), 0]


# --- prepared by TRL ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's own preparation of a training set, and `Rows` on it as the trainer makes them."""
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
def test_rows_that_trl_prepared_to_be_trained_whole(prepare: Any, mode: str) -> None:
    _, expected = conversational(20, mode == "keep_end")
    rows = prepare([{"messages": conversation} for conversation in CONVERSATIONS], mode, max_length=20)
    assert rows.token_counts("response").tolist() == expected
    assert rows.texts("response") == ["hello", "long answer\nc", "", "y", "twice"]
    parts = [{"prompt": "a" * 8, "completion": "b" * 5}, {"prompt": "a", "completion": "b"}]
    rows = prepare(parts, mode, max_length=9, completion_only_loss=False)  # one token more, <eos>
    assert rows.token_counts("total").tolist() == [9, 3]
    assert rows.token_counts("response").tolist() == [1 if mode == "keep_start" else 6, 2]
    assert rows.texts("both") == ["aaaaaaaa\nbbbbb", "a\nb"]


@pytest.mark.filterwarnings("ignore")
def test_rows_that_trl_prepared_to_be_trained_on_the_response(prepare: Any) -> None:
    parts = [{"prompt": "a" * 8, "completion": "b" * 5}, {"prompt": "a", "completion": "b"}]
    rows = prepare(parts, "keep_start", max_length=10)
    assert rows.token_counts("response").tolist() == [2, 2]
    sharegpt = [{"from": "user", "value": "U"}, {"from": "assistant", "value": "A"}]
    rows = prepare([{"conversations": sharegpt}], "keep_start", max_length=None)
    assert rows.token_counts("response").tolist() == [len("A") + 1]
    assert texts(rows.dataset) == [("U", "A")]
    rows = prepare([{"text": "plain"}], "keep_start", max_length=None)
    assert rows.texts("prompt") == rows.texts("response") == rows.texts("both") == ["plain"]
    assert rows.token_counts("response").tolist() == [len("plain") + 1]


def test_counts_are_numpy_integers() -> None:
    for of in ("total", "response", "prompt"):
        assert Rows(numbered()).token_counts(of).dtype == np.int64
