"""``imprompt batch --ray``: batches as rows of Ray Data, drawn by actors that each keep an Engine.

Ray starts the actors, restarts one that died with its batch, and moves nothing but requests and lines of the
manifest: jobs, pictures and output lie in folders that all machines of the cluster see under the same path.
"""

import json
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import ray
import ray.data

Draw: TypeAlias = Callable[[Any], list[dict[str, Any]]]
"""Draws a batch; gives its lines of the manifest."""


class _Actor:
    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {"entries": [json.dumps(self._draw(pickle.loads(batch))) for batch in rows["batch"]]}


def drawn(draw: Draw, batches: Sequence[Any], workers: int) -> Iterator[list[dict[str, Any]]]:
    """What ``draw`` gives for each batch, in the order in which they are ready.

    ``workers`` 0: one a GPU of the cluster, else one. Connects to the cluster of ``RAY_ADDRESS``, or starts
    Ray on this machine.
    """
    if not batches:
        return
    started = not ray.is_initialized()
    if started:
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    try:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        gpus = int(ray.cluster_resources().get("GPU", 0))
        done = ray.data.from_items(
            [{"batch": pickle.dumps(batch)} for batch in batches], override_num_blocks=len(batches)
        ).map_batches(
            _Actor,
            fn_constructor_args=(draw,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers or gpus or 1),
            num_gpus=1 if gpus else None,
            num_cpus=None if gpus else 1,
        )
        for row in done.iter_rows():
            yield json.loads(row["entries"])
    finally:
        if started:
            ray.shutdown()
