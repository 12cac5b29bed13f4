"""Train a model.

    python -m gt_jax.train --config=configs/gf_mh.py
    python -m gt_jax.train --config=configs/gf_mh.py --config.optim.lr=3e-4 --workdir=runs/slow

Interrupted? Run the same command again: it goes on from its last checkpoint, to the bit on a CPU.
The run's folder holds config.json, metrics.jsonl, checkpoints/, samples.txt, curve.png and
tensorboard/.
"""

import contextlib
import dataclasses
import functools
import json
import signal
import threading
import time
from pathlib import Path

import jax
from absl import flags as absl_flags
from ml_collections import config_flags

from gt_jax import cli, kernels
from gt_jax.config import (
    Config,
    check_devices,
    flatten,
    from_config_dict,
    to_dict,
)
from gt_jax.data import evaluation_batches, make_batches, tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.generate import encode_prompt, generate
from gt_jax.models import ModelConfig, count_parameters, make_model
from gt_jax.training import backend, checkpoint, parallel
from gt_jax.training.display import Display, Speed
from gt_jax.training.evaluation import describe, evaluate
from gt_jax.training.metrics import Metrics
from gt_jax.training.model import make_model_config
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.plot import draw_curve
from gt_jax.training.step import init_state, make_eval_step, make_train_step
from gt_jax.training.text import Text, characters_per_token, loss_unit, read_text

# What a resumed run may change; a longer one follows the cosine of its new length from there on.
FREE_ON_RESUME = ("train.steps", "train.max_minutes", "train.eval_every", "train.patience")
FREE_ON_RESUME += ("train.max_nonfinite", "train.sample_every", "train.sample_prompt")
FREE_ON_RESUME += ("train.sample_tokens", "checkpoint.every", "checkpoint.keep")
FREE_ON_RESUME += ("log.every", "log.tensorboard")


@dataclasses.dataclass
class Progress:
    """How a run is going; a checkpoint remembers it."""

    best_loss: float | None = None
    best_step: int | None = None
    last_loss: float | None = None
    evaluations_since_best: int = 0

    def update(self, step: int, loss: float) -> bool:
        """Take in an evaluation; True if it is the best so far."""
        self.last_loss = loss
        if self.best_loss is not None and not loss < self.best_loss:
            self.evaluations_since_best += 1
            return False
        self.best_loss, self.best_step, self.evaluations_since_best = loss, step, 0
        return True

    def out_of_patience(self, config: Config) -> bool:
        """Whether train.patience evaluations have passed without a new best."""
        return 0 < config.train.patience <= self.evaluations_since_best


