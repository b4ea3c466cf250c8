"""Measure how well the gradients of a group's rows agree before training.

Steps: (1) one backward pass for each training row of the study, unpadded, at the weights from which its runs start;
each gradient of all weights is kept as a random projection (signs, then sums of every `DIMENSIONS`-th element), which
keeps cosines to about 1 / sqrt(DIMENSIONS); (2) the gradient of a batch's summed loss is the sum of those of its rows,
so the cosines of any batches follow without a further pass.

    python -m benchmarks gradients --size full --data FOLDER

Cost: one pass over the rows of the study; 5 minutes for 320 rows on one core.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from numpy.typing import NDArray

from benchmarks import study
from benchmarks.common import Report, Settings, Table
from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer
from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import build_grouper, fit_assign_cached

TITLE = "Agreement of gradients within and between groups"
SIZES: dict[str, dict[str, Any]] = {size: study.SIZES[size] | {"batch": 8} for size in ("quick", "full", "gpu")}
DIMENSIONS = 2**18
DRAWS = 3
"""Seeds of the batches and halves."""
METRICS: dict[str, dict[str, Any]] = {
    "task": {"commonit_metric": "task"},
    "length": {"commonit_metric": "length"},
    "embedding:MMLU reference": {
        "commonit_metric": "embedding",
        "commonit_reference_dataset": "reference.jsonl",
        "commonit_embedding_model": "encoder",
        "commonit_min_group_size": 16,
    },
}


def run(settings: Settings) -> Report:
    """Compute the rows' gradients, and the cosines by each metric."""
    work = Path(settings["work"]).absolute()
    study.prepare(settings, work)
    trainer = make_trainer(work)
    gradients = row_gradients(trainer)
    tables, results = [], {}
    for metric, options in METRICS.items():
        paths = {
            name: str(work / value) if name.endswith(("dataset", "model")) else value for name, value in options.items()
        }
        rows = trainer.commonit.grouping.rows
        grouper = build_grouper(CommonITArguments(**paths), rows.columns, seed=0)
        grouper, group_ids = fit_assign_cached(grouper, rows)
        results[metric] = [
            agreement(gradients, group_ids, settings["batch"], np.random.default_rng(seed)) for seed in range(DRAWS)
        ]
        names = list(results[metric][0])
        tables.append(
            [metric, len(grouper.names), *(_spread([draw[name] for draw in results[metric]]) for name in names)]
        )
    return Report(
        head={
            "model": "SmolLM2-135M-Instruct, before training" if settings["model"] == "smollm2" else settings["model"],
            "rows": f"{len(gradients):,} training rows of the study; mean and range of {DRAWS} draws of the batches",
        },
        parts=[
            Table(heading="Cosines of gradients", header=("metric", "groups", *names), rows=tables),
            "*halves*: the gradients of two random halves of one group, and of halves of two groups, mean over groups "
            "with at least twice the rows of a batch. *batches*: "
            f"{settings['batch']} rows of one group, or random rows, with the gradient of all rows.",
        ],
        results=results,
    )


def make_trainer(work: Path) -> Any:
    """Return a trainer that has the model of the study and its tokenised rows."""
    args = CommonITSFTConfig(
        output_dir=str(work / "gradients"),
        commonit_metric="task",
        max_length=study.LONGEST,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"},
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    rows = load_dataset("json", data_files=str(work / "data" / "train.jsonl"), split="train")
    return CommonITSFTTrainer(str(work / "model"), args=args, train_dataset=rows)


def row_gradients(trainer: Any) -> NDArray[np.float32]:
    """Return (rows, `DIMENSIONS`) projected gradients of the summed loss of each row's trained tokens."""
    model = trainer.accelerator.unwrap_model(trainer.model).train()
    device = next(model.parameters()).device
    sizes = [weight.numel() for weight in model.parameters()]
    signs = torch.randint(0, 2, (sum(sizes),), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    signs = (2 * signs - 1).to(device).split(sizes)
    projected = np.empty((len(trainer.train_dataset), DIMENSIONS), dtype=np.float32)
    for number, row in enumerate(trainer.train_dataset):
        inputs = {name: value.to(device) for name, value in trainer.data_collator([row]).items()}
        labels = inputs.pop("labels")
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(**inputs).logits
        torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), labels[0, 1:], ignore_index=-100, reduction="sum"
        ).backward()
        total = torch.zeros(DIMENSIONS, device=device)
        for weight, sign in zip(model.parameters(), signs):
            signed = (weight.grad.flatten() * sign).float()
            total += torch.nn.functional.pad(signed, (0, -len(signed) % DIMENSIONS)).view(-1, DIMENSIONS).sum(0)
        projected[number] = total.cpu().numpy()
        model.zero_grad(set_to_none=False)
    return projected


def agreement(
    gradients: NDArray[np.float32], group_ids: NDArray[np.int64], batch: int, rng: np.random.Generator
) -> dict[str, float]:
    """Return mean cosines of halves and batches of the groups.

    Args:
        gradients: (rows, dimensions) of each row's loss.
        group_ids: (rows,) group of each row.
        batch: rows of a batch.
        rng: draws halves and batches.
    """
    halves, batches = [], []
    for group in np.unique(group_ids):
        members = rng.permutation(np.flatnonzero(group_ids == group))
        if len(members) >= 2 * batch:
            halves.append(np.stack([gradients[half].sum(0) for half in np.array_split(members, 2)]))
            batches += list(_batches(gradients, members, batch))
    first, second = np.stack(halves).swapaxes(0, 1)
    between = cosines(first, second)
    within = np.diag(between)
    apart = ~np.eye(len(between), dtype=bool)
    everything = gradients.sum(0, keepdims=True)
    plain = list(_batches(gradients, rng.permutation(len(gradients)), batch))
    return {
        "halves of one group": float(within.mean()),
        "halves of two groups": float(between[apart].mean()),
        "batches of one group, with all rows": float(cosines(np.stack(batches), everything).mean()),
        "random batches, with all rows": float(cosines(np.stack(plain), everything).mean()),
    }


def _batches(gradients: NDArray[np.float32], rows: NDArray[np.int64], batch: int) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(rows) - batch + 1, batch):
        yield gradients[rows[start : start + batch]].sum(0)


def cosines(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (ours, theirs) cosines of two sets of vectors, (vectors, dimensions) each."""
    return (ours @ theirs.T) / np.outer(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1))


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
