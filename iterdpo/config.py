"""Validated configuration. Imports neither torch nor vllm, so that a typo is found in well under a second.

A configuration is one or more YAML files merged left to right, then `dotted.key=value` overrides. Unknown keys
are refused with the nearest known one. Paths are relative to the current directory.

Configuration objects stop at the constructors of the stages; the functions below take plain arguments.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from iterdpo import from_trl
from iterdpo.errors import ConfigError
from iterdpo.secrets import secret_in


def _local(path: str) -> str:
    """A path made absolute, so that a run resumes from any directory. One that does not exist may be a hub id."""
    try:
        found = Path(path).expanduser()
        return str(found.absolute()) if found.exists() else path
    except (OSError, RuntimeError):  # too long for a path, or the home of a user who is not there
        return path


def _used(use: str) -> str:
    file, sign, name = use.rpartition(":")
    return f"{_local(file)}{sign}{name}" if file.endswith(".py") else use


def _argument(value: Any) -> Any:
    """An argument with the paths in it made absolute; a mapping with a `use` is a judge within a judge."""
    match value:
        case dict():
            return {k: _used(v) if k == "use" and isinstance(v, str) else _argument(v) for k, v in value.items()}
        case list():
            return [_argument(item) for item in value]
        case str() if "/" in value:
            return _local(value)
    return value


def _server(url: str) -> str:
    if not re.fullmatch(r"https?://[^/\s@]+/?", url):
        raise ValueError(f"{url!r} is no URL of a server; write http://HOST:PORT, without a path")
    return url.rstrip("/")


LocalPath = Annotated[str, AfterValidator(_local)]
OptionalPath = Annotated[str | None, AfterValidator(lambda path: _local(path) if path else None)]
RunDirectory = Annotated[str, AfterValidator(lambda path: str(Path(path).expanduser().absolute()))]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


def _unset(value: Any) -> bool:
    """Whether an optional key is left out of a step's inputs, as in runs that know nothing of it."""
    return value is None


class TagsConfig(Section):
    """What a policy writes before and after its reasoning."""

    start: str = Field(min_length=1)
    end: str = Field(min_length=1)

    @model_validator(mode="after")
    def _the_tags_differ(self) -> TagsConfig:
        if self.start in self.end or self.end in self.start:
            raise ValueError(
                f"start {self.start!r} and end {self.end!r}: one has the other in it; give two that differ"
            )
        return self


def _word_or_tags(value: Any) -> Any:
    """One error for a value that is neither, in place of two."""
    if isinstance(value, dict):
        try:
            return TagsConfig.model_validate(value)
        except ValidationError as error:
            raise ValueError("; ".join(explain(TagsConfig, e) for e in error.errors())) from None
    if value in ("auto", "none") or isinstance(value, TagsConfig):
        return value
    raise ValueError(f"{value!r}: input should be auto, none, or tags such as {{start: <think>, end: </think>}}")


class ModelConfig(Section):
    path: LocalPath
    """The initial policy: a Hugging Face checkpoint directory, its [URL](data.md#files-by-url), or a hub id."""
    revision: str | None = None
    """A hub id's branch, tag or commit. Pin it for runs that must be repeatable."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoint. Only for checkpoints whose code you have read."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Values for the variables of the chat template, such as `{enable_thinking: false}`. Those of a row's column
    `chat_template_kwargs` come first."""
    thinking: Annotated[Literal["auto", "none"] | TagsConfig, BeforeValidator(_word_or_tags)] = Field(
        "auto", exclude_if=lambda value: value == "auto"
    )
    """The tags around the reasoning of a [thinking model](training.md#thinking-models). `auto`: those of the chat template,
    if it has any. `none`: a completion is not divided. Or your own: `{start: "<think>", end: "</think>"}`."""


class PromptsConfig(Section):
    path: LocalPath
    """A JSON, JSONL, CSV or Parquet file, a directory of them, the [URL](data.md#files-by-url) of either, or a hub data set
    id."""
    split: str = "train"
    """The split to read, if the data set has several."""
    column: str = "prompt"
    """The column with the prompt: text, or a list of chat messages. The other columns go to the judges."""
    id_column: str | None = None
    """A column with unique ids. Without it, an id is the hash of the prompt, and repeated prompts are dropped."""
    per_round: int = Field(128, ge=1)
    """Prompts per round. Rounds never share a prompt, unless `reuse` allows it."""
    heldout: int = Field(128, ge=1)
    """Prompts set aside for evaluation: the same for the whole run, never sampled for training."""
    heldout_path: OptionalPath = None
    """A separate file of held-out prompts, in the format of `path`. Prompts that are in both are not trained on."""
    bad_rows: Literal["error", "skip"] = "error"
    """What becomes of rows that cannot be used, such as those without a prompt: `error` names them all and ends the run
    before it begins; `skip` leaves them out, counted by reason."""
    limit: int | None = Field(None, ge=1, exclude_if=_unset)
    """Train on so many prompts at most: the first of those that a run without it would sample."""
    reuse: bool = False
    """When all prompts have been used, start again in another order instead of refusing."""
    choose: Literal["all", "untied"] = Field("all", exclude_if=lambda which: which == "all")
    """With `reuse`: `untied` retires prompts whose scores tied in every round that sampled them. They teach nothing: all
    completions are right, or all wrong (arXiv:2503.14476). They come back if too few others are left."""

    @model_validator(mode="after")
    def _rounds_have_their_prompts(self) -> PromptsConfig:
        if self.limit is not None and self.limit < self.per_round:
            raise ValueError(f"limit = {self.limit}: a round needs per_round = {self.per_round} prompts")
        if self.choose == "untied" and not self.reuse:
            raise ValueError("choose = 'untied': no prompt is sampled twice without reuse; set reuse=true")
        return self


class EngineConfig(Section):
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of sampling. The policy's weights are kept in their own precision on disk."""
    max_model_len: int | None = Field(None, ge=2)
    """Maximum length of prompt and completion together, in tokens. Default: as the prompts and `max_tokens` require."""
    max_num_seqs: int = Field(256, ge=1)
    """Completions sampled at once."""
    kv_cache_gib: int = Field(1, ge=1)
    """Memory for the key-value cache on a CPU, in whole GiB. On a GPU `gpu_memory_utilization` decides."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of the GPU's memory for the engine while it samples. It is released while the trainer runs."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Number of GPUs for one engine."""
    replicas: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Number of engines, each with `tensor_parallel_size` GPUs, or with its share of the cores. They sample the shards of one
    queue. `auto`: as many as the visible GPUs allow, and one on a CPU."""
    lora: Literal["auto", "vllm", "merge"] = "auto"
    """`vllm`: the engine applies a LoRA policy's adapter. `merge`: it is merged into the initial policy's weights, on disk.
    `auto`: `vllm` on a GPU; `merge` on a CPU, where it is some 25 times faster."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of `vllm.LLM`."""


