"""Every random choice takes its seed from here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2**31) for one choice, named by what it belongs to: `derive_seed(run_seed, round, "pairing", prompt_id)`.

    SHA-256 of the parts: neighbouring rounds, stages and items get unrelated streams, on every platform the same.
    """
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def derive_seeds(seed: int, *parts: int | str, items: Iterable[str]) -> NDArray[np.uint32]:
    """`derive_seed(seed, *parts, item)` of every item, [N] uint32; a million in a second."""
    import numpy as np

    begun = hashlib.sha256("\x1f".join(str(part) for part in (seed, *parts, "")).encode())
    values = bytearray()
    for item in items:
        one = begun.copy()
        one.update(item.encode())
        values += one.digest()[:4]
    return np.frombuffer(values, ">u4").astype(np.uint32) >> np.uint32(1)
