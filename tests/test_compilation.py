"""Programs that compile side by side, and the cache that keeps them for the next process."""

import functools
import threading
import warnings
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gt_jax import compilation, kept_programs, kernel_programs
from gt_jax.errors import InputError
from gt_jax.kernels.elementwise import gated_norm
from gt_jax.kernels.pallas import devices, early

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_include_full_tracebacks_in_locations",
)


@pytest.fixture
def settings(monkeypatch):
    """JAX's settings as a new process has them, put back afterwards; every program is kept."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compilation, "_WORTH_KEEPING_SECONDS", 0)
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(factor):
    """A program of its own for each factor, in a process that has compiled nothing yet."""
    jax.clear_caches()
    compilation_cache.reset_cache()
    return float(jax.jit(lambda x: jnp.sin(x * factor).sum())(jnp.ones(7)))


def test_second_process_takes_programs_from_the_cache_and_says_so_once(settings, tmp_path, capsys):
    assert compilation.use_cache(str(tmp_path / "xla")) == tmp_path / "xla"
    first = run(3)
    assert capsys.readouterr().err == ""
    assert run(3) == run(3) == first
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(tmp_path / "xla") in said[0] and "--compile_cache=none" in said[0]


def test_damaged_cache_is_ignored_without_a_word(settings, tmp_path, recwarn, capsys):
    compilation.use_cache(str(tmp_path / "xla"))
    first = run(4)
    kept = list((tmp_path / "xla").glob("*-cache"))
    assert kept
    for file in kept:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert run(4) == first
    (tmp_path / "a file").write_text("in the folder's place")
    compilation.use_cache(str(tmp_path / "a file"))
    assert run(4) == first
    assert not recwarn.list and capsys.readouterr().err == ""


@pytest.mark.parametrize("folder", [False, True])
def test_empty_entry_or_a_folder_in_its_place_is_compiled_anew(settings, tmp_path, capsys, folder):
    compilation.use_cache(str(tmp_path))
    first = run(5)
    for file in tmp_path.glob("*-cache"):
        file.unlink()
        file.mkdir() if folder else file.touch()
    assert run(5) == first
    assert capsys.readouterr() == ("", "")


def test_settings_of_jax_go_before_auto_but_not_before_a_folder(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation.use_cache() == tmp_path / "gt_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert compilation.use_cache() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert compilation.use_cache(str(tmp_path / "other")) == tmp_path / "other"
    assert compilation.use_cache("none") is None
    assert not jax.config.jax_enable_compilation_cache
    assert compilation.use_cache() is None


@pytest.mark.parametrize("folder", ["", " ", "~nobody-of-this-name/xla"])
def test_name_that_is_no_folder_is_refused(settings, folder):
    with pytest.raises(InputError, match="name a folder, auto or none"):
        compilation.use_cache(folder)


def test_options_of_a_gpu_are_for_a_gpu_alone(monkeypatch):
    assert compilation.options(compilation.TRAINING) is None or jax.default_backend() == "gpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.options(compilation.TRAINING) == compilation.TRAINING


def test_a_step_of_few_tokens_runs_kernels_side_by_side():
    small, large = (
        compilation.training(n * 192, kernels=True, devices=1) for n in (64 * 64, 8 * 2048)
    )
    assert small["xla_gpu_command_buffer_scheduling_mode"] == "CONCURRENT"
    assert large == compilation.TRAINING


def test_products_are_tried_as_triton_kernels_where_a_model_has_no_kernels_of_ours():
    # chunked recurrences train a sixth slower without them
    tried = "xla_gpu_enable_triton_gemm"
    for number in (1, 4):
        for activation in (2**10, 2**30):
            plain = compilation.training(activation, kernels=False, devices=number)
            assert tried not in plain and "xla_gpu_autotune_level" not in plain
            assert compilation.training(activation, kernels=True, devices=number)[tried] is False


def test_programs_compile_side_by_side_and_errors_come_where_results_are_asked_for():
    caller, seen = threading.current_thread(), []

    def lower(factor):
        seen.append((factor, threading.current_thread() is caller))
        return jax.jit(lambda x: factor * x).lower(jnp.ones(3))

    def fail():
        raise ValueError("no such program")

    programs = {"long": lambda: lower(2), "broken": fail, "short": lambda: lower(3)}
    compiled = compilation.compile_side_by_side(programs)
    assert compiled["short"].result()(jnp.ones(3)).tolist() == [3, 3, 3]
    assert compiled["long"].result()(jnp.ones(3)).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="no such program"):
        compiled["broken"].result()
    assert seen == [(2, False), (3, False)]  # the first of them first


@pytest.fixture
def compiled(monkeypatch):
    """Programs hold the kernels that their `names` say: what was compiled, counted in `begun`."""
    seen = []

    def kernel(name):
        made = SimpleNamespace(compile=lambda: (seen.append(name), begun.release()))
        return SimpleNamespace(hash=name, program=SimpleNamespace(lower=lambda: made), arguments=[])

    begun = threading.Semaphore(0)
    of = lambda lowered: [kernel(name) for name in lowered.names]
    monkeypatch.setattr(compilation, "_kernels_of", of)
    return SimpleNamespace(names=seen, begun=begun, kernel=kernel)


def test_each_kernel_compiles_once_beside_the_programs_that_hold_it(compiled, monkeypatch):
    monkeypatch.setattr(compilation, "_LOADING_SECONDS", 0)

    def compile_(new):  # is done when that many kernels are
        for _ in range(new):
            assert compiled.begun.acquire(timeout=120)

    train = SimpleNamespace(names="abc", compile=lambda: compile_(3))
    evaluate = SimpleNamespace(names="bcd", compile=lambda: compile_(1))
    found = compilation.compile_side_by_side({"train": lambda: train, "evaluate": lambda: evaluate})
    for program in found.values():
        program.result()
    assert sorted(compiled.names) == ["a", "b", "c", "d"]


def test_programs_with_kernels_wait_for_the_first_and_others_do_not(compiled):
    ends, order = threading.Event(), []

    def lowered(name, names, compile_=lambda: None):
        return lambda: SimpleNamespace(
            names=names, compile=lambda: (compile_(), order.append(name))
        )

    programs = {
        "train": lowered("train", "a", lambda: ends.wait(120)),
        "evaluate": lowered("evaluate", "b"),
        "init": lowered("init", "", ends.set),
    }
    for program in compilation.compile_side_by_side(programs).values():
        program.result(timeout=120)
    assert order == ["init", "train", "evaluate"]


def test_an_error_of_the_program_is_told_once_and_one_of_telling_is_a_warning(monkeypatch):
    """As on a GPU, where the first program tells of its kernels."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def fail(only_while_telling):
        if early.told() or not only_while_telling:
            raise ValueError("no such program")
        return SimpleNamespace(names="", compile=lambda: "compiled")

    monkeypatch.setattr(compilation, "_kernels_of", lambda lowered: [])
    compile_ = lambda only: compilation.compile_side_by_side({"train": lambda: fail(only)})["train"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="no such program"):
            compile_(False).result(timeout=120)
    with pytest.warns(UserWarning, match="no such program"):
        assert compile_(True).result(timeout=120) == "compiled"