class SamplingConfig(Section):
    n: int = Field(4, ge=2)
    """K, completions per prompt. At least two: a pair needs a chosen and a rejected one."""
    temperature: float = Field(1.0, gt=0)
    """1 samples from the policy itself. Lower values sharpen the distribution, and pairs become less diverse."""
    temperatures: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=2, exclude_if=_unset)
    """In place of `temperature` for a round's prompts: each has one of these, at random, for all of its completions. (If
    completions of a prompt had different ones, pairs would teach a temperature.) Evaluations are at `temperature`."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off."""
    top_k: int = Field(0, ge=0)
    """Sample among the k likeliest tokens; 0 is off."""
    max_tokens: int = Field(256, ge=1)
    """Maximum length of a completion, in tokens. Longer ones are truncated and marked as such."""
    shard_size: int = Field(64, ge=1)
    """Prompts that are saved together. A crash repeats at most one shard; on a GPU, those that are in flight."""
    reproducible: bool = Field(False, exclude_if=lambda wanted: not wanted)
    """Sample the same completions each time on a GPU too, as a CPU does: seeds for each prompt, one shard at a time, and
    vLLM's batch invariance. Slower."""
    engine: EngineConfig = EngineConfig()
    """The vLLM engine."""
    servers: list[Annotated[str, AfterValidator(_server)]] = Field(default_factory=list)
    """URLs of vLLM servers (`http://10.0.0.7:8000`) that sample in place of engines of the run's own. They are started with
    `VLLM_SERVER_DEV_MODE=1`, and see the run directory under the same path. See
    [scaling.md](scaling.md#servers-that-are-there)."""
    ray: str | None = None
    """Address of a Ray cluster (`auto`, `HOST:PORT`) on whose nodes the engines run, `engine.replicas` of them. See
    [scaling.md](scaling.md#ray)."""

    @model_validator(mode="after")
    def _one_place(self) -> SamplingConfig:
        if self.servers and self.ray is not None:
            raise ValueError("servers and ray: the engines are in one place; leave one of the two out")
        return self


class JudgeConfig(Section):
    use: Annotated[str, AfterValidator(_used)]
    """The name of a judge in docs/judges.md, or your own as `path/to/file.py:name` or `package.module:name`."""
    args: Annotated[dict[str, Any], AfterValidator(_argument)] = Field(default_factory=dict)
    """Keyword arguments of the judge. docs/judges.md lists those of the built-in judges."""
    max_abstained: float = Field(0.25, ge=0, le=1)
    """Stop the stage if more than this share of its completions cannot be judged. Finished judgments are kept, and the
    same command judges the missing ones. 1 never stops."""
    max_abstained_count: int | None = Field(None, ge=0)
    """The same limit as a number of completions. The limit that is exceeded first stops the stage."""
    sees: Literal["answer", "completion"] = Field("answer", exclude_if=lambda part: part == "answer")
    """What the judge is given of a thinking model's completion: the answer alone, or the whole completion, which begins
    with the reasoning."""
    stream: bool | None = None
    """Judge each shard while the next one is sampled. Default: true if the judge needs no accelerator."""


class PreferenceFileConfig(Section):
    path: LocalPath
    """A JSON, JSONL, CSV or Parquet file (plain or .gz), a directory of them, the [URL](data.md#files-by-url) of either, or a
    hub data set id."""
    split: str = "train"
    """The split to read, if the data set has several."""
    format: Literal["auto", "pairs", "hh", "unpaired", "sharegpt"] = "auto"
    """One of the formats in [data.md](data.md). `auto` detects it from the first row's columns."""
    limit: int | None = Field(None, ge=1)
    """Read only this many rows, from the start."""
    min_margin: float | None = Field(None, ge=0)
    """Leave out pairs whose chosen completion is not scored higher than the rejected by at least this, in columns such as
    `score_chosen` and `score_rejected`. Without it, pairs that their scores contradict are trained on, and counted."""
    bad_rows: Literal["error", "skip"] = "error"
    """What becomes of rows that cannot be used, such as those without a prompt: `error` names them all and ends the run
    before training; `skip` leaves them out, counted by [reason](data.md#rows-that-cannot-be-used)."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts lose their beginning."""
    max_completion_tokens: int = Field(1024, ge=1)
    """Longer completions lose their end."""


class DataConfig(PreferenceFileConfig):
    heldout: int = Field(0, ge=0)
    """Pairs kept out of training. Their loss, accuracy and margin are reported after training."""


class OtherSideConfig(Section):
    """Where one side of each pair comes from, if it is no completion of the round's policy. Exactly one of the keys."""

    round: int | None = Field(None, ge=0, exclude_if=_unset)
    """The policy that this round left; 0 is the initial one. Until that round has ended, the policy itself."""
    model: OptionalPath = Field(None, exclude_if=_unset)
    """Another checkpoint, or a hub id: of the policy's architecture, with its tokenizer."""
    column: str | None = Field(None, exclude_if=_unset)
    """A column of the prompts with a completion of each: text, or messages."""

    @model_validator(mode="after")
    def _it_is_one(self) -> OtherSideConfig:
        if [self.round, self.model, self.column].count(None) != 2:
            raise ValueError("name one of round, model and column")
        return self


class MixedDataConfig(PreferenceFileConfig):
    """Preference pairs of a file to mix with a round's own."""

    share: float = Field(gt=0, lt=1)
    """Their share of a round's pairs. They are drawn at random for each round."""

    @model_validator(mode="after")
    def _they_are_pairs(self) -> MixedDataConfig:
        if self.format == "unpaired":
            raise ValueError("format = 'unpaired': only pairs can be mixed with a round's; remove it")
        return self


