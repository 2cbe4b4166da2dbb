"""A worker's privacy budget of a run: how often it may still answer, in a file that outlives it.

A release is charged together with its bytes, in one replaced file, before anyone is given them.
So a process that ends at any moment has shown at most what is charged, and one that comes back
repeats an answer that may have left instead of making another.
"""

import base64
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from lorand import durable, schedules, strict_json
from lorand.config import RunConfig
from lorand.errors import BudgetSpent, LorandError
from lorand.privacy import accountant, diff2, plan
from lorand.privacy.accountant import Release
from lorand.privacy.diff2 import Rule
from lorand.privacy.mechanism import Mechanism
from lorand.v1 import ledger_pb2 as pb
from lorand_worker import sources
from lorand_worker.feedback import Place
from lorand_worker.sources import Source

FORMAT: Final = "lorand/budget/v1"
SUFFIX: Final = "budget.json"
SLACK: Final = 1e-3
"""Epsilon by which another version of the accountant may differ from the one that planned."""

Asked = tuple[int, int, int]
"""A round, how many were committed before it, and the worker's number."""


@dataclass(frozen=True)
class Answer:
    """The last release, as it may have left."""

    asked: Asked
    contribution: pb.Contribution


@dataclass(frozen=True)
class Restarts:
    """Those releases of a DIFF2 run that are of gradients, not of differences.

    They are in the rounds after a multiple of `every` commits; `charged` of `limit` are spent.
    """

    release: Release
    every: int
    limit: int
    charged: int = 0

    @staticmethod
    def of(config: RunConfig, release: Release, charged: int = 0) -> "Restarts":
        """Return those of a run."""
        every, spare = config.privacy.restart_every, config.privacy.spare_rounds
        return Restarts(release, every, diff2.counts(config.run.rounds, every, spare)[0], charged)


@dataclass(frozen=True)
class Account:
    """What was released of some examples in a run, and how much may be.

    `charged` of `limit` releases are spent; each made `scalars` numbers of a fresh sample. `data`
    is the file that the examples came from. Of a DIFF2 run `restarts` are some of them, and
    `release` is that of the others.
    """

    run_digest: str
    run: str
    worker: str
    data: str
    release: Release
    target_epsilon: float
    delta: float
    scalars: int
    limit: int
    charged: int = 0
    answer: Answer | None = None
    restarts: Restarts | None = None

    @property
    def left(self) -> int:
        """Releases that may still be made."""
        return self.limit - self.charged

    def left_after(self, committed: int) -> int:
        """Return how many may still be made of the kind that a round after so many commits has."""
        first = self.restarts
        if first is None:
            return self.left
        if schedules.restarts(committed, first.every):
            return first.limit - first.charged
        return self.left - (first.limit - first.charged)

    def spent(self) -> float:
        """Return the epsilon, at delta, of what is charged so far."""
        return self._epsilon(self.charged, self.restarts.charged if self.restarts else 0)

    def most(self) -> float:
        """Return the epsilon, at delta, of all that may be charged."""
        return self._epsilon(self.limit, self.restarts.limit if self.restarts else 0)

    def _epsilon(self, times: int, restarts: int) -> float:
        parts = [(self.release, times - restarts)]
        if self.restarts is not None:
            parts.append((self.restarts.release, restarts))
        return accountant.epsilon_together(parts, self.delta)

    def after(self, asked: Asked, contribution: pb.Contribution) -> "Account":
        """Return the account with one release more."""
        first, (_, committed, _) = self.restarts, asked
        if first is not None and schedules.restarts(committed, first.every):
            first = replace(first, charged=first.charged + 1)
        answer = Answer(asked, contribution)
        return replace(self, charged=self.charged + 1, answer=answer, restarts=first)