def test_a_program_that_is_found_missing_when_python_ends_is_given_up(monkeypatch):
    """Else what waits for the first program would wait for ever."""

    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after shutdown")

    place = kept_programs.Kept(Path("train"), Future())
    found = compilation.compile_side_by_side({"train": lambda: None}, {"train": place})
    monkeypatch.setattr(compilation.ThreadPoolExecutor, "submit", refuse)
    place.program.set_result(None)
    with pytest.raises(RuntimeError, match="after shutdown"):
        found["train"].result(timeout=120)


def test_programs_with_kernels_compile_where_the_first_fails(compiled):
    def fail():
        raise ValueError("no such program")

    evaluate = SimpleNamespace(names="b", compile=lambda: "compiled")
    found = compilation.compile_side_by_side({"train": fail, "evaluate": lambda: evaluate})
    assert found["evaluate"].result(timeout=120) == "compiled"


def test_kernels_of_a_program_that_is_on_disk_are_not_compiled(compiled):
    ready = Future()
    ready.set_result(None)
    kernel = compiled.kernel("a")
    compilation._compile_unless(ready, 0.0, kernel)
    assert not compiled.names
    compilation._compile_unless(Future(), 0.0, kernel)
    assert compiled.names == ["a"]


def test_a_program_whose_kernels_are_not_found_is_compiled_nevertheless(monkeypatch):
    """The search reads what JAX and XLA may write otherwise in another version."""

    def search(lowered):
        raise KeyError("kernel_hash")

    monkeypatch.setattr(kernel_programs, "of_call", search)
    lowered = SimpleNamespace(compile=lambda: "compiled")
    with pytest.warns(UserWarning, match="one after another: KeyError.'kernel_hash'"):
        found = compilation.compile_side_by_side({"train": lambda: lowered})["train"].result()
    assert found == "compiled"