class PairingConfig(Section):
    strategy: Literal["best_worst", "best_random", "best_mean_2sd", "all_pairs"] = "best_worst"
    """Best completion against worst, best against a random worse one, best against the one whose score is closest to the
    prompt's mean - 2 standard deviations (arXiv:2502.16825), or all pairs with different scores. See
    [pairs](training.md#pairs)."""
    min_margin: float = Field(0.0, ge=0)
    """Minimum difference of scores in a pair. Smaller differences count as ties. Equal scores always tie."""
    max_pairs_per_prompt: int | None = Field(None, ge=1)
    """Maximum number of pairs per prompt. Those with the largest margins are kept (`all_pairs`)."""
    drop_truncated: bool = False
    """Leave out completions that reached `max_tokens`, and thoughts that have no end. Keep it off if completions are cut
    on purpose."""
    chosen_from: OtherSideConfig | None = Field(None, exclude_if=_unset)
    """Choose a completion of another source, without judging it, and reject one of the policy's: `{column: gold}` is SPIN
    (arXiv:2401.01335). See [pairs across policies](training.md#pairs-across-policies)."""
    rejected_from: OtherSideConfig | None = Field(None, exclude_if=_unset)
    """Choose the policy's best completion, and reject one of another source, without judging it: delta learning
    (arXiv:2507.06187)."""
    against: OtherSideConfig | None = Field(None, exclude_if=_unset)
    """The policy's first completion against one of another source: the judge says which of the two is chosen. For XPO's
    exploration, `{round: 0}` with `dpo.xpo_alpha`."""
    replay: float = Field(0.0, ge=0, lt=1, exclude_if=lambda share: share == 0)
    """Share of a round's pairs that come from earlier rounds, drawn at random. They are added to the fresh ones."""
    offline: MixedDataConfig | None = Field(None, exclude_if=_unset)
    """Pairs of a file, added to the fresh ones."""

    @model_validator(mode="after")
    def _sides_and_shares_fit(self) -> PairingConfig:
        sides = [name for name in ("chosen_from", "rejected_from", "against") if getattr(self, name) is not None]
        if len(sides) > 1:
            raise ValueError(f"{' and '.join(sides)}: a pair has one side of another source; set all but one to null")
        for name in ("chosen_from", "rejected_from"):
            if getattr(self, name) is not None and self.min_margin:
                raise ValueError(
                    f"min_margin: a pair with {name} has one score, and so no margin; set one of the two to its default"
                )
        if self.offline is not None and self.replay + self.offline.share >= 1:
            raise ValueError(
                f"replay = {self.replay:g} and offline.share = {self.offline.share:g} leave no share for fresh pairs; their sum "
                "must be below 1"
            )
        return self

    @property
    def other_side(self) -> OtherSideConfig | None:
        """The source of the side that is not the policy's, if there is one."""
        return self.chosen_from or self.rejected_from or self.against

    @property
    def other_key(self) -> str:
        """Which of the three keys names it."""
        return next(name for name in ("chosen_from", "rejected_from", "against") if getattr(self, name) is not None)


class AdapterConfig(Section):
    """A LoRA adapter (arXiv:2106.09685), trained with PEFT instead of the model's own weights."""

    r: int = Field(16, ge=1)
    """Rank of the update of each matrix."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt. `all-linear` is all linear modules except the output head."""
    modules_to_save: list[str] | None = Field(None, min_length=1, exclude_if=_unset)
    """Names of modules to train whole beside the adapter, and to save in it: `[lm_head]`, or `[embed_tokens]`."""
    lora_dropout: float = Field(0.0, ge=0, lt=1, exclude_if=lambda share: share == 0)
    """Probability with which an input of the adapter is dropped in a training step. Elsewhere dropout is off, as in the
    log-probabilities of the reference, so that rewards no longer start at 0."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: the frozen weights in 4 bits (QLoRA, arXiv:2305.14314). Needs a GPU and bitsandbytes."""


Action = Literal["off", "warn", "stop"]


class SentinelsConfig(Section):
    """Alarms during training. `warn` records an alarm in the log and the metrics; `stop` also ends the round."""

    non_finite: Literal["skip", "stop"] = "stop"
    """A loss or gradient that is not finite. It is never applied: the step is skipped, or the round ends."""
    chosen_drop: float = Field(100.0, gt=0)
    """Alarm if the chosen completions have lost more nats than this relative to the reference, in the mean of `window`
    steps (likelihood displacement, arXiv:2410.08847)."""
    chosen_drop_action: Action = "warn"
    """See `chosen_drop`."""
    margin: float = Field(50.0, gt=0)
    """Alarm if the mean reward margin of `window` steps is above this."""
    margin_action: Action = "warn"
    """See `margin`."""
    stuck_accuracy: float = Field(0.02, ge=0, lt=0.5)
    """Alarm if the mean accuracy of the last `stuck_window` steps is within this distance of 0.5."""
    stuck_accuracy_action: Action = "warn"
    """See `stuck_accuracy`."""
    stuck_window: int = Field(50, ge=2)
    """Steps over which the accuracy of `stuck_accuracy` is averaged."""
    grad_norm: float = Field(50.0, gt=1)
    """Alarm if the gradient norm, before it is scaled down, is more than this many times the median of earlier steps."""
    grad_norm_action: Action = "warn"
    """See `grad_norm`."""
    score_gap: float = Field(0.25, ge=0, lt=1)
    """Alarm if the mean difference of scores in a round's pairs is less than this share of round 1's: chosen and rejected
    become alike, and rounds stall (arXiv:2508.06026). `stop` ends the run before the round trains."""
    score_gap_action: Action = "warn"
    """See `score_gap`."""
    window: int = Field(5, ge=1)
    """Steps over which `chosen_drop` and `margin` are averaged."""


class _Loss(Section):
    uses_reference: ClassVar[bool] = True
    compares_completions: ClassVar[bool] = True
    """Whether a pair's loss depends on both of its completions together, and on no other pair."""
    takes_unpaired: ClassVar[bool] = False
    """Whether an example may have one completion only, desirable or not."""


class SmoothedLoss(_Loss):
    type: Literal["sigmoid", "sigmoid_norm", "robust"]
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed probability that a label is flipped. With `sigmoid`, above 0 is conservative DPO."""


class ExoPairLoss(_Loss):
    type: Literal["exo_pair"]
    label_smoothing: float = Field(0.001, gt=0, lt=0.5)
    """Assumed probability that a label is flipped. At 0 the loss would be infinite."""


class PlainLoss(_Loss):
    type: Literal["ipo", "hinge", "nca_pair", "apo_zero", "apo_down", "sppo_hard", "bco_pair"]


class DPOPLoss(_Loss):
    type: Literal["dpop"]
    penalty_weight: float = Field(50.0, ge=0)
    """The paper's lambda: weight of the penalty for a chosen completion that becomes less likely."""


class DiscoPOPLoss(_Loss):
    type: Literal["discopop"]
    tau: float = Field(0.05, gt=0)
    """Temperature of the blend of the logistic and the exponential loss; 0.05 in the paper."""


class AOTLoss(_Loss):
    compares_completions: ClassVar[bool] = False
    type: Literal["aot", "aot_unpaired"]
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """As in conservative DPO: weight of the opposite margin."""


class BCOLoss(_Loss):
    compares_completions: ClassVar[bool] = False
    takes_unpaired: ClassVar[bool] = True
    type: Literal["bco"]


class SimPOLoss(_Loss):
    uses_reference: ClassVar[bool] = False
    type: Literal["simpo"]
    gamma: float = Field(0.5, ge=0)
    """Target reward margin. The authors use a tenth to eight tenths of `dpo.beta`."""


class ORPOLoss(_Loss):
    uses_reference: ClassVar[bool] = False
    type: Literal["orpo"]


class SFTLoss(_Loss):
    uses_reference: ClassVar[bool] = False
    compares_completions: ClassVar[bool] = False
    type: Literal["sft"]


class KTOLoss(_Loss):
    compares_completions: ClassVar[bool] = False
    takes_unpaired: ClassVar[bool] = True
    type: Literal["kto"]
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of desirable (chosen) completions."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of undesirable (rejected) completions."""


