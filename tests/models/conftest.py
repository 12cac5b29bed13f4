import pytest

from tests.models.small_models import KINDS, small_model


@pytest.fixture(params=KINDS)
def small(request):
    return small_model(request.param)
