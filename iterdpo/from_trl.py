"""The keys of TRL, each with its equivalent here or the reason why there is none.

`docs/from-trl.md` is written from this table (`tools/from_trl_docs.py`), and a message about an unknown key takes its
hint from it. TRL is version 1.16. Notes are plain text, since they stand in messages too; backticks are removed there.
"""

from __future__ import annotations

from typing import NamedTuple


class Equivalent(NamedTuple):
    """What a key of TRL is here: `Equivalent(("dpo.nll_coefficient",), "the weight of the chosen completion's NLL")`."""

    keys: tuple[str, ...]
    """Dotted keys of the configuration; empty if there is none."""
    note: str
    """What differs, or why there is no such key."""


def _is(*keys: str, note: str = "") -> Equivalent:
    return Equivalent(keys, note)


def _no(reason: str) -> Equivalent:
    return Equivalent((), reason)


_STATES = "the state of a run is its directory: the same command goes on from there"
_NO_HUB = "nothing is uploaded; the policy is in run_dir, as a Hugging Face checkpoint"
_LOADER = "pairs are read from memory-mapped files, by the training process itself"
_COMPILE = "the model is not compiled; attention over shared prompts and the output head have kernels of their own"
_EVERY_STEP = "every step is a line of train_log.jsonl"
_DDP = "use dpo.accelerate_config for settings of the distributed backend"