Loss = (
    SmoothedLoss
    | ExoPairLoss
    | PlainLoss
    | DPOPLoss
    | DiscoPOPLoss
    | AOTLoss
    | BCOLoss
    | SimPOLoss
    | ORPOLoss
    | SFTLoss
    | KTOLoss
)
LOSSES: dict[str, type[_Loss]] = {
    name: kind for kind in get_args(Loss) for name in get_args(kind.model_fields["type"].annotation)
}
"""Every loss's name, with the model of its keys. There is no other list of losses."""


def _loss_with_type(value: Any) -> Any:
    """A name alone means the loss with its defaults; keys without a type belong to the default loss."""
    if isinstance(value, str):
        return {"type": value}
    return {"type": "sigmoid", **value} if isinstance(value, dict) else value


class RoundScheduleConfig(Section):
    """How the peak learning rate falls from round to round. It depends on the round alone, so that rounds can be added."""

    schedule: Literal["linear", "cosine", "exponential"] = "linear"
    """The curve from the full rate in round 1 to `final` of it."""
    rounds: int = Field(ge=2)
    """The round that has `final` of the rate, as do those after it. Independent of the run's `rounds`."""
    final: float = Field(0.1, gt=0, le=1)
    """Share of the rate that is left."""

    def factor(self, round: int) -> float:
        """The share of the learning rate that `round` has, which counts from 1."""
        progress = min(1.0, (round - 1) / (self.rounds - 1))
        match self.schedule:
            case "linear":
                return 1 - (1 - self.final) * progress
            case "cosine":
                return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
            case "exponential":
                return float(self.final**progress)


_WARMUP_RATIO = 0.1


class DPOConfig(Section):
    loss: Annotated[Loss, Field(discriminator="type"), BeforeValidator(_loss_with_type)] = SmoothedLoss(type="sigmoid")
    """The objective, with its additional keys. [losses.md](losses.md) has the equations. `sigmoid` is DPO.
    `orpo`, `simpo` and `sft` have no reference; `kto` and `bco` also take unpaired data; `sft` trains only on the chosen
    completion."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference (Eq. 7 of arXiv:2305.18290). Smaller values let the policy move further.
    Each loss has its own scale: [losses.md](losses.md#the-losses)."""
    nll_coefficient: float = Field(0.0, ge=0)
    """Weight of the chosen completion's mean token loss, added to the objective (iterative RPO, arXiv:2404.19733)."""
    wpo: bool = False
    """Weight each pair by its probability under the policy (WPO, arXiv:2406.11827)."""
    xpo_alpha: float = Field(0.0, ge=0, exclude_if=lambda alpha: alpha == 0)
    """Weight of XPO's exploration term (arXiv:2405.21046, Algorithm 1): the log-probability of the other source's completion
    of `pairing.against`, which is made smaller. See [XPO](losses.md#terms-that-can-be-added-to-a-loss)."""
    ld_alpha: float | None = Field(None, ge=0, le=1, exclude_if=_unset)
    """Weight of a completion's tokens beyond the length of the other completion of its pair (LD-DPO, arXiv:2409.06411):
    less reward for length. 0 leaves them out, 1 changes nothing."""
    train_on: Literal["completion", "answer"] = Field("completion", exclude_if=lambda part: part == "completion")
    """The part of a [thinking model's](training.md#thinking-models) completion whose tokens count. `answer`: the reasoning
    is read, but neither rewarded nor punished."""
    reference: Literal["previous", "initial", "ema", "periodic", "none"] = "previous"
    """The policy that the objective pulls towards: see [the reference](training.md#the-reference). `none` is a constant
    (reference-free DPO), and is always used for orpo, simpo and sft."""
    reference_decay: float = Field(0.5, ge=0, lt=1)
    """With `ema`: the weight of the old average in each update."""
    reference_every: int = Field(2, ge=1)
    """With `periodic`: rounds between renewals."""
    sampler_logps_tolerance: float | None = Field(None, gt=0)
    """Use the sampler's log-probabilities as the reference's if, over some pairs, they differ from the trainer's by at
    most this, in nats per token. This saves a forward pass. Off by default."""
    adapter: AdapterConfig | None = None
    """Train a LoRA adapter. `{}` means its defaults. Without it, all weights are trained."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW. Around 5e-7 to 5e-6 for billions of parameters, 1e-5 to 1e-4 for 100 million or
    for an adapter."""
    learning_rate_over_rounds: RoundScheduleConfig | None = Field(None, exclude_if=_unset)
    """A smaller peak in later rounds, which start closer to their goal."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """Decay after the warm-up, over the round's steps."""
    warmup_ratio: float = Field(_WARMUP_RATIO, ge=0, lt=1)
    """Share of the round's steps in which the learning rate rises from 0."""
    warmup_steps: int | None = Field(None, ge=0, exclude_if=_unset)
    """Number of those steps, in place of `warmup_ratio`. A round with fewer steps ends below the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay; biases and norms are exempt."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", exclude_if=lambda name: name == "adamw")
    """`adamw`: torch's, exact: 16 bytes a weight. `adamw_8bit`: torchao's, 6 bytes a weight: weights and gradients in
    bfloat16, moments in 8 bits, and updates rounded up or down at random, so that small ones are not lost on average.
    Trains all weights of 8B on a GPU of 80 GB."""
    optimizer_state: Literal["reset", "carry"] = "reset"
    """`carry`: each round starts with AdamW's moments from the previous round. They are saved with the policy, and are
    twice its size."""
    epochs: int = Field(1, ge=1)
    """Passes over the round's pairs. More than one overfits fresh pairs quickly."""
    max_steps: int | None = Field(None, ge=1, exclude_if=_unset)
    """Optimizer steps in a round, in place of `epochs`: less than one pass over the pairs, or as many as it takes."""
    pairs_per_step: int = Field(8, ge=1)
    """Pairs in one optimizer step, over all processes and micro-batches: the effective batch size."""
    tokens_per_micro_batch: int = Field(4096, ge=1)
    """Tokens in one forward pass on one process. Smaller values need less memory. The result is the same."""
    shared_prompts: bool = True
    """Process a prompt once for all of its completions, if a trial on the first pairs shows that the model allows it.
    Otherwise each completion gets its own row."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """fp32: everything in float32. bf16: weights, gradients and moments in float32, and matrix products in bfloat16; on a GPU
    all activations too, over a bfloat16 copy of the weights that is made for each step."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the policy on disk. bfloat16 halves its size, but loses small updates by rounding before the next
    round."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep activations in the host's memory between forward and backward pass. For a GPU."""
    kernels: Literal["auto", "liger", "none"] = Field("auto", exclude_if=lambda name: name == "auto")
    """Fused kernels on a GPU, for norms, rotary positions and the MLP's activation. `auto`: Liger's, if they are installed
    (`pip install 'iterdpo[kernels]'`) and know the model. `liger` refuses to do without the package."""
    checkpoint_every: int = Field(50, ge=1)
    """Optimizer steps between checkpoints within a round. A crash repeats at most this many."""
    processes: int = Field(1, ge=1)
    """Training processes (GPUs), of all nodes together."""
    accelerate_config: OptionalPath = None
    """An `accelerate` configuration file, for settings other than the number of processes: see configs/accelerate. Its
    `num_processes` must equal `processes`. With `num_machines`, training takes [several nodes](scaling.md#training-on-several-nodes)."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    """Experiment trackers that also receive each step's and each round's metrics, and a few completions. A run directory
    is one run in each tracker. Each requires its package."""
    tracker_project: str = "iterdpo"
    """The project name in the trackers."""
    sentinels: SentinelsConfig = SentinelsConfig()
    """Alarms during training."""

    @model_validator(mode="after")
    def _the_objective_is_defined(self) -> DPOConfig:
        if self.wpo and not self.loss.compares_completions:
            raise ValueError(f"wpo: weights pairs, but {self.loss.type} compares none; set wpo to false")
        if self.ld_alpha is not None and not (self.loss.compares_completions and self.loss.uses_reference):
            raise ValueError(
                f"ld_alpha: weights tokens by the length of a pair's other completion, which {self.loss.type} does not "
                "compare under a reference; set ld_alpha to null"
            )
        if self.ld_alpha is not None and self.sampler_logps_tolerance is not None:
            raise ValueError(
                "sampler_logps_tolerance: the sampler's log-probabilities are of whole completions, and ld_alpha weights "
                "their tokens; set one of the two to null"
            )
        if self.xpo_alpha and not (self.loss.compares_completions and self.loss.uses_reference):
            raise ValueError(
                f"xpo_alpha: adds to a loss that compares two completions under a reference, and {self.loss.type} does not; "
                "set xpo_alpha to 0"
            )
        if self.train_on == "answer" and self.sampler_logps_tolerance is not None:
            raise ValueError(
                "sampler_logps_tolerance: the sampler's log-probabilities are of whole completions, and train_on = 'answer' "
                "leaves out the reasoning; set sampler_logps_tolerance to null, or train_on to completion"
            )
        if self.max_steps is not None and self.epochs != 1:
            raise ValueError(f"max_steps: takes the place of epochs, which is {self.epochs}; set one of the two")
        if self.warmup_steps is not None and self.warmup_ratio not in (0.0, _WARMUP_RATIO):
            raise ValueError(
                f"warmup_steps: takes the place of warmup_ratio, which is {self.warmup_ratio}; set one of the two"
            )
        if self.optimizer == "adamw_8bit" and (self.precision == "fp32" or self.adapter is not None):
            why = "precision is fp32" if self.precision == "fp32" else "an adapter's own are few, and in float32"
            raise ValueError(f"optimizer: adamw_8bit keeps weights in bfloat16, but {why}; set it to adamw")
        if self.reference == "ema" and self.adapter is not None:
            raise ValueError("reference: ema averages whole checkpoints, not adapters; set it to previous")
        if self.sampler_logps_tolerance is not None and self.reference != "previous":
            raise ValueError("sampler_logps_tolerance: the sampler is the previous policy; set reference to previous")
        return self

    @property
    def weights_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the weights that are trained, if all are."""
        return "float32" if self.optimizer == "adamw" else "bfloat16"

    @property
    def policy_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the policy on disk: no more than was trained."""
        return self.save_dtype if self.weights_dtype == "float32" else "bfloat16"

    @property
    def uses_reference(self) -> bool:
        """Whether the objective compares the policy with a reference."""
        return self.loss.uses_reference and self.reference != "none"

    def of_round(self, round: int) -> DPOConfig:
        """The settings of `round`, with the learning rate that it has."""
        if (over_rounds := self.learning_rate_over_rounds) is None:
            return self
        rate = self.learning_rate * over_rounds.factor(round)
        return self.model_copy(update={"learning_rate": rate, "learning_rate_over_rounds": None})

    def steps(self, pairs: int) -> int:
        """Optimizer steps of a round of `pairs`."""
        return self.max_steps or self.epochs * math.ceil(pairs / self.pairs_per_step)

    def pairs_seen(self, pairs: int) -> int:
        """How many pairs the steps of a round of `pairs` train on, each counted once a pass."""
        passes, rest = divmod(self.steps(pairs), math.ceil(pairs / self.pairs_per_step))
        return passes * pairs + min(rest * self.pairs_per_step, pairs)


class BenchmarksConfig(Section):
    """Tasks of lm-evaluation-harness, run on the initial policy and on each candidate that is evaluated."""

    tasks: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """Names of tasks or groups, such as `[gsm8k, mmlu]`."""
    include_path: OptionalPath = None
    """A directory with tasks of your own."""
    limit: int | None = Field(None, ge=1)
    """Examples of each task. Default: all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples in each prompt. Default: the task's own."""
    apply_chat_template: bool = False
    """Ask in the policy's chat template."""
    batch_size: int = Field(8, ge=1)
    """Examples in one forward pass."""
    max_loss: float | None = Field(None, ge=0)
    """Do not promote a candidate that has lost more than this, in the first metric of any task, against the initial policy
    (`benchmark/max_loss`)."""


