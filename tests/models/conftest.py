import pytest

from tests.models.small_models import KINDS, small_model


# gpt1 is gpt2 with another norm.
@pytest.fixture(params=[kind for kind in KINDS if kind != "gpt1"])
def small(request):
    return small_model(request.param)