SECTIONS: dict[str, dict[str, Equivalent]] = {
    "The objective": {
        "loss_type": _is("dpo.loss", note="one name, no sums; `sigmoid` plus `sft` is dpo.nll_coefficient"),
        "loss_weights": _is(
            "dpo.nll_coefficient", note="the weight of `sft` beside another loss; there are no other sums"
        ),
        "beta": _is("dpo.beta"),
        "label_smoothing": _is("dpo.loss.label_smoothing", note="also works with `sigmoid` (conservative DPO)"),
        "ld_alpha": _is("dpo.ld_alpha"),
        "use_weighting": _is("dpo.wpo"),
        "discopop_tau": _is("dpo.loss.tau", note="with `discopop`"),
        "f_divergence_type": _no("only the reverse KL of DPO is implemented"),
        "f_alpha_divergence_coef": _no("only the reverse KL of DPO is implemented"),
        "router_aux_loss_coef": _no("the load-balancing loss of mixture-of-experts models is not added"),
        "label_smoothing_factor": _is(
            "dpo.loss.label_smoothing",
            note="TRL's smooths token labels, which DPO does not use; ours flips preferences",
        ),
    },
    "The reference": {
        "precompute_ref_log_probs": _no("always: they are computed once, before the first step, and stored"),
        "precompute_ref_batch_size": _is("dpo.tokens_per_micro_batch", note="in tokens; the same as in training"),
        "sync_ref_model": _is(
            "dpo.reference", note="it is renewed between rounds, not within one: `previous`, `ema` or `periodic`"
        ),
        "ref_model_mixup_alpha": _is("dpo.reference_decay", note="1 minus TRL's value; with `dpo.reference: ema`"),
        "ref_model_sync_steps": _is("dpo.reference_every", note="in rounds; with `dpo.reference: periodic`"),
    },
    "The model and its adapter": {
        "model_init_kwargs": _is("model.revision", "dpo.precision", note="no other arguments of from_pretrained"),
        "model_name_or_path": _is("model.path"),
        "model_revision": _is("model.revision"),
        "trust_remote_code": _is("model.trust_remote_code"),
        "dtype": _is("dpo.precision", note="weights are float32, and frozen ones under an adapter bfloat16"),
        "attn_implementation": _no("the trainer chooses it; a trial on the first pairs checks it"),
        "disable_dropout": _no("always: only an adapter can have dropout, with dpo.adapter.lora_dropout"),
        "use_peft": _is("dpo.adapter", note="`{}` means an adapter with the defaults"),
        "peft_config": _is("dpo.adapter"),
        "lora_r": _is("dpo.adapter.r"),
        "lora_alpha": _is("dpo.adapter.alpha"),
        "lora_dropout": _is("dpo.adapter.lora_dropout", note="0 here, 0.05 in TRL's ModelConfig"),
        "lora_target_modules": _is("dpo.adapter.target_modules"),
        "lora_modules_to_save": _is("dpo.adapter.modules_to_save"),
        "lora_target_parameters": _no("an adapter has matrices of modules only"),
        "lora_task_type": _no("always CAUSAL_LM"),
        "use_rslora": _is(
            "dpo.adapter.alpha", note="the scale is alpha / r; rsLoRA's alpha / sqrt(r) needs a larger alpha"
        ),
        "use_dora": _no("adapters are plain LoRA"),
        "load_in_4bit": _is("dpo.adapter.quantize", note="`nf4`"),
        "load_in_8bit": _is("dpo.adapter.quantize", note="4 bits (`nf4`) only"),
        "bnb_4bit_quant_type": _is("dpo.adapter.quantize", note="`nf4` only"),
        "bnb_4bit_quant_storage": _no("bitsandbytes' default"),
        "use_bnb_nested_quant": _no("bitsandbytes' default, not nested"),
        "neftune_noise_alpha": _no("log-probabilities are computed and compared without noise"),
    },
    "The data": {
        "dataset_name": _is("data.path", "prompts.path", note="a file, a directory or a hub id"),
        "dataset_config": _no("download the configuration of the data set that you need, and give its files"),
        "dataset_train_split": _is("data.split", "prompts.split"),
        "dataset_test_split": _is(
            "data.heldout", "prompts.heldout_path", note="a number of rows of the split, or a file"
        ),
        "dataset_streaming": _no("rows are read once and stored as token ids"),
        "dataset_num_proc": _no("larger data sets are tokenized by as many processes as there are cores"),
        "max_length": _is(
            "data.max_prompt_tokens", "data.max_completion_tokens", note="two limits; prompts lose their beginning"
        ),
        "truncation_mode": _is(
            "data.max_prompt_tokens", note="prompts lose their beginning and completions their end, always"
        ),
        "padding_free": _no("always, with dpo.shared_prompts: the trees of a micro-batch are one row"),
        "pad_to_multiple_of": _no("rows are padded to a few widths, chosen by the trainer"),
        "pad_token": _no("padding comes after every completion, and no token of it is ever read"),
        "ignore_bias_buffers": _no("no model is known to need it"),
        "remove_unused_columns": _no("columns that are not of the pair are passed to judges, and left out of training"),
        "label_names": _no("the format of the data decides"),
        "length_column_name": _no("lengths are counted in tokens"),
    },
    "Steps": {
        "per_device_train_batch_size": _is(
            "dpo.pairs_per_step",
            note="times gradient_accumulation_steps and the number of devices; memory is dpo.tokens_per_micro_batch",
        ),
        "gradient_accumulation_steps": _is(
            "dpo.pairs_per_step", note="a step has this many pairs; dpo.tokens_per_micro_batch decides how it is cut"
        ),
        "auto_find_batch_size": _is("dpo.tokens_per_micro_batch", note="lower it if memory does not suffice"),
        "average_tokens_across_devices": _no("a step is the mean over its pairs, whatever processes they are on"),
        "num_train_epochs": _is("dpo.epochs", note="1 here, 3 in TRL"),
        "max_steps": _is("dpo.max_steps", note="of each round"),
        "learning_rate": _is("dpo.learning_rate"),
        "lr_scheduler_type": _is(
            "dpo.lr_scheduler", note="`constant`, `linear` or `cosine`; `constant_with_warmup` is `constant`"
        ),
        "lr_scheduler_kwargs": _no("the schedules have no arguments"),
        "warmup_steps": _is("dpo.warmup_steps", note="below 1, TRL's is a share: dpo.warmup_ratio"),
        "warmup_ratio": _is("dpo.warmup_ratio", note="0.1 here, 0 in TRL"),
        "optim": _is("dpo.optimizer", note="fused AdamW, or torchao's with 8-bit moments"),
        "optim_args": _no("dpo.optimizer has no further arguments"),
        "optim_target_modules": _no("dpo.optimizer updates all trained weights"),
        "weight_decay": _is("dpo.weight_decay", note="biases and norms are exempt"),
        "adam_beta1": _is("dpo.adam_betas"),
        "adam_beta2": _is("dpo.adam_betas"),
        "adam_epsilon": _no("always 1e-8"),
        "max_grad_norm": _is("dpo.max_grad_norm"),
        "seed": _is("seed", note="0 here, 42 in TRL"),
        "data_seed": _is("seed", note="every random choice is derived from it"),
        "full_determinism": _no("on a CPU results are bit-exact; on a GPU kernels may differ in the last bits"),
        "train_sampling_strategy": _no("a new random order every epoch; pairs of a prompt stay together"),
        "dataloader_drop_last": _no("the last step of an epoch has the pairs that are left"),
        "ignore_data_skip": _no("a resumed round goes on with the next step's pairs"),
    },
    "Speed and memory": {
        "bf16": _is("dpo.precision"),
        "fp16": _is("dpo.precision", note="bf16 or fp32"),
        "bf16_full_eval": _is("dpo.precision", note="the same as in training"),
        "fp16_full_eval": _is("dpo.precision", note="the same as in training"),
        "tf32": _no("PyTorch's default"),
        "gradient_checkpointing": _is("dpo.gradient_checkpointing", note="off here, on in TRL"),
        "gradient_checkpointing_kwargs": _no("never reentrant"),
        "activation_offloading": _is("dpo.activation_offload"),
        "use_liger_kernel": _is(
            "dpo.kernels", note="but for the loss: the output head never holds all logits, without it"
        ),
        "liger_kernel_config": _no("norms, rotary positions and activations, if dpo.kernels has it"),
        "torch_compile": _no(_COMPILE),
        "torch_compile_backend": _no(_COMPILE),
        "torch_compile_mode": _no(_COMPILE),
        "torch_empty_cache_steps": _is("dpo.tokens_per_micro_batch", note="lower it if memory does not suffice"),
        "use_cache": _no("training needs no key-value cache"),
        "skip_memory_metrics": _no("memory is not logged"),
        "use_cpu": _no("without a GPU the trainer runs on the CPU; CUDA_VISIBLE_DEVICES= hides the GPUs"),
        "dataloader_num_workers": _no(_LOADER),
        "dataloader_pin_memory": _no(_LOADER),
        "dataloader_persistent_workers": _no(_LOADER),
        "dataloader_prefetch_factor": _no(_LOADER),
        "dataloader_multiprocessing_context": _no(_LOADER),
        "dataloader_in_order": _no(_LOADER),
    },
    "Several processes": {
        "accelerator_config": _is("dpo.accelerate_config", note="a file of `accelerate config`"),
        "parallelism_config": _is("dpo.accelerate_config"),
        "fsdp": _is("dpo.accelerate_config", note="an FSDP file of accelerate; untested on GPUs"),
        "fsdp_config": _is("dpo.accelerate_config", note="an FSDP file of accelerate; untested on GPUs"),
        "deepspeed": _is("dpo.accelerate_config", note="a DeepSpeed file of accelerate; untested"),
        "ddp_backend": _no(_DDP),
        "ddp_timeout": _no(_DDP),
        "ddp_find_unused_parameters": _no(_DDP),
        "ddp_bucket_cap_mb": _no(_DDP),
        "ddp_broadcast_buffers": _no(_DDP),
        "ddp_static_graph": _no(_DDP),
        "local_rank": _is("dpo.processes", note="the run starts its own processes"),
    },
    "Logging and evaluation": {
        "output_dir": _is("run_dir"),
        "run_name": _is("run_dir", note="trackers show the name of its last directory"),
        "report_to": _is("dpo.trackers"),
        "project": _is("dpo.tracker_project"),
        "trackio_space_id": _no("set it in trackio's own environment"),
        "trackio_bucket_id": _no("set it in trackio's own environment"),
        "trackio_static_space_id": _no("set it in trackio's own environment"),
        "logging_strategy": _no(_EVERY_STEP),
        "logging_steps": _no(_EVERY_STEP),
        "logging_first_step": _no(_EVERY_STEP),
        "log_on_each_node": _no("training runs on one machine"),
        "logging_nan_inf_filter": _is("dpo.sentinels.non_finite"),
        "include_num_input_tokens_seen": _no("tokens_per_second is in every line of train_log.jsonl"),
        "log_level": _no("the log of each process is in run_dir/logs"),
        "log_level_replica": _no("the log of each process is in run_dir/logs"),
        "disable_tqdm": _no("the progress line is left out if the output is not a terminal"),
        "debug": _no("the log of each process is in run_dir/logs"),
        "eval_strategy": _is("evaluation", "data.heldout", note="once, after each round"),
        "eval_steps": _is("evaluation", "data.heldout", note="once, after each round"),
        "eval_delay": _is("evaluation", "data.heldout", note="once, after each round"),
        "eval_on_start": _no("round 0 evaluates the initial policy"),
        "do_eval": _is("evaluation", "data.heldout", note="once, after each round"),
        "do_train": _no("always"),
        "do_predict": _no("there is no separate prediction pass"),
        "per_device_eval_batch_size": _is("dpo.tokens_per_micro_batch", note="the same as in training"),
        "eval_accumulation_steps": _no("metrics are kept, not outputs"),
        "eval_do_concat_batches": _no("metrics are kept, not outputs"),
        "eval_use_gather_object": _no("metrics are kept, not outputs"),
        "prediction_loss_only": _no("metrics are kept, not outputs"),
        "batch_eval_metrics": _no("metrics are kept, not outputs"),
        "include_for_metrics": _no("metrics are kept, not outputs"),
        "metric_for_best_model": _is("gate.metric", note="decides after each round"),
        "greater_is_better": _no("a higher value is better for every metric of the gate"),
        "load_best_model_at_end": _is("gate.metric", note="the gate promotes a round's policy or keeps the one before"),
    },
    "Checkpoints and the hub": {
        "save_strategy": _is("dpo.checkpoint_every", note="a checkpoint within a round is for resuming only"),
        "save_steps": _is("dpo.checkpoint_every"),
        "save_total_limit": _no("the last checkpoint of a round is kept, and the policy of each round"),
        "save_only_model": _is("dpo.optimizer_state", note="`reset`: the policy has no optimizer state beside it"),
        "save_on_each_node": _no("training runs on one machine"),
        "enable_jit_checkpoint": _no(_STATES),
        "resume_from_checkpoint": _is("run_dir", note=_STATES),
        "restore_callback_states_from_checkpoint": _no("there are no callbacks"),
        "push_to_hub": _no(_NO_HUB),
        "hub_token": _no(_NO_HUB),
        "hub_private_repo": _no(_NO_HUB),
        "hub_model_id": _no(_NO_HUB),
        "hub_strategy": _no(_NO_HUB),
        "hub_always_push": _no(_NO_HUB),
        "hub_revision": _no(_NO_HUB),
    },
    "Keys of earlier versions and of other trainers": {
        "rpo_alpha": _is("dpo.nll_coefficient"),
        "reference_free": _is("dpo.reference", note="`none`"),
        "max_prompt_length": _is("data.max_prompt_tokens"),
        "max_completion_length": _is("data.max_completion_tokens", "sampling.max_tokens"),
        "max_target_length": _is("data.max_completion_tokens", "sampling.max_tokens"),
        "max_new_tokens": _is("sampling.max_tokens"),
        "num_generations": _is("sampling.n"),
        "lr": _is("dpo.learning_rate"),
        "optimizer": _no("dpo.optimizer chooses between two"),
        "gamma": _is("dpo.loss.gamma", note="with `simpo`"),
        "simpo_gamma": _is("dpo.loss.gamma", note="with `simpo`"),
        "cpo_alpha": _is("dpo.nll_coefficient", note="TRL's CPOTrainer has 1 unless told otherwise"),
        "desirable_weight": _is("dpo.loss.desirable_weight", note="with `kto`"),
        "undesirable_weight": _is("dpo.loss.undesirable_weight", note="with `kto`"),
        "use_logits_to_keep": _no("always: logits exist at completion positions only"),
        "use_liger_loss": _no("the output head never holds all logits, without it"),
        "generate_during_eval": _is(
            "evaluation.n", note="completions of held-out prompts are sampled after each round"
        ),
        "label_pad_token_id": _no("there are no labels: log-probabilities are taken at completion positions"),
        "padding_value": _no("padding comes after every completion, and no token of it is ever read"),
        "is_encoder_decoder": _no("models are causal language models"),
        "force_use_ref_model": _no("an adapter's reference may be any policy; it is scored before training starts"),
        "model_adapter_name": _no("a policy has one adapter"),
        "ref_adapter_name": _is("dpo.reference"),
        "ref_model_init_kwargs": _is("dpo.reference"),
        "ref_model": _is("dpo.reference", note="a policy of the run, or `none`"),
        "tools": _no("tools are read from the rows of the data"),
        "evaluation_strategy": _is("evaluation", "data.heldout", note="once, after each round"),
        "group_by_length": _no("the trees of a step are sorted by length before they are cut into micro-batches"),
        "overwrite_output_dir": _no("`--redo` repeats the steps that were made with other settings"),
        "logging_dir": _is("run_dir", note="trackers write to run_dir/trackers"),
        "save_safetensors": _no("always"),
        "no_cuda": _no("without a GPU the trainer runs on the CPU; CUDA_VISIBLE_DEVICES= hides the GPUs"),
        "num_epochs": _is("dpo.epochs"),
        "batch_size": _is("dpo.pairs_per_step"),
        "train_batch_size": _is("dpo.pairs_per_step"),
        "reward_model_path": _is("judge.use", note="`reward_model`, with the path in judge.args"),
        "missing_eos_penalty": _is("pairing.drop_truncated", note="leaves truncated completions out"),
    },
}
"""Keys by subject. A key stands in one of them."""

KEYS: dict[str, Equivalent] = {name: row for rows in SECTIONS.values() for name, row in rows.items()}

LOSSES: dict[str, str] = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid",
    "slic": "hinge",
    "aot_pair": "aot",
    "kto_pair": "kto",
    "sppo": "sppo_hard",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "apo": "apo_zero",
    "dpo_positive": "dpop",
    "smaug": "dpop",
}
"""Other names of losses, with ours."""


def hint(key: str, known: set[str]) -> str | None:
    """What a message about an unknown key says of TRL's key of this name; None if TRL has none.

    `known` are the dotted keys of the configuration: the equivalents among them are named.
    """
    found = KEYS.get(key)
    if found is None:
        return None
    note = found.note.replace("`", "")
    if not found.keys:
        return f"TRL's {key} has no equivalent here: {note}"
    named = [name for name in found.keys if name in known] or list(found.keys)
    return f"TRL's {key} is {' and '.join(named)} here" + (f": {note}" if note else "")
