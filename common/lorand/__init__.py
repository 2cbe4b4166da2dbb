"""LoRand: fine-tune one model on many machines; only seeds and small integers cross the network.

Scripts have the Python API from here: `lorand.simulate`, `lorand.Coordinator`, `lorand.Worker`,
`lorand.load_adapter` and so on are names of `lorand_api`, which stands on top of both sides and is
imported when one of them is asked for.
"""

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lorand_api import Coordinator as Coordinator
    from lorand_api import Ray as Ray
    from lorand_api import Round as Round
    from lorand_api import Simulation as Simulation
    from lorand_api import Worker as Worker
    from lorand_api import add_weighted as add_weighted
    from lorand_api import load_adapter as load_adapter
    from lorand_api import merge_and_unload as merge_and_unload
    from lorand_api import prepare as prepare
    from lorand_api import push_to_hub as push_to_hub
    from lorand_api import simulate as simulate
    from lorand_api import unload as unload

__version__ = "0.1.0"
API: Final = (
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
)


def __getattr__(name: str) -> Any:
    """Return a name of the Python API."""
    if name not in API:  # looked at before an import: this package's own modules come by here too
        raise AttributeError(f"module 'lorand' has no attribute {name!r}")
    import lorand_api

    return getattr(lorand_api, name)
