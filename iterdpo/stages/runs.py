"""What the stages of a run work with, checked before anything heavy is loaded."""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import importlib.util
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any, TypeVar

from iterdpo.config import Config, OfflineConfig, TagsConfig
from iterdpo.data.chats import content_of
from iterdpo.data.preferences import NOT_RENDERED
from iterdpo.data.prompts import RoundPrompts, check_lengths, place_of
from iterdpo.data.rendering import engine_ends, load_tokenizer, prompts_token_ids, turn_ends
from iterdpo.data.rows import SHOWN_ALIKE, BadRows, source_digest
from iterdpo.data.thinking import Tags, Thinking, find_tags
from iterdpo.errors import ConfigError, DamagedError, DataError, RowError
from iterdpo.gate import best_record, learning_rate
from iterdpo.judging.judge import NamedJudge, RunJudge, Waiting
from iterdpo.judging.shards import StreamingJudge
from iterdpo.run.artifacts import Evaluation, PolicyCheckpoint
from iterdpo.run.checkpoints import (
    check_adapter_targets,
    check_checkpoint,
    check_model,
    check_whole_modules,
    context_length,
    resolve_checkpoint,
    training_bytes,
)
from iterdpo.run.devices import Turns, answers, check_devices, visible_gpus
from iterdpo.run.disk import check_space
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import (
    RunDir,
    check_step,
    digest,
    directory_digest,
    file_sums,
    read_manifest,
    read_object,
    removed,
    write_json,
)
from iterdpo.run.supervise import Child
from iterdpo.run.trackers import Trackers, flat
from iterdpo.sampling import Pool, Sampler, VLLMSampler
from iterdpo.sampling.client import engine_share
from iterdpo.sampling.ray import RaySampler, connect
from iterdpo.sampling.servers import ServerSampler
from iterdpo.stages.checks import check_evaluation, check_gate, check_pairing
from iterdpo.training.launch import check_training, processes_here, warm_up
from iterdpo.types import Content, Prompt, RoundRecord

T = TypeVar("T")
LONGEST = 10_000
"""Prompts of a round that a plan tokenizes."""


