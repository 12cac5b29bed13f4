"""Stand-ins for models that compile slowly, where a test is of what is done with their runs."""

import pytest

from experiments.lab import families, programs
from tests.training.conftest import ToyModel


@pytest.fixture
def toys(monkeypatch):
    """The laboratory trains toys, which have two branches and a gate, in the place of models."""
    monkeypatch.setattr(programs, "make_model", lambda c: ToyModel(c.layers, c))


@pytest.fixture(scope="module")
def compiled_once():
    """A program that the laboratory compiled for one training serves a later one of this file,
    which differs from it in seeds or in the values of swept fields."""
    made, prepare = {}, programs.prepare

    def prepared(program, **options):
        seeds = {point["seed"] for point in program.points}
        key = (program.model_config, program.config.train, len(program.points), len(seeds))
        if key not in made:
            made[key] = prepare(program, **options)
        return made[key]._replace(program=program)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "prepare", prepared)
        yield


@pytest.fixture
def plain_hybrid(monkeypatch):
    """The hybrid of the families is a GPT of another kind than GPT-2, with a program of its own."""
    monkeypatch.setitem(families.FAMILIES, families.HYBRID, {"model.preset": "gpt1"})