def train(config: Config, workdir) -> Progress:
    """Train until config.train.steps, or go on with the run that workdir holds.

    Args:
        config: from `gt_jax.config.from_config_dict`.
        workdir: the run's folder, made if need be.

    Raises:
        InputError: the config does not fit the data, the devices or the run in workdir; or training
            broke down (train.max_nonfinite).
        OSError: a checkpoint cannot be written; earlier ones are intact.
    """
    # The folder, and the run in it if there is one.
    began = time.perf_counter()
    workdir, steps = Path(workdir), config.train.steps
    backend.prepare()
    mesh = parallel.make_mesh()
    check_devices(config, mesh.size)
    writer = checkpoint.Writer(workdir, keep=config.checkpoint.keep)
    start = writer.latest_step() or 0
    about = checkpoint.read_about(checkpoint.find(workdir)) if start else None
    progress = Progress(**about["progress"]) if about else Progress()
    if about:
        _check_same_run(about["config"], config, workdir)
    if start >= steps or progress.out_of_patience(config):
        print(
            f"{workdir} holds a finished run of {start} steps. Go on with a larger "
            "--config.train.steps or train.patience, or start anew with another --workdir."
        )
        return progress

    # Text, in the tokens of the model to go on from if there is one.
    stored = about or _stored(config)
    tokenizer = tokenizer_from_dict(stored["tokenizer"]) if config.model.init_from else None
    text = read_text(config, tokenizer=tokenizer, cache_dir=workdir)
    shape = {"batch_size": config.train.batch_size, "seq_len": config.train.seq_len}
    batches = make_batches(text.tokens.train, order=config.data.order, seed=config.seed, **shape)
    held_out = evaluation_batches(
        text.tokens.validation,
        max_tokens=config.train.eval_tokens,
        carry=config.train.carry_state,
        **shape,
    )
    unit = loss_unit(text.tokenizer)
    per_token = characters_per_token(text.tokenizer, text.tokens.validation)
    prompt = text.tokens.validation[0][:16]
    if config.train.sample_prompt:
        prompt = encode_prompt(text.tokenizer, config.train.sample_prompt, "train.sample_prompt")

    # Model, optimizer, compiled steps.
    model_config = make_model_config(config, text.tokenizer.vocab_size, stored)
    counts = count_parameters(model_config)  # traces: finds out whether model.impl runs here
    model = make_model(model_config)
    schedule = make_schedule(config.optim, steps)
    tx = make_optimizer(config.optim, schedule)
    make_step = functools.partial(make_train_step, model, tx, schedule, config)
    train_step = parallel.compile_train_step(make_step, mesh, config.parallel.mode)
    eval_step = parallel.compile_eval_step(make_eval_step(model), mesh)
    zero_carry = model.init_state(shape["batch_size"]) if config.train.carry_state else None

    # State: the checkpoint's, else fresh but for the parameters of model.init_from.
    key = jax.random.key(config.seed)
    make_state = jax.jit(
        functools.partial(init_state, model, tx, config),
        out_shardings=parallel.state_sharding(mesh),
    )
    if about:
        if about["tokenizer"] != text.tokenizer.to_dict():
            raise InputError(
                f"data.source={config.data.source} is no longer the text that {workdir} began "
                "with; bring it back, or start anew with another --workdir"
            )
        state = checkpoint.restore(checkpoint.find(workdir), jax.eval_shape(make_state, key))
        batches.restore(about["batches"])
    else:
        state = make_state(key)
        if config.model.init_from:
            _, params, _ = checkpoint.load(config.model.init_from)
            state = state.replace(
                params=jax.device_put(params, parallel.state_sharding(mesh).params)
            )

    _introduce(config, model_config, counts, text, mesh, workdir, start)
    (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    metrics = Metrics(workdir, start=start, tensorboard=config.log.tensorboard)
    speed = Speed(shape["batch_size"] * shape["seq_len"], start=start)
    report = functools.partial(_report, config, unit, speed, metrics)

    feed = parallel.in_bursts(batches, mesh, config.parallel.mode)

    # The loop. A step's numbers are read while the next one runs, so the device never waits.
    row = None
    with Display(start=start, steps=steps) as display, _stop_signals() as signals:
        for step in range(start + 1, steps + 1):
            batch, position = next(feed)
            state, numbers = train_step(state, batch)
            speed.begin(numbers)
            if row:
                row = report(display, row)
            is_last, stopped, improved = step == steps, list(signals), False
            if 0 < config.train.max_minutes <= (time.perf_counter() - began) / 60:
                stopped.append(f"train.max_minutes={config.train.max_minutes:g}")
            if every(config.log.every, step) or is_last or stopped:
                row = {"step": step, **numbers}

            if every(config.train.eval_every, step) or is_last:
                with speed.paused(state):
                    measured = evaluate(
                        eval_step, state.params, held_out, carry=zero_carry, per_token=per_token
                    )
                row = {"step": step, **numbers, **measured}
                improved = progress.update(step, measured["validation_loss"])
                is_last |= progress.out_of_patience(config)

            if config.train.sample_tokens and (every(config.train.sample_every, step) or is_last):
                with speed.paused(state):
                    tokens = generate(
                        model,
                        state.params,
                        prompt,
                        max_tokens=config.train.sample_tokens,
                        seed=config.seed,
                    )
                    _keep_sample(workdir, step, text.tokenizer.decode([*prompt, *tokens]), display)

            if improved or every(config.checkpoint.every, step) or is_last or stopped:
                with speed.paused(state):
                    if row:  # Kept before the checkpoint that a resumed run goes on from.
                        row = report(display, row)
                    about = {
                        "model": dataclasses.asdict(model_config),
                        "tokenizer": text.tokenizer.to_dict(),
                        "config": to_dict(config),
                        "batches": position,
                        "progress": dataclasses.asdict(progress),
                    }
                    writer.save(state, about, best_step=progress.best_step)
            if is_last or stopped:
                break

    # The end: everything on disk, and where it is.
    writer.finish(best_step=progress.best_step)
    writer.close()
    metrics.close()
    title = f"{config.model.preset} on {text.corpus.name}"
    draw_curve(workdir, title=title, unit=f"nats per {unit}")
    if not is_last:
        print(f"stopped by {stopped[0]} after step {step}; the same command goes on from there")
        return progress
    early = f", stopped early by train.patience={config.train.patience}" if step < steps else ""
    print(
        f"\nstep {step} after {time.perf_counter() - began:.0f} s{early}; "
        f"{speed.overall(step):,.0f} tokens/s in training\n"
        f"best validation loss {progress.best_loss:.4f} at step {progress.best_step}, "
        f"last {progress.last_loss:.4f} nats/{unit}\n"
        f"curve:       {workdir / 'curve.png'}\n"
        f"samples:     {workdir / 'samples.txt'}\n"
        f"checkpoints: {writer.folder} (best {progress.best_step}, last {step})"
    )
    return progress


def every(interval: int, step: int) -> bool:
    """Whether something that happens every `interval` steps, 0 for never, happens at this one."""
    return interval > 0 and step % interval == 0


def _stored(config: Config) -> dict | None:
    """What a checkpoint says of the model in model.init_from, None where none is set."""
    if config.model.init_from is None:
        return None
    return checkpoint.read_about(checkpoint.find(config.model.init_from))


def _check_same_run(old: dict, config: Config, workdir: Path) -> None:
    old, new = flatten(old), flatten(to_dict(config))
    for name in new:
        if name not in FREE_ON_RESUME and new[name] != old.get(name):
            raise InputError(
                f"{name}={new[name]} differs from {old.get(name)}, with which {workdir} began; "
                f"set it back, or start anew with another --workdir"
            )


def _introduce(config, model_config: ModelConfig, counts, text: Text, mesh, workdir, start):
    """Say what is about to be trained, on what, and how."""
    total = counts.pop("total")
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    name = config.model.preset
    if config.model.init_from:
        name = f"{model_config.architecture} from {config.model.init_from}"
    print(f"model:  {name}, {total:,} parameters ({parts})")
    device = mesh.devices.flat[0].device_kind
    print(f"device: {mesh.size} x {device}, {model_config.dtype}, {config.parallel.mode}")
    ops = {"rwkv": "wkv6", "mamba": "ssd"}
    for op in (op for part, op in ops.items() if part in counts):
        name, reason = kernels.choose_impl(op)
        if model_config.impl != "auto":
            name, reason = model_config.impl, "set by model.impl"
        print(f"{op + ':':8}{name} ({reason})")
    tokens, kind = text.tokens, text.tokenizer.kind
    sizes = [sum(map(len, documents)) for documents in (tokens.train, tokens.validation)]
    print(
        f"data:   {text.corpus.name}, {sizes[0]:,} tokens to train on and {sizes[1]:,} to "
        f"validate; vocabulary of {text.tokenizer.vocab_size} ({kind})"
    )
    if text.corpus.note:
        print(f"        {text.corpus.note}")
    print(f"run:    {workdir}" + (f", resuming at step {start}" if start else ""), flush=True)


def _report(config, unit, speed: Speed, metrics: Metrics, display: Display, row: dict) -> None:
    """Fetch a step's numbers, keep them, show them, and end a run that no longer learns."""
    row, step = jax.device_get(row), row["step"]
    row["tokens_per_second"] = round(speed.latest(step))
    metrics.write(row)
    skipped = f"  {row['skipped']} steps skipped" if row["skipped"] else ""
    display.numbers(
        step,
        f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
        f"{row['tokens_per_second']:,} tokens/s{skipped}",
    )
    if "validation_loss" in row:
        display.line(f"step {step}/{config.train.steps}  validation {describe(row, unit)}")
    if row["skipped_in_a_row"] >= config.train.max_nonfinite:
        raise InputError(
            f"the last {row['skipped_in_a_row']} steps were not finite in loss or gradient "
            f"(train.max_nonfinite={config.train.max_nonfinite}); lower optim.lr={config.optim.lr}"
        )


def _keep_sample(workdir: Path, step: int, sample: str, display: Display) -> None:
    with (workdir / "samples.txt").open("a", encoding="utf-8") as file:
        file.write(f"--- after {step} steps ---\n{sample}\n\n")
    display.line(f"--- sample after {step} steps ---\n{sample}\n---")


@contextlib.contextmanager
def _stop_signals():
    """Collects the names of SIGINT and SIGTERM received; a second one acts as it usually does."""
    received, usual = [], {}

    def note(number, _):
        received.append(signal.Signals(number).name)
        signal.signal(number, usual[number])

    if threading.current_thread() is threading.main_thread():
        usual = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def main(argv):
    flags = cli.new_flags()
    cli.define_config(flags, argv)
    absl_flags.DEFINE_string(
        "workdir", None, "The run's folder; runs/<config name> if not given.", flag_values=flags
    )
    if not cli.parse(flags, argv, usage=__doc__, required=("config",)):
        return
    name = Path(config_flags.get_config_filename(flags["config"])).stem
    train(from_config_dict(flags.config), flags.workdir or Path("runs") / name)


if __name__ == "__main__":
    cli.run(main)