class OfflineRun:
    """What one offline round needs: a directory, a policy and the settings of its training.

    Anything that would fail later and can be seen now is a UserError.
    """

    def __init__(self, config: Config | OfflineConfig, *, progress: Progress | None = None, redo: bool = False) -> None:
        self.settings = config
        self.dir = RunDir(config.run_dir, redo=redo)
        self.progress = progress or Progress()
        self._open = ExitStack()
        self._trainer: Child | None = None
        self._sums: dict[str, str] = {}  # of the initial policy's files
        check_training(config.dpo)
        check_devices(processes_here(config.dpo), "dpo.processes")
        self.model_path = resolve_checkpoint(config.model.path, revision=config.model.revision)
        self.model_config = check_checkpoint(self.model_path, trust_remote_code=config.model.trust_remote_code)
        check_whole_modules(self.model_path, config.dpo.adapter)
        if (adapter := config.dpo.adapter) is not None:
            tied, whole = bool(self.model_config.get("tie_word_embeddings")), adapter.modules_to_save or []
            merged = self._merges_adapters
            check_adapter_targets(self.model_path, adapter.target_modules, whole, tied=tied, merged=merged)

    def warm_up_trainer(self, round: int) -> None:
        """Begin the start of the round's trainer, if there is one to come: it imports torch while other work goes on."""
        if self._trainer is None and read_manifest(self.dir.round_dir(round) / "policy") is None:
            self._trainer = warm_up(
                self.settings.dpo, log=self.dir.log_path("train"), reserved=self.devices.descriptors
            )
            if self._trainer is not None:
                self._open.callback(self._trainer.kill)

    def take_trainer(self) -> Child | None:
        """The trainer that `warm_up_trainer` began, for one round."""
        taken, self._trainer = self._trainer, None
        return taken

    def check_model(self) -> None:
        """Hold the checkpoint against the model that transformers makes of it. Takes seconds; noted like the digest."""
        version = importlib.metadata.version("transformers")
        self._noted(f"transformers {version}", lambda: check_model(self.model_path, self.model_config))

    @cached_property
    def initial(self) -> PolicyCheckpoint:
        """The policy of round 0. Its digest reads all of it; a note in the run directory saves that on the next start."""
        digest = str(self._noted("digest", lambda: directory_digest(self.model_path)))
        self._sums = dict(self._noted("sha256", lambda: file_sums(self.model_path)))
        return PolicyCheckpoint(self.model_path, digest, 0)

    @cached_property
    def added_stops(self) -> list[int]:
        """The ids at which a turn ends but an engine does not stop on its own; see `turn_ends`. Noted like the digest."""
        found = self._noted("added_stops", lambda: sorted(turn_ends(self.tokenizer) - engine_ends(self.tokenizer)))
        return list(found)

    @cached_property
    def tags(self) -> Tags | None:
        """The tags around the policy's reasoning, if it is a thinking model. Those of its template are noted like the digest.

        A ConfigError if there are none, and answers alone are to be trained on.
        """
        match self.settings.model.thinking:
            case TagsConfig(start=start, end=end):
                return Tags(start, end)
            case "auto":
                found = self._noted("tags", lambda: tags.to_json() if (tags := find_tags(self.tokenizer)) else None)
                if found:
                    return Tags(**found)
        if self.settings.dpo.train_on == "answer":
            raise ConfigError(
                f"dpo.train_on = 'answer': no tags of reasoning are known for {self.model_path}; set model.thinking to "
                "those that it writes, such as {start: <think>, end: </think>}, or train_on to completion"
            )
        return None

    @cached_property
    def thinking(self) -> Thinking | None:
        """What divides completions into reasoning and answer; None if the policy is no thinking model."""
        return Thinking(self.tokenizer, self.tags) if self.tags is not None else None

    def _noted(self, name: str, compute: Callable[[], Any]) -> Any:
        """What depends on the files of the initial policy alone: as noted in the run directory, if they are the same."""
        files = sorted(path for path in self.model_path.iterdir() if path.is_file())
        stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        note, key = self.dir.root / ".initial.json", {"path": str(self.model_path), "stamp": stamp}
        try:
            known = read_object(note)
        except (FileNotFoundError, NotADirectoryError, DamagedError):
            known = {}
        if {k: known.get(k) for k in key} != key:
            known = key
        if name not in known:
            known = {**known, name: compute()}
            if self.dir.root.exists():
                with suppress(OSError):  # it only saves time
                    write_json(note, known, record=self.dir.root)
        return known[name]

    def check(self, *policies: PolicyCheckpoint) -> None:
        """Check every byte of policies that are about to be sampled from, trained on or scored with, and of their base.

        What this process has checked is not read again.

        Raises:
            DamagedError: naming a file that is not as it was written.
        """
        for policy in {p.path: p for p in (*policies, self.initial)}.values():
            if (manifest := read_manifest(policy.path)) is not None:
                if removed(policy.path):
                    raise DataError(
                        f"{policy.path}: its weights were removed, as keep = {self.settings.model_dump().get('keep', 'all')!r} "
                        "asked; delete this directory to train it again"
                    )
                check_step(policy.path, manifest)
            elif policy.path == self.initial.path and (there := file_sums(policy.path)) != self._sums:
                changed = sorted({name for name, _ in there.items() ^ self._sums.items()})
                raise DataError(
                    f"model.path {policy.path}: {', '.join(changed)}: not as when this run began; restore it, or choose "
                    "another run_dir"
                )

    @cached_property
    def tokenizer(self) -> Any:
        model = self.settings.model
        tokenizer = load_tokenizer(
            self.model_path,
            trust_remote_code=model.trust_remote_code,
            chat_template_kwargs=model.chat_template_kwargs,
        )
        gc.freeze()  # a million objects of transformers and torch: each full collection would go through them
        atexit.register(gc.unfreeze)
        return tokenizer

    @cached_property
    def devices(self) -> Turns:
        """The GPUs that this run's stages take turns on with those of others; none if it shares them."""
        turns = Turns(0 if self.settings.share_gpus else self._devices, say=self.progress.say)
        self._open.callback(turns.close)
        return turns

    def learning_rate(self, round: int) -> float:
        """The peak learning rate of `round`."""
        return self.settings.dpo.of_round(round).learning_rate

    @property
    def _devices(self) -> int:
        return processes_here(self.settings.dpo)

    @property
    def _merges_adapters(self) -> bool:
        """Whether an adapter will be merged into the weights, to sample from it."""
        return False

    def check_space(self) -> None:
        """Refuse to begin if the policies that are not trained yet, and the trainer's checkpoint, do not fit on the disk.

        Raises:
            UserError: the disk has less free space.
        """
        policy, checkpoint = training_bytes(self.model_path, self.settings.dpo)
        rounds = range(1, self._rounds + 1)
        missing = sum(not (self.dir.round_dir(t) / "policy").is_dir() for t in rounds)
        if missing:
            check_space(self.dir.root, min(missing, self.policies_at_once) * policy + checkpoint)

    @property
    def policies_at_once(self) -> int:
        """The most policies of rounds to come that are on disk together."""
        return self._rounds

    @property
    def _rounds(self) -> int:
        return 1

    @cached_property
    def trackers(self) -> Trackers:
        """The experiment trackers of `dpo.trackers`."""
        dpo, config = self.settings.dpo, flat(self.settings.model_dump(mode="json"))
        return Trackers(dpo.trackers, project=dpo.tracker_project, run=self.dir, config=config, say=self.progress.say)

    def close(self) -> None:
        self._open.close()
        if "trackers" in vars(self):
            self.trackers.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class IterativeRun(OfflineRun):
    """The resources of an iterative run: also prompts, judges and a sampler. Constructing one loads no model.

    Args:
        config: the run's configuration.
        train_judge, heldout_judge: see `NamedJudge`; the second is None if the first evaluates too.
        sampler: another sampler than the vLLM engine, for tests.
        progress: where progress is shown.
        redo: repeat steps that were made with other settings, instead of refusing.
    """

    def __init__(
        self,
        config: Config,
        *,
        train_judge: NamedJudge,
        heldout_judge: NamedJudge | None = None,
        sampler: Sampler | None = None,
        progress: Progress | None = None,
        redo: bool = False,
    ) -> None:
        self.config = config
        super().__init__(config, progress=progress, redo=redo)
        width = config.sampling.engine.tensor_parallel_size
        check_devices(width, "sampling.engine.tensor_parallel_size")
        if self._replicas > 1:
            check_devices(width * self._replicas, "sampling.engine: replicas x tensor_parallel_size")
        self.waiting: Waiting = self._say_waiting
        """Prefect pauses the flow run meanwhile."""
        judges = [train_judge, *([heldout_judge] if heldout_judge else [])]
        self.judges = [RunJudge(named, self.dir.root, self._wait) for named in judges]
        self.train_judge = self.judges[0]
        self.prompts = RoundPrompts(
            config.prompts,
            self.dir,
            rounds=config.rounds,
            seed=config.seed,
            min_margin=config.pairing.min_margin,
        )
        check_gate(self, heldout_judge=heldout_judge is not None)
        check_pairing(self)
        check_evaluation(self)
        if sampler is not None:
            self.sampler = sampler
        self._streaming: list[StreamingJudge] = []
        self._measuring = threading.Lock()

    def other_content(self, prompt: Prompt) -> Content | None:
        """The completion in the column that the section `pairing` names; None if the prompt has none.

        Raises:
            DataError: it is neither text nor messages, with its place in the data.
        """
        source = self.config.pairing.other_side
        assert source is not None
        assert source.column is not None
        if (value := prompt.columns.get(source.column)) is None:
            return None
        try:
            content = content_of(value, f"column {source.column!r}")
        except DataError as error:
            raise DataError(f"{self.place_of(prompt)}: {error}") from error
        return (content if content.strip() else None) if isinstance(content, str) else content or None

    @cached_property
    def other_model(self) -> PolicyCheckpoint:
        """The checkpoint that `pairing.rejected_from`, `chosen_from` or `against` names."""
        source = self.config.pairing.other_side
        assert source is not None
        assert source.model is not None
        path = resolve_checkpoint(source.model)
        return PolicyCheckpoint(path, directory_digest(path), 0)

    @cached_property
    def compared_model(self) -> PolicyCheckpoint | None:
        """The checkpoint that `evaluation.against` names."""
        if (against := self.config.evaluation.against) is None:
            return None
        path = resolve_checkpoint(against.model)
        return PolicyCheckpoint(path, directory_digest(path), 0)

    @cached_property
    def offline_content(self) -> str:
        """What identifies the data of `pairing.offline`."""
        data = self.config.pairing.offline
        assert data is not None
        return source_digest(data.path, data.split)

    def policy_after(self, round: int) -> PolicyCheckpoint:
        """The policy that stood when `round` had ended: the one that the next round starts from."""
        record = self.dir.record(round)
        assert record is not None, f"round {round} has not ended"
        if record.policy_round == 0:
            return self.initial
        path = self.dir.root / record.policy
        if directory_digest(path) != record.policy_digest:
            remedy = "restore it, or pass --redo to repeat the rounds after it"
            raise DataError(f"{path}: not the policy that round {round} kept; {remedy}")
        return PolicyCheckpoint(path, record.policy_digest, record.policy_round)

    def evaluates(self, round: int) -> bool:
        """Whether `round` is evaluated: as `evaluation.every` says, the last one, and one that was the last before."""
        if round % self.config.evaluation.every == 0 or round == self.config.rounds:
            return True
        return any((self.dir.round_dir(round) / name).exists() for name in ("evaluation", "evaluation.partial"))

    def standing(self, round: int) -> PolicyCheckpoint:
        """The policy that stood after the last evaluation before `round`."""
        return self.policy_after(max(t for t in range(round) if self.evaluates(t)))

    def records_before(self, round: int) -> list[RoundRecord]:
        """How the rounds before `round` ended."""
        return [record for r in range(round) if (record := self.dir.record(r)) is not None]

    def learning_rate(self, round: int) -> float:
        return learning_rate(super().learning_rate(round), self.records_before(round))

    def baselines(self, round: int, policy: PolicyCheckpoint) -> dict[str, Evaluation]:
        """The evaluations that the candidate of `round`, which starts from `policy`, is compared with, by name.

        `initial`, `previous`, and `best`, if the best round so far is not the one of `policy`.
        """
        rounds = {"initial": 0, "previous": policy.round, "best": best_record(self.records_before(round)).policy_round}
        if rounds["best"] == policy.round:
            del rounds["best"]
        found = {}
        for name, round in rounds.items():
            path = self.dir.round_dir(round) / "evaluation"
            manifest = read_manifest(path)
            assert manifest is not None, f"round {round} has no evaluation"
            found[name] = Evaluation(path, manifest.digest, round)
        return found

    def streaming_judge(self, round: int) -> StreamingJudge:
        """The training judge, to work while the round is sampled.

        One that still works, because its round begins again, is waited for: what it makes is used.
        """
        for earlier in self._streaming:
            earlier.join()
        self._streaming.append(StreamingJudge(self.train_judge, self.dir.round_dir(round) / "judgments.streaming"))
        return self._streaming[-1]

    @cached_property
    def max_model_len(self) -> int:
        """What the engine must hold, in tokens. Tokenizes the run's prompts.

        A UserError if a prompt leaves no room for `max_tokens` in the model's context.
        """
        return self.estimated_max_model_len(1 << 62)

    def _measured(self) -> int:
        """`max_model_len`, for engines that start at once, each in a thread: tokenized by the first."""
        with self._measuring:
            return self.max_model_len

    def estimated_max_model_len(self, most: int = LONGEST) -> int:
        """`max_model_len` from the `most` longest texts of each round alone: the same, but in a very large file."""
        config = self.config
        limit = config.sampling.engine.max_model_len
        context = context_length(self.model_config)
        if limit is not None and context is not None and limit > context:
            raise ConfigError(f"sampling.engine.max_model_len = {limit}: the model's context is {context} tokens")
        available = min(x for x in (limit, context, 1 << 30) if x is not None)
        parts = [*(self.prompts.of(t) for t in range(1, config.rounds + 1)), self.prompts.heldout]
        lengths = (
            (len(ids), prompt)
            for part in parts
            for prompts in batches(part.longest(most) if len(part) > most else part, 1024)
            for ids, prompt in zip(self.prompt_ids(prompts), prompts, strict=True)
        )
        longest = check_lengths(lengths, available - config.sampling.max_tokens, place_of=self.place_of)
        return limit or -(-(longest + config.sampling.max_tokens) // 64) * 64

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler that was given, or the configuration's engines. Made at its first use."""
        supervision = self.config.supervision
        return Pool(self._engines(), restarts=supervision.restarts, say=self.progress.say)

    def _engines(self) -> Sequence[Sampler]:
        sampling = self.config.sampling
        if sampling.servers:
            return [self._server(url) for url in sampling.servers]
        if sampling.ray is None:
            width = sampling.engine.tensor_parallel_size
            shares = [engine_share(number, self._replicas, width) for number in range(self._replicas)]
            return [VLLMSampler(**self._engine(n), variables=share) for n, share in enumerate(shares)]
        there, width = connect(sampling.ray), sampling.engine.tensor_parallel_size
        count = max(1, there // width) if sampling.engine.replicas == "auto" else sampling.engine.replicas
        return [RaySampler(**self._engine(n), gpus=width if there else 0) for n in range(count)]

    def _engine(self, number: int) -> dict[str, Any]:
        """The arguments of a `VLLMSampler`."""
        adapter, engine = self.config.dpo.adapter, self.config.sampling.engine
        return {
            "max_model_len": self._measured,
            "engine": engine,
            "log": self.dir.log_path("sampler" + (f"-{number}" if number else "")),
            "trust_remote_code": self.config.model.trust_remote_code,
            "reproducible": self.config.sampling.reproducible,
            "adapter_rank": adapter.r if adapter is not None and not adapter.modules_to_save else None,  # else merged
            "reserved": self.devices.descriptors,
            "supervision": self.config.supervision,
            "say": self.progress.say,
            "base": lambda policy: policy if policy.is_relative_to(self.dir.root) else self.initial.path,
        }

    def _server(self, url: str) -> ServerSampler:
        supervision = self.config.supervision
        return ServerSampler(
            url,
            max_model_len=self._measured,
            reproducible=self.config.sampling.reproducible,
            silence=supervision.silence,
            start=supervision.start,
            base=lambda: (self.initial.path, self.initial.digest),
        )

    @property
    def sampling_turn(self) -> AbstractContextManager[None]:
        """A context in which the run samples: with its GPUs, unless others do it."""
        return self.devices.turn() if self._replicas else nullcontext()

    def probe_sampler(self) -> None:
        """Ask once for what samples, if it is not here: the servers, or the package for a cluster.

        Raises:
            ConfigError: naming the key.
        """
        sampling = self.config.sampling
        for url in sampling.servers:
            if not answers(f"{url}/health"):
                raise ConfigError(f"sampling.servers: {url} does not answer; start the server, or correct the URL")
        if sampling.ray is not None and importlib.util.find_spec("ray") is None:
            raise ConfigError("sampling.ray: the package 'ray' is not installed; run: pip install 'iterdpo[ray]'")

    def warm_up(self) -> None:
        """Begin what takes long to start, without waiting: the sampler's processes import vLLM meanwhile."""
        if isinstance(self.sampler, Pool):
            self.sampler.warm_up()

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The prompts as token ids, as the chat template renders them now.

        Raises:
            DataError: some cannot be rendered, with their places in the data.
        """
        try:
            return prompts_token_ids(self.tokenizer, [prompt.content for prompt in prompts])
        except DataError:
            bad = BadRows()
            for prompt in prompts:
                try:
                    prompts_token_ids(self.tokenizer, [prompt.content])
                except DataError as error:  # the data is read for each place that is shown
                    place = f"{self.place_of(prompt)}: " if bad.counts[NOT_RENDERED] < SHOWN_ALIKE else ""
                    bad.add(RowError(f"{place}{error}", NOT_RENDERED))
            if bad.counts:
                raise bad.error(self.config.prompts.path, len(prompts)) from None
            raise

    def pinned_ids(self, round: int) -> Iterator[list[int]]:
        """The token ids of a round's prompts (0: of the held-out ones), in their order, as they were first rendered.

        A template may write the date: all shards and all rounds get the ids of the first day.
        """
        stamp = digest([self.initial.digest, self.settings.model.chat_template_kwargs])
        return self.prompts.pinned_ids(round, self.prompt_ids, stamp=stamp)

    def place_of(self, prompt: Prompt) -> str:
        return place_of(prompt, self.config.prompts)

    def release_judges(self) -> None:
        """Let judges that hold a device give it back."""
        for judge in self.judges:
            judge.release()

    def close(self) -> None:
        """End the sampler's process, if one was started, and give back judges and devices."""
        if "sampler" in vars(self):
            self.sampler.close()
        for streaming in self._streaming:
            streaming.cancel()
        try:
            self.release_judges()
        finally:
            super().close()

    @property
    def _devices(self) -> int:
        return max(self._replicas * self.config.sampling.engine.tensor_parallel_size, processes_here(self.config.dpo))

    @property
    def _replicas(self) -> int:
        """Engines on this machine."""
        engine = self.config.sampling.engine
        if self.config.sampling.servers or self.config.sampling.ray is not None:
            return 0
        if engine.replicas != "auto":
            return engine.replicas
        return max(1, len(visible_gpus()) // engine.tensor_parallel_size)

    @property
    def _merges_adapters(self) -> bool:
        lora = self.config.sampling.engine.lora
        adapter = self.config.dpo.adapter
        whole = adapter is not None and bool(adapter.modules_to_save)  # vLLM applies no such adapter
        return lora == "merge" or (lora == "auto" and (whole or not visible_gpus()))

    @property
    def _rounds(self) -> int:
        return self.config.rounds

    @property
    def policies_at_once(self) -> int:
        word, _, number = self.config.keep.partition(" ")
        others = 3  # the start, the best, a reference
        return min(self._rounds, int(number) + others) if word == "last" else self._rounds

    @contextmanager
    def _wait(self, message: str) -> Iterator[Callable[[], None] | None]:
        """Around a judge's wait for a person: others may have the devices meanwhile."""
        with self.devices.between(), self.waiting(message) as poll:
            yield poll

    @contextmanager
    def turn_of(self, *judges: RunJudge) -> Iterator[None]:
        """A context in which these judges work, with the devices if one of them may need one."""
        with self.devices.turn() if any(judge.load().needs_device for judge in judges) else nullcontext():
            yield

    @contextmanager
    def _say_waiting(self, message: str) -> Iterator[Callable[[], None] | None]:
        self.progress.say(f"  {'waiting':<9} {message}")
        yield None


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
