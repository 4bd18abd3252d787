"""The scripts that complete command lines in bash, zsh and fish, made of the table in cli/completion.py.

They are static: a TAB starts no Python. Where an argument names a path, the runs, studies and recipes of this folder
are offered first, and any path when none of them begins with what is typed.
"""

from __future__ import annotations

import shlex

from gptlab.cli.completion import Argument, Command, Kind, setting_flags
from gptlab.version import VERSION

MADE_BY = f"# %s completion of gptlab {VERSION}; after an update, `gptlab completion %s` prints it anew\n"


def _position(command: Command, number: int) -> str:
    """The number of a positional argument; `3+` if the words that follow belong to it too."""
    return f"{number}+" if command.positions[number - 1].takes == "+" else str(number)


def _switches(command: Command, takes: str) -> list[str]:
    return [flag for argument in command.flags if argument.takes == takes for flag in argument.flags]


# -- bash -----------------------------------------------------------------------------------------------------------

BASH = r"""
_gptlab() {
  local whole cur piece keep verb word what rest trimmed reply path i n
  local flags switches many settings last words globs paths
  local -a typed=() replies=()
  COMPREPLY=()

  # bash breaks words at = and : too; words without a space between them are put together again
  rest=${COMP_LINE:0:COMP_POINT}
  for ((i = 0; i <= COMP_CWORD; i++)); do
    trimmed=${rest#"${rest%%[![:space:]]*}"}
    piece=${COMP_WORDS[i]}
    ((i == COMP_CWORD)) && piece=$trimmed
    if ((i)) && [[ $trimmed == "$rest" ]]; then typed[-1]+=$piece; else typed+=("$piece"); fi
    rest=${trimmed:${#piece}}
  done
  whole=${typed[-1]} cur=${typed[-1]}
  [[ $piece == [=:]* ]] && piece=
  keep=${whole%"$piece"} # of the word under the cursor, what bash does not replace
  typed=("${typed[@]:1:${#typed[@]}-2}")

  verb=${typed[0]-}
  case $verb in @GROUPS@) verb="$verb ${typed[1]-}" typed=("${typed[@]:1}") ;; esac
  verb=${verb% } flags= switches= many= settings= last=0
  case $verb in
@VERBS@
  esac

  n=0 what=
  for word in "${typed[@]:1}"; do
    if [[ $word == --* || $word == -h ]]; then
      what=$word
      [[ $word == *=* || " $switches " == *" $word "* ]] && what=
    elif [[ $what ]]; then
      [[ " $many " == *" $what "* ]] || what=
    else
      ((n++))
    fi
  done
  words= globs= paths=
  if [[ $cur == --*=* ]]; then
    what=${cur%%=*} cur=${cur#*=}
  elif [[ $cur == -* ]]; then
    what=flag words=$flags
    if [[ $settings && $cur == *.* ]]; then words+=" $_gptlab_settings"; fi
    if [[ $settings && $cur != *.* ]]; then words+=" $_gptlab_sections"; fi
  elif [[ ! $what ]]; then
    what=$((n + 1))
    if ((n >= last)) && [[ " $many " == *" $last "* ]]; then what=$last; fi
  fi
  case "$verb $what" in
@VALUES@
  esac

  for word in $words; do [[ $word == "$cur"* ]] && replies+=("$word"); done
  for path in $globs; do
    [[ -e $path && $path == "$cur"* ]] && replies+=("$(printf %q "${path%/}")")
  done
  whole=${whole%"$cur"}
  for reply in "${replies[@]}"; do
    reply=$whole$reply
    COMPREPLY+=("${reply#"$keep"}")
  done
  [[ ${#replies[@]} == 1 && ${replies[0]} == *[=.] ]] && compopt -o nospace
  case $paths in
    '') compopt +o default ;;
    folder) compopt +o default -o dirnames ;;
  esac
}
complete -o default -F _gptlab gptlab
"""


def bash(top: Command) -> str:
    """The script for bash, from 4.4 on."""
    settings = [argument.flags[0] for argument in setting_flags()]
    sections = dict.fromkeys("".join(flag.partition(".")[:2]) for flag in settings)
    verbs: list[str] = []
    values: dict[Kind, list[str]] = {}
    for command in top.walk():
        verb = " ".join(command.words)
        many = _switches(command, "+") + [str(n + 1) for n, one in enumerate(command.positions) if one.takes == "+"]
        facts = {
            "flags": " ".join(flag for argument in command.flags for flag in argument.flags),
            "switches": " ".join(_switches(command, "0")),
            "many": " ".join(many),
            "settings": "yes" * command.takes_settings,
            "last": str(len(command.positions)),
        }
        written = " ".join(f"{key}={shlex.quote(value)}" for key, value in facts.items() if value)
        verbs.append(f"    {shlex.quote(verb)}) {written} ;;")
        for argument in command.flags:
            values.setdefault(argument.kind, []).extend(shlex.quote(f"{verb} {flag}") for flag in argument.flags)
        for number, argument in enumerate(command.positions, 1):
            values.setdefault(argument.kind, []).append(shlex.quote(f"{verb} {number}"))
    for argument in setting_flags():
        values.setdefault(argument.kind, []).append(f"*{shlex.quote(f' {argument.flags[0]}')}")
    cases = []
    for kind, patterns in values.items():
        facts = {"words": " ".join(kind.words), "globs": " ".join(kind.globs), "paths": kind.path}
        if written := " ".join(f"{key}={shlex.quote(value)}" for key, value in facts.items() if value):
            cases.append(f"    {' | '.join(patterns)}) {written} ;;")
    script = BASH.replace("@GROUPS@", " | ".join(command.words[0] for command in top.parts if command.parts))
    script = script.replace("@VERBS@", "\n".join(verbs)).replace("@VALUES@", "\n".join(cases))
    names = f"_gptlab_settings={shlex.quote(' '.join(settings))}\n_gptlab_sections={shlex.quote(' '.join(sections))}\n"
    return MADE_BY % ("bash", "bash") + names + script


