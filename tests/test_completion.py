"""Completion at TAB, in the real shells: what they put on the line is what the program would be given."""

import contextlib
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptlab.cli import main
from gptlab.cli.common import Parser
from gptlab.cli.completion import CORPORA, SHELLS, commands, setting_flags
from gptlab.cli.main import make_parser
from gptlab.config import PRESETS, REGIME_NAMES, flag_sections, shipped
from gptlab.data.corpora import LABELED, TEXT

ALL, TAB = "<all>", "<tab>"
"""Keys: put all that may be typed here on the line; complete the word, of which there must be one."""

NOTE = "gptlab() { printf '%s\\0' \"$@\" > new; mv new answer; }"
SET_UP = {
    "bash": ["source ./script; bind 'set bell-style none'; bind '\"\\C-xa\": insert-completions'", NOTE],
    "zsh": [
        "fpath+=($PWD/functions); autoload -Uz compinit; compinit -u -D; unsetopt beep",
        "zle -C all-matches complete-word _generic; bindkey '^Xa' all-matches",
        "zstyle ':completion:all-matches::::' completer _all_matches _complete",
        "zstyle ':completion:all-matches:*' insert true",
        NOTE,
    ],
}
COMMAND = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


class Shell:
    """An interactive bash or zsh on a pseudo-terminal, in which `gptlab` writes its arguments to a file."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.answer = name, folder / "answer"
        pid, self.terminal = pty.fork()
        if pid == 0:
            os.chdir(folder)
            os.execvpe(COMMAND[name][0], COMMAND[name], environment(folder))
        self.pid = pid
        os.set_blocking(self.terminal, False)
        for line in SET_UP[name]:
            os.write(self.terminal, f" {line}\r".encode())
        assert self.type("gptlab ready") == ["ready"]

    def type(self, line: str) -> list[str]:
        self.answer.unlink(missing_ok=True)
        os.write(self.terminal, f"{line.replace(ALL, chr(24) + 'a').replace(TAB, chr(9))}\r".encode())
        end = time.monotonic() + 30
        while not self.answer.exists():
            assert time.monotonic() < end, f"no answer to {line!r}"
            time.sleep(0.002)
            with contextlib.suppress(BlockingIOError):
                os.read(self.terminal, 65536)  # what it shows; it would wait if nobody took it
        return self.answer.read_text(encoding="utf-8").split("\0")[:-1]

    def ask(self, *lines: str) -> list[list[str]]:
        """For each line the words that the program is given when it is typed, with its keys, and entered."""
        return [self.type(line) for line in lines]

    def close(self) -> None:
        os.close(self.terminal)  # the shell ends
        os.waitpid(self.pid, 0)


class Fish:
    """fish's own answer to the question what may stand at the end of a line."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder

    def ask(self, *lines: str) -> list[list[str]]:
        starts = [line.removesuffix(ALL).removesuffix(TAB) for line in lines]
        code = ["source ./script", *(f"complete -C '{start}'; echo next" for start in starts)]
        command = ["fish", "--no-config", "-c", "\n".join(code)]
        done = subprocess.run(command, cwd=self.folder, env=environment(self.folder), capture_output=True, text=True)
        assert not done.stderr
        answers = []
        for line, start, shown in zip(lines, starts, done.stdout.split("next\n"), strict=False):
            found = [one.partition("\t")[0] for one in shown.splitlines()]
            assert line.endswith(ALL) or len(found) == 1, (line, found)
            answers.append([*start.rpartition("gptlab ")[2].split(" ")[:-1], *found])
        return answers

    def close(self) -> None:
        pass


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "LC_ALL": "C.UTF-8"}


