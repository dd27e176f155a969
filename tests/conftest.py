"""Settings of all tests."""

from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("kuea", deadline=None)
settings.load_profile("kuea")
