import pytest


@pytest.fixture(autouse=True)
def few_probe_images(monkeypatch):
    """Two drawn images tell as much of a toy tower as eight."""
    monkeypatch.setattr("kuea_mllm.swapping.drift._MOST_DRAWN", 2)
