"""Settings shared by all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run and machine, and no limit that a busy machine could miss.
settings.register_profile("neuroexapt", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("neuroexapt")
