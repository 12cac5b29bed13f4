"""Train a model.

    python -m gt_jax.train --config=configs/gf_mh.py
    python -m gt_jax.train --config=configs/gf_mh.py --config.optim.lr=3e-4 --workdir=runs/slow

A config file is Python and is run: name only files that you trust.

Interrupted? Run the same command again: it continues from its last checkpoint, to the bit on a CPU.
The run's folder holds config.json, provenance.jsonl, metrics.jsonl, checkpoints/, samples.txt,
curve.png and tensorboard/.

Exit status: 0 done; 1 an error, in one line; 75 stopped by train.max_minutes; 128 + N stopped by
signal N, of which SIGHUP (129), SIGINT (130, Ctrl-C) and SIGTERM (143) are saved after the step
under way, as is a closed pipe (141, `| head`). A second signal ends the program at once.
"""

import contextlib
import dataclasses
import functools
import json
import time
from concurrent.futures import wait
from pathlib import Path

import jax
import numpy as np
from absl import flags as absl_flags

from gt_jax import cli, code_files, compilation, kept_programs
from gt_jax.config import Config, check_devices, from_config_dict, to_dict
from gt_jax.data import beginning
from gt_jax.data.corpora import replace_file
from gt_jax.generation import generate, lower_ahead, sample
from gt_jax.generation.prompts import encode_prompt
from gt_jax.scoring import loss_unit
from gt_jax.training import backend, hosts, parallel, provenance, stopping, utilization, watch
from gt_jax.training.display import Display, Speed, reader_left, say
from gt_jax.training.ending import curve_of, is_finished, keep_curve
from gt_jax.training.evaluation import describe, evaluate
from gt_jax.training.guard import Guard, Spike, rewind
from gt_jax.training.job import Job, first_state, prepare, progress_of
from gt_jax.training.loggers import Service
from gt_jax.training.metrics import Metrics, plain
from gt_jax.training.metrics import read as read_metrics
from gt_jax.training.placement import on_one_device
from gt_jax.training.plot import prepare_to_draw, prepare_to_draw_beside
from gt_jax.training.prefetch import prefetch
from gt_jax.training.progress import Progress
from gt_jax.training.runtime import joined
from gt_jax.training.samples import Samples
from gt_jax.training.stopping import Interrupted, Stop
from gt_jax.training.summary import conclude, introduce
from gt_jax.training.text import Text
from gt_jax.training.watchdog import Watchdog
from gt_jax.training.writer import Writer, newest_of_all


def train(config: Config, workdir: str | Path, stop: Stop | None = None) -> Progress:
    """Train until config.train.steps, or continue the run that workdir holds.

    Args:
        config: from `gt_jax.config.from_config_dict`.
        workdir: the run's folder, made if need be.
        stop: what ends the run early, saved. By default SIGINT, SIGTERM and SIGHUP during the loop.

    Raises:
        InputError: the config does not fit the data, the devices or the run in workdir; another
            process trains there; or training broke down (train.max_nonfinite).
        OSError: a checkpoint cannot be written; earlier ones are intact.
    """
    began = time.perf_counter()
    workdir = Path(workdir)
    with joined(config.parallel):
        hosts.check_same_config(config)
        backend.prepare()
        check_devices(config, jax.device_count())
        mesh = parallel.make_mesh(config.parallel.fsdp, config.parallel.sequence)
        with hosts.folder(workdir) as own:
            return _train(config, workdir, own, mesh, stop, began)


def _train(config: Config, workdir: Path, own: Path, mesh, stop: Stop | None, began) -> Progress:
    """`train`, with the folder from `hosts.folder`."""
    folder, about = newest_of_all(workdir)
    start = int(folder.name) if folder is not None else 0
    progress = Progress()
    if folder is not None and about is not None:
        progress = progress_of(folder, about, config, workdir)
    if hosts.of_first(lambda: is_finished(config, own, start, progress)):
        say(
            f"{workdir} holds a finished run of {start} steps. Continue it with a larger "
            "--config.train.steps or train.patience, or start anew with another --workdir."
        )
        return progress

    prompt_of = functools.partial(_prompt, config)
    job = prepare(config, workdir, own, mesh, about, prompt_of, lower_ahead)
    introduce(job, start)
    written = json.dumps(to_dict(config), indent=2) + "\n"
    replace_file(own / "config.json", written.encode())
    provenance.record(own, step=start, text=job.fingerprint)
    speed = Speed(config.train.batch_size * config.train.seq_len, start=start)
    keep = config.checkpoint
    if stop is None:
        stop = Stop()
        listening = stopping.signals(stop)
    else:
        listening = contextlib.nullcontext()
    if hosts.count() > 1:
        stop.vote = hosts.Vote(mesh)
    with listening, Writer(workdir, keep=keep.keep, keep_every=keep.keep_every) as writer:
        step = None
        while step is None:
            try:
                step = _loop(job, folder, about, progress, stop, writer, speed, began)
            except Spike as spike:
                found = spike.with_traceback(None)  # which holds the state of before
            if step is None:
                folder, about, progress = rewind(config, workdir, writer, progress, found)
                speed.rewind(int(folder.name))
        curve = curve_of(job)  # while the last checkpoint is written
        writer.finish(best_step=progress.best_step)
    keep_curve(job, curve)
    stop.work_to_lose = False
    conclude(job, progress, step, stop, speed, time.perf_counter() - began)
    wait(job.compiling.values())  # else Python does at its exit, where signals show tracebacks
    return progress