class Budget:
    """The account of one worker in one run, in its file; one process at a time has it.

    The noise multiplier is calculated once, here, from the run's own settings, and stays with the
    account.
    """

    def __init__(
        self,
        place: Place,
        config: RunConfig,
        data: Source,
        planned: Callable[[RunConfig], Release] = plan.planned,
    ) -> None:
        """Open the account, or begin it. Raises LorandError when it is not to be relied upon."""
        self.path = place.file(SUFFIX)
        self._descriptor = self._lock()
        try:
            self.account = self._opened(place, config, data, planned)
        except BaseException:
            self.close()
            raise

    def _opened(
        self,
        place: Place,
        config: RunConfig,
        data: Source,
        planned: Callable[[RunConfig], Release],
    ) -> Account:
        begun = Account(
            run_digest=place.run_digest.hex(),
            run=config.run.name,
            worker=place.name,
            data=sources.key(data),
            release=plan.release_of(config, 1.0),
            target_epsilon=config.privacy.target_epsilon,
            delta=config.privacy.delta,
            scalars=config.num_directions,
            limit=config.releases,
        )
        if not self.path.exists():
            if config.privacy.differences:
                made = plan.planned_differences(config)
                account = replace(begun, release=made.increment)
                account = _with_restarts(account, config, Restarts.of(config, made.restart))
            else:
                account = replace(begun, release=planned(config))
            self._check(account)
            self._keep(account)
            return account
        account = read(self.path)
        release = plan.release_of(config, account.release.multiplier)
        ours = replace(begun, release=release, charged=account.charged, answer=account.answer)
        if config.privacy.differences:
            first = account.restarts or Restarts(release, 0, 0)  # which is of no such run
            release = plan.release_of(config, first.release.multiplier)
            ours = _with_restarts(ours, config, Restarts.of(config, release, first.charged))
        if replace(account, data=ours.data) != ours:
            raise _unreliable(self.path, "it is of another run, worker or release of lorand")
        self._check(account)
        return account

    def _check(self, account: Account) -> None:
        """Have the whole run stay within its target, whatever made the account."""
        most = account.most()
        if not most <= account.target_epsilon + SLACK:
            raise _unreliable(
                self.path, f"{account.limit} rounds at its noise are epsilon {most:.4g}"
            )

    def _lock(self) -> int:
        lock = self.path.with_suffix(".lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritten(self.path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise LorandError(
                f"another process spends from {self.path}: a worker is in a run once; end the "
                "other one, or give this one a --name and data of its own"
            ) from error
        return descriptor

    def close(self) -> None:
        """Let another process have the account."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def mechanism(self, config: RunConfig) -> Mechanism | Rule:
        """Return what releases a round of the run, with the noise of this account."""
        multiplier, restarts = self.account.release.multiplier, self.account.restarts
        if restarts is not None:
            return plan.rule(config, restarts.release.multiplier, multiplier)
        return plan.mechanism(config, multiplier)

    def check(self, committed: int) -> None:
        """Raise BudgetSpent when nothing is left for a round after so many commits."""
        account = self.account
        if account.left_after(committed) <= 0:
            raise BudgetSpent(
                f"the privacy budget of {account.worker!r} in the run {account.run!r} is spent: "
                f"{account.charged} of {account.limit} releases, (epsilon "
                f"{account.target_epsilon:g}, delta {account.delta:g}); this worker sends nothing "
                "more. What was learned: `lr-worker export`; more rounds take another run, and "
                "its epsilon comes on top"
            )

    def charge(self, asked: Asked, contribution: pb.Contribution) -> None:
        """Charge a release and keep it, durably; only then may anyone have it.

        Raises BudgetSpent when nothing is left, LorandError when it cannot be kept: in either case
        the release must be dropped.
        """
        self.check(asked[1])
        account = self.account.after(asked, contribution)
        self._keep(account)
        self.account = account

    def _keep(self, account: Account) -> None:
        try:
            durable.replace(self.path, _written(account))
        except OSError as error:
            raise _unwritten(self.path, error) from error


def _with_restarts(account: Account, config: RunConfig, restarts: Restarts) -> Account:
    """Return that of a DIFF2 run, of which either kind may need all spare rounds."""
    return replace(account, restarts=restarts, limit=account.limit + config.privacy.spare_rounds)


def read(path: Path) -> Account:
    """Return the account in a file. Raises LorandError when it cannot be relied upon."""
    try:
        content: dict[str, Any] = strict_json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError("it is of another format")
        answer = content.pop("answer")
        if answer is not None:
            first, second, third = map(int, answer["asked"])
            body = base64.b64decode(answer["contribution"], validate=True)
            answer = Answer((first, second, third), pb.Contribution.FromString(body))
        release = Release(**content.pop("release"))
        restarts = content.pop("restarts", None)
        if restarts is not None:
            restarts = Restarts(release=Release(**restarts.pop("release")), **restarts)
        account = Account(release=release, answer=answer, restarts=restarts, **content)
        if restarts is not None and not 0 <= restarts.charged <= restarts.limit:
            raise ValueError("what it counts cannot be")
        if not 0 <= account.charged <= account.limit or (account.charged == 0) != (answer is None):
            raise ValueError("what it counts cannot be")
        return account
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DecodeError) as error:
        raise _unreliable(path, str(error) or type(error).__name__) from error


def accounts(folder: Path) -> list[Account]:
    """Return all accounts in a folder, in the order of their names. Raises LorandError."""
    found = [read(path) for path in sorted(folder.glob(f"*.{SUFFIX}"))]
    return sorted(found, key=lambda account: (account.run, account.worker, account.run_digest))


def of_same_data(folder: Path, data: Source) -> list[Account]:
    """Return the accounts of one data file, whatever the run: their epsilons and deltas add."""
    return [account for account in accounts(folder) if account.data == sources.key(data)]


def _written(account: Account) -> bytes:
    content = asdict(replace(account, answer=None)) | {"format": FORMAT}
    if account.answer is not None:
        body = account.answer.contribution.SerializeToString(deterministic=True)
        content["answer"] = {
            "asked": list(account.answer.asked),
            "contribution": base64.b64encode(body).decode(),
        }
    return json.dumps(content, indent=1).encode()


def _unwritten(path: Path, error: Exception) -> LorandError:
    return LorandError(
        f"cannot keep the privacy budget in {path}: {error}; without it nothing is sent; choose "
        "another folder with --state"
    )


def _unreliable(path: Path, why: str) -> LorandError:
    return LorandError(
        f"the privacy budget in {path} cannot be relied upon: {why}. What was released is not "
        "known, so this worker sends nothing: bring the file back from a copy that is no older "
        "than the last round, or join another run"
    )