# -- zsh ------------------------------------------------------------------------------------------------------------

ZSH = r"""
# Offer words and what patterns find; where none of them begins with what is typed, any file or folder.
_gptlab_offer() { # file|folder|none WORD|PATTERN...
  local one
  local -a offered
  for one in "${@:2}"; do
    if [[ $one == *\** ]]; then offered+=(${^~one}(N)); else offered+=($one); fi
  done
  compadd "$expl[@]" -- ${offered%/} && return
  case $1 in
    file) _files "$expl[@]" ;;
    folder) _files "$expl[@]" -/ ;;
  esac
}
"""


def zsh(top: Command) -> str:
    """The script for zsh, a function to load from $fpath, or to source."""
    settings = "\n".join(f"  {_zsh_spec(argument)}" for argument in setting_flags())
    functions = [_zsh_function(command) for command in top.walk()]
    return (
        "#compdef gptlab\n"
        + MADE_BY % ("zsh", "zsh")
        + f"\n_gptlab_settings=(\n{settings}\n)\n"
        + ZSH
        + "\n".join(functions)
        + '\nif [[ $funcstack[1] == _gptlab ]]; then _gptlab "$@"; else compdef _gptlab gptlab; fi\n'
    )


def _zsh_function(command: Command) -> str:
    name = "_".join(["_gptlab", *command.words])
    specs = [_zsh_spec(argument) for argument in command.flags]
    if command.parts:
        verbs = " ".join(shlex.quote(f"{part.words[-1]}:{part.says}") for part in command.parts)
        cases = [f"    {part.words[-1]}) {'_'.join(['_gptlab', *part.words])} ;;" for part in command.parts]
        arguments = " \\\n    ".join(["_arguments -C -A '-*'", *specs, "'1: :->verb'", "'*:: :->rest'"])
        lines = ["  local context state state_descr line", "  typeset -A opt_args", f"  {arguments} && return"]
        lines += [f"  if [[ $state == verb ]]; then local -a verbs=({verbs}); _describe verb verbs; return; fi"]
        return "\n".join([f"\n{name}() {{", *lines, "  case $words[1] in", *cases, "  esac", "}"])
    for number, argument in enumerate(command.positions, 1):
        where = "*" if argument.takes == "+" else str(number) + ":" * (argument.takes == "?")
        specs.append(shlex.quote(f"{where}:{_colons(argument.name)}:{_zsh_action(argument.kind)}"))
    settings = ['"${_gptlab_settings[@]}"'] * command.takes_settings
    lines = ["", f"{name}() {{", *_zsh_more(command), "  " + " \\\n    ".join(["_arguments", *specs, *settings]), "}"]
    return "\n".join(lines)


def _zsh_more(command: Command) -> list[str]:
    """Lines for what _arguments has no words for: a flag's second value, and one that may be left out."""
    several = [argument for argument in command.flags if argument.takes in "?+"]
    if not several:
        return []
    cases = [f"      {argument.flags[-1]}) {_zsh_offer(argument.kind)}; return ;;" for argument in several]
    before = "    local i=$CURRENT; while ((--i > 1)) && [[ $words[i] != -* ]]; do; done"
    return ["  if [[ $PREFIX != -* ]]; then", before, "    case $words[i] in", *cases, "    esac", "  fi"]


def _zsh_spec(argument: Argument) -> str:
    """A flag in the words of _arguments."""
    says = argument.says.replace("[", "(").replace("]", ")")
    value = f"{_colons(argument.name)}:{_zsh_action(argument.kind)}"
    after = f":{value}" if argument.takes in "1+" else ""
    specs = []
    for flag in argument.flags:
        takes_equals = "=" if after and flag.startswith("--") else ""
        others = f"({' '.join(argument.flags)})" if argument.takes != "+" else "*"
        specs.append(shlex.quote(f"{others}{flag}{takes_equals}[{_colons(says)}]{after}"))
    return " ".join(specs)