class ComparedConfig(Section):
    """What every round is compared with besides other rounds."""

    model: LocalPath
    """A checkpoint, or a hub id: of the policy's architecture, with its tokenizer."""


class EvaluationConfig(Section):
    judge: JudgeConfig | None = None
    """The held-out judge, which is never used for training. Without it, only the training judge evaluates, and the
    report says so."""
    n: int = Field(1, ge=1)
    """Completions per held-out prompt. More completions narrow the intervals."""
    temperature: float | None = Field(None, ge=0)
    """Default: the temperature of `sampling`. 0 is greedy; the KL estimate is then not meaningful."""
    temperatures: list[Annotated[float, Field(ge=0)]] | None = Field(None, min_length=1, exclude_if=_unset)
    """Further temperatures at which each evaluated policy is sampled and judged, as `temperature/<T>/…`; the report draws the
    win rate over them: [temperatures](evaluation.md#temperatures)."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Coverage of the intervals."""
    reference_column: str | None = Field(None, exclude_if=_unset)
    """A column of the held-out prompts with a completion of each, by a person or another model, to compare with as
    `win_rate/vs_reference`: [references](evaluation.md#reference-completions)."""
    against: ComparedConfig | None = Field(None, exclude_if=_unset)
    """Another model, to compare with as `win_rate/vs_model`: [another model](evaluation.md#another-model)."""
    self_bleu: bool = Field(False, exclude_if=lambda measured: not measured)
    """Also measure `text/self_bleu`, how alike the completions are. It holds all of their tokens in memory."""
    looks: Literal["plain", "spending"] = Field("plain", exclude_if=lambda looks: looks == "plain")
    """The rounds look at the same prompts. `plain`: each interval alone has its coverage. `spending`: the intervals of a
    metric over all rounds together have it, so those of later rounds are wider: [looks](evaluation.md#looking-again-and-again)."""
    max_logp_gap: float = Field(0.05, gt=0)
    """Maximum mean difference, in nats per token, between the engine's log-probabilities and the checkpoint's. The run
    stops if it is exceeded. bf16 gives about 0.01; a quantized engine needs more."""
    benchmarks: BenchmarksConfig | None = Field(None, exclude_if=_unset)
    """Benchmarks that a policy should not lose: see [benchmarks](operating.md#benchmarks)."""
    every: int = Field(1, ge=1, exclude_if=lambda rounds: rounds == 1)
    """Evaluate each round of this number, and the last. The others are promoted without a gate. A candidate that the gate
    refuses gives way to the policy that was evaluated before, not to the one of the round before."""
    bootstrap_samples: int = Field(10_000, ge=100)
    """Bootstrap resamples of the held-out prompts for each interval."""

    @property
    def completions(self) -> int:
        """Completions of each held-out prompt."""
        return self.completions_at(self.temperature)

    def completions_at(self, temperature: float | None) -> int:
        """Completions of each held-out prompt at a temperature. All greedy ones of a prompt would be one."""
        return 1 if temperature == 0 else self.n


