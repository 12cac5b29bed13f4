"""The model card of an exported folder: what the model is, learned from, scored, and how to use it.

Where the model is a run's, the run's own files tell: config.json, metrics.jsonl, provenance.jsonl.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gt_jax import checkpoint, stored
from gt_jax.config_groups import Optim
from gt_jax.data.base import Tokenizer
from gt_jax.models import ModelConfig, count_parameters

USE = """\
## Use

With transformers, after a look at {code}, the code that it runs:

```python
{imports}

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
{prompt}
print({shown})
```

Alone, with torch and safetensors, from inside the folder:

```python
import torch
from modeling_gt_jax import load

model = load(".")
logits, state = model(torch.tensor([[1, 2, 3]]))  # a prompt
logits, state = model(torch.tensor([[4]]), state)  # one more token
```

In JAX again: `python -m gt_jax.convert import FOLDER runs/model`, with the same bits.
"""


def model_card(
    source: str | Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    licence: str | None,
    has_tokenizer: bool,
    code: Sequence[str],
) -> str:
    """README.md of an exported folder.

    Args:
        source: what `gt_jax.load` took.
        config: the model's.
        tokenizer: the model's.
        licence: of the weights, an identifier such as "apache-2.0"; None if nobody said.
        has_tokenizer: whether the folder has one that transformers reads.
        code: names of the folder's Python files.
    """
    folder = checkpoint.find(source)
    about = checkpoint.read_about(folder)
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [gt_jax]"]
    if licence:
        head.insert(0, f"license: {licence}")
    parameters = count_parameters(config)["total"]
    files = " and ".join(f"`{name}`" for name in code)
    weights = f"Weights: {licence}." if licence else "Weights: no licence was stated."
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# {folder.parent.parent.name if about.get('step') is not None else folder.name}",
        "",
        f"{describe(config)}: {parameters:,} parameters, tokenizer {tokenizer.kind} with "
        f"{tokenizer.vocab_size:,} ids.",
        "",
        *training_of(folder, about),
        "## Licence",
        "",
        f"{weights} The code in {files}: MIT.",
        "",
        _use(has_tokenizer, files),
    ]
    return "\n".join(lines)


def describe(config: ModelConfig) -> str:
    """A model in a few words, as a sentence begins."""
    kind = {"rwkv6": "RWKV-6", "mamba2": "Mamba-2", "gpt2": "GPT-2", "gpt1": "GPT with RMSNorm"}
    name = kind.get(config.architecture, "")
    if config.architecture == "hybrid":
        branches = config.branches.replace("rwkv", "RWKV-6").replace("mamba", "Mamba-2")
        name = f"Hybrid of {branches.replace('+', ' and ')} by fusion {config.fusion}"
    legacy = ", legacy branch" if config.branch == "legacy" else ""
    blocks = "1 block" if config.layers == 1 else f"{config.layers} blocks"
    return f"{name}{legacy}, {blocks} of width {config.dim}"


def training_of(folder: Path, about: Mapping[str, Any]) -> list[str]:
    """Data, loss and command of the run that a checkpoint is of; nothing for a converted model.

    Raises:
        InputError: the checkpoint says them in another form.
    """
    with stored.readable(folder):
        return _training(folder, about)


def _training(folder, about):
    step, settings = about.get("step"), about.get("config", {})
    if step is None:
        return []
    workdir, data, train = folder.parent.parent, settings["data"], settings["train"]
    tokens = step * train["batch_size"] * train["seq_len"]
    lines = [
        "## Training",
        "",
        f"- Data: {data['source']}, {tokens:,} tokens in {step:,} steps of {train['batch_size']} x "
        f"{train['seq_len']}",
    ]
    rows = [row for row in _rows(workdir / "metrics.jsonl") if row.get("step", step + 1) <= step]
    for name in ("validation_loss", "loss"):
        values = [row[name] for row in rows if isinstance(row.get(name), float)]
        if values:
            lines.append(f"- {name.replace('_', ' ').capitalize()}: {values[-1]:.4f} nats a token")
    optimizer = "`, `".join(_optimizer(settings["optim"]))
    lines += [f"- Optimizer: `{optimizer}`", f"- Seed: {settings['seed']}", ""]
    commands = [row["command"] for row in _rows(workdir / "provenance.jsonl") if "command" in row]
    if commands:
        command = re.sub(r"^\S*python\S*", "python", commands[-1])
        lines += ["Command:", "", f"    {command}", ""]
    return lines


# What a reader of a card looks for, whatever its value.
ALWAYS_SHOWN = ("name", "lr", "schedule", "warmup_steps", "weight_decay", "clip")


def _optimizer(optim: Mapping[str, Any]) -> list[str]:
    """A run's settings of the optimizer as flags: the usual ones, and those with other values."""
    usual = _flat(dataclasses.asdict(Optim()))
    found = _flat(optim)
    names = [*ALWAYS_SHOWN, *(name for name in sorted(found) if name not in ALWAYS_SHOWN)]
    return [
        f"optim.{name}={found[name]}"
        for name in names
        if name in found and (name in ALWAYS_SHOWN or found[name] != usual.get(name))
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def _rows(path: Path) -> list[dict]:
    """The JSON objects in the lines of a file; none where there is no file."""
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def _use(has_tokenizer: bool, code: str) -> str:
    """The section on how to use the folder; the tokenizer where transformers can read it."""
    if not has_tokenizer:
        prompt = "ids = torch.tensor([[1, 2, 3]])  # there is no tokenizer that transformers reads"
        return USE.format(
            code=code,
            imports="import torch\nfrom transformers import AutoModelForCausalLM",
            prompt=prompt,
            shown="model.generate(ids, max_new_tokens=100, do_sample=True)",
        )
    return USE.format(
        code=code,
        imports="from transformers import AutoModelForCausalLM, AutoTokenizer",
        prompt='tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)\n'
        'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
        shown="tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=True)[0])",
    )
