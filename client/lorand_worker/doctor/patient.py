"""What `lr-worker doctor` examines, found step by step: a step that failed is not tried again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lorand import credentials, durable, transport
from lorand.config import RunConfig, load
from lorand.credentials import Credentials
from lorand.errors import LorandError
from lorand.manifest import Identity
from lorand_worker.link import Link
from lorand_worker.sources import Source

if TYPE_CHECKING:  # doctor has something to say where torch is missing
    from lorand_worker.bench import Base
    from lorand_worker.data import Data

GIVE_UP_S: Final = 5.0
T = TypeVar("T")


@dataclass
class Patient:
    """A machine that is to take part, with the flags that `join` would get.

    Parts are None where they were not asked for, or where what they depend on has failed: the
    check of that says why.
    """

    address: str = ""
    run: Path | None = None
    data: Source | None = None
    columns: str = ""
    model: Path | None = None
    device: str = "auto"
    credentials_file: Path | None = None
    insecure: bool = False
    state: Path | None = None
    _found: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where state is kept."""
        return self.state or durable.state_folder()

    @property
    def addresses(self) -> list[str]:
        """The coordinators', if any were named. Raises ConfigError."""
        return transport.several(self.address) if self.address else []

    @property
    def shown(self) -> Credentials | None:
        """The credentials for the coordinator. Raises ConfigError."""
        return self._once("shown", self._shown)

    @property
    def served(self) -> tuple[RunConfig, Identity | None]:
        """The run as the coordinator has it. Raises LorandError."""
        return self._once("served", self._served)

    @property
    def planned(self) -> tuple[RunConfig, Identity | None] | None:
        """The run, from the coordinator or a file, as far as it is known."""
        try:
            if self.address:
                return self.served
            return None if self.run is None else (load(self.run), None)
        except LorandError:
            return None

    @property
    def examples(self) -> "Data | None":
        """The examples, as the run takes them. Raises LorandError."""
        return self._once("examples", self._examples)

    @property
    def base(self) -> "Base | None":
        """The run's model, loaded. Raises LorandError."""
        return self._once("base", self._base)

    def _once(self, name: str, find: Callable[[], T]) -> T:
        """Return what is found the first time, or raise what was raised then."""
        if name not in self._found:
            try:
                self._found[name] = find()
            except LorandError as error:
                self._found[name] = error
        found = self._found[name]
        if isinstance(found, LorandError):
            raise found
        result: T = found
        return result

    def _shown(self) -> Credentials | None:
        return credentials.find(self.address, self.credentials_file, self.insecure, self.state)

    def _served(self) -> tuple[RunConfig, Identity | None]:
        link = Link(self.address, GIVE_UP_S, self.shown)
        try:
            return link.persist(link.get_run, lambda why: None)
        finally:
            link.close()

    def _examples(self) -> "Data | None":
        from lorand_worker import data as data_files

        if self.planned is None or self.data is None:
            return None
        task = data_files.mapped(self.planned[0].task, self.columns)
        return data_files.load(self.data, task)

    def _base(self) -> "Base | None":
        from lorand_worker.bench import load_base

        if self.planned is None:
            return None
        config, theirs = self.planned
        return load_base(config, self.model, self.device, theirs=theirs)
