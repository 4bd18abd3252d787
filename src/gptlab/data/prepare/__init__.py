"""From documents to a prepared dataset: `gptlab prepare`."""

from gptlab.data.prepare.pipeline import prepare

__all__ = ["prepare"]
