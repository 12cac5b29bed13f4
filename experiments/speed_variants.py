"""Scratch: a training step in several variants, for decisions on a GPU. Not to be merged.

    python -m experiments.speed_variants --config=configs/gf_mh_base.py --variants=now,scan,tune0

One line per variant: seconds to lower and to compile, ms a step, kernels, peak MiB, and whether two
executables compiled anew give the same bits after 3 steps (--bits).
"""

import contextlib

import flax.linen as nn
import jax
import numpy as np
from absl import flags as absl_flags

from experiments import profile_training
from experiments.profile_training import Trainer
from gt_jax import cli
from gt_jax.config import from_config_dict
from gt_jax.models import language_model
from gt_jax.models.language_model import REMAT_POLICIES, LanguageModel, anatomy, lookup
from gt_jax.training import backend, optimizer, parallel

TUNE0 = {"xla_gpu_autotune_level": 0}
NO_TRITON = {"xla_gpu_enable_triton_gemm": False}
# name -> (what changes in Python, options of XLA added to those of training)
VARIANTS = {
    "now": ((), {}),
    "joined": (("joined",), {}),  # optimizer: every leaf in a vector, as before
    "scatter": (("take",), {}),  # embedding gradient: the scatter-add as before
    "scan": (("scan1",), {}),
    "scan2": (("scan2",), {}),
    "scan4": (("scan4",), {}),
    "tune0": ((), TUNE0),
    "tune0_notriton": ((), TUNE0 | NO_TRITON),
    "notriton": ((), NO_TRITON),
    "deterministic": ((), {"xla_gpu_deterministic_ops": True}),
    "exclude": ((), {"xla_gpu_exclude_nondeterministic_ops": True}),
    "concurrent": ((), {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}),
    "llvm_parallel": ((), {"xla_gpu_enable_llvm_module_compilation_parallelism": True}),
    "scan_tune0": (("scan1",), TUNE0),
    "scan_tune0_notriton": (("scan1",), TUNE0 | NO_TRITON),
}


class Scanned(LanguageModel):
    """The blocks in a scan over their stacked parameters; without gates and final states."""

    unroll: int = 1

    @nn.compact
    def _read(self, tokens, state, segment_ids, rwkv_drop):
        c = self.config
        block, norm, embed_init, head_init = anatomy(c)
        embedding = nn.Embed(c.vocab_size, c.dim, embedding_init=embed_init, name="embedding")
        x = lookup(embedding.embedding, tokens)
        if self.is_initializing():
            for i in range(c.layers):
                x, _ = block(c, i, name=f"blocks_{i}")(x, None, segment_ids, None)
        else:
            params = [self.variables["params"][f"blocks_{i}"] for i in range(c.layers)]
            stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *params)

            def one(x, p):
                y, _ = block(c, 1, parent=None).apply({"params": p}, x, None, segment_ids, None)
                return y.astype(x.dtype), None

            if c.remat != "none":
                one = jax.checkpoint(one, policy=REMAT_POLICIES[c.remat])
            x, _ = jax.lax.scan(one, x, stacked, unroll=self.unroll)
        x = norm(c, "final_norm")(x).reshape(-1, c.dim)
        if c.tie_embeddings:
            return x, embedding.embedding.T, ()
        return x, self.param("head", head_init, (c.dim, c.vocab_size)), ()


@contextlib.contextmanager
def patched(changes):
    undo = []

    def put(where, name, value):
        undo.append((where, name, getattr(where, name)))
        setattr(where, name, value)

    for change in changes:
        if change.startswith("scan"):
            unroll = int(change.removeprefix("scan"))
            put(profile_training, "make_model", lambda c, n=unroll: Scanned(c, unroll=n))
        elif change == "joined":
            put(optimizer, "_LARGE", 2**62)
        elif change == "take":
            take = lambda table, index: jax.numpy.take(table, index, axis=0)
            put(language_model, "lookup", take)
    yield
    for where, name, value in undo:
        setattr(where, name, value)


def main(argv):
    flags = cli.new_flags()
    cli.define_config(flags, argv)
    absl_flags.DEFINE_list("variants", ["now"], "Of VARIANTS.", flag_values=flags)
    absl_flags.DEFINE_integer("vocab", 0, "As in profile_training.", flag_values=flags)
    absl_flags.DEFINE_integer("timed_steps", 50, "Per stretch.", flag_values=flags)
    absl_flags.DEFINE_bool("bits", False, "Compile twice, compare.", flag_values=flags)
    if not cli.parse(flags, argv, usage=__doc__, required=("config",)):
        return
    jax.config.update("jax_enable_compilation_cache", False)
    config = from_config_dict(flags.config)
    vocab = flags.vocab or (
        config.data.vocab_size if config.data.tokenizer == "sentencepiece" else 65
    )
    backend.prepare()
    for name in flags.variants:
        changes, options = VARIANTS[name]
        try:
            with patched(changes):
                line = measure(config, vocab, options, flags)
        except Exception as error:  # the other variants still count
            line = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{name:20} {line}", flush=True)
        jax.clear_caches()


def measure(config, vocab, options, flags):
    with using(options):
        trainer = Trainer(config, vocab)
    B, T = config.train.batch_size, config.train.seq_len
    lower, compile_ = trainer.lower_seconds, trainer.compile_seconds - trainer.lower_seconds
    trainer.run(5)
    times = [trainer.run(flags.timed_steps) / flags.timed_steps for _ in range(5)]
    ms = 1e3 * float(np.median(times))
    line = f"lower {lower:5.1f} s  compile {compile_:5.1f} s  {ms:8.3f} ms a step"
    line += f" ({1e3 * min(times):.3f} to {1e3 * max(times):.3f})  {B * T / ms:8.1f} K tokens/s"
    memory = trainer.compiled.memory_analysis()
    line += f"  temporaries {memory.temp_size_in_bytes / 2**20:,.0f} MiB"
    if flags.bits:
        ends = []
        for _ in range(2):
            with using(options):
                again = Trainer(config, vocab)
            again.run(3)
            ends.append([np.asarray(x) for x in jax.tree.leaves(again.state.params)])
            del again
        same = sum(np.array_equal(a, b) for a, b in zip(*ends))
        line += f"  {same} of {len(ends[0])} arrays with equal bits"
    return line


@contextlib.contextmanager
def using(options):
    """The trainer's step compiled with more options."""
    jit = jax.jit

    def with_options(f, **keywords):
        if "compiler_options" in keywords:
            merged = (keywords["compiler_options"] or {}) | options
            keywords["compiler_options"] = merged or None
        return jit(f, **keywords)

    parallel.jax.jit = with_options
    try:
        yield
    finally:
        parallel.jax.jit = jit


if __name__ == "__main__":
    cli.run(main)