def test_a_kernel_that_fails_alone_is_told_unless_its_program_says_so():
    for error, count in ((None, 1), (RuntimeError("of the program"), 0)):
        ready = Future()
        end = functools.partial(ready.set_result if error is None else ready.set_exception, error)

        def fail(end=end):  # the program is ready a little later
            threading.Timer(0.05, end).start()
            raise ValueError("no such target")

        program = SimpleNamespace(lower=lambda fail=fail: SimpleNamespace(compile=fail))
        kernel = SimpleNamespace(program=program, arguments=[])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            compilation._compile_unless(ready, 0.0, kernel)
        assert [str(w.message) for w in told] == count * [
            "kernels compile one after another: ValueError('no such target')"
        ]


@pytest.mark.skipif(
    jax.__version_info__ < devices.OLDEST_JAX, reason="the Pallas kernels need a newer JAX"
)
def test_a_kernel_alone_is_the_one_inside_a_program():
    """Else it would be compiled twice. The parts of a kernel are compared as XLA is given them."""
    shapes = [jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16) for _ in range(2)]

    def two(y, projected, scale):
        normed = gated_norm.gated_norm(1e-5, y, projected, scale)
        return jax.lax.fori_loop(
            0, 2, lambda _, z: gated_norm.gated_norm(1e-5, z, z, scale), normed
        )

    def calls(jitted, *arguments):
        with devices.simulated("lower"):
            lowered = jitted.trace(*arguments).lower(lowering_platforms=("cuda",))
        text = [line for line in lowered.as_text().splitlines() if "mosaic_gpu" in line]
        parts = [line[line.index("mhlo.backend_config") :] for line in text]
        return kernel_programs.of_program(lowered), parts

    found, whole = calls(jax.jit(two), *shapes, jax.ShapeDtypeStruct((128,), jnp.float32))
    assert found
    for kernel in found:
        _, [alone] = calls(kernel.program, *kernel.arguments)
        assert any(
            alone.split("operand_layouts")[0] == x.split("operand_layouts")[0] for x in whole
        )


def test_programs_that_are_never_kept_are_lowered_after_the_search_for_the_others():
    """Else they would take Python from what a process needs first."""
    order = []

    def lower(name):
        order.append(name)
        return jax.jit(lambda x: x + 1).lower(jnp.ones(2))

    places = {name: kept_programs.Kept(Path(name), Future()) for name in ("step", "init")}
    names = ("step", "init", "sample")
    programs = {name: functools.partial(lower, name) for name in names}
    compiled = compilation.compile_side_by_side(programs, places)
    ready = jax.jit(lambda x: x).lower(jnp.ones(2)).compile()
    places["step"].program.set_result(ready)
    assert not order and compiled["step"].result() is ready and not compiled["sample"].done()
    places["init"].program.set_result(None)
    assert all(float(compiled[name].result()(jnp.ones(2))[0]) == 2 for name in names[1:])
    assert order == ["init", "sample"]
