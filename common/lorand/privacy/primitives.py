"""All cryptography of secure sums and signed ledgers: calls of the `cryptography` library alone.

Signatures are Ed25519 (RFC 8032), key agreement is X25519 (RFC 7748), keys are derived with
HKDF-SHA256 (RFC 5869) and masks are the stream of ChaCha20 (RFC 8439). Private keys come from the
operating system's randomness.
"""

from typing import Final, NoReturn

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from lorand.errors import ConfigError, HandshakeError

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
NONCE: Final = bytes(16)
"""Counter and nonce of ChaCha20: zero, since a derived key makes one stream and is forgotten."""

Unsigned = NDArray[np.uint64]


class IdentityKey:
    """A member's long-term Ed25519 key: who it is, over all runs. Its owner keeps it on disk."""

    def __init__(self, private: bytes | None = None) -> None:
        """Take the 32 bytes of `private_bytes`, or make a new key. Raises ConfigError."""
        if private is not None and len(private) != KEY_BYTES:
            raise ConfigError(
                f"an identity key has {KEY_BYTES} bytes, not {len(private)}: restore the file from "
                "a copy, or make a new key and have the roster changed at every member"
            )
        self._key = (
            Ed25519PrivateKey.generate()
            if private is None
            else Ed25519PrivateKey.from_private_bytes(private)
        )
        self.public = self._key.public_key().public_bytes_raw()

    def private_bytes(self) -> bytes:
        """Return the secret, 32 bytes, for a file that only its owner can read."""
        return self._key.private_bytes_raw()

    def sign(self, body: bytes) -> bytes:
        """Return the signature of a body that begins with its domain tag, 64 bytes."""
        return self._key.sign(body)


def signed_by(public: bytes, signature: bytes, body: bytes) -> bool:
    """Return whether the owner of a public key signed this body."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, body)
    except (InvalidSignature, ValueError):
        return False
    return True


class EphemeralKey:
    """A member's X25519 key of one run, in memory only: who restarts announces another.

    There is no way to bring a key, since whoever repeats a key repeats masks.
    """

    def __init__(self) -> None:
        """Make a new key."""
        self._key = X25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()

    def shared_secret(self, public: bytes) -> bytes:
        """Return what both owners compute, 32 bytes. Raises HandshakeError for an unsound key.

        Keys of small order lead to the same secret for everyone; the library refuses them.
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise HandshakeError(
                "a member announced a key that hides nothing: do not take part before its owner "
                "explains it"
            ) from error

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickles: two holders of one key could mask twice."""
        raise TypeError("an ephemeral key cannot be copied or stored")


def mask(secret: bytes, info: bytes, length: int) -> Unsigned:
    """Return r = ChaCha20(HKDF-SHA256(secret, info)) as little-endian u64, shape (length,)."""
    key = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)
    stream = Cipher(algorithms.ChaCha20(key, NONCE), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * length)), "<u8")