def _loop(job: Job, folder, about, progress, stop, writer, speed, began) -> int:
    """Train from the step of a checkpoint, or from 0, until the last one or a stop.

    A step is evaluated, saved, then sampled. What a run that was stopped or killed left undone of
    these at the step that it begins from is done first. Returns the steps done.
    """
    config, steps = job.config, job.config.train.steps
    start = int(folder.name) if folder is not None else 0
    numbers = next((row for row in read_metrics(job.folder) if row["step"] == start), {})
    carry, row = None, None
    if config.train.carry_state:
        carry = parallel.put_rows(job.model.init_state(config.train.batch_size), job.mesh)

    @contextlib.contextmanager
    def paused():
        with speed.paused(state):
            watchdog.pause()
            yield

    def save():
        guard.finish()
        metrics.flush()
        about = {
            "model": dataclasses.asdict(job.model_config),
            "tokenizer": job.text.tokenizer.to_dict(),
            "config": to_dict(config),
            "batches": position,
            "text": job.fingerprint,
            "progress": dataclasses.asdict(progress),
        }
        writer.save(state, about, best_step=progress.best_step)

    with contextlib.ExitStack() as stack:
        display = stack.enter_context(Display(start=start, steps=steps))
        watchdog = stack.enter_context(Watchdog(display.line))
        guard = Guard(
            config,
            progress,
            workdir=job.workdir,
            starts=job.batches.starts,
            saved=writer.steps,
            say=display.line,
        )
        send = functools.partial(prefetch, job.batches, job.mesh, config.parallel.mode)
        feed = send() if about is None else None  # it compiles, which waits for others later on
        state = first_state(job, folder, about)  # before anything is cut off behind `start`
        feed = feed or send()
        metrics = stack.enter_context(contextlib.closing(_open_metrics(job, start)))
        samples = Samples(job.folder, start=start)
        report = functools.partial(_report, job, speed, metrics, watch.Alarm(config))
        if job.compiling:
            if not job.compiling["train"].done():
                prepare_to_draw()  # Python has nothing else to do now
            display.wait_for(job.compiling["train"], began)
        if config.train.eval_at_start and not start and not stop:
            with contextlib.suppress(Interrupted):
                report(display, {"step": 0} | _evaluate(job, state, stop, carry))
        for step in range(start or 1, steps + 1):
            # The step. Its numbers are read while the next one runs: the device never waits.
            trains = step > start
            if trains:
                watchdog.begin(step)
                batch, position = next(feed)
                state, numbers = job.train_step(state, batch)
                speed.begin(numbers)
                if row:
                    row = report(display, row)
                guard.add(step, numbers, batch, position)
                stop.work_to_lose = True
                _look_for_reasons(stop, config, began)
            is_last = step == steps or bool(progress.stops_early(config))
            due = (every(config.train.eval_every, step) or is_last) and progress.evaluated < step
            if trains and (every(config.log.every, step) or due):
                numbers |= job.probe(state.params, batch)
                row = {"step": step, **numbers, **progress.returned()}

            improved = False
            if due and not stop:
                if is_last:
                    prepare_to_draw_beside()
                with paused(), contextlib.suppress(Interrupted):
                    measured = _evaluate(job, state, stop, carry)
                    row = {"step": step, **numbers, **progress.returned(), **measured}
                    improved = progress.update(step, measured["validation_loss"])
                    if config.train.stop_rules:
                        rows = [*read_metrics(job.folder), plain(jax.device_get(row))]
                        progress.broken_rule = watch.broken_rule(rows, config)
                    is_last |= bool(progress.stops_early(config))

            saved = improved or every(config.checkpoint.every, step) or is_last or bool(stop)
            if row and (saved or not trains):  # Kept before the checkpoint to continue from.
                with paused():
                    row = report(display, row)
            if saved and trains:
                with paused():
                    save()

            due = (every(config.train.sample_every, step) or is_last) and samples.last < step
            if due and config.train.sample_tokens and not stop:
                with paused(), contextlib.suppress(Interrupted):
                    _sample(job, state.evaluated, step, stop, samples, display)
            if stop and trains and not saved:
                if row:
                    row = report(display, row)
                save()
            if is_last or stop:
                break
    return step


