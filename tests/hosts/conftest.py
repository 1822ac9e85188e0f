"""The installed hosts themselves. What is not installed is skipped, and says so: ``make test-hosts`` installs it."""

from __future__ import annotations

import hosts

hosts.make_torchvision_importable()
