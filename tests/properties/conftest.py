"""Examples are the same on every run in continuous integration, new ones elsewhere; no example has a deadline."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("new", deadline=None, database=None, max_examples=60)
settings.register_profile("same", settings.get_profile("new"), derandomize=True)
settings.load_profile("same" if os.environ.get("CI") else "new")
