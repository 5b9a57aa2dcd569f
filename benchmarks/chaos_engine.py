"""A worker that answers as `iterdpo.sampling.worker` does, without vLLM: it starts in a second, and draws random letters.

What it draws depends on the policy's weights, the prompt and its seed. Log-probabilities are -1.
"""

from __future__ import annotations

import hashlib
import random
import string
import time
from pathlib import Path

from iterdpo.run.worker import Done, beat, serve
from iterdpo.sampling.base import Load, Release, Released, Sample, Sampled, Start, Started
from iterdpo.types import Completion

SECONDS = 0.05
"""For a prompt."""


class Worker:
    def start(self, request: Start) -> Started:
        self._use(request.policy)
        return Started()

    def load(self, request: Load) -> Done:
        self._use(request.policy)
        return Done()

    def _use(self, policy: str) -> None:
        weights = b"".join(path.read_bytes() for path in sorted(Path(policy).glob("*.safetensors")))
        self.policy = hashlib.sha256(weights).hexdigest()

    def sample(self, request: Sample) -> Sampled:
        groups = []
        for ids, seed in zip(request.prompt_ids, request.seeds, strict=True):
            draw = random.Random(f"{self.policy} {ids} {seed}")
            groups.append([self.completion(draw, request.parameters.max_tokens) for _ in range(request.parameters.n)])
            time.sleep(SECONDS)
            beat()
        return Sampled(groups)

    def completion(self, draw: random.Random, tokens: int) -> Completion:
        ids = [draw.randrange(3, 259) for _ in range(tokens)]
        return Completion("".join(draw.choices(string.ascii_lowercase, k=tokens)), ids, [-1.0] * tokens, "length")


if __name__ == "__main__":
    worker = Worker()
    serve(
        {Start: worker.start, Load: worker.load, Sample: worker.sample, Release: lambda request: Released(asleep=False)}
    )
