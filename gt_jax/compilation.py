"""How programs are compiled: options of XLA with their reasons, a cache on disk, threads."""

import contextlib
import gc
import itertools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from gt_jax import kept_programs, kernel_programs
from gt_jax.errors import InputError
from gt_jax.kernels.pallas import early

# XLA's options on a GPU, by kind of program.
#
# Training without kernels of ours: XLA would compile each fusion in several ways and time them, a
# sixth of the seconds to the first step, and train no faster (H100, configs/gf_mh_base.py).
PLAIN_TRAINING = {"xla_gpu_experimental_enable_fusion_autotuner": False}
# Training with them: it would do the same with each product as a Triton kernel of many sizes,
# beside those of cuBLAS: 14 of 94 seconds to measure gf_mh_base, which takes 96.5 ms a step so and
# 96.7 otherwise (H200). The small products of chunked recurrences lose: gf_mh at 8 x 2048 makes
# 865 000 tokens/s with Triton's and made 705 000 without, in two builds (H200).
TRAINING = PLAIN_TRAINING | {"xla_gpu_enable_triton_gemm": False}
# What runs for a short time, and the laboratory: nothing is tried out on the device while programs
# compile, not even kernels of cuBLAS. That is most of compiling, and waits for what runs meanwhile.
UNTIMED = TRAINING | {"xla_gpu_autotune_level": 0}
# Several devices: many exchanges may be under way. XLA's own limit is one: each sum of gradients
# waits for the one before, and the backward pass for each; with more they start as gradients come
# and end after the backward pass. 128 is more than a step of 16 blocks has. Two H200, gf_mh_350m
# copied: 33.2 GiB a card instead of 39.9, 0.2 % of the time exposed instead of 2.2, as fast.
_OF_SEVERAL = {"xla_gpu_experimental_parallel_collective_overlap_limit": 128}
# A small step, which kernels' starts bind: kernels of both branches run side by side. What runs at
# once shares no memory. H200, gf_mh: at 64 x 64 tokens 2.76 ms instead of 4.12, temporaries 779 MiB
# instead of 407; at 8 x 2048 9.19 ms instead of 7.99. With products that are untimed it has 831
# kernels and not 897, as fewer sums are cut in parts; gf_mh_base takes 2 % longer so. With
# cuBLAS's workspaces of what runs at once, gf_mh takes 2.9 GiB.
_OF_SMALL = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
_SMALL = 2**20  # numbers of one activation, tokens x width; these two have 0.5 and 2.1 million
# Decoding: a step is hundreds of small kernels whatever the model. No product is cut along the axis
# it sums, since summing the parts takes longer than is saved.
DECODING = {
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_experimental_force_split_k": 1,
}
# A sample while training: its few hundred tokens take less time than trying products does.
SAMPLE = DECODING | UNTIMED

# Compiled programs kept on disk; the least recently used go first.
_CACHE_BYTES = 2 * 2**30
# What of JAX's settings says that there is, or shall be, another cache.
_OF_THE_USER = ("compilation_cache_dir", "enable_compilation_cache")
# A program that compiles faster than this is not worth a file.
_WORTH_KEEPING_SECONDS = 0.2
# A program that is on disk is loaded in less time than this.
_LOADING_SECONDS = 1.0

# What JAX tells when a program comes from its cache.
_HIT = "/jax/compilation_cache/cache_hits"

_folder: Path | None = None  # of `use_cache`


def options(on_gpu: dict) -> dict | None:
    """Compiler options for jax.jit: `on_gpu`, as DECODING, on a GPU and None elsewhere."""
    return on_gpu if jax.default_backend() == "gpu" else None


def training(activation: int, *, kernels: bool, devices: int) -> dict:
    """The options of a training step on GPUs.

    Args:
        activation: numbers of one activation, tokens x width.
        kernels: whether Pallas kernels compute the recurrences.
        devices: on how many it runs.
    """
    chosen = TRAINING if kernels else PLAIN_TRAINING
    if devices > 1:
        return chosen | _OF_SEVERAL
    if activation <= _SMALL:
        return (UNTIMED if kernels else chosen) | _OF_SMALL
    return chosen


