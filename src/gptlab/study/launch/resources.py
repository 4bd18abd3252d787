"""What a job asks the cluster for: the flags of `gptlab launch` and the keys of a profile file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from gptlab.config import Count, Positive, Section
from gptlab.errors import ConfigError
from gptlab.files import read_toml

FLAGS = ("partition", "time", "gpus", "nodes", "tasks", "cpus", "mem", "account", "qos", "signal_delay")


class Resources(Section):
    """The resources of one job."""

    partition: str = ""
    time: str = ""
    """Time limit as sbatch reads it: minutes, H:M:S or D-H:M:S. Empty: the partition's limit."""
    gpus: Count = 0
    """GPUs per node."""
    nodes: Positive = 1
    tasks: Count = 0
    """Processes per node. 0: one per GPU, or one process without GPUs."""
    cpus: Count = 0
    """Cores per process. 0: the cluster's default, often one core."""
    mem: str = ""
    """Memory per node as sbatch reads it: 64G."""
    account: str = ""
    qos: str = ""
    signal_delay: Positive = 120
    """The job is warned this many seconds before its time limit. SLURM may warn up to a minute earlier."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further sbatch options by their long names. `true` is an option without a value."""

    @property
    def tasks_per_node(self) -> int:
        return self.tasks or self.gpus or 1

    @property
    def seconds(self) -> int | None:
        return limit_seconds(self.time) if self.time else None


def limit_seconds(text: str) -> int:
    """Seconds of a time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"time = {text}: must be minutes, H:M:S or D-H:M:S")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def read_resources(profile: Path | None, flags: Mapping[str, Any]) -> Resources:
    """Read a profile file (TOML) and apply flags, which take precedence.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is out of bounds.
    """
    content: dict[str, Any] = {}
    if profile is not None:
        try:
            content = read_toml(profile, ConfigError)
        except FileNotFoundError as error:
            raise ConfigError(f"--profile {profile} cannot be read: {error.strerror}") from None
        for key in content:
            if key not in Resources.model_fields:
                raise ConfigError(f"{profile} has no key {key!r}; it may have {', '.join(Resources.model_fields)}")
        for key in ("time", "mem"):  # minutes, megabytes
            if type(content.get(key)) is int:
                content[key] = str(content[key])
    try:
        resources = Resources.model_validate({**content, **flags})
    except ValidationError as error:
        first = error.errors()[0]
        says = first["msg"].replace("Input should", "must")
        raise ConfigError(f"{'.'.join(map(str, first['loc']))} = {first['input']}: {says}") from None
    if resources.seconds is not None and resources.seconds <= resources.signal_delay:
        raise ConfigError(
            f"time = {resources.time}: must be longer than signal_delay ({resources.signal_delay} s), "
            "the time between the warning and the limit"
        )
    return resources
