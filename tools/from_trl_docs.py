"""Writes docs/from-trl.md from the table in `iterdpo.from_trl`.

python tools/from_trl_docs.py            write it
python tools/from_trl_docs.py --check    exit with status 1 if it is out of date
"""

from __future__ import annotations

from configuration_docs import write_page  # a script finds what lies beside it

from iterdpo.from_trl import LOSSES, SECTIONS, Equivalent

HEADER = """\
# Coming from TRL

<!-- Written by tools/from_trl_docs.py from iterdpo/from_trl.py: edit the table there, and run it again. -->

The keys of TRL 1.16's `DPOConfig`, `ModelConfig` and `ScriptArguments`, and what they are called here. An unknown key
that is one of TRL's is refused with its row of this table:

```
$ iterdpo train base.yaml dpo.rpo_alpha=1
base.yaml: unknown key 'dpo.rpo_alpha'; TRL's rpo_alpha is dpo.nll_coefficient here
```

One offline round of `iterdpo train` is what TRL's `DPOTrainer` does. This is a script of TRL's, and the same round:

```python
DPOConfig(
    output_dir="runs/first",
    loss_type=["sigmoid", "sft"],
    loss_weights=[1.0, 0.5],
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    num_train_epochs=1,
    learning_rate=5e-7,
    warmup_steps=20,
    max_length=2048,
)
```

```yaml
run_dir: runs/first
model: {path: ../models/SmolLM2-135M-Instruct}
data: {path: pairs.jsonl, max_prompt_tokens: 1024, max_completion_tokens: 1024}
dpo:
  loss: sigmoid
  nll_coefficient: 0.5
  pairs_per_step: 16             # 4 on a device, 4 times, on one GPU
  learning_rate: 5.0e-7
  warmup_steps: 20
```

The rows of a data set that TRL reads are read as they are: see [data.md](data.md). The losses have TRL's names. Where
their values differ, [losses.md](losses.md#where-iterdpo-and-trl-differ) says so.
"""

LOSS_NAMES = """\
## Names of losses

Every `loss_type` of TRL 1.16 is a `dpo.loss` of the same name. `bco` is the loss of TRL's former `BCOTrainer`, with its
running reward shift, and `bco_pair` the loss without it. TRL's `aot_pair` became `aot`, and its `aot` became
`aot_unpaired`; the names here are the new ones. `kto`, `orpo` and `simpo` are the losses of TRL's `KTOTrainer`,
`ORPOTrainer` and `CPOTrainer`.
"""


def render() -> str:
    """The page."""
    links = "\n".join(f"- [{title}](#{anchor(title)})" for title in SECTIONS)
    parts = [HEADER, links + "\n- [Names of losses](#names-of-losses)"]
    for title, rows in SECTIONS.items():
        parts += [f"## {title}", "\n".join(["| TRL | here | |", "| --- | --- | --- |", *map(row, rows, rows.values())])]
    parts.append(LOSS_NAMES)
    parts.append(
        "\n".join(
            ["| other name | `dpo.loss` |", "| --- | --- |", *(f"| `{n}` | `{ours}` |" for n, ours in LOSSES.items())]
        )
    )
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def row(name: str, found: Equivalent) -> str:
    here = ", ".join(f"`{key}`" for key in found.keys) or "none"
    return f"| `{name}` | {here} | {found.note} |"


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    write_page("from-trl.md", render())
