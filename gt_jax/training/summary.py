"""What a run says first and last."""

from gt_jax import checkpoint
from gt_jax.data import count_tokens
from gt_jax.scoring import loss_unit
from gt_jax.terminal import fill
from gt_jax.training import hosts
from gt_jax.training.display import Speed, say
from gt_jax.training.job import Job
from gt_jax.training.progress import Progress
from gt_jax.training.stopping import Stop


def introduce(job: Job, start: int) -> None:
    """Say what is about to be trained, on what, and how."""
    model_config, text, mesh = job.model_config, job.text, job.mesh
    tell = lambda label, text: say(fill(text, f"{label:8}"))
    counts = {name: n for name, n in job.parameters.items() if name != "total"}
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    name, init_from = job.config.model.preset, job.config.model.init_from
    if init_from:
        name = f"{model_config.architecture} from {init_from}"
    tell("model:", f"{name}, {job.parameters['total']:,} parameters ({parts})")
    if (tune := job.config.train.tune) != "none":
        tell("tune:", f"{tune}, {job.trained:,} parameters; all others stay as they are")
    device = mesh.devices.flat[0].device_kind
    spread = f" on {hosts.count()} processes" if hosts.count() > 1 else ""
    mode = job.config.parallel.mode
    tell("device:", f"{mesh.size} x {device}{spread}, {model_config.dtype}, {mode}")
    for op, (name, reason) in job.kernels.items():
        if model_config.impl != "auto":
            name, reason = model_config.impl, "set by model.impl"
        tell(f"{op}:", f"{name} ({reason})")
    tokens, kind = text.tokens, text.tokenizer.kind
    sizes = [count_tokens(documents) for documents in (tokens.train, tokens.validation)]
    tell(
        "data:",
        f"{text.corpus.name}, {sizes[0]:,} tokens to train on and {sizes[1]:,} to "
        f"validate; vocabulary of {text.tokenizer.vocab_size} ({kind})",
    )
    if text.corpus.note:
        tell("", text.corpus.note)
    # Not in lines: a path may hold spaces.
    say(f"run:    {job.workdir}" + (f", resuming at step {start}" if start else ""))


def conclude(
    job: Job, progress: Progress, step: int, stop: Stop, speed: Speed, seconds: float
) -> None:
    """Say why the run is over after `step`, `seconds` after its start, and where everything is."""
    config, workdir, unit = job.config, job.workdir, loss_unit(job.text.tokenizer)
    if stop:
        say(f"stopped by {stop.reason} after step {step}; the same command continues from there")
        return
    early = f", stopped early by {progress.stops_early(config)}"
    rate = speed.overall(step)
    in_training = "" if rate is None else f"; {rate:,.0f} tokens/s in training"
    best = "no finite validation loss"
    if progress.best_step is not None:
        best = f"best validation loss {progress.best_loss:.4f} at step {progress.best_step}"
    written = {"curve": workdir / "curve.png", "samples": workdir / "samples.txt"}
    lines = [f"{f'{name}:':13}{file}" for name, file in written.items() if file.exists()]
    folder = workdir / checkpoint.FOLDER
    say(
        f"\nstep {step} after {seconds:.0f} s{early if step < config.train.steps else ''}"
        f"{in_training}\n"
        f"{best}, last {progress.last_loss:.4f} nats/{unit}"
    )
    say("\n".join([*lines, f"checkpoints: {folder} (best {progress.best_step}, last {step})"]))