BOUNDS = ("minimum", "maximum", "max_increase", "max_decrease")
Otherwise = Literal["keep", "lower_learning_rate", "stop"]


class RuleConfig(Section):
    """A list of bounds beside `gate.metric`. A candidate is promoted if it keeps all of them. If it breaks several, the
    strictest `otherwise` counts: `stop`, then `lower_learning_rate`, then `keep`. A rule has one bound.
    """

    metric: str
    """A metric of [metrics.md](metrics.md#metricsjsonl) that is a number, or the `_low` or `_high` of one."""
    minimum: float | None = None
    """The metric must be at least this."""
    maximum: float | None = None
    """The metric must be at most this."""
    max_increase: float | None = None
    """The metric may be higher by this, in its own unit, than that of the policy in `against`."""
    max_decrease: float | None = None
    """The metric may be lower by this than that of the policy in `against`."""
    against: Literal["initial", "previous", "best"] = "previous"
    """What an increase or decrease is measured from: the initial policy, the one that the round started from, or that of the
    best round so far."""
    otherwise: Otherwise = "keep"
    """What happens if the bound is broken: as in `gate.otherwise`."""

    @model_validator(mode="after")
    def _one_bound(self) -> RuleConfig:
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"a rule has one of {', '.join(BOUNDS)}, not {found}; write a rule for each bound")
        kind, bound = given[0], getattr(self, given[0])
        fixed = self.metric.partition("/vs_")[2].startswith(("reference", "model")) or self.metric.startswith(
            "temperature/"
        )
        if "win_rate/" in self.metric and not fixed and kind.startswith("max_"):
            raise ValueError(
                f"{kind}: {self.metric} compares with another policy already, and the initial one has none; give a minimum "
                "or a maximum"
            )
        if "win_rate/" in self.metric and not 0 <= bound <= 1:
            raise ValueError(f"{kind} = {bound:g}: {self.metric} is between 0 and 1; half is 0.5")
        return self


class GateConfig(Section):
    metric: Literal[
        "win_rate/vs_previous",
        "win_rate/vs_previous_low",
        "win_rate/vs_best",
        "win_rate/vs_best_low",
        "win_rate/vs_initial",
        "win_rate/vs_initial_low",
        "length_controlled_win_rate/vs_previous",
        "length_controlled_win_rate/vs_previous_low",
        "length_controlled_win_rate/vs_best",
        "length_controlled_win_rate/vs_best_low",
        "length_controlled_win_rate/vs_initial",
        "length_controlled_win_rate/vs_initial_low",
        "win_rate/vs_reference",
        "win_rate/vs_reference_low",
        "win_rate/vs_model",
        "win_rate/vs_model_low",
        "score/heldout_judge",
        "score/heldout_judge_low",
        "score/train_judge",
        "score/train_judge_low",
    ] = "win_rate/vs_previous"
    """The held-out metric that decides about promotion. `_low`: the lower end of its interval."""
    minimum: float = 0.5
    """The candidate is promoted if the metric is at least this. A win rate of 0.5 from ties alone promotes only if this is
    lower."""
    max_kl: float | None = Field(None, gt=0)
    """Do not promote a candidate whose `kl/to_initial` (nats per completion) is above this."""
    otherwise: Otherwise = "keep"
    """`keep`: the next round starts again from the last promoted policy, on fresh prompts. `lower_learning_rate`: so it
    does, and `dpo.learning_rate` is multiplied by `learning_rate_factor` from then on. `stop`: the run ends."""
    rules: list[RuleConfig] = Field(default_factory=list, exclude_if=lambda rules: not rules)
    """Further bounds, all of which a candidate must keep: [gate.rules](#gaterules)."""
    patience: int | None = Field(None, ge=1, exclude_if=_unset)
    """The run ends after this many rounds in a row without a promotion."""
    learning_rate_factor: float = Field(0.5, gt=0, lt=1, exclude_if=lambda factor: factor == 0.5)
    """The factor of `lower_learning_rate`."""

    def metrics(self) -> Iterator[tuple[str, str]]:
        """Every key that names a metric, with the metric."""
        yield "gate.metric", self.metric
        for number, rule in enumerate(self.rules):
            yield f"gate.rules.{number}.metric", rule.metric

    @model_validator(mode="after")
    def _a_win_rate_is_a_share(self) -> GateConfig:
        if "win_rate/" in self.metric and not 0 <= self.minimum <= 1:
            raise ValueError(f"minimum = {self.minimum:g}: a win rate is between 0 and 1; half is 0.5")
        return self


class SupervisionConfig(Section):
    """What becomes of a sampler or trainer that hangs or is lost. A trainer that ends with an error is not started again."""

    silence: float = Field(900, gt=0)
    """Seconds without a sign of work (a decoding step, a micro-batch) after which the process counts as hung and is
    ended. More than the policy takes to be saved."""
    start: float = Field(3600, gt=0)
    """The same while it starts, or takes new weights."""
    restarts: int = Field(2, ge=0)
    """How often a process that hangs, or that a signal ends, is started again in a stage. 0: the run ends."""


SUPERVISED = SupervisionConfig()


ONE_RUN = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "optimizer_state": "carry"}
"""Defaults of `dpo` that make rounds of a few steps one training: short rounds have no schedule of their own."""


