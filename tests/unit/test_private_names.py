"""The one list of private names of other packages that this package uses, checked against the source and the packages.

A name that a new version removes fails here by name; `test_platform.py` and `test_axolotl_platform.py` test how each
behaves.
"""

import ast
import importlib
import importlib.metadata
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PRIVATE_NAMES = {
    "_fingerprint": ("datasets", "Dataset", "tells whether train_dataset was replaced"),
    "_indices": ("datasets", "Dataset", "reads shuffled rows through Arrow"),
    "_get_grad_norm": ("transformers", "Trainer", "the only place with the gradient norm of every step"),
    "_get_train_sampler": ("transformers", "Trainer", "refused where a trainer has its own; Axolotl's packs all rows"),
    "_init_training_state": ("transformers", "Trainer", "the only place that decides where a run resumes"),
    "_train_batch_size": ("transformers", "Trainer", "the batch size that auto_find_batch_size lowers"),
    "_metrics": ("trl", "SFTTrainer", "running metrics, restored after the loss is measured"),
    "_stored_metrics": ("trl.experimental.orpo", "ORPOTrainer", "those of ORPO and CPO"),
    "_prepare_dataset": ("trl", "SFTTrainer", "the only place to group rows before they are packed"),
    "_tokenizer": ("trl", "SFTTrainer", "the tokenizer of a processor"),
    "_configure_warmup_and_logging": (
        "axolotl.core.builders",
        "HFCausalTrainerBuilder",
        "warm-up and logging from the plan's steps",
    ),
    "_is_dataset_already_tokenized": ("axolotl.utils.data.wrappers", None, "tokenised rows keep their columns"),
}
"""Name -> module, class and use."""


def private_names(file: Path) -> set[str]:
    """Attributes with one leading underscore that the file reads of other objects, or of itself without defining."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    targets = [
        target
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {target.attr for target in targets if isinstance(target, ast.Attribute)}
    own |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (ast.unparse(node.value) == "self" and node.attr in own)
    }


def test_the_source_uses_only_these() -> None:
    files = [file for package in ("commonit_trl", "axolotl_plugin") for file in (ROOT / package).rglob("*.py")]
    assert set().union(*map(private_names, files)) == set(PRIVATE_NAMES)


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_the_package_has_it(name: str) -> None:
    module, owner, _ = PRIVATE_NAMES[name]
    package = module.partition(".")[0]
    if not any(importlib.metadata.distributions(name=package)):
        pytest.skip(f"{package} is not installed")
    if package == "axolotl":  # importing it changes the process
        files = [file for file in importlib.metadata.files(package) or () if file.suffix == ".py"]
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        assert f"def {name}(" in source
        return
    place = getattr(importlib.import_module(module), owner)
    if not hasattr(place, name):  # set by the constructor
        source = "".join(map(inspect.getsource, place.__mro__[:-1]))
        assert f"self.{name}" in source, f"{module}.{owner} has no {name}"
