"""Sampling from vLLM servers that somebody else has started: `sampling.servers`.

A server needs `VLLM_SERVER_DEV_MODE=1`, whose endpoints change its weights, and must see the run directory under the same
path. After a change it is told the digest of the policy as the version of its weights. Completions count only if it
still has that version after them: a server that was started again, or that another run has changed, is noticed.

    POST /collective_rpc reload_weights    the weights of a checkpoint, from its path
    POST /v1/load_lora_adapter             an adapter, if the server was started with --enable-lora
    POST /v1/completions                   token ids in; token ids with log-probabilities out
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from iterdpo.errors import ChildFailed
from iterdpo.escape import printable
from iterdpo.sampling.base import Batch, Sampler, SamplingParameters
from iterdpo.types import Completion

if TYPE_CHECKING:
    from aiohttp import ClientSession

R = TypeVar("R")
AT_ONCE = 2
"""Batches that a server has at once, so that it is not idle while the slowest completion of one ends."""


class ServerSampler(Sampler):
    """One vLLM server. What fails there is a ChildFailed, with the server's URL; the next `load` tries again.

    Args:
        url: without a path, such as `http://10.0.0.7:8000`.
        max_model_len: called for the longest prompt and completion together, in tokens, which the server must hold.
        reproducible: send seeds.
        silence, start: seconds that a request for completions, or for new weights, may take.
        base: gives the checkpoint that adapters belong to, and its digest.
    """

    def __init__(
        self,
        url: str,
        *,
        max_model_len: Callable[[], int],
        reproducible: bool,
        silence: float,
        start: float,
        base: Callable[[], tuple[Path, str]],
    ) -> None:
        self.url, self._max_model_len, self._reproducible = url.rstrip("/"), max_model_len, reproducible
        self._silence, self._start, self._base = silence, start, base
        self._model: str | None = None  # as requests name it
        self._version = ""  # of its weights
        self._running: set[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = set()

    def load(self, policy: Path, digest: str) -> None:
        self._run(lambda session: self._load(session, policy, digest))

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        assert self._model is not None, "load a policy first"
        return self._run(lambda session: self._sample(session, prompt_ids, seeds, parameters))

    def sample_batches(
        self, batches: Iterable[Batch], parameters: SamplingParameters
    ) -> Generator[list[list[Completion]]]:
        """In order, a few at once."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            flying = deque[Any]()
            for batch in batches:
                flying.append(threads.submit(self.sample, *batch, parameters))
                if len(flying) == AT_ONCE:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()

    def release(self) -> None:
        """The server is not ours."""

    def close(self) -> None:
        """End the requests that are on their way."""
        for loop, task in list(self._running):
            with suppress(RuntimeError):  # it has just ended, and its loop is closed
                loop.call_soon_threadsafe(task.cancel)

    async def _load(self, session: ClientSession, policy: Path, digest: str) -> None:
        served = self._part(await self._ask(session, "GET", "/v1/models", seconds=self._start), "data")
        base = next((model for model in served if not model.get("parent")), None)
        if base is None:
            raise self._failed("/v1/models: no model is there")
        needed, there = self._max_model_len(), base.get("max_model_len")
        if there is not None and there < needed:
            raise self._failed(f"it holds {there} tokens, but this run needs {needed}; start it with --max-model-len")
        if not (policy / "adapter_config.json").exists():
            await self._take(session, policy, digest)
            self._model = base["id"]
            return
        await self._take(session, *self._base())  # it may have been started with another, or another run has changed it
        self._model, path = f"iterdpo-{digest}", str(policy.resolve())
        if all(model["id"] != self._model for model in served):
            await self._ask(
                session, "POST", "/v1/load_lora_adapter", lora_name=self._model, lora_path=path, seconds=self._start
            )

    async def _take(self, session: ClientSession, checkpoint: Path, digest: str) -> None:
        """Let the server have these weights, which it may have already."""
        self._version = digest
        if await self._served(session) == digest:
            return
        weights: dict[str, Any] = {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(checkpoint.resolve())},
        }
        await self._ask(session, "POST", "/collective_rpc", **weights, seconds=self._start)
        await self._ask(session, "POST", "/reset_prefix_cache", seconds=self._start)
        await self._ask(session, "POST", "/update_weight_version", new_version=digest, seconds=self._start)

    async def _served(self, session: ClientSession) -> str:
        """The version of the server's weights."""
        return str(self._part(await self._ask(session, "GET", "/weight_info", seconds=self._start), "weight_version"))

    async def _sample(
        self,
        session: ClientSession,
        prompt_ids: Sequence[list[int]],
        seeds: Sequence[int],
        parameters: SamplingParameters,
    ) -> list[list[Completion]]:
        """All prompts at once."""
        body: dict[str, Any] = {
            "model": self._model,
            "n": parameters.n,
            "top_p": parameters.top_p,
            "top_k": parameters.top_k,
            "max_tokens": parameters.max_tokens,
            "stop_token_ids": list(parameters.stop_token_ids),
            # a server takes what is not said from the model's generation_config.json
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
        }
        given: list[dict[str, Any]] = [
            {"temperature": parameters.temperature_of(seed), **({"seed": seed} if self._reproducible else {})}
            for seed in seeds
        ]
        replies = await asyncio.gather(
            *(
                self._ask(session, "POST", "/v1/completions", prompt=ids, **body, **own, seconds=self._silence)
                for ids, own in zip(prompt_ids, given, strict=True)
            )
        )
        if (served := await self._served(session)) != self._version:
            raise self._failed(f"its weights are no longer those of the policy, but of {printable(served)[:80]}")
        groups = [[self._completion(choice) for choice in self._part(reply, "choices")] for reply in replies]
        if wrong := [len(group) for group in groups if len(group) != parameters.n]:
            raise self._failed(f"/v1/completions: {wrong[0]} completions of a prompt in place of {parameters.n}")
        return groups

    def _completion(self, choice: dict[str, Any]) -> Completion:
        ids, logprobs = self._part(choice, "token_ids"), self._part(self._part(choice, "logprobs"), "token_logprobs")
        if len(ids) != len(logprobs):
            raise self._failed(f"/v1/completions: {len(ids)} token_ids with {len(logprobs)} token_logprobs")
        ended = choice.get("finish_reason")
        return Completion(self._part(choice, "text"), ids, logprobs, "length" if ended == "length" else "stop")

    def _part(self, reply: Any, name: str) -> Any:
        if not isinstance(reply, dict) or reply.get(name) is None:
            raise self._failed(f"a reply of it has no {name}, as those of vLLM have; correct the URL, or start vLLM")
        return reply[name]

    async def _ask(self, session: ClientSession, verb: str, path: str, /, *, seconds: float, **body: Any) -> Any:
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=30)
            async with session.request(verb, self.url + path, json=body or None, timeout=timeout) as reply:
                text = await reply.text()
                if reply.status == 404:
                    raise self._failed(f"it has no {path}; start it with VLLM_SERVER_DEV_MODE=1 (and --enable-lora)")
                if reply.status != 200:
                    raise self._failed(f"{path}: status {reply.status}: {printable(' '.join(text.split()))[:400]}")
                return await reply.json() if reply.content_type == "application/json" else None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise self._failed(f"{path}: {type(error).__name__} {printable(str(error))[:200]}") from error

    def _failed(self, why: str) -> ChildFailed:
        return ChildFailed(f"the server {self.url}: {why}")

    def _run(self, work: Callable[[ClientSession], Coroutine[Any, Any, R]]) -> R:
        """The result of `work`, which asks over one session: its requests share connections."""
        from aiohttp import ClientSession, TCPConnector

        async def run() -> R:
            task = asyncio.current_task()
            assert task is not None
            entry = (asyncio.get_running_loop(), task)
            self._running.add(entry)
            try:
                async with ClientSession(connector=TCPConnector(limit=0)) as session:
                    return await work(session)
            finally:
                self._running.discard(entry)

        try:
            return asyncio.run(run())
        except asyncio.CancelledError:
            raise self._failed("closed") from None
