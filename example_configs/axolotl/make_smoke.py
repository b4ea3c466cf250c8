"""Generate the data and models of smoke-cpu.yml in out/smoke.

Writes rows of six task families, a tokenizer trained on them, a Llama with 0.4 million random weights and a toy
encoder. Takes a few seconds and downloads nothing.

    python example_configs/axolotl/make_smoke.py [FOLDER]
"""

import sys
from pathlib import Path

from commonit_trl.cli.demo import generate_rows, make_models, write_rows

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/smoke")
train, held_out = generate_rows(seed=0)
folder.mkdir(parents=True, exist_ok=True)
write_rows(folder / "data", train, held_out)
make_models(folder, train, seed=0)
print(f"Wrote {len(train)} training rows, {len(held_out)} held-out rows and two models to {folder}.")
