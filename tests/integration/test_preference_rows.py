"""`Rows` reads columns of TRL's DPO, reward and KTO trainers: the response is the chosen answer or the completion."""

import pytest
from datasets import Dataset
from helpers.kinds import KINDS
from helpers.toys import QUIET, tiny_tokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from commonit_trl import Rows

PROMPTS, CHOSEN, REJECTED = ["one? ", "another? "], ["yes", "long answer"], ["no", "nothing"]


def messages(role, text):
    return [{"role": role, "content": text}]


FORMS = {
    "text": lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r},
    "messages": lambda p, c, r: {
        "prompt": messages("user", p),
        "chosen": messages("assistant", c),
        "rejected": messages("assistant", r),
    },
    "text, implicit prompt": lambda p, c, r: {"chosen": p + c, "rejected": p + r},
    "messages, implicit prompt": lambda p, c, r: {
        "chosen": messages("user", p) + messages("assistant", c),
        "rejected": messages("user", p) + messages("assistant", r),
    },
}


TRAINERS = {
    "DPO": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "KTO": (KTOTrainer, KTOConfig),
    "ORPO": (ORPOTrainer, ORPOConfig),
    "CPO": (CPOTrainer, CPOConfig),
}


def prepared(kind, rows, model, tmp_path):
    """Return the training set of TRL's trainer of this kind."""
    trainer, config = TRAINERS[kind]
    model = KINDS["reward"].model() if kind == "reward" else model
    arguments = {"args": config(output_dir=str(tmp_path), **QUIET), "train_dataset": Dataset.from_list(rows)}
    return trainer(model=model, processing_class=tiny_tokenizer(), **arguments).train_dataset


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["DPO", "reward"])
def test_the_response_of_a_preference_is_the_chosen_answer(kind, form, model, tmp_path):
    raw = [FORMS[form](*row) for row in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
    dataset, tokenizer = prepared(kind, raw, model, tmp_path), tiny_tokenizer()
    expected = list(zip(PROMPTS, CHOSEN, strict=True))
    if "text" in form and "implicit" in form and kind == "DPO":
        expected = [(prompt.rstrip(), f" {answer}") for prompt, answer in expected]  # TRL moves the space
    for rows in (Rows(Dataset.from_list(raw)), Rows(dataset, tokenizer)):
        found = zip(rows.texts("prompt"), rows.texts("response"), strict=True)
        assert [tuple(map(str.strip, pair)) for pair in found] == [tuple(map(str.strip, pair)) for pair in expected]
    rows = Rows(dataset, tokenizer)
    assert rows.token_counts("response").tolist() == [len(answer) + 1 for _, answer in expected]  # and <eos>
    tokens = dataset.select_columns([column for column in dataset.column_names if column.endswith("_ids")])
    decoded = zip(Rows(tokens, tokenizer).texts("prompt"), Rows(tokens, tokenizer).texts("response"), strict=True)
    for (prompt, answer), pair in zip(expected, decoded, strict=True):
        assert prompt in pair[0]
        assert pair[1] == answer


@pytest.mark.parametrize("kind", ["ORPO", "CPO"])
def test_the_response_of_orpo_and_cpo_is_the_chosen_answer(kind, model, tmp_path):
    raw = [FORMS["text"](*row) for row in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
    dataset, tokenizer = prepared(kind, raw, model, tmp_path), tiny_tokenizer()
    rows = Rows(dataset, tokenizer)
    assert rows.token_counts("prompt").tolist() == list(map(len, PROMPTS))
    assert rows.token_counts("response").tolist() == [len(answer) + 1 for answer in CHOSEN]  # and <eos>
    for read in (rows, Rows(dataset.select_columns(["chosen_input_ids", "chosen_labels"]), tokenizer)):
        assert (read.texts("prompt"), read.texts("response")) == (PROMPTS, CHOSEN)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["text", "messages"])
def test_the_response_of_kto_is_the_completion(form, model, tmp_path):
    raw = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": label}
        for label in (True, False)
        for row in (FORMS[form](*row) for row in zip(PROMPTS, CHOSEN, REJECTED, strict=True))
    ]
    dataset, tokenizer = prepared("KTO", raw, model, tmp_path), tiny_tokenizer()
    rows = Rows(dataset, tokenizer)
    assert sorted(rows.texts("response")) == sorted(CHOSEN * 2)
    assert sorted(rows.token_counts("response").tolist()) == sorted(len(answer) + 1 for answer in CHOSEN * 2)
