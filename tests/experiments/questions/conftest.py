"""Plots of results are drawn coarsely: the tests of lab/results.py draw them as users see them."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True, scope="module")  # plots of other folders are drawn whole
def coarse():
    """Twice as fast: texts do not seek their places, which nothing here looks at."""
    save = Figure.savefig

    def coarsely(figure, path, **options):
        figure.set_layout_engine("none")
        save(figure, path, **options | {"dpi": 20})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", coarsely)
        yield
