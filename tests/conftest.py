"""Settings of all tests."""

import logging

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("kuea", deadline=None)
settings.load_profile("kuea")


@pytest.fixture(autouse=True)
def propagating_logger() -> None:
    """Undo what a command of an earlier test did: caplog would hear nothing, or all lines twice."""
    logging.getLogger("kuea_mllm").propagate = True
