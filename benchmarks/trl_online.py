"""Online RL by TRL, as an arm of `iterdpo compare`: GRPO or RLOO on the arm's prompts, with its judge as the reward.

    arms:
      grpo: {command: ["{python}", benchmarks/trl_online.py, "{spec}"], requires: [trl]}
      rloo: {command: ["{python}", benchmarks/trl_online.py, "{spec}", rloo], requires: [trl]}

In place of `{python}`, which is iterdpo's own, may be that of another environment, with iterdpo, for the judge, and the TRL
of your choice (tried: 1.16, with a tiny model). As many completions are sampled as the other arms sample and never more, `n` of each prompt, in as many
optimizer steps. `beta` is TRL's weight of the KL to the initial policy. The checkpoint and `budget.json` are written where
the spec says.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from iterdpo.types import Completion, CompletionGroup, Prompt
from judges import load_judge

ABSTAINED = 0.0
"""The reward of a completion that the judge could not score, which these trainers cannot leave out."""


def main(path: str, method: str = "grpo") -> None:
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = json.loads(Path(spec["prompts"]).read_text(encoding="utf-8"))
    judge = load_judge(spec["judge"]["use"], spec["judge"]["args"])
    judge.begin_stage()
    used = {"completions": 0, "judge_calls": 0, "tokens": 0}

    def reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        groups = []
        for i, (prompt, said, ids) in enumerate(zip(prompts, completions, completion_ids, strict=True)):
            text = said if isinstance(said, str) else said[-1]["content"]
            own = {name: values[i] for name, values in columns.items() if name in rows[0]}
            groups.append(
                CompletionGroup(Prompt(f"p-{i}", prompt, own), [], [Completion(text, ids, [0.0] * len(ids), "stop")])
            )
            used["tokens"] += len(ids)
        used["completions"] += len(groups)
        used["judge_calls"] += len(groups)
        return [ABSTAINED if j.scores[0] is None else j.scores[0] for j in judge.judge(groups)]

    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[method]
    a_step = max(1, spec["completions"] // spec["steps"] // spec["n"]) * spec["n"]
    settings = config(
        output_dir=tempfile.mkdtemp(),  # nothing is saved there
        max_steps=min(spec["steps"], spec["completions"] // a_step),
        learning_rate=spec["learning_rate"],
        beta=spec["beta"],
        num_generations=spec["n"],
        per_device_train_batch_size=a_step,
        temperature=spec["temperature"],
        max_completion_length=spec["max_tokens"],
        seed=spec["seed"],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"]),
        processing_class=tokenizer,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(rows),
    )
    made.train()
    made.save_model(spec["output"])
    (Path(spec["output"]) / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of this machine
    tokenizer.save_pretrained(spec["output"])
    (Path(spec["output"]) / "budget.json").write_text(json.dumps({**used, "steps": made.state.global_step}))


if __name__ == "__main__":
    main(*sys.argv[1:])
