"""A transcript of the secure sum, byte for byte.

Golden values are in secure_sum.json beside this file. They are normative: a member that derives
other masks cannot be summed. `python -m tests.unit.secure_sum.test_transcript` writes them anew,
for a new version of the tags.
"""

import hashlib
import hmac
import json
import struct
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from tests.unit.secure_sum.cohort import RUN, STATE, Cohort, integers, secret

GOLDEN: Final = Path(__file__).with_name("secure_sum.json")


def transcript() -> dict[str, Any]:
    """Four members, a first attempt that misses one, and a second that succeeds."""
    cohort = Cohort(4, bound=1000)
    first = cohort.attempt(3)
    vectors = {number: integers(number, -number, 1000) for number in range(4)}
    before = cohort.masked(first, {number: vectors[number] for number in range(3)})
    retry = cohort.retry(first, cohort.roster.names[:3])
    fresh = {number: integers(-1000, 7 * number, 0) for number in range(3)}
    after = cohort.masked(retry, fresh)
    return {
        "roster": json.loads(cohort.roster.to_json()),
        "roster_digest": cohort.roster.digest().hex(),
        "announcements": [announcement.hex() for announcement in cohort.announcements],
        "attempts": [first.to_bytes().hex(), retry.to_bytes().hex()],
        "masked": [[message.hex() for message in messages] for messages in (before, after)],
        "sum": cohort.total(retry, after).tolist(),
    }


def test_the_transcript_is_the_committed_one() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["sum"] == [-3000, 21, 0]
    assert transcript() == golden


def test_the_committed_transcript_is_the_formula() -> None:
    """Masks derived a second time, from private keys and the layout that `attempts` documents."""
    golden = json.loads(GOLDEN.read_text())
    attempt = bytes.fromhex(golden["attempts"][1])
    keys = [X25519PrivateKey.from_private_bytes(secret(n, "ephemeral")) for n in range(4)]
    publics = [key.public_key() for key in keys]
    raw = [public.public_bytes_raw() for public in publics]
    head = struct.unpack("<QIIIQ", attempt[21:49])
    assert (attempt[:21], head) == (b"lorand/sum/attempt/v1", (0, 1, 3, 0b111, 1000))
    roster = hashlib.sha256(json.dumps(golden["roster"], separators=(",", ":")).encode()).digest()
    digests = hashlib.sha256(b"lorand/sum/keys/v1" + b"".join(raw[:3])).digest()
    assert attempt[49:] == RUN + roster + STATE + digests
    vectors = [[-1000, 7 * number, 0] for number in range(3)]
    for number, vector in enumerate(vectors):
        message = bytes.fromhex(golden["masked"][1][number])
        expected = [value % 2**64 for value in vector]
        for other in {0, 1, 2} - {number}:
            pair = struct.pack("<HH", min(number, other), max(number, other))
            info = b"lorand/sum/mask/v1" + attempt + pair
            extracted = hmac.digest(bytes(32), keys[number].exchange(publics[other]), "sha256")
            key = hmac.digest(extracted, info + b"\1", "sha256")
            cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
            stream = struct.unpack("<3Q", cipher.update(bytes(24)))
            sign = 1 if number < other else -1
            expected = [(y + sign * r) % 2**64 for y, r in zip(expected, stream, strict=True)]
        body = b"lorand/sum/masked/v1" + hashlib.sha256(attempt).digest()
        body += struct.pack("<H3Q", number, *expected)
        identity = Ed25519PrivateKey.from_private_bytes(secret(number, "identity"))
        assert message == body + identity.sign(body)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(transcript(), indent=1) + "\n")
