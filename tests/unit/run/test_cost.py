"""Costs by arithmetic, held against what was measured and against sums by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from iterdpo.config import Config
from iterdpo.errors import ConfigError
from iterdpo.run.checkpoints import check_checkpoint
from iterdpo.run.cost import (
    CARDS,
    GIB,
    Load,
    Rates,
    Shape,
    card_of,
    engine_bytes,
    rates_of_card,
    read_rates,
    seconds_of_rounds,
    trainer_bytes,
    what_would_fit,
)

ONE = Shape(weights=1_236_000_000, layers=16, hidden=2048, inner=8192, kv_width=512)
EIGHT = Shape(weights=8_030_000_000, layers=32, hidden=4096, inner=14336, kv_width=1024)
TINY = Shape(weights=134_515_008, layers=30, hidden=576, inner=1536, kv_width=192)


def config(**sections: Any) -> Config:
    given = {"run_dir": "x", "model": {"path": "m"}, "prompts": {"path": "p"}, "judge": {"use": "length"}}
    return Config.model_validate(given | sections)


# docs/gpu.md, an H100: tokens of a prompt and of a completion; pairs/s, and with the reference pass; GiB
SEEN = {"prompts of 1,024": (1024, 128, 51.6, 39.6, 36.2), "chat": (320, 320, 50.8, 37.0, 37.1)}


@pytest.mark.parametrize("case", SEEN)
def test_the_figures_of_an_h100_are_met_within_30_percent_of_time_and_15_of_memory(case: str) -> None:
    prompt, completion, steps, whole, gib = SEEN[case]
    dpo = {"tokens_per_micro_batch": 16384, "pairs_per_step": 16}
    settings = config(sampling={"max_tokens": 128}, dpo=dpo)
    step = 16.0 * (prompt + 2 * completion)
    memory = trainer_bytes(ONE, None, settings.dpo, sharded=False, step_tokens=step)
    assert memory / GIB == pytest.approx(gib, rel=0.15)
    load = Load(1, 4096, 256, 1, 1024, prompt_tokens=prompt, completion_tokens=completion)
    rates = rates_of_card(CARDS["H100"], "H100", ONE, settings, load)
    assert 1 / rates.stages["train"][1] == pytest.approx(whole, rel=0.3)
    alone = config(dpo=dpo | {"reference": "none", "loss": "simpo"})
    rates = rates_of_card(CARDS["H100"], "H100", ONE, alone, load)
    assert 1 / rates.stages["train"][1] == pytest.approx(steps, rel=0.3)


@pytest.mark.parametrize(("own", "gib"), [({"adapter": {}}, 17.4), ({"optimizer": "adamw_8bit"}, 49.7)])
def test_8b_has_the_memory_that_was_seen(own: dict[str, Any], gib: float) -> None:
    dpo = {**own, "gradient_checkpointing": True, "tokens_per_micro_batch": 4096, "pairs_per_step": 4}
    memory = trainer_bytes(EIGHT, None, config(dpo=dpo).dpo, sharded=False, step_tokens=4 * 960.0)
    assert memory / GIB == pytest.approx(gib, rel=0.15)


def test_all_weights_of_8b_train_as_fast_as_was_seen_beside_other_work_on_the_card() -> None:
    dpo = {"optimizer": "adamw_8bit", "gradient_checkpointing": True, "pairs_per_step": 4}
    load = Load(1, 4096, 256, 1, 1024, prompt_tokens=320, completion_tokens=320)
    rates = rates_of_card(CARDS["H100"], "H100", EIGHT, config(dpo=dpo), load)
    assert 1 / rates.stages["train"][1] == pytest.approx(3.65, rel=0.3)


def test_sampling_has_the_speed_that_was_seen() -> None:
    """135M: 9,300 to 11,300 tokens/s on an H200, 7,000 to 8,800 on an H100."""
    settings = config(sampling={"max_tokens": 128})
    load = Load(1, 1024, 256, 1, 1024, prompt_tokens=20, completion_tokens=128)
    for card, seen in (("H200", 10_300), ("H100", 8_000)):
        rates = rates_of_card(CARDS[card], card, TINY, settings, load)
        assert 128 / rates.stages["sample"][1] == pytest.approx(seen, rel=0.3)


def test_bytes_of_8b_are_those_of_the_table_in_the_page_about_gpus() -> None:
    """144, 48 and 17 GB before activations, which are a micro-batch of one token here."""
    one = {"tokens_per_micro_batch": 1}

    def gigabytes(**dpo: Any) -> float:
        return (trainer_bytes(EIGHT, None, config(dpo=one | dpo).dpo, sharded=False) - 2 * GIB) / 1e9

    assert gigabytes() == pytest.approx(144, rel=0.01)
    assert gigabytes(optimizer="adamw_8bit") == pytest.approx(48, rel=0.01)
    assert gigabytes(adapter={}) == pytest.approx(17, rel=0.05)
    wide = config().dpo
    one_token = trainer_bytes(EIGHT, None, wide, sharded=False, step_tokens=1.0)
    assert one_token == pytest.approx(trainer_bytes(EIGHT, None, config(dpo=one).dpo, sharded=False), rel=1e-4)
    eight = config(dpo=one | {"processes": 8}).dpo
    assert (trainer_bytes(EIGHT, None, eight, sharded=True) - 2 * GIB) / 1e9 == pytest.approx(18, rel=0.01)


def test_what_would_fit_fits_and_names_keys_of_the_configuration() -> None:
    dpo = config(dpo={"tokens_per_micro_batch": 16384}).dpo
    change = what_would_fit(EIGHT, None, dpo, 80e9, sharded=False)
    assert change[0] == "dpo.optimizer=adamw_8bit dpo.gradient_checkpointing=true"
    assert change[-1].startswith("FSDP over 4 GPUs")
    assert what_would_fit(ONE, None, dpo, 40e9, sharded=False)[0] == "dpo.gradient_checkpointing=true"
    assert what_would_fit(EIGHT, None, dpo, 1e9, sharded=False) == []


def test_an_engine_is_its_weights_and_a_sequence_on_each_of_its_gpus() -> None:
    assert engine_bytes(EIGHT, config(), 8192) == 2 * 8.03e9 + 4 * 32 * 1024 * 8192 + 2 * GIB
    two = config(sampling={"engine": {"tensor_parallel_size": 2}})
    assert engine_bytes(EIGHT, two, 8192) - 2 * GIB == (engine_bytes(EIGHT, config(), 8192) - 2 * GIB) / 2


def test_seconds_are_starts_and_units_of_each_stage_and_the_engine_starts_once() -> None:
    rates = Rates({"sample": (1.0, 0.5), "train": (10.0, 2.0), "evaluate": (1.0, 0.5), "kl": (3.0, 0.1)}, 20.0, 4.0)
    load = Load(2, completions=8, evaluated=4, judges=1, pairs=3, prompt_tokens=10, completion_tokens=5)
    first, second, third = seconds_of_rounds(load, rates)
    assert sum(first.values()) == 20 + 4 + (1 + 2)
    assert second == third
    assert sum(second.values()) == pytest.approx(4 + (1 + 4) + (10 + 6) + (1 + 2) + (3 + 0.8))


def test_rounds_without_an_evaluation_take_no_time_for_one_and_other_policies_are_sampled_too() -> None:
    rates = Rates({"sample": (1.0, 0.5), "evaluate": (1.0, 0.5), "kl": (3.0, 0.1)})
    load = Load(5, 8, 4, 1, 3, 10, 5, others=2, compared=6, unevaluated=[1, 3])
    first, *rounds = seconds_of_rounds(load, rates)
    assert sum(first.values()) == 1 + (4 + 6) / 2
    assert [sum(seconds.values()) for seconds in rounds] == pytest.approx([6, 6 + 6.8, 6, 6 + 6.8, 6 + 6.8])


def test_a_shape_is_read_from_headers(tiny_model: Path) -> None:
    shape = Shape.of(tiny_model, check_checkpoint(tiny_model))
    assert shape[1:] == (2, 64, 128, 32)
    assert shape.weights == sum(
        int(n) for n in [259 * 64, 64, *[64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64] * 2]
    )


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"stages": {"train": 3}}', '{"stages": {"train": [1, -1]}}', '{"stages": {"train": [1, NaN]}}'],
)
def test_a_file_that_has_no_rates_is_refused_with_the_form_of_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(ConfigError, match=r"--rates .*it has the form") as refused:
        read_rates(tmp_path / "rates.json")
    form = re.search(r"form (\{.*\})", str(refused.value))
    assert form
    (tmp_path / "rates.json").write_text(form[1])
    assert read_rates(tmp_path / "rates.json").engine == 23.0


def test_rates_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    rates = Rates({"train": (1.5, 0.25)}, 2.0, 3.0, "a calibration", {"engine": 1e9})
    (tmp_path / "rates.json").write_text(json.dumps(rates.to_json()))
    assert read_rates(tmp_path / "rates.json") == rates
    with pytest.raises(ConfigError, match="no such file"):
        read_rates(tmp_path / "none.json")


def test_an_unknown_card_is_refused_with_those_that_are_known() -> None:
    assert card_of("h100") == CARDS["H100"]
    with pytest.raises(ConfigError, match=r"--card 'H1000': not a known card; .*H100"):
        card_of("H1000")