def with_dial(values: Any) -> Any:
    """The values of a configuration, with those that `steps_per_round` sets.

    Raises:
        ValueError: `total_steps` is missing or no multiple, or a key that is set has another value.
    """
    if not isinstance(values, dict):
        return values
    steps, total, dpo = values.get("steps_per_round"), values.get("total_steps"), values.get("dpo") or {}
    if steps is None and total is not None:
        raise ValueError("total_steps: needs steps_per_round; set it, or set rounds in place of total_steps")
    if not all(type(number) is int and number > 0 for number in (steps, total) if number is not None) or steps is None:
        return values  # what is no number is refused as such
    if total is None or total % steps:
        nearest = [d for d in range(1, (total or 0) + 1) if (total or 1) % d == 0]
        said = (
            f"no divisor of total_steps = {total}; such are {', '.join(map(str, nearest))}"
            if total
            else ("needs total_steps, the optimizer steps of the run")
        )
        raise ValueError(f"steps_per_round = {steps}: {said}")
    prompts = values.get("prompts")
    dpo, prompts = (s.model_dump(exclude_unset=True) if isinstance(s, Section) else s for s in (dpo, prompts))
    if not isinstance(dpo, dict) or not isinstance(prompts, dict):
        return values
    per_step = dpo.get("pairs_per_step", DPOConfig().pairs_per_step)
    if type(per_step) is not int:
        return values
    sets = {"rounds": total // steps, "prompts.per_round": per_step * steps, "dpo.max_steps": steps}
    given = {"rounds": values, "prompts.per_round": prompts, "dpo.max_steps": dpo}
    for key, value in sets.items():
        known = given[key].get(key.rpartition(".")[2])
        if known not in (None, value):
            raise ValueError(f"{key} = {known}: steps_per_round sets it to {value}; remove one of the two")
    defaults = {k: v for k, v in ONE_RUN.items() if k != "warmup_ratio" or dpo.get("warmup_steps") is None}
    return {
        **values,
        "rounds": sets["rounds"],
        "prompts": {**prompts, "per_round": sets["prompts.per_round"]},
        "dpo": {**defaults, **dpo, "max_steps": steps},
    }


class Config(Section):
    """A run of iterative DPO."""

    run_dir: RunDirectory
    """The directory for all files of the run. Use the same directory again to resume, or to add rounds."""
    rounds: int = Field(3, ge=1)
    """Total number of rounds. Increase it to continue a finished run."""
    steps_per_round: int | None = Field(None, ge=1, exclude_if=_unset)
    """The dial from online to offline: optimizer steps between two samplings (the s of arXiv:2506.21495). 1 is fully online,
    `total_steps` one round. Sets `rounds`, `prompts.per_round` and `dpo.max_steps`: see
    [from online to offline](training.md#from-online-to-offline)."""
    total_steps: int | None = Field(None, ge=1, exclude_if=_unset)
    """Optimizer steps of the run, with `steps_per_round`; a multiple of it."""
    seed: int = 0
    """The source of every random choice of the run."""
    keep: str = Field("all", pattern=r"^(all|promoted|last [1-9]\d*)$", exclude_if=lambda kept: kept == "all")
    """Policies whose weights stay on disk: `all`, those that were `promoted`, or those of the rounds `last 3`. One that a later
    round starts from or has as its reference, and the best one, always stay."""
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    judge: JudgeConfig
    pairing: PairingConfig = PairingConfig()
    dpo: DPOConfig = DPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    share_gpus: bool = Field(False, exclude_if=lambda shared: not shared)
    """Let other runs use the GPUs at the same time, in place of turns by stage. All have to fit into their memory: see
    [scaling.md](scaling.md#several-runs-on-one-gpu)."""

    @property
    def evaluation_temperature(self) -> float:
        """Of the held-out completions."""
        own = self.evaluation.temperature
        return self.sampling.temperature if own is None else own

    @property
    def further_temperatures(self) -> list[float]:
        """Those of `evaluation.temperatures` that are not the evaluation's own, each once."""
        return [t for t in dict.fromkeys(self.evaluation.temperatures or []) if t != self.evaluation_temperature]

    @model_validator(mode="before")
    @classmethod
    def _the_dial_sets_rounds(cls, values: Any) -> Any:
        return with_dial(values)

    @model_validator(mode="after")
    def _the_heldout_judge_is_another(self) -> Config:
        heldout = self.evaluation.judge
        if heldout is not None and (heldout.use, heldout.args) == (self.judge.use, self.judge.args):
            raise ValueError("evaluation.judge is the training judge; a held-out judge must not be used for training")
        return self

    @model_validator(mode="after")
    def _the_engine_applies_the_adapter(self) -> Config:
        if self.sampling.engine.lora == "vllm" and self.dpo.adapter is not None and self.dpo.adapter.modules_to_save:
            raise ValueError(
                "sampling.engine.lora = 'vllm': vLLM applies no adapter with dpo.adapter.modules_to_save; set it to auto, "
                "which merges it"
            )
        return self

    @model_validator(mode="after")
    def _the_sampler_was_the_policy(self) -> Config:
        pairing = self.pairing
        if self.dpo.sampler_logps_tolerance is not None and (pairing.other_side or pairing.replay or pairing.offline):
            raise ValueError(
                "dpo.sampler_logps_tolerance: pairs of another policy, of earlier rounds or of a file have no "
                "log-probabilities of this round's sampler; set it to null"
            )
        return self

    @model_validator(mode="after")
    def _exploration_has_the_other_completion(self) -> Config:
        if self.dpo.xpo_alpha and self.pairing.against is None:
            raise ValueError(
                "dpo.xpo_alpha: needs pairs with a completion of another policy; set pairing.against to {round: 0}, the initial "
                "policy"
            )
        return self

    @model_validator(mode="after")
    def _the_gate_has_its_kl(self) -> Config:
        kl = "gate.max_kl" if self.gate.max_kl is not None else None
        kl = next((key for key, metric in self.gate.metrics() if metric.startswith("kl/")), kl)
        if kl is not None and self.evaluation.temperature == 0:
            raise ValueError(
                f"{kl}: greedy completions (evaluation.temperature = 0) give no estimate of the KL; set another "
                "temperature, or leave it out"
            )
        return self


def _one_reference(dpo: DPOConfig) -> DPOConfig:
    """One round has one reference, if any."""
    return dpo if dpo.reference == "none" else dpo.model_copy(update={"reference": "previous"})


class OfflineConfig(Section):
    """One offline DPO round on existing preference pairs."""

    run_dir: RunDirectory
    """The directory for all files of the run. Use the same directory again to resume."""
    seed: int = 0
    """The source of every random choice of the run."""
    model: ModelConfig
    data: DataConfig
    dpo: Annotated[DPOConfig, AfterValidator(_one_reference)] = DPOConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    share_gpus: bool = Field(False, exclude_if=lambda shared: not shared)
    """Let other runs use the GPUs at the same time, in place of turns by stage. All have to fit into their memory: see
    [scaling.md](scaling.md#several-runs-on-one-gpu)."""


class JudgesConfig(Section):
    """What `iterdpo judge check`, `compare` and `try` need of a configuration: the judges, and the policy if there is one."""

    judge: JudgeConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    model: ModelConfig | None = None


AnyConfig = TypeVar("AnyConfig", Config, OfflineConfig, JudgesConfig)


def load_config(*paths: str | Path, overrides: list[str] | None = None) -> Config:
    """The run configuration in YAML files, merged left to right, then `dotted.key=value` overrides.

    A ConfigError if a file is missing or not YAML, a key is unknown, or a value is out of range.
    """
    return _load(Config, paths, overrides or [])


def load_offline_config(*paths: str | Path, overrides: list[str] | None = None) -> OfflineConfig:
    """Like `load_config`, for one offline round (`iterdpo train`)."""
    return _load(OfflineConfig, paths, overrides or [])


def load_any_config(path: str | Path) -> Config | OfflineConfig:
    """The configuration in one file: of an offline round if it has a section `data`, of a run otherwise."""
    return load_offline_config(path) if "data" in read_yaml(Path(path)) else load_config(path)


def load_judges_config(path: str | Path) -> JudgesConfig:
    """The judges in a configuration, which may be one of a run, or have a section `judge` alone.

    Of a run's configuration everything is checked, as by `load_config`. A ConfigError if something is wrong.
    """
    values = read_yaml(Path(path))
    if {"run_dir", "prompts", "data"} & values.keys():
        config = load_config(path)
        return JudgesConfig(judge=config.judge, evaluation=config.evaluation, model=config.model)
    others = Config.model_fields.keys() - JudgesConfig.model_fields.keys()
    return parse_config(JudgesConfig, {k: v for k, v in values.items() if k not in others}, source=str(path))


def parse_config(schema: type[AnyConfig], values: dict[str, Any], *, source: str = "the configuration") -> AnyConfig:
    """`values` as a checked configuration, or a ConfigError that names `source`, the key and the remedy."""
    if (key := secret_in(values)) is not None:
        raise ConfigError(
            f"{source}: {key} looks like a secret, and the configuration is kept in run.json and shown in the report; "
            "put it into an environment variable, and name that (such as api_key_env)"
        )
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(explain(schema, e) for e in error.errors())) from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` merged into it: mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = merge(merged[key], value)
        merged[key] = value
    return merged


def _load(schema: type[AnyConfig], paths: tuple[str | Path, ...], overrides: list[str]) -> AnyConfig:
    values: dict[str, Any] = {}
    for path in paths:
        values = merge(typed_loss(values), read_yaml(Path(path)))
    for override in overrides:
        values = assign(typed_loss(values), override)
    source = " + ".join(map(str, paths)) or "the overrides"
    command, others = ("train", {"data"}) if schema is Config else ("run", {"judge", "prompts"})
    if found := sorted(others & values.keys()):
        raise ConfigError(f"{source}: has {found[0]!r}: this is a configuration of `iterdpo {command}`")
    return parse_config(schema, values, source=source)


def typed_loss(values: dict[str, Any]) -> dict[str, Any]:
    """`dpo.loss: ipo` as `{type: ipo}`, so that later files and overrides can add keys to it."""
    match values:
        case {"dpo": {"loss": str(name)} as dpo}:
            return {**values, "dpo": {**dpo, "loss": {"type": name}}}
    return values


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-5 as a number. YAML 1.1 reads it as text, because it has no dot."""


_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys in a file; a ConfigError if it cannot be read, or is no mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).replace(chr(10), ' ')}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration must be a mapping of keys, not a {type(values).__name__}")
    return values


def assign(values: dict[str, Any], override: str) -> dict[str, Any]:
    """`values` with an override applied: `assign({}, "dpo.beta=0.2") == {"dpo": {"beta": 0.2}}`."""
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"{override!r}: write an override as key=value, with dots between the levels: dpo.beta=0.2")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not valid YAML; quote it") from None
    return with_key(values, key.strip(), value)


def with_key(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`values` with a dotted key set: `with_key({}, "dpo.beta", 0.2) == {"dpo": {"beta": 0.2}}`."""
    *sections, last = key.split(".")
    target = values = dict(values)
    for part in sections:
        inner = target.get(part)
        target[part] = dict(inner) if isinstance(inner, dict) else {}
        target = target[part]
    target[last] = value  # replaces a whole mapping too: judge.args={}
    return values


def explain(schema: type[BaseModel], error: Any) -> str:
    """An error of pydantic's `ValidationError.errors()` in our words, with the nearest key if one is unknown."""
    loc = error["loc"]
    # pydantic has the loss's name in the path of its keys: ("dpo", "loss", "ipo", "gamma").
    where = ".".join(str(part) for before, part in pairwise(("", *loc)) if before != "loss" or part not in LOSSES)
    match error["type"]:
        case "extra_forbidden":
            section, key = _section(schema, loc[:-1]), str(loc[-1])
            owners = [name for name, keys in LOSSES.items() if key in keys.model_fields]
            if issubclass(section, _Loss) and owners:
                union = where.removesuffix(f".{key}")
                return (
                    f"unknown key {where!r}: it belongs to {', '.join(owners)}, but {union}.type is {loc[-2]!r}; remove "
                    f"it, or set {union}={loc[-2]} to start from its defaults"
                )
            known = sorted(section.model_fields)
            hint = _elsewhere(schema, where) or _nearest(key, known) or f"known keys: {', '.join(known)}"
            return f"unknown key {where!r}; {hint}"
        case "missing":
            return f"missing key {where!r}"
        case "union_tag_invalid":
            tag = error["ctx"]["tag"]
            near = f"did you mean {from_trl.LOSSES[tag]!r}?" if tag in from_trl.LOSSES else _nearest(tag, LOSSES)
            return f"{where} = {tag!r}: " + (near or f"input should be one of {', '.join(LOSSES)}")
        case "value_error":
            return f"{where}: {error['ctx']['error']}".removeprefix(": ")
        case _:
            return f"{where} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key that a configuration may have, the sections too: `"dpo"`, `"dpo.beta"`, `"dpo.loss.gamma"`."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        kinds = get_args(field.annotation) or (field.annotation,)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from dotted_keys(kind, f"{prefix}{name}.")


def _elsewhere(schema: type[BaseModel], where: str) -> str | None:
    """Where the configuration has the key that `where` ends with: in another section, or under another name than TRL's."""
    section, _, key = where.rpartition(".")
    known = set(dotted_keys(schema))
    places = sorted(name for name in known if name.rpartition(".")[2] == key)
    if section and (below := [name for name in places if name.startswith(f"{section}.")]):
        return f"did you mean {below[0].removeprefix(f'{section}.')!r}?"
    if 1 <= len(places) <= 2:
        return f"did you mean {' or '.join(map(repr, places))}?"
    return from_trl.hint(key, known) if "dpo" in schema.model_fields else None


def _nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that differs from `word` by a slip of the finger; further off, a hint would mislead."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.65 if len(word) <= 4 else 0.75)
    return f"did you mean {near[0]!r}?" if near else None


def _section(schema: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel]:
    for part in loc:
        annotation = schema.model_fields[part].annotation if part in schema.model_fields else None
        sections = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        schema = sections[0] if sections else LOSSES.get(part, schema)
    return schema
