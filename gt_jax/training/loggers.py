"""Where a run's numbers go besides metrics.jsonl: TensorBoard, and wandb or trackio where asked."""

import hashlib
import importlib
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gt_jax.config import Log
from gt_jax.errors import InputError, one_line
from gt_jax.training.display import say

SERVICES = ("wandb", "trackio")  # packages with the same init, log and finish
_PATIENCE = 30.0  # seconds after which what TensorBoard does not see yet is written


class TensorBoard:
    """tensorboard/ of a run: one event file, made anew from the rows that there are.

    What a process that was killed had not written yet is so filled in, and what it wrote after its
    last checkpoint is gone. Files are written without a thread: tensorboardX's own flush leaves out
    the events in its queue.
    """

    def __init__(self, workdir: str | Path, rows: Sequence[Mapping[str, Any]]):
        open_file, self._event, self._summary = _import_tensorboard()
        folder = Path(workdir) / "tensorboard"
        folder.mkdir(exist_ok=True)
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer, self._flushed = open_file(str(folder / "events")), time.monotonic()
        for row in rows:
            self.write(row)
        self.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row of `gt_jax.training.metrics`."""
        new = self._summary
        values = [new.Value(tag=tag, simple_value=x) for tag, x in scalars(row).items()]
        event = self._event(wall_time=time.time(), step=row["step"], summary=new(value=values))
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > _PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Have all rows on the disk when this returns."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _import_tensorboard() -> tuple[Any, Any, Any]:
    """tensorboardX's EventsWriter, Event and Summary.

    The package itself imports torch wherever that is installed, which takes seconds and serves
    nothing here: while its modules of files are imported, an empty module stands for the package.
    """
    name = "tensorboardX"
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return _import_files(name)
    empty = ModuleType(name)
    empty.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = empty
    try:
        return _import_files(name)
    finally:
        del sys.modules[name]  # whoever imports it gets the whole package


def _import_files(name: str) -> tuple[Any, Any, Any]:
    files, events, summaries = (
        importlib.import_module(f"{name}.{module}")
        for module in ("event_file_writer", "proto.event_pb2", "proto.summary_pb2")
    )
    return files.EventsWriter, events.Event, summaries.Summary


class Service:
    """A run of wandb or trackio, which a resumed run continues; not even its failure ends a run.

    Whether it is sent anywhere is the service's own setting: WANDB_MODE=offline keeps wandb's under
    WORKDIR/wandb for `wandb sync`; trackio's stays on this machine by default.
    """

    def __init__(
        self, module: ModuleType, workdir: str | Path, config: Mapping[str, Any], project: str
    ):
        """Open the run of a folder in a project.

        Args:
            module: wandb or trackio, from `import_services`.
            workdir: the run.
            config: its settings, for the service to show.
            project: what the service collects runs in.

        Raises:
            InputError: the service refuses, as wandb does without a key.
        """
        self._module, self._name = module, module.__name__
        workdir = Path(workdir).absolute()
        run_id = hashlib.sha256(str(workdir).encode()).hexdigest()[:12]
        options: dict[str, Any] = {"name": f"{workdir.name}-{run_id[:4]}"}  # all that trackio knows
        if self._name == "wandb":
            options = {"name": workdir.name, "id": run_id, "dir": str(workdir)}
        try:
            module.init(project=project, config=dict(config), resume="allow", **options)
        except Exception as error:  # of many kinds, most of them the package's own
            offline = "set WANDB_MODE=offline, or " if self._name == "wandb" else ""
            raise InputError(
                f"log.{self._name}=True: {one_line(error)}; {offline}leave it off"
            ) from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Send a row of `gt_jax.training.metrics`; the service may do so later."""
        self._attempt(lambda: self._module.log(scalars(row), step=row["step"]))

    def flush(self) -> None:
        """Nothing: the services have threads for that."""

    def close(self) -> None:
        self._attempt(lambda: self._module.finish())

    def _attempt(self, call):
        try:
            call()
        except Exception as error:  # as above
            say(f"{self._name} gets no more numbers: {one_line(error)}")
            self._attempt = lambda call: None


def import_services(log: Log) -> list[ModuleType]:
    """The modules of the services that are asked for.

    Raises:
        InputError: one is not installed.
    """
    modules = []
    for name in SERVICES:
        if getattr(log, name):
            try:
                modules.append(importlib.import_module(name))
            except ImportError as error:
                raise InputError(
                    f"log.{name}=True needs a package: pip install {name} ({one_line(error)})"
                ) from error
    return modules


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers by tag, those of a list as name/0, name/1, ...; without the step and None."""
    found = {}
    for name, value in row.items():
        items = enumerate(value) if isinstance(value, list) else None
        tagged = {f"{name}/{i}": x for i, x in items} if items else {name: value}
        found |= {tag: x for tag, x in tagged.items() if tag != "step" and x is not None}
    return found
