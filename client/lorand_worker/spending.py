"""Private runs on the command line: opening a budget at join, and `lr-worker privacy`."""

from pathlib import Path
from typing import Any

from lorand import ledger
from lorand.config import RunConfig
from lorand.errors import ConfigError, HandshakeError
from lorand.manifest import Identity
from lorand.privacy import accountant, plan
from lorand_worker import budget, guard
from lorand_worker.budget import Account, Budget
from lorand_worker.feedback import Place
from lorand_worker.guard import Policy
from lorand_worker.session import Reporter
from lorand_worker.sources import Source


def open_budget(
    config: RunConfig,
    identity: Identity,
    name: str,
    folder: Path,
    data: Source,
    policy: Policy,
    report: Reporter,
) -> Budget | None:
    """Return the budget of a private run, None for any other. Raises LorandError.

    Runs on the same data file count together, and one run takes a data file once.
    """
    if not config.privacy.noised:
        return None
    digest = ledger.origin(config, identity).run_digest
    others = [
        account
        for account in budget.of_same_data(folder, data)
        if (account.run_digest, account.worker) != (digest.hex(), name)
    ]
    for account in others:
        if account.run_digest == digest.hex():
            raise HandshakeError(
                f"{data} is in this run already, as {account.worker!r}: twice would show twice as "
                "much of it; join with that --name"
            )
    elsewhere = sum(account.spent() for account in others)
    guard.check_epsilon(config, policy, elsewhere)
    report.note("calculating what noise keeps the run to its epsilon")
    opened = Budget(Place(folder, digest, name), config, data)
    report.note(_said(config, opened.account))
    if elsewhere:
        report.note(f"other runs spent epsilon {elsewhere:.4g} of these data: epsilons add up")
    return opened


def _said(config: RunConfig, account: Account) -> str:
    release, section = account.release, config.privacy
    if account.restarts is not None:
        first = account.restarts
        return (
            f"DIFF2, experimental: noise multipliers {first.release.multiplier:.4g} of "
            f"{first.limit} restarts and {release.multiplier:.4g} of "
            f"{account.limit - first.limit} rounds between, of which {first.charged} and "
            f"{account.charged - first.charged} are made"
        )
    error = _on_a_scalar(config, release.multiplier)
    what = "scalar of the mean of all" if section.summed else "scalar"
    return (
        f"noise multiplier {release.multiplier:.4g}: {release.noise} noise of scale {error:.3g} on "
        f"each {what}, for {account.limit} releases, of which {account.charged} are made"
    )


def expected(config: RunConfig) -> tuple[dict[str, Any], str]:
    """Return what a run file's settings come to, for scripts and as text. Raises ConfigError."""
    section = config.privacy
    if not section.noised:
        raise ConfigError(
            f'the run {config.run.name!r} has no privacy: set privacy.mode = "worker", or another'
        )
    if section.differences:
        return _expected_differences(config)
    release = plan.planned(config)
    spent = accountant.epsilon(release, config.releases, section.delta)
    error = _on_a_scalar(config, release.multiplier)
    whose = "each worker's scalars carry"
    if section.summed:
        whose = f"the mean of {config.rounds.quorum} workers' scalars carries"
    result = {
        "noise_multiplier": release.multiplier,
        "epsilon": spent,
        "delta": section.delta,
        "releases": config.releases,
        "noise_on_a_scalar": error,
    }
    return result, (
        f"epsilon {spent:.4g} at delta {section.delta:g} after {config.releases} releases takes a "
        f"noise multiplier of {release.multiplier:.4g}: {whose} {section.mechanism} noise of scale "
        f"{error:.3g}"
    )


def _on_a_scalar(config: RunConfig, multiplier: float) -> float:
    """Return the scale of the noise on a released scalar: of a worker, or of the mean of all."""
    section = config.privacy
    parties = config.rounds.quorum if section.summed else 1
    return multiplier * section.clip_bound / (config.estimator.batch_size * parties)


def _expected_differences(config: RunConfig) -> tuple[dict[str, Any], str]:
    section, made = config.privacy, plan.planned_differences(config)
    spent = made.epsilon(section.delta)
    both = made.restart.multiplier, made.increment.multiplier
    error = both[0] * section.clip_bound / config.estimator.batch_size
    result = {
        "noise_multiplier": both[1],
        "noise_multiplier_of_restarts": both[0],
        "epsilon": spent,
        "delta": section.delta,
        "releases": made.restarts + made.increments,
        "releases_of_restarts": made.restarts,
        "noise_on_a_scalar": error,
    }
    return result, (
        f"DIFF2, experimental: epsilon {spent:.4g} at delta {section.delta:g} after "
        f"{made.restarts} restarts and {made.increments} rounds between takes noise multipliers of "
        f"{both[0]:.4g} and {both[1]:.4g}: after a restart each worker's scalars carry noise of "
        f"scale {error:.3g}, to which each round adds"
    )


def listed(folder: Path) -> tuple[dict[str, Any], str]:
    """Return what was spent in all runs of a state folder, for scripts and as text."""
    found = [(account, account.spent()) for account in budget.accounts(folder)]
    by_data: dict[str, float] = {}
    for account, spent in found:
        by_data[account.data] = by_data.get(account.data, 0.0) + spent
    result = {
        "runs": [_figures(account, spent) for account, spent in found],
        "data": [{"file": name, "epsilon": spent} for name, spent in by_data.items()],
    }
    if not found:
        return result, f"no private run was joined here ({folder} holds no budgets)"
    lines = []
    for account, spent in found:
        lines.append(
            f"{account.run}, as {account.worker}: epsilon {spent:.4g} of "
            f"{account.target_epsilon:g} spent, delta {account.delta:g}\n"
            f"  {account.charged} of {account.limit} releases, each {account.scalars:,} scalars of "
            f"a fresh sample, noise multiplier {account.release.multiplier:.4g}\n"
            f"  of {account.data}"
        )
    shared = [name for name in by_data if [a.data for a, _ in found].count(name) > 1]
    for name in shared:
        lines.append(f"together, of {name}: epsilon {by_data[name]:.4g} (deltas add as well)")
    return result, "\n".join(lines)


def _figures(account: Account, spent: float) -> dict[str, Any]:
    return {
        "run": account.run,
        "run_digest": account.run_digest,
        "worker": account.worker,
        "data": account.data,
        "epsilon_spent": spent,
        "epsilon_left": max(0.0, account.target_epsilon - spent),
        "target_epsilon": account.target_epsilon,
        "delta": account.delta,
        "releases": account.charged,
        "releases_left": account.left,
        "scalars": account.charged * account.scalars,
        "noise_multiplier": account.release.multiplier,
    }
