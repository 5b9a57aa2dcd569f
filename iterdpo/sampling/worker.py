"""The process that holds the vLLM engine. `client.py` starts it and sends it the requests of `base.py`.

A reply to `Sample` depends on the weights and the request alone. Each prompt has its own seed, all prompts of a request
are in flight together, and what the prefix cache held before is dropped, so that the batches that the engine forms, and
with them the last bits of the arithmetic, are the same in an engine that has just started. `Enqueue` and `Finish` do
without that: prompts join those in flight, and have no seeds.

A policy that is a LoRA adapter stays one if vLLM applies it (`native`), and is merged into its base otherwise: if
vLLM cannot, and on a CPU, whose kernels gather a copy of the adapter for every token. On two cores, a model
of 100 million weights with r = 16 sampled 25 times slower so; merging it takes 3 seconds a round.
"""

from __future__ import annotations

import shutil
import traceback
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from safetensors import safe_open

from iterdpo.run.worker import Done, beat, import_heavy, serve
from iterdpo.sampling.base import (
    Enqueue,
    Finish,
    Load,
    Release,
    Released,
    Sample,
    Sampled,
    SamplingParameters,
    Start,
    Started,
)
from iterdpo.types import Completion

FULL = 16
"""Completions in flight for each that the engine samples at once: it stays full until one that is 16 times longer ends."""


def main() -> None:
    worker = Worker()
    serve(
        {
            Start: worker.start,
            Load: worker.load,
            Sample: worker.sample,
            Enqueue: worker.enqueue,
            Finish: worker.finish,
            Release: worker.release,
        },
        # It takes twelve seconds on a small machine, while the parent does other things.
        prepare=lambda: import_heavy("vllm"),
    )


class Worker:
    """One method for each request; each returns its reply."""

    native = False
    """Whether the engine applies adapters itself."""

    def __init__(self) -> None:
        self.flying: deque[list[str]] = deque()  # ids of the requests of each batch
        self.finished: dict[str, Any] = {}  # outputs of batches that are not complete, by id

    def start(self, request: Start) -> Started:
        try:
            self._start(request)
        except Exception as error:
            if not self.native or self.lora != "auto":
                raise
            traceback.print_exc()
            return Started(no_adapters=f"{type(error).__name__}: {error}")
        together = self.on_gpu and not request.reproducible
        return Started(in_flight=FULL * request.engine.max_num_seqs if together else 0)

    def _start(self, request: Start) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        from iterdpo.training.models import adapter_base  # after vLLM, which sets torch up before its import

        self.on_gpu = not current_platform.is_cpu()
        self.lora, self.scratch = request.lora, Path(request.scratch)
        self.trust_remote_code = request.trust_remote_code
        engine = request.engine.model_dump(include={"dtype", "max_num_seqs", "gpu_memory_utilization"})
        engine |= {"max_model_len": request.max_model_len, "tensor_parallel_size": request.engine.tensor_parallel_size}
        engine |= {"trust_remote_code": request.trust_remote_code, **request.engine.extra}
        rank = request.adapter_rank
        self.native = rank is not None and (self.lora == "vllm" or (self.lora == "auto" and self.on_gpu))
        self.adapter: Any = None
        self.adapters = 0
        defaults: dict[str, Any] = {"enable_sleep_mode": True} if self.on_gpu else cpu_defaults(engine["max_model_len"])
        if self.native:
            assert rank is not None
            defaults |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": engine_rank(rank)}
        self.weights = adapter_base(request.policy) or request.policy
        self.llm = LLM(self.weights, seed=0, disable_log_stats=True, **{**defaults, **engine})
        step = self.llm.llm_engine.step

        def beating(*given: Any) -> Any:
            beat()
            return step(*given)

        self.llm.llm_engine.step = beating
        if self.weights != request.policy:
            self._use(request.policy)

    def load(self, request: Load) -> Done:
        if self.on_gpu:
            self.llm.wake_up()
        if request.reload:
            self._use(request.policy)
        return Done()

    def _use(self, policy: str) -> None:
        """Sample from this policy from now on."""
        from iterdpo.training.models import adapter_base

        base = adapter_base(policy)
        self.adapter = None
        if base is None:
            self._reload(policy, name=policy)
        elif not self.native or (not self.on_gpu and adapts_head(policy)):  # see `adapts_head`
            self._merge(policy)
        else:
            if self.weights != base:
                self._reload(base, name=base)
            try:
                self.adapter = self._added(policy)
            except Exception as error:
                if self.lora != "auto":
                    raise
                print(f"vLLM does not take the adapter ({type(error).__name__}: {error})")
                self._merge(policy)

    def _added(self, policy: str) -> Any:
        """The adapter as requests name it. Added now, because a refusal during sampling would end the engine."""
        from vllm.lora.request import LoRARequest

        self.adapters += 1  # never an id again: vLLM takes two adapters of one id for the same
        request = LoRARequest(f"policy-{self.adapters}", self.adapters, policy)
        self.llm.llm_engine.add_lora(request)
        return request

    def _merge(self, policy: str) -> None:
        print(f"merging the adapter {policy} into its base")
        shutil.rmtree(self.scratch, ignore_errors=True)  # that of a run that was killed
        try:
            dtype = self.llm.llm_engine.model_config.dtype
            merge_adapter(policy, self.scratch, dtype=dtype, trust_remote_code=self.trust_remote_code)
            self._reload(str(self.scratch), name=policy)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _reload(self, path: str, *, name: str) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        if not self.on_gpu:
            self.llm.apply_model(repack_output_head)
        self.weights = name

    def sample(self, request: Sample) -> Sampled:
        self.llm.reset_prefix_cache()
        parameters = request.parameters
        settings = [_settings(parameters, parameters.temperature_of(seed), seed) for seed in request.seeds]
        outputs = self.llm.generate(_prompts(request), settings, use_tqdm=False, lora_request=self.adapter)
        return Sampled([[completion_of(c) for c in output.outputs] for output in outputs])

    def enqueue(self, request: Enqueue) -> Done:
        if not self.flying:
            self.llm.reset_prefix_cache()
        settings = [_settings(request.parameters, temperature, None) for temperature in request.temperatures]
        ids = self.llm.enqueue(_prompts(request), settings, use_tqdm=False, lora_request=self.adapter)
        self.flying.append([name.partition("-")[0] for name in ids])  # outputs do without the random part
        return Done()

    def finish(self, request: Finish) -> Sampled:
        wanted = self.flying.popleft()
        while any(name not in self.finished for name in wanted):
            self.finished |= {output.request_id: output for output in self.llm.llm_engine.step() if output.finished}
        return Sampled([[completion_of(c) for c in self.finished.pop(name).outputs] for name in wanted])

    def release(self, request: Release) -> Released:
        if self.on_gpu:
            self.llm.sleep(level=1)
        return Released(asleep=self.on_gpu)


