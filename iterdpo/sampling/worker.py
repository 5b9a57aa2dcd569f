"""The process that holds the vLLM engine. `client.py` starts it and speaks to it in JSON lines.

start    a new engine with the policy's weights
load     wake up, and take other weights in place
sample   completions with tokens and log-probabilities
release  sleep: give the GPU's memory back (a CPU has nothing to give)

A reply depends on the weights and the request alone. Each prompt has its own seed, all prompts of a request are in
flight together, and what the prefix cache held before is dropped, so that the batches that the engine forms, and
with them the last bits of the arithmetic, are the same in an engine that has just started.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes to the log, not between the replies
    worker = Worker()
    import vllm  # noqa: F401  # twelve seconds on a small machine, while the parent does other things

    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("method"))(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class Worker:
    """One method a request; each returns its reply."""

    def start(self, policy: str, engine: dict[str, Any]) -> dict[str, Any]:
        from vllm import LLM
        from vllm.platforms import current_platform

        self.on_gpu = not current_platform.is_cpu()
        defaults: dict[str, Any] = {"enable_sleep_mode": True} if self.on_gpu else cpu_defaults(engine)
        self.llm = LLM(policy, seed=0, disable_log_stats=True, **{**defaults, **engine})
        return {}

    def load(self, policy: str, reload: bool) -> dict[str, Any]:
        if self.on_gpu:
            self.llm.wake_up()
        if reload:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": policy})
            if not self.on_gpu:
                self.llm.apply_model(repack_output_head)
        return {}

    def sample(self, prompt_ids: list[list[int]], seeds: list[int], parameters: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        # logprobs=0: that of the sampled token alone, of the unmodified distribution
        settings = [SamplingParams(**parameters, seed=seed, logprobs=0) for seed in seeds]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompt_ids], settings, use_tqdm=False)
        return {"groups": [[completion_json(c) for c in output.outputs] for output in outputs]}

    def release(self) -> dict[str, Any]:
        if self.on_gpu:
            self.llm.sleep(level=1)
        return {"asleep": self.on_gpu}


def repack_output_head(model: Any) -> None:
    """Pack the output head for the CPU again, from the weights as they are now.

    vLLM 0.32 packs it once. A head that is tied to the embeddings has no weights of its own to reload, so its packed
    copy stays that of the first policy, and the engine samples from new layers under an old head.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def cpu_defaults(engine: dict[str, Any]) -> dict[str, Any]:
    return {
        # Compiling takes 45 s and gains a tenth for models that a CPU can sample from at all.
        "enforce_eager": True,
        # A seeded request that is prefilled in chunks crashes vLLM's CPU sampler.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, engine["max_model_len"]),
    }


def completion_json(completion: Any) -> dict[str, Any]:
    """A vLLM CompletionOutput as the fields of `iterdpo.types.Completion`."""
    ids = list(completion.token_ids)
    return {
        "text": completion.text,
        "token_ids": ids,
        "logprobs": [position[token].logprob for position, token in zip(completion.logprobs, ids, strict=True)],
        "finish_reason": "length" if completion.finish_reason == "length" else "stop",
    }


if __name__ == "__main__":
    main()
