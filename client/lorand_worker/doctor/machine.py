"""What this machine has: versions, processors, memory, a GPU, proxies, a place for state."""

import os
import platform
from importlib import metadata

from lorand import transport
from lorand.errors import ConfigError
from lorand.findings import Finding, failed, ok, warning
from lorand_worker import memory
from lorand_worker.doctor.patient import Patient

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


def versions(patient: Patient) -> Finding:
    """Python and the libraries of a worker are those that this release takes."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return failed("libraries of workers are missing: pip install 'lorand[worker]'")
    try:
        wanted = [Requirement(line) for line in metadata.requires("lorand") or ()]
    except metadata.PackageNotFoundError:
        return warning("lorand is not installed, so that its needs are not known: pip install it")
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": "worker"})]
    wrong, right = [], []
    for requirement in needed:
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, not {requirement.specifier}")
        right.append(f"{requirement.name} {found}")
    if wrong:
        return failed(f"{'; '.join(wrong)}: pip install -U 'lorand[worker]'")
    shown = [r for r in right if r.split()[0] in ("torch", "transformers", "grpcio", "numba")]
    return ok(", ".join([f"Python {platform.python_version()}", *shown]))


def polling(patient: Patient) -> Finding | None:
    """Which way gRPC waits for its sockets, where that was chosen or may fail."""
    chosen = os.environ.get("GRPC_POLL_STRATEGY")
    if chosen:
        return ok(f"GRPC_POLL_STRATEGY = {chosen}")
    major = platform.release().partition(".")[0]
    if platform.system() == "Linux" and major.isdigit() and int(major) >= 7:
        return warning(
            f"gRPC's usual way to wait for sockets has failed on some kernels like this one "
            f"({platform.release()}): if connections hang, set GRPC_POLL_STRATEGY=poll"
        )
    return None


def processors(patient: Patient) -> Finding:
    """How many processors passes may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) < (count or 1):
        return warning(
            f"{count} processors, of which OMP_NUM_THREADS = {limit} lets passes use {limit}: "
            "unset it, or give --threads"
        )
    return ok(f"{count} processors")


def free_memory(patient: Patient) -> Finding | None:
    """There is memory for the model: twice, or once where weights are made layer by layer."""
    import torch

    free = memory.free_bytes(torch.device("cpu"))
    if free is None:
        return None
    text = f"{free / 1e9:.1f} GB free"
    if patient.model is None or not patient.model.is_dir():
        return ok(text)
    once = sum(path.stat().st_size for path in patient.model.glob("*.safetensors"))
    if not memory.fits(once, free):
        return failed(
            f"{text}, and the weights alone are {once / 1e9:.1f} GB: a machine with more memory is "
            "needed, or a run with a quantised base or a smaller model"
        )
    if not memory.fits(2 * once, free):
        return warning(
            f"{text}, and weights kept twice would be {2 * once / 1e9:.1f} GB: join with "
            "--weights layerwise (auto chooses it)"
        )
    return ok(f"{text}; the weights are {once / 1e9:.2f} GB")


def gpu(patient: Patient) -> Finding:
    """The device that was asked for is there."""
    import torch

    from lorand_worker.bench import parse_device

    device = parse_device(patient.device)
    if device.type != "cuda":
        return ok(f"passes run on the {device.type.upper()}")
    count, free = torch.cuda.device_count(), memory.free_bytes(device)
    more = f"; {count - 1} more for other workers" if count > 1 else ""
    return ok(f"{torch.cuda.get_device_name(device)}, {(free or 0) / 1e9:.1f} GB free{more}")


def proxies(patient: Patient) -> Finding | None:
    """Proxies of the environment, which the coordinator is not reached through."""
    found = [name for name in (*PROXIES, *map(str.upper, PROXIES)) if os.environ.get(name)]
    if not found:
        return None
    text = f"{', '.join(found)} is set: it serves for the hub"
    if patient.address and any(_elsewhere(each) for each in patient.addresses):
        return warning(
            f"{text}, while the coordinator is called directly: have its address and port opened "
            "for this machine"
        )
    return ok(f"{text}, and the coordinator is called directly")


def _elsewhere(address: str) -> bool:
    return not transport.is_loopback(transport.split(address)[0])


def place_for_state(patient: Patient) -> Finding:
    """Budgets and credentials can be kept."""
    folder = patient.folder.absolute()
    standing = folder
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{folder} cannot be written, where privacy budgets, credentials and the history seen "
            "are kept: choose another place with --state"
        )
    return ok(f"{folder}")
