"""The command line, `gptlab VERB ...`: one file per verb."""

from gptlab.cli.main import lift_settings, main

__all__ = ["lift_settings", "main"]