def _evaluate(job: Job, state, stop: Stop, carry) -> dict:
    """The measures of the parameters that the run evaluates. Raises Interrupted at a stop."""
    return evaluate(
        job.eval_step,
        state.evaluated,
        stop.until(job.held_out),
        carry=carry,
        per_token=job.per_token,
    )


def _open_metrics(job: Job, start: int) -> Metrics:
    """metrics.jsonl and the loggers of a run; of several processes the first one logs."""
    log = job.config.log
    services = [
        Service(module, job.workdir, to_dict(job.config), log.project)
        for module in job.services
        if hosts.is_first()
    ]
    return Metrics(job.folder, start=start, tensorboard=log.tensorboard, services=services)


def every(interval: int, step: int) -> bool:
    """Whether something that happens every `interval` steps, 0 for never, happens at this one."""
    return interval > 0 and step % interval == 0


def _look_for_reasons(stop: Stop, config: Config, began: float) -> None:
    """Ask for a stop when the time is up or nobody reads the output any more."""
    if 0 < config.train.max_minutes <= (time.perf_counter() - began) / 60:
        stop.request(f"train.max_minutes={config.train.max_minutes:g}", stopping.TIME_IS_UP)
    if reader_left():
        stop.request("a closed output", stopping.CLOSED_OUTPUT)
    stop.look()


def _report(
    job: Job, speed: Speed, metrics: Metrics, alarm: watch.Alarm, display: Display, row: dict
) -> None:
    """Fetch a step's numbers, keep them and show them."""
    row, step = jax.device_get(row), row["step"]
    if step and "tokens_per_second" not in row:
        rate = speed.latest(step)
        row["tokens_per_second"] = None if rate is None else round(rate)
        row |= utilization.measure(rate, job.flops, list(job.mesh.devices.flat))
    metrics.write(row)
    if row.get("loss") is not None:
        rate = row["tokens_per_second"]
        tokens = "" if rate is None else f"  {rate:,} tokens/s"
        skipped = f"  {row['skipped']} steps skipped" if row["skipped"] else ""
        with_terms = f"  objective {row['objective']:.4f}" if "objective" in row else ""
        display.numbers(
            step,
            f"loss {row['loss']:.4f}{with_terms}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}"
            f"{tokens}{utilization.describe(row)}{skipped}",
        )
    if (news := alarm.look(plain(row))) is not None:
        display.line(f"step {step}/{job.config.train.steps}  {news}")
    if "validation_loss" in row:
        said = describe(row, loss_unit(job.text.tokenizer))
        display.line(f"step {step}/{job.config.train.steps}  validation {said}")


def _prompt(config: Config, text: Text) -> np.ndarray:
    if config.train.sample_prompt:
        return encode_prompt(text.tokenizer, config.train.sample_prompt, "train.sample_prompt")
    return beginning(text.tokens.validation, 16)


def _sample(job: Job, params, step, stop: Stop, samples: Samples, display) -> None:
    """Let the model write, keep and show it; a sample that cannot be made ends no run."""
    most, seed = job.config.train.sample_tokens, job.config.seed
    params = on_one_device(params, job.mesh)
    draw = functools.partial(sample, programs=job.sampling) if job.sampling else generate
    try:
        tokens = stop.until(draw(job.model, params, job.prompt, max_tokens=most, seed=seed))
        text = job.text.tokenizer.decode([*job.prompt, *tokens])
        samples.write(step, text)
    except (ValueError, OSError) as error:
        display.line(f"no sample after {step} steps: {' '.join(str(error).split())}")
        return
    display.line(f"--- sample after {step} steps ---\n{text}\n---")


def main(argv: list[str]) -> int | None:
    stop = Stop()
    with stopping.program(stop):
        flags = cli.new_flags()
        with code_files.reading() as read:
            name = cli.define_config(flags, argv)
        absl_flags.DEFINE_string(
            "workdir", None, "The run's folder; runs/<config name> if not given.", flag_values=flags
        )
        if not cli.parse(flags, argv, usage=__doc__):
            return None
        kept_programs.begin("gt_jax.train", compilation.cache_in_use(), *read)
        train(from_config_dict(flags.config), flags.workdir or Path("runs") / Path(name).stem, stop)
    return stop.status


if __name__ == "__main__":
    cli.run(main, leave_threads=True)