def _prompts(request: Sample | Enqueue) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in request.prompt_ids]


def _settings(parameters: SamplingParameters, temperature: float, seed: int | None) -> Any:
    """As vLLM's SamplingParams, with the log-probability of the sampled token, of the unmodified distribution.

    In lists for all tokens: an object for each would keep Python's collector busy.
    """
    from vllm import SamplingParams

    arguments = {**asdict(parameters), "temperature": temperature, "stop_token_ids": list(parameters.stop_token_ids)}
    return SamplingParams(**arguments, seed=seed, logprobs=0, flat_logprobs=True)


HEADS = ("lm_head", "embed_out", "output_layer")


def merge_adapter(adapter: str | Path, output: Path, *, dtype: Any, trust_remote_code: bool = False) -> None:
    """Write W + (alpha / r) B A in `dtype` to `output`: config.json and weights, as an engine reloads them.

    Added in float32 and rounded once, on the CPU; takes four bytes of memory a weight. A ValueError if it adapts an
    output head, or embeddings, that are tied: two matrices would have to come of one.
    """
    from iterdpo.training.models import load_policy, make_savable

    model = load_policy(adapter, trust_remote_code=trust_remote_code)
    inner = model.get_base_model()
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if inner.config.get_text_config().tie_word_embeddings and any(hasattr(end, "lora_A") for end in ends):
        raise ValueError(
            f"{adapter} adapts the tied embeddings or output head of a model, and cannot be merged; leave them "
            "out of dpo.adapter.target_modules"
        )
    merged = model.merge_and_unload().to(dtype)
    make_savable(merged)
    merged.save_pretrained(output)


def adapts_head(adapter: str | Path) -> bool:
    """Whether the adapter changes the output head.

    vLLM 0.32 on a CPU leaves such a head in place when its adapter is gone: the base then samples with it.
    """
    with safe_open(Path(adapter) / "adapter_model.safetensors", framework="numpy") as tensors:
        return any(head in name.split(".") for name in tensors.keys() for head in HEADS)  # noqa: SIM118  # no mapping


def repack_output_head(model: Any) -> None:
    """Pack the output head for the CPU again, from the weights as they are now.

    vLLM 0.32 packs it once. A head that is tied to the embeddings has no weights to reload, so its packed
    copy stays that of the first policy, and the engine samples from new layers under an old head.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def engine_rank(rank: int) -> int:
    """The smallest rank the engine can be built for that holds adapters of this one; a ValueError if vLLM has none."""
    from vllm.config.lora import MaxLoRARanks

    fitting: list[int] = [known for known in sorted(get_args(MaxLoRARanks)) if known >= rank]
    if not fitting:
        raise ValueError(f"vLLM applies adapters up to rank {max(get_args(MaxLoRARanks))}, but this one has {rank}")
    return fitting[0]


def cpu_defaults(max_model_len: int) -> dict[str, Any]:
    return {
        # Compiling takes 45 s and gains a tenth for models that a CPU can sample from at all.
        "enforce_eager": True,
        # A seeded request that is prefilled in chunks crashes vLLM's CPU sampler.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_model_len),
    }


def completion_of(output: Any) -> Completion:
    """Ours, of a vLLM CompletionOutput."""
    flat = output.logprobs
    logprobs = [flat.logprobs[first] for first in flat.start_indices]  # the sampled token is the first at its position
    return Completion(
        output.text, list(output.token_ids), logprobs, "length" if output.finish_reason == "length" else "stop"
    )


if __name__ == "__main__":
    main()
