"""The manifest: which tensors a run trains, and how far a direction moves each of them."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lorand import strict_json
from lorand.errors import ConfigError, ModelError

MAX_TENSORS: Final = 100_000
LOCK_FORMAT: Final = "lorand/run.lock/v1"
LOCK_NAME: Final = "run.lock"


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor; `scale_exponent` s multiplies its part of every direction by 2^s.

    `rank` is that of the subspace in which directions act on a matrix; 0: they act on all of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale_exponent: int = 0
    rank: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for length in self.shape:
            total *= length
        return total


@dataclass(frozen=True)
class Manifest:
    """The trainable tensors sorted by name; a tensor's place is its tid (DESIGN §2 step 1)."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        """Raise ModelError unless names are sorted, distinct, not too many, and ranks fit."""
        names = [tensor.name for tensor in self.tensors]
        if names != sorted(set(names)):
            raise ModelError("a manifest lists each trainable tensor once, sorted by name")
        if not 0 < len(names) <= MAX_TENSORS:
            raise ModelError(f"a run trains 1 to {MAX_TENSORS} tensors, not {len(names)}")
        for tensor in self.tensors:
            if tensor.rank and (len(tensor.shape) != 2 or not 0 < tensor.rank < min(tensor.shape)):
                raise ModelError(
                    f"{tensor.name!r} of shape {tensor.shape} has no subspace of rank "
                    f"{tensor.rank}: a rank is below both sides of a matrix; set subspace.rank or "
                    "subspace.targets"
                )

    @property
    def num_weights(self) -> int:
        """d, the number of trainable weights."""
        return sum(tensor.size for tensor in self.tensors)

    def to_json(self) -> str:
        """Return the canonical text: what the digest is taken of."""
        rows = [
            [t.name, list(t.shape), t.dtype, t.scale_exponent, *([t.rank] if t.rank else [])]
            for t in self.tensors
        ]
        return json.dumps(rows, separators=(",", ":"), ensure_ascii=True)

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Return the manifest of a canonical text. Raises ModelError when it is none."""
        try:
            rows = strict_json.loads(text)
            return Manifest(
                tuple(
                    TensorSpec(str(n), tuple(map(int, sh)), str(d), int(s), *map(int, rank))
                    for n, sh, d, s, *rank in rows
                )
            )
        except (ValueError, TypeError) as error:
            raise ModelError(f"the parameter manifest cannot be read: {error}") from error

    def digest(self) -> bytes:
        """Return SHA-256 of the canonical text, 32 bytes."""
        return hashlib.sha256(self.to_json().encode()).digest()


@dataclass(frozen=True)
class Identity:
    """What every replica of a run must share besides the config. Digests are 32 bytes."""

    base_digest: bytes
    tokenizer_digest: bytes
    manifest: Manifest

    def to_lock(self) -> str:
        """Return the text of run.lock: identity of base model, tokenizer and trainable set."""
        return json.dumps(
            {
                "format": LOCK_FORMAT,
                "base_digest": self.base_digest.hex(),
                "tokenizer_digest": self.tokenizer_digest.hex(),
                "manifest_digest": self.manifest.digest().hex(),
                "manifest": json.loads(self.manifest.to_json()),
            },
            indent=1,
        )

    @staticmethod
    def beside(run: Path) -> "Identity | None":
        """Return what the run.lock beside a run file says, None without one. Raises ConfigError."""
        lock = run.with_name(LOCK_NAME)
        if not lock.exists():
            return None
        try:
            return Identity.from_lock(lock.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read {lock}: {error}; write it again with `lr-worker prepare {run}`"
            ) from error

    @staticmethod
    def from_lock(text: str) -> "Identity":
        """Read run.lock. Raises ConfigError when it is damaged or was edited by hand."""
        hint = "; write it again with `lr-worker prepare run.toml`"
        try:
            lock = strict_json.loads(text)
            if lock["format"] != LOCK_FORMAT:
                raise ConfigError(
                    f"run.lock has format {lock['format']!r}, not {LOCK_FORMAT!r}{hint}"
                )
            manifest = Manifest.from_json(json.dumps(lock["manifest"]))
            base = bytes.fromhex(lock["base_digest"])
            tokenizer = bytes.fromhex(lock["tokenizer_digest"])
            written = bytes.fromhex(lock["manifest_digest"])
        except (ValueError, KeyError, TypeError, ModelError) as error:
            raise ConfigError(f"run.lock cannot be read ({error!r}){hint}") from error
        if written != manifest.digest() or len(base) != 32 or len(tokenizer) != 32:
            raise ConfigError(f"run.lock does not match its own digests{hint}")
        return Identity(base, tokenizer, manifest)


def run_digest(config_digest: bytes, identity: Identity) -> bytes:
    """Return the 32 bytes that name a run: config, base model, tokenizer and trainable set."""
    return hashlib.sha256(
        b"lorand/run/v1"
        + config_digest
        + identity.base_digest
        + identity.tokenizer_digest
        + identity.manifest.digest()
    ).digest()


_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layer|layers|h|block|blocks))\.(?P<index>\d+)\.")


def select_trainable(names: list[str], rule: str) -> list[str]:
    """Return the names that a trainable rule selects, in the order given (the model's own).

    `all`; `last:N` (the last N layers of the deepest stack and everything registered after it:
    final norms, pooler, head); `name:REGEX` (searched in the name). Raises ConfigError for any
    other rule and ModelError when nothing matches.

    >>> select_trainable(["e.w", "h.0.w", "h.1.w", "head.w"], "last:1")
    ['h.1.w', 'head.w']
    """
    kind, _, argument = rule.partition(":")
    if rule == "all":
        return list(names)
    if kind == "name":
        try:
            pattern = re.compile(argument)
        except re.error as error:
            raise ConfigError(
                f"model.trainable = {rule!r}: not a regular expression: {error}"
            ) from error
        chosen = [name for name in names if pattern.search(name)]
    elif kind == "last" and argument.isdecimal() and int(argument) > 0:
        chosen = _last_layers(names, int(argument))
    else:
        raise ConfigError(
            f"model.trainable = {rule!r} is not understood; use 'all', 'last:N' or 'name:REGEX'"
        )
    if not chosen:
        raise ModelError(
            f"model.trainable = {rule!r} matches no parameter; the model has, for example, "
            + ", ".join(names[:3] + names[-2:])
        )
    return chosen


def _last_layers(names: list[str], count: int) -> list[str]:
    depths: dict[str, int] = {}
    for name in names:
        if match := _LAYER.match(name):
            stack = match["stack"]
            depths[stack] = max(depths.get(stack, 0), int(match["index"]) + 1)
    if not depths:
        raise ModelError("model.trainable = 'last:N' needs a model with numbered layers; name them")
    stack = max(depths, key=lambda key: depths[key])
    first = depths[stack] - count
    if first < 0:
        raise ModelError(
            f"model.trainable = 'last:{count}', but the model has {depths[stack]} layers"
        )
    inside = [i for i, name in enumerate(names) if name.startswith(stack + ".")]
    chosen = []
    for position, name in enumerate(names):
        match = _LAYER.match(name)
        if match and match["stack"] == stack:
            if int(match["index"]) >= first:
                chosen.append(name)
        elif position > inside[-1]:
            chosen.append(name)
    return chosen