@pytest.fixture(scope="module", params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell | Fish]:
    if not shutil.which(request.param):
        pytest.skip(f"needs {request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("runs/a+lr=3e-4_seed1", "runs/b c_seed2", "results/sweep", "data/mine-byte", "elsewhere/deep"):
        (folder / name).mkdir(parents=True)
    for name in ("mine.toml", "elsewhere/text.txt"):
        (folder / name).touch()
    (folder / "functions").mkdir()
    file = folder / ("functions/_gptlab" if request.param == "zsh" else "script")
    with file.open("w") as out:
        subprocess.run([sys.executable, "-m", "gptlab", "completion", request.param], stdout=out, check=True)
    opened = (Fish if request.param == "fish" else Shell)(request.param, folder)
    yield opened
    opened.close()


def expect(shell: Shell | Fish, table: dict[str, list[str]]) -> None:
    """The table has what the last words are to be, whatever their order; what is before them must be kept."""
    for (line, words), given in zip(table.items(), shell.ask(*table), strict=True):
        before = line.removesuffix(ALL).removesuffix(TAB).rpartition("gptlab ")[2].split(" ")[:-1]
        assert given[: len(before)] == before, line
        assert sorted(given[len(before) :]) == sorted(words), line


RUNS = ["runs/a+lr=3e-4_seed1", "runs/b c_seed2"]


def test_names_and_paths(shell: Shell | Fish) -> None:
    verbs = list(make_parser()._actions[-1].choices or ())  # type: ignore[call-overload]
    expect(
        shell,
        {
            f"gptlab {ALL}": verbs,
            f"cd . && gptlab tr{TAB}": ["train"],
            f"gptlab study r{ALL}": ["run", "report"],
            f"gptlab train {ALL}": [*shipped(), "mine.toml", *RUNS],
            f"gptlab train smoke-l{TAB}": ["smoke-lm"],
            f"gptlab study run archi{ALL}": [name for name in shipped("studies") if name.startswith("archi")],
            f"gptlab eval {ALL}": RUNS,
            f"gptlab eval runs/a+lr=3{TAB}": [RUNS[0]],
            f"gptlab eval runs/b{TAB}": [RUNS[1]],
            f"gptlab stop {ALL}": [*RUNS, "results/sweep"],
            f"gptlab study report results/sweep r{TAB}": ["results/sweep"],
            f"gptlab train --data.path d{TAB}": ["data/mine-byte"],
            f"gptlab train --data.path=d{TAB}": ["--data.path=data/mine-byte"],
            f"gptlab prepare s{ALL}": ["shakespeare", "stdlib"],
            f"gptlab prepare shakespeare --from elsewhere/t{TAB}": ["elsewhere/text.txt"],
            f"gptlab nonsense {ALL}": [],
        },
    )


def test_any_folder_where_no_run_begins_so(shell: Shell | Fish) -> None:
    for line in (
        f"gptlab eval elsew{TAB}",
        f"gptlab import nanogpt elsew{TAB}",
        f"gptlab train --data.path=elsew{TAB}",
    ):
        [given] = shell.ask(line)
        assert given[-1].rpartition("=")[2].rstrip("/") == "elsewhere"


def test_flags_and_their_values(shell: Shell | Fish) -> None:
    spam = [argument.flags[0] for argument in setting_flags() if argument.flags[0].startswith("--optim.spam-")]
    assert len(spam) > 5
    expect(
        shell,
        {
            f"gptlab train --resume {ALL}": ["auto", "never"],
            f"gptlab train --resume=a{TAB}": ["--resume=auto"],
            f"gptlab train --optim.na{TAB}": ["--optim.name"],
            f"gptlab train smoke-lm --optim.spam-{ALL}": spam,
            f"gptlab train --sparsity.method=2{TAB}": ["--sparsity.method=2:4"],
            f"gptlab train --optim.lr {ALL}": [],  # any number
            f"gptlab sample --temperature 0.3 runs/a{TAB}": [RUNS[0]],
            f"gptlab export runs/x --to {ALL}": ["hf", "gguf", "sparse24"],
            f"gptlab study run x --arm a b --jo{TAB}": ["--jobs"],
            f"gptlab bench inference --regimes fp32 tf32 amp{ALL}": ["amp_bf16", "amp_fp16"],
            f"gptlab bench inference --regimes fp32 tf32 --js{TAB}": ["--json"],
            f"gptlab study sweep smoke-lm optim.lr=1e-3 optim.mu{ALL}": ["optim.muon_lr=", "optim.muon_momentum="],
            f"gptlab train --help opt{TAB}": ["optim"],
            f"gptlab eval runs/x --checkpoint {ALL}": ["last", "best"],
            f"gptlab --ver{TAB}": ["--version"],
        },
    )


def test_every_choice_of_every_setting(shell: Shell | Fish) -> None:
    rows = [row for _, rows in flag_sections().values() for row in rows if row.choices]
    assert len(rows) > 30
    table = {f"gptlab train smoke-lm {row.flag} {ALL}": row.accepts.split("|") for row in rows}
    table = {line: [word for word in words if not word.isupper()] for line, words in table.items()}
    expect(shell, table)


@pytest.mark.slow
def test_every_flag_of_every_verb(shell: Shell | Fish) -> None:
    """A flag whose whole name is typed is completed to itself and to those that go on from it; no other verb's is."""
    settings = [argument.flags[0] for argument in setting_flags()]
    if isinstance(shell, Shell) and shell.name == "bash":  # which has no room for all, and offers sections first
        settings = [f"--{section}." for section in flag_sections()]
    table = {}
    for command in commands(make_parser()).walk():
        known = [flag for argument in command.flags for flag in argument.flags] + settings * command.takes_settings
        for argument in command.flags:
            flag = argument.flags[-1]
            line = " ".join(["gptlab", *command.words, f"{flag}{ALL}"])
            table[line] = [one for one in known if one.startswith(flag)]
    expect(shell, {**table, f"gptlab sample --strict{ALL}": ["--strict"] if isinstance(shell, Shell) else []})
    assert len(table) > 80


def test_zsh_takes_the_script_by_source_too(tmp_path: Path) -> None:
    if not shutil.which("zsh"):
        pytest.skip("needs zsh")
    with (tmp_path / "script").open("w") as out:
        subprocess.run([sys.executable, "-m", "gptlab", "completion", "zsh"], stdout=out, check=True)
    code = "autoload -Uz compinit; compinit -u -D; source ./script; print $_comps[gptlab]"
    done = subprocess.run(
        ["zsh", "-f", "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("_gptlab\n", "")


def test_the_table_agrees_with_the_code() -> None:
    assert {*CORPORA} == {*TEXT, *LABELED} - {"text"}
    table = {command.words: command for command in commands(make_parser()).walk()}
    assert table["study", "power"].flags[2].kind.globs == ("results/*/",)
    assert table["plan",].flags[-3].kind.words == tuple(PRESETS)
    assert table["bench", "inference"].flags[1].kind.words == tuple(REGIME_NAMES)
    assert isinstance(make_parser(), Parser)


def test_another_shell_is_refused_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["completion", "tcsh"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("gptlab: argument shell: invalid choice: 'tcsh' (choose from")
