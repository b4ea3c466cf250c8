"""Embed the prompts of a dataset with Ray Data, and write the rows with their vectors to Parquet.

Steps: (1) Ray Data reads the rows in blocks; (2) each worker holds one encoder and embeds the prompts of its blocks,
as `commonit_metric: embedding` reads them; (3) the rows, all their columns and a column `vector` go to Parquet files in
the order of the source. Train on these files with `commonit_embedding_column: vector`.

    python examples/ray_embeddings.py train.jsonl out/embedded --model sentence-transformers/all-MiniLM-L6-v2

On a cluster, add `--address auto`, and `--gpus-per-worker 1` if the nodes have GPUs; the source and the output are then
paths that all nodes can read, such as s3://. Embed the reference dataset of `commonit_reference_dataset` in the same
way. Cost: the encoder's, divided by the number of workers.
"""

import argparse

import pyarrow as pa
import ray
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from commonit_trl.rows import Rows

CPUS_PER_WORKER = 0.5
"""CPUs that Ray reserves for an encoder. The rest reads and writes: with none left, the job would never start."""


class Encoder:
    """Adds the column `vector` to rows; one in each worker.

    Args:
        model: name or path of a sentence-transformers model.
        text: text of a row to embed, `prompt`, `response` or `both`.
    """

    def __init__(self, model: str, text: str) -> None:
        self.model = SentenceTransformer(model)
        self.text = text

    def __call__(self, rows: pa.Table) -> pa.Table:
        texts = Rows(Dataset(rows)).texts(self.text)
        vectors = self.model.encode(texts, batch_size=64, convert_to_numpy=True, show_progress_bar=False)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype("float32").ravel()), vectors.shape[1])
        return rows.append_column("vector", column)


def embed(
    source: str,
    target: str,
    *,
    model: str,
    text: str = "prompt",
    workers: int = 2,
    gpus_per_worker: float = 0,
    rows_per_block: int = 4096,
) -> None:
    """Embed the rows of JSON Lines or Parquet files.

    Args:
        source: file or directory of rows.
        target: directory for the Parquet files.
        model: name or path of a sentence-transformers model.
        text: text of a row to embed, `prompt`, `response` or `both`.
        workers: encoders that work at the same time.
        gpus_per_worker: GPUs of each encoder.
        rows_per_block: rows of a block, and at least of an output file.

    Raises:
        ValueError: when the encoders would leave no CPU of the cluster for reading.
    """
    cpus = ray.cluster_resources().get("CPU", 0)
    if workers * CPUS_PER_WORKER > cpus - 1:
        most = int((cpus - 1) / CPUS_PER_WORKER)
        raise ValueError(f"--workers={workers}: more than {cpus:.0f} CPUs allow. Set it to {most} or less.")
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    read = ray.data.read_parquet if source.rstrip("/").endswith("parquet") else ray.data.read_json
    rows = read(source).repartition(target_num_rows_per_block=rows_per_block)
    embedded = rows.map_batches(
        Encoder,
        fn_constructor_kwargs={"model": model, "text": text},
        batch_format="pyarrow",
        batch_size=512,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=CPUS_PER_WORKER,
        num_gpus=gpus_per_worker,
    )
    embedded.write_parquet(target, min_rows_per_file=rows_per_block)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="JSON Lines or Parquet file, or a directory of such files")
    parser.add_argument("target", help="directory for the Parquet files")
    parser.add_argument("--model", required=True, help="name or path of a sentence-transformers model")
    parser.add_argument("--text", choices=("prompt", "response", "both"), default="prompt", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="encoders (default: %(default)s)")
    parser.add_argument("--gpus-per-worker", type=float, default=0, help="GPUs of each encoder (default: %(default)s)")
    parser.add_argument("--address", help="of a running Ray cluster (default: start Ray on this machine)")
    args = parser.parse_args()
    ray.init(address=args.address)
    embed(
        args.source,
        args.target,
        model=args.model,
        text=args.text,
        workers=args.workers,
        gpus_per_worker=args.gpus_per_worker,
    )