def _zsh_action(kind: Kind) -> str:
    if kind == Kind():
        return " "
    if not kind.path:
        return f"({_colons(' '.join(kind.words))})"
    return _colons(f" {_zsh_offer(kind)}")  # after a space it is called with these words alone


def _zsh_offer(kind: Kind) -> str:
    return shlex.join(["_gptlab_offer", kind.path or "none", *kind.words, *kind.globs])


def _colons(text: str) -> str:
    return text.replace("\\", r"\\").replace(":", r"\:")


# -- fish -----------------------------------------------------------------------------------------------------------

FISH = r"""
function __gptlab_at -d 'Whether this verb was typed, and its positional argument of this number, or its flag, follows'
    set -l typed (commandline -opc)[2..]
    set -l verb $typed[1]
    switch "$verb"
        case @GROUPS@
            set verb "$typed[1..2]"
            set -e typed[1]
    end
    test "$verb" = "$argv[1]"; or return
    set -q argv[2]; or return 0
    set -l switches
    set -l many
    switch "$verb"
@VERBS@
    end
    set -l position 1
    set -l flag
    for word in $typed[2..]
        switch $word
            case '--*=*'
                set flag
            case '--*' -h
                set flag $word
                contains -- $word $switches; and set flag
            case '*'
                if test -z "$flag"
                    set position (math $position + 1)
                else if not contains -- $flag $many
                    set flag
                end
        end
    end
    test -n "$flag"; and set position $flag
    test "$position" = $argv[2]; and return
    test -z "$flag"; and string match -q '*+' -- $argv[2]; and test $position -ge (string trim -c + -- $argv[2])
end

function __gptlab_takes_settings
    for verb in @TAKERS@
        __gptlab_at $verb; and return
    end
    return 1
end

function __gptlab_offer -d 'Words and what patterns find; where none begins with what is typed, any file or folder'
    set -l typed (commandline -ct | string replace -r '^--[^=]*=' '')
    set -l offered
    for one in $argv[2..]
        if string match -q '*\**' $one
            eval "set -l found $one; set -a offered \$found"
        else
            set -a offered $one
        end
    end
    set -l fitting
    for one in (string trim -r -c / -- $offered)
        test (string sub -l (string length -- "$typed") -- $one) = "$typed"; and set -a fitting $one
    end
    if set -q fitting[1]
        string join \n -- $fitting
    else if test $argv[1] = folder
        __fish_complete_directories $typed ''
    else
        __fish_complete_path $typed
    end
end

complete -c gptlab -f
"""


def fish(top: Command) -> str:
    """The script for fish, from 3.2 on."""
    verbs, lines = [], []
    for command in top.walk():
        verb = " ".join(command.words)
        verbs.append(f"        case {_fish(verb)}")
        for name, takes in (("switches", "0"), ("many", "+")):
            if flags := _switches(command, takes):
                verbs.append(f"            set {name} {' '.join(flags)}")
        at = f"__gptlab_at {_fish(verb)}"
        lines += [_fish_flag(at, argument) for argument in command.flags]
        for argument in command.flags:
            if argument.takes in "?+":  # fish knows neither a second value nor an optional one after a space
                where = f"{at} {argument.flags[-1]}"
                lines.append(_fish_line(where, "", _fish_values(argument.kind), argument.name))
        for number, argument in enumerate(command.positions, 1):
            where = f"{at} {_position(command, number)}"
            if command.parts:
                lines += [_fish_line(where, "", f"-a {part.words[-1]}", part.says) for part in command.parts]
            else:
                lines.append(_fish_line(where, "", _fish_values(argument.kind), argument.name))
    lines += [_fish_flag("__gptlab_takes_settings", argument) for argument in setting_flags()]
    takers = [_fish(" ".join(command.words)) for command in top.walk() if command.takes_settings]
    script = FISH.replace("@GROUPS@", " ".join(command.words[0] for command in top.parts if command.parts))
    script = script.replace("@VERBS@", "\n".join(verbs)).replace("@TAKERS@", " ".join(takers))
    return MADE_BY % ("fish", "fish") + script + "\n".join(lines) + "\n"


def _fish_flag(where: str, argument: Argument) -> str:
    names = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in argument.flags)
    values = _fish_values(argument.kind) if argument.takes in "1+" else ""
    return _fish_line(where, names, "-x " * (argument.takes in "1+") + values, argument.says)


def _fish_line(where: str, names: str, values: str, says: str) -> str:
    parts = ["complete -c gptlab -n", _fish(where), names, values.strip(), f"-d {_fish(says)}" if says else ""]
    return " ".join(part for part in parts if part)


def _fish_values(kind: Kind) -> str:
    words = " ".join(_fish(word) if "*" in word else word for word in (*kind.words, *kind.globs))
    offered = f"(__gptlab_offer {kind.path} {words})" if kind.path else words
    return f"-a {_fish(offered)}" if offered else ""


def _fish(text: str) -> str:
    """A word in fish's quotes."""
    return "'" + text.replace("\\", r"\\").replace("'", r"\'") + "'"
