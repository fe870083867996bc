"""``python -m id3pm_deploy``."""

from .cli import run

run()
