"""Train on Ray: `commonit sft` on the workers of a `ray.train.torch.TorchTrainer`.

Takes the YAML file and the flags of `commonit sft`, beside its own:

    python examples/ray_train.py --workers 4 --use-gpu --config example_configs/trl/length.yaml

Every worker is a data-parallel rank. A run resumes from the last complete checkpoint in its `output_dir`, also when Ray
restarts it after the death of a worker (`--max-failures`). The workers of several nodes need the data, the model and
`output_dir` at the same path.
"""

import argparse
import os

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from commonit_trl.cli.main import main, parse_sft
from commonit_trl.trainer.checkpoint import last_checkpoint


def train(options: list[str]) -> None:
    """Train on one worker.

    Args:
        options: of `commonit sft`.

    Raises:
        ValueError: on wrong options; the worker's log has the reason.
    """
    parsed, _ = parse_sft(options)
    checkpoint = last_checkpoint(parsed.training.output_dir)
    resume = [] if checkpoint is None else ["--resume_from_checkpoint", checkpoint]
    if main(["sft", *options, *resume]):
        raise ValueError("commonit sft: wrong options. See the log of the worker.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other options: commonit sft.")
    parser.add_argument("--workers", type=int, default=2, help="data-parallel ranks (default: %(default)s)")
    parser.add_argument("--use-gpu", action="store_true", help="reserve one GPU for each worker")
    parser.add_argument("--max-failures", type=int, default=0, help="restarts of the run (default: %(default)s)")
    parser.add_argument("--storage", help="directory of Ray's results (default: ~/ray_results)")
    parser.add_argument("--address", help="of a running Ray cluster (default: start Ray on this machine)")
    parser.add_argument("--config", required=True, help="YAML file with options of commonit sft")
    args, options = parser.parse_known_args()
    ray.init(address=args.address)
    TorchTrainer(
        train,
        train_loop_config=["--config", args.config, *options],
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.use_gpu),
        run_config=RunConfig(
            storage_path=args.storage and os.path.abspath(args.storage),
            failure_config=FailureConfig(max_failures=args.max_failures),
        ),
    ).fit()
