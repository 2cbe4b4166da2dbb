"""The Python API, made of both sides; its names are those of `lorand` as well."""

from lorand_api.adapters import add_weighted, load_adapter, merge_and_unload, unload
from lorand_api.coordinator import Coordinator
from lorand_api.hub import push_to_hub
from lorand_api.ray_machines import Ray
from lorand_api.runs import prepare
from lorand_api.simulation import Round, Simulation, simulate
from lorand_api.worker import Worker

__all__ = [
    "Coordinator",
    "Ray",
    "Round",
    "Simulation",
    "Worker",
    "add_weighted",
    "load_adapter",
    "merge_and_unload",
    "prepare",
    "push_to_hub",
    "simulate",
    "unload",
]
