"""Every random choice takes its seed from here."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2**31) for one choice, named by what it belongs to: `derive_seed(run_seed, round, "pairing", prompt_id)`.

    SHA-256 of the parts: neighbouring rounds, stages and items get unrelated streams, on every platform the same.
    """
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
