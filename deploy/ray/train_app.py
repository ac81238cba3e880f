"""Train one adapter with several workers of Ray Train, on this machine or on a cluster.

    pip install 'imprompt[ray]'
    python deploy/ray/train_app.py run.toml --workers 2 [--gpu] [--restarts 3]

Ray places the workers and starts them again after a failure; the run then goes on from its newest intact
checkpoint. All machines see the configuration's folders under the same paths. Two workers with a batch of 4
learn what one with 8 learns.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from imprompt.training import TrainConfig
from imprompt.training.folder import RECORD, WEIGHT_NAME


def work(settings: dict[str, Any]) -> None:
    """Train in one worker; accelerate finds the process group that Ray has made."""
    from imprompt.training import train

    os.chdir(settings["folder"])
    config = TrainConfig.model_validate_json(settings["config"])
    begun = (config.output / RECORD).exists()
    train(config.replace(resume=config.resume or (settings["again"] and begun)))


def run(config: TrainConfig, *, workers: int = 2, gpu: bool = False, restarts: int = 0) -> Path:
    """Train by ``config`` with so many workers; gives the adapter's file.

    The workers are started again after a failure, at most ``restarts`` times; then Ray raises its error."""
    settings = {"config": config.model_dump_json(), "folder": str(Path.cwd()), "again": restarts > 0}
    output = config.output.absolute()
    TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(
            name=output.name,
            storage_path=str(output.parent / "ray"),
            failure_config=FailureConfig(max_failures=restarts),
        ),
    ).fit()
    return output / WEIGHT_NAME


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="configuration of the run (.toml or .json)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--restarts", type=int, default=3)
    args = parser.parse_args()
    config = TrainConfig.read(args.config)
    print(run(config, workers=args.workers, gpu=args.gpu, restarts=args.restarts))


if __name__ == "__main__":
    main()
