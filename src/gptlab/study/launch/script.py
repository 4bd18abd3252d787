"""Batch scripts for sbatch, and the scripts that `gptlab launch --print` shows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from gptlab.study.launch.local import local_command
from gptlab.study.launch.record import FILES, PRINTED, RECORD, Launch, LaunchPart
from gptlab.training.signals import WARNING

END = "GPTLAB_END"  # ends a here-document


def batch_script(launch: Launch, part: LaunchPart, before: Sequence[str] = ()) -> str:
    """The batch script of one part.

    Args:
        before: shell lines that run ahead of the job's command.
    """
    asked = part.resources
    options = {
        "job-name": launch.name if part.name == "run" else f"{launch.name}-{part.name}",
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "time": asked.time,
        "nodes": asked.nodes,
        "ntasks-per-node": asked.tasks_per_node,
        "gpus-per-node": asked.gpus,
        "cpus-per-task": asked.cpus,
        "mem": asked.mem,
        "array": f"0-{len(part.runs) - 1}%{min(launch.jobs or len(part.runs), len(part.runs))}" if part.runs else "",
        "signal": f"{WARNING.removeprefix('SIG')}@{asked.signal_delay}",
        "open-mode": "append",
        "requeue": True,
    }
    given = {key: value for key, value in options.items() if value}
    lines = [
        f"#SBATCH --{key.replace('_', '-')}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for key, value in (given | asked.extra).items()
    ]
    # One failed rank ends the other ranks, which would wait for it. srun ignores sbatch's cores since SLURM 22.05.
    cpus = [f"--cpus-per-task={asked.cpus}"] if asked.cpus else []
    output = ["--unbuffered", "--open-mode=append", f"--output={log_file(launch, part, '%t')}"]
    srun = ["srun", *output, "--kill-on-bad-exit=1", *cpus, *part.words]
    return "\n".join(["#!/bin/bash", *lines, "", *before, shlex.join(srun)]) + "\n"


def sbatch_arguments(launch: Launch, part: LaunchPart) -> list[str]:
    """sbatch's arguments ahead of the script: what a script that is submitted by hand cannot know."""
    after = ":".join(launch.part(name).job for name in part.after)
    dependency = [f"--dependency=afterany:{after}"] if after else []
    output = [] if "output" in part.resources.extra else [f"--output={log_file(launch, part, '0')}"]
    return ["--parsable", *output, *dependency]


def log_file(launch: Launch, part: LaunchPart, rank: str) -> Path:
    return (launch.folder / FILES).resolve() / f"{'%A_%a' if part.runs else '%j'}_{rank}_log.out"


def printed_script(launch: Launch) -> str:
    """One script that does what the launch would do; it needs no file beside the dataset.

    A recipe's script is for sbatch. A study's script submits the study's jobs: it is for bash, or for sbatch where
    nodes may submit jobs. The script of a local job is for bash and stays in the foreground.
    """
    folder, launch.command = launch.folder.resolve(), launch.command.replace(" --print", "")
    several = launch.on == "slurm" and launch.parts[0].name != "run"
    for part in launch.parts:
        part.job = f"${part.name.upper()}_JOB" if several else PRINTED  # a variable of the script
    written = [f"mkdir -p {shlex.quote(str(folder / FILES))}"]
    for name, text in {**launch.files, RECORD: launch.to_json()}.items():
        written += [f"cat > {shlex.quote(str(folder / name))} <<'{END}'", text.rstrip("\n"), END]
    if launch.on == "local":
        written += [f"exec {shlex.join(local_command(folder, launch.parts[0].name))}"]
        return "\n".join(["#!/bin/bash", *written, ""])
    if not several:
        return batch_script(launch, launch.parts[0], [*written, ""])
    lines = ["#!/bin/bash", "set -e", *written]
    for part in launch.parts:
        arguments = sbatch_arguments(launch, part)
        words = " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in arguments)
        variable = part.job.removeprefix("$")
        lines += ["", f"{variable}=$(sbatch {words} <<'{END}'", batch_script(launch, part) + END, ")"]
        lines += [f'sed -i "s/\\${variable}/${variable}/" {shlex.quote(str(folder / RECORD))}']
    return "\n".join([*lines, f'echo "submitted {" ".join(part.job for part in launch.parts)}"', ""])
