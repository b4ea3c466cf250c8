"""Memory and open files do not grow during a long run."""

import gc
import statistics

import psutil
import pytest
from datasets import Dataset
from helpers.trainers import make_trainer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

EPOCHS, STEPS = 50, 2000
WARM_UP = 10
GROUPS = 8


class Use(TrainerCallback):
    """Records resident memory in bytes and open files at the end of each epoch."""

    def __init__(self):
        self.memory, self.files = [], []

    def on_epoch_end(self, args, state, control, **kwargs):
        gc.collect()
        process = psutil.Process()
        self.memory.append(process.memory_info().rss)
        self.files.append(process.num_fds())


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_soak(tmp_path, figures):
    tokens = [[1, 2, 3 + number % 5] for number in range(STEPS)]
    tasks = [f"g{number % GROUPS}" for number in range(STEPS)]
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens, "task": tasks})
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, num_key_value_heads=1, **shape))
    use = Use()
    options = {"per_device_train_batch_size": 1, "num_train_epochs": EPOCHS, "dataloader_num_workers": 2}
    logging = {"logging_steps": 500, "save_strategy": "steps", "save_steps": 10_000, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, rows, model=model, extra={"callbacks": [use]}, **options, **logging)
    result = trainer.train()
    assert trainer.state.global_step == EPOCHS * STEPS

    first, last = statistics.median(use.memory[WARM_UP : WARM_UP + 5]), statistics.median(use.memory[-5:])
    growth = last / first - 1
    figures["A long run"].append(
        {
            "steps": trainer.state.global_step,
            "epochs": EPOCHS,
            "dataloader workers": 2,
            "minutes": round(result.metrics["train_runtime"] / 60, 1),
            f"resident memory after {WARM_UP} epochs, MB": round(first / 1e6, 1),
            "at the end, MB": round(last / 1e6, 1),
            "growth, %": round(100 * growth, 2),
            "open files after the first epoch": use.files[0],
            "at most": max(use.files),
        }
    )
    assert growth < 0.02, use.memory
    assert max(use.files) <= use.files[0], use.files
