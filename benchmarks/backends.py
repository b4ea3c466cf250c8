"""Compare the speed of sentence-transformers' backends with torch.

Steps: (1) take distinct prompts of the mixture; (2) export MiniLM to each backend; (3) encode the prompts in rounds
over all cases, and compare the embeddings with those of torch in float32: the lowest cosine, and the share of texts
with the same nearest of 32 k-means centroids.

    python -m benchmarks backends --size full --data FOLDER

The backends require an older transformers than this project, so this benchmark imports nothing of the project and runs
in its own environment, which `make bench-full` creates. Cost: two minutes for each round of 4,000 prompts on two cores.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sklearn.cluster import KMeans

from benchmarks.common import Cases, Report, Settings, Skipped, Table, installed, medians, paired_rounds
from benchmarks.mixture import encoder, read_mixture, stratified_slice

TITLE = "Backends of the encoder"
SIZES = {"quick": {"prompts": 500, "rounds": 2}, "full": {"prompts": 4_000, "rounds": 3}}
EXACT = "torch, float32"
CLUSTERS = 32

CASES = Cases()
Encode = Callable[[list[str]], Any]


@CASES(EXACT)
def exact(folder: Path) -> Encode:
    return partial(SentenceTransformer(encoder(), device="cpu").encode, show_progress_bar=False)


@CASES("torch, bfloat16 autocast")
def autocast(folder: Path) -> Encode:
    encode = exact(folder)

    def run(texts: list[str]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return encode(texts)

    return run


@CASES("torch, bfloat16 weights")
def bfloat16(folder: Path) -> Encode:
    return partial(exact(folder).func.__self__.to(torch.bfloat16).encode, show_progress_bar=False)


@CASES("ONNX", package="optimum-onnx")
def onnx(folder: Path) -> Encode:
    return partial(SentenceTransformer(encoder(), device="cpu", backend="onnx").encode, show_progress_bar=False)


@CASES("ONNX, 8-bit weights", package="optimum-onnx")
def onnx_quantized(folder: Path) -> Encode:
    from sentence_transformers import export_dynamic_quantized_onnx_model

    model = SentenceTransformer(encoder(), device="cpu", backend="onnx")
    model.save_pretrained(str(folder / "onnx"))
    export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(folder / "onnx"))
    options = {"file_name": "model_qint8_avx512_vnni.onnx"}
    quantized = SentenceTransformer(str(folder / "onnx"), device="cpu", backend="onnx", model_kwargs=options)
    return partial(quantized.encode, show_progress_bar=False)


@CASES("OpenVINO", package="optimum-intel")
def openvino(folder: Path) -> Encode:
    """In the precision that OpenVINO chooses for the processor."""
    return partial(SentenceTransformer(encoder(), device="cpu", backend="openvino").encode, show_progress_bar=False)


@CASES("OpenVINO, float32", package="optimum-intel")
def openvino_exact(folder: Path) -> Encode:
    options = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    model = SentenceTransformer(encoder(), device="cpu", backend="openvino", model_kwargs=options)
    return partial(model.encode, show_progress_bar=False)


def timed(encode: Encode, texts: list[str], kept: dict[str, NDArray[Any]], name: str, number: int) -> dict[str, float]:
    start = time.perf_counter()
    kept[name] = np.asarray(encode(texts), dtype=np.float32)
    return {"seconds": time.perf_counter() - start}


def run(settings: Settings) -> Report:
    if not (installed("optimum-onnx") or installed("optimum-intel")):
        raise Skipped("needs optimum-onnx or optimum-intel: `make bench-full` makes an environment with both")
    rows = stratified_slice(read_mixture(settings.data), settings["prompts"], seed=0)
    texts = list(dict.fromkeys(row["prompt"] for row in rows))
    functions, skipped = CASES.present()
    kept: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = {}
        for name, function in functions.items():
            encode = function(Path(folder))
            encode(texts[:64])  # one-time setup of the process
            cases[name] = partial(timed, encode, texts, kept, name)
        results = medians(paired_rounds(cases, settings["rounds"]), "seconds", EXACT)
    centroids = KMeans(CLUSTERS, n_init=1, random_state=0).fit(kept[EXACT]).cluster_centers_
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    nearest = {name: (embeddings @ centroids.T).argmax(axis=1) for name, embeddings in kept.items()}
    for name, row in results.items():
        lengths = np.linalg.norm(kept[name], axis=1) * np.linalg.norm(kept[EXACT], axis=1)
        row["lowest_cosine"] = float(((kept[name] * kept[EXACT]).sum(axis=1) / lengths).min())
        row["same_centroid"] = float(np.mean(nearest[name] == nearest[EXACT]))
    return Report(
        head={
            "data": f"{len(texts):,} distinct prompts of GSM8K, CodeAlpaca and APIBench; all-MiniLM-L6-v2",
            "figures": f"wall seconds, medians of {settings['rounds']} rounds, ratios taken in each round",
        },
        parts=[
            Table(
                heading="Encoding",
                header=["", "seconds", f"× {EXACT}", "texts a second", "lowest cosine", "same centroid"],
                rows=[
                    [
                        name,
                        f"{row['seconds']:.2f}",
                        f"{row['ratio']:.2f}",
                        f"{len(texts) / row['seconds']:,.0f}",
                        f"{row['lowest_cosine']:.5f}",
                        f"{row['same_centroid']:.2%}",
                    ]
                    for name, row in results.items()
                ],
                skipped=skipped,
                bars={name: row["ratio"] for name, row in results.items()},
                bars_of=f"seconds, × {EXACT}",
            )
        ],
        results=results,
        packages=("sentence-transformers", "onnxruntime", "optimum-onnx", "openvino", "optimum-intel"),
    )