def default_cache() -> Path:
    """The folder of compiled programs under the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "gt_jax" / "xla"


def use_cache(folder: str = "auto") -> Path | None:
    """Keep compiled programs on disk for the next process; says so when the first comes from it.

    What is damaged there, or cannot be written, costs a compilation and nothing else.

    Args:
        folder: where; "auto" for `default_cache`, "none" for no cache. What JAX's own settings
            (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) say goes before "auto".

    Returns:
        The folder, None if there is no cache of ours; `cache_in_use` says it again.

    Raises:
        InputError: the folder's name is empty, or begins with the home of an unknown user.
    """
    global _folder
    _folder = None
    # Where a kernel was traced from would be part of it: the same kernel of a training step and of
    # an evaluation would be two, and the program around it another after a line moved.
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    if folder == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    own, enabled = (getattr(jax.config, f"jax_{name}") for name in _OF_THE_USER)
    if folder == "auto" and (own or not enabled):
        return None
    try:
        path = default_cache() if folder == "auto" else Path(folder).expanduser()
    except RuntimeError as error:  # ~nobody
        raise InputError(
            f"--compile_cache={folder} is of no known user; name a folder, auto or none"
        ) from error
    if not folder.strip():
        raise InputError("--compile_cache is empty; name a folder, auto or none")
    warnings.filterwarnings("ignore", ".*persistent compilation cache.*", UserWarning)
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(path),
        "jax_compilation_cache_max_size": _CACHE_BYTES,
        "jax_persistent_cache_min_compile_time_secs": _WORTH_KEEPING_SECONDS,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX may have found out before that there is none
    _say_first_hit(path)
    _folder = path
    return path


def cache_in_use() -> Path | None:
    """The folder that `use_cache` chose last, None if it chose none."""
    return _folder


def _say_first_hit(path: Path) -> None:
    said = threading.Event()

    def on_event(event, **_):
        if event == _HIT and not said.is_set():
            said.set()
            line = f"compiled programs come from {path} (--compile_cache=none compiles anew)"
            with contextlib.suppress(OSError):  # nobody may be reading
                print(line, file=sys.stderr, flush=True)

    jax.monitoring.register_event_listener(on_event)


def compile_side_by_side(
    programs: Mapping[str, Callable[[], jax.stages.Lowered]],
    kept: Mapping[str, kept_programs.Kept] | None = None,
) -> dict[str, Future]:
    """Compile programs in threads while the caller does something else.

        compiled = compile_side_by_side({"step": lambda: jax.jit(step).lower(state, batch), ...})
        ...
        step = compiled["step"].result()  # waits for this one alone

    Args:
        programs: name -> a function that lowers; the one that is needed first and takes longest is
            first. Tracing and lowering are Python, so they take turns in this order; XLA compiles
            outside of Python, each program in a thread of its own, and each of its Pallas kernels
            in another, on one GPU those of the first program from when each is lowered. While XLA
            compiles kernels, it compiles nothing else, so that other programs with kernels wait
            for the first.
        kept: name -> a program as an earlier process compiled it, which is not even lowered, or
            where to keep it. The others are lowered once all of these are found or not: until then
            they would take Python from the process that needs these first.

    Returns:
        name -> future jax.stages.Compiled; its result() raises what lowering or compiling raised.
    """
    tracing = ThreadPoolExecutor(1, "lower")
    compiling = ThreadPoolExecutor(max(len(programs), 1), "compile")
    kernels = ThreadPoolExecutor(os.cpu_count() or 1, "kernel")
    results, kept = {name: Future() for name in programs}, kept or {}
    first = next(iter(results.values()), Future())
    begun = set()  # hashes of kernels

    def compile_new(found, result, seconds):
        """Those of the kernels found that are new, if `result` is not there in `seconds`."""
        loaded = time.monotonic() + seconds
        for kernel in found:
            if kernel is not None and kernel.hash not in begun:
                begun.add(kernel.hash)
                kernels.submit(_compile_unless, result, loaded, kernel)

    def start(name, lower):
        result, place = results[name], kept.get(name)

        def settle(work, then=lambda _: None):
            try:
                then(work())
            except BaseException as error:  # raised again where the result is asked for
                result.set_exception(error)

        def compile_(lowered):
            found = _kernels_of(lowered)
            calls = kernel_programs.calls_of(lowered) if place else set()  # compiling may change it

            def compile_in_turn():
                if found and result is not first:
                    wait([first])
                compile_new(found, result, _LOADING_SECONDS)
                if place:
                    kept_programs.compile_and_keep(place, lowered, calls, result.set_result)
                else:
                    result.set_result(lowered.compile())

            compiling.submit(settle, compile_in_turn)

        def lower_unless(program):
            if program is not None:
                jax.monitoring.record_event(_HIT)  # JAX's cache has it as well
                result.set_result(program)
                return
            trace = lambda: kept_programs.traced(without_collector, lower_)
            settle(lambda: tracing.submit(settle, trace, compile_))  # refused once Python ends

        def lower_():
            if result is not first or jax.default_backend() != "gpu" or jax.device_count() > 1:
                return lower()
            try:
                with early.telling(lambda call: compile_new(_kernels_of(call), result, 0)):
                    return lower()
            except Exception as error:  # of this JAX, or of the program, which raises it again
                lowered = lower()
                _say_slower(error)
                return lowered

        if place:
            place.program.add_done_callback(lambda program: lower_unless(program.result()))
        else:
            _when_done([place.program for place in kept.values()], lambda: lower_unless(None))

    for name, lower in programs.items():
        start(name, lower)
    return results


def _when_done(futures: Sequence[Future], call: Callable[[], None]) -> None:
    """Call a function when the last of some futures is done; now, if all are or there is none."""
    count = itertools.count(1)

    def one(_: Any) -> None:
        if next(count) >= len(futures):
            call()

    for future in futures:
        future.add_done_callback(one)
    if not futures:
        call()


def _kernels_of(lowered: Any) -> Sequence[kernel_programs.Kernel | None]:
    """Of a lowered program or of a call in it; none where a JAX writes them otherwise.

    Only time is lost then.
    """
    try:
        if isinstance(lowered, jax.stages.Lowered):
            return kernel_programs.of_program(lowered)
        return [kernel_programs.of_call(lowered)]
    except Exception as error:
        _say_slower(error)
        return []


def _say_slower(error: BaseException) -> None:
    warnings.warn(f"kernels compile one after another: {error!r}", stacklevel=2)


def _compile_unless(ready: Future, loaded: float, kernel: kernel_programs.Kernel) -> None:
    """Compile a kernel, unless the program around it is `ready`, from disk, by the time `loaded`.

    If that fails, the program around it most often does too, and says why.
    """
    wait([ready], timeout=max(loaded - time.monotonic(), 0))
    if ready.done():
        return
    try:
        kernel.program.lower(*kernel.arguments).compile()
    except Exception as error:
        if ready.exception() is None:  # once it is ready
            _say_slower(error)


def without_collector(lower: Callable) -> Any:
    """lower() with Python's garbage collector off: tracing makes millions of objects and little
    garbage, and looking for it takes a seventh of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return lower()
    finally:
        if enabled:
            gc.enable()


def when_ready(program: Future) -> Callable:
    """A function that waits for a future function at its first call."""
    return lambda *args: program.result()(*args)
