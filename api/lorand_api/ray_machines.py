"""Virtual workers on the machines of a Ray cluster (extra `lorand[ray]`)."""

import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lorand.errors import ConfigError, LorandError
from lorand_api.groups import Call, Place, Seat, Setup


@dataclass(frozen=True)
class Ray:
    """Where `simulate(machines=…)` puts groups of virtual workers: one a Ray actor.

    Each group has the model once, and measures with so many CPUs and GPUs; `groups` = 0: as many as
    the cluster has room for. The cluster is the one that the script connected to by `ray.init`, or
    that RAY_ADDRESS names, and else this machine. Every machine needs `lorand[ray,worker]`, the
    same versions, and the model.
    """

    groups: int = 0
    cpus: float = 1
    gpus: float = 0

    @contextmanager
    def places(self, workers: int) -> Iterator[list[Place]]:
        """See Machines."""
        ray = _library()
        begun = not ray.is_initialized()
        if begun:
            ray.init(include_dashboard=False, logging_level="warning")
        actors: list[Any] = []
        try:
            actor = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus)(Seat)

            def place(setup: Setup) -> Call:
                actors.append(actor.remote(setup))
                return _calling(ray, actors[-1])

            yield [place] * min(workers, self.groups or self._room(ray.cluster_resources()))
        finally:
            for each in actors:
                ray.kill(each)
            if begun:
                ray.shutdown()

    def _room(self, resources: dict[str, float]) -> int:
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        room = [int(resources.get(kind, 0) // each) for kind, each in wanted.items() if each]
        if not room or not min(room):
            raise ConfigError(
                f"the Ray cluster has no room for a group of {self.cpus:g} CPUs and "
                f"{self.gpus:g} GPUs: ask for less, or give the number of groups"
            )
        return min(room)


def _library() -> Any:
    # Read by Ray when it starts a cluster: no usage statistics. What the user set stays.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "simulate(machines=lorand.Ray()) needs Ray: pip install 'lorand[ray]'"
        ) from error


def _calling(ray: Any, actor: Any) -> Call:
    def call(method: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = getattr(actor, method).remote(*arguments).future()
        told: Future[Any] = Future()
        answer.add_done_callback(lambda done: _tell(ray, done, told))
        return told

    return call


def _tell(ray: Any, done: Future[Any], told: Future[Any]) -> None:
    """Hand on what a call came to; what Ray says becomes an error of ours."""
    error = done.exception()
    if error is None:
        told.set_result(done.result())
        return
    cause = getattr(error, "cause", None)
    if isinstance(cause, LorandError):
        told.set_exception(cause)
    elif isinstance(error, ray.exceptions.RayActorError):
        text = "simulate with ledger_at=, and a run that was broken off goes on"
        told.set_exception(LorandError(f"a group of virtual workers was lost; {text}: {error}"))
    else:
        told.set_exception(error)
