"""Completion for shells: scripts for bash, zsh and fish, made from the parser of the command, so that they know what it knows.

    source <(aifactory completion bash)                       in ~/.bashrc
    aifactory completion zsh > "${fpath[1]}/_aifactory"        once
    aifactory completion fish > ~/.config/fish/completions/aifactory.fish

The scripts stand alone: nothing of Python starts while somebody types.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_FILES = ("CONFIG", "FILE", "PROOF", "FOLDER")
"""What stands for a path in the help."""
_YAML = "CONFIG"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Something that begins with a dash."""

    names: Sequence[str]
    help: str
    takes: str
    """What its value is called; empty where it takes none."""
    choices: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A verb, or a part of one."""

    path: tuple[str, ...]
    help: str
    options: Sequence[Option]
    arguments: Sequence[Option]
    """What it takes without a name, in order; their names are what they are called."""
    commands: Sequence[Command]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for bash, zsh or fish."""
    return _SHELLS[shell](_command(parser, (), ""))


def _command(parser: argparse.ArgumentParser, path: tuple[str, ...], said: str) -> Command:
    options: list[Option] = []
    arguments: list[Option] = []
    commands: list[Command] = []
    for action in parser._actions:  # argparse tells of them nowhere else
        if isinstance(action, argparse._SubParsersAction):
            said_of = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, sub in action.choices.items():
                commands.append(_command(sub, (*path, name), said_of.get(name, "")))
            continue
        found = Option(
            names=list(action.option_strings) or [str(action.metavar or action.dest)],
            help=_plain(action.help),
            takes="" if action.nargs == 0 else str(action.metavar or action.dest).upper(),
            choices=[str(choice) for choice in action.choices or ()],
        )
        (options if action.option_strings else arguments).append(found)
    return Command(path=path, help=_plain(said), options=options, arguments=arguments, commands=commands)


def _plain(text: str | None) -> str:
    """A line for a menu: no markup of a shell, and not too long."""
    line = " ".join((text or "").replace("%%", "%").split())
    return re.sub(r"[\[\]'\"`\\:$]", " ", line)[:90].strip()


def _every(command: Command) -> Iterator[Command]:
    yield command
    for sub in command.commands:
        yield from _every(sub)


def _values(option: Option) -> tuple[Sequence[str], bool]:
    """The words that it may be, and whether it is a path."""
    return option.choices, option.takes in _FILES or (not option.takes and option.names[0] in _FILES)


# ── bash ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _bash(root: Command) -> str:
    known, words, values = [], [], []
    for each in _every(root):
        path = " ".join(each.path)
        known += [f'    "{" ".join(sub.path)}") path="{" ".join(sub.path)}" ;;' for sub in each.commands]
        names = [sub.path[-1] for sub in each.commands]
        names += [word for argument in each.arguments for word in argument.choices]
        flags = [name for option in each.options for name in option.names]
        takes_files = any(_values(argument)[1] for argument in each.arguments)
        words.append(f'    "{path}") flags="{" ".join(flags)}"; words="{" ".join(names)}"; files={int(takes_files)} ;;')
        for option in each.options:
            choices, is_file = _values(option)
            if option.takes:
                patterns = "|".join(f'"{path} {name}"' for name in option.names)
                then = f'words="{" ".join(choices)}"; files={int(is_file)}; flags=""'
                values.append(f"    {patterns}) {then} ;;")
    return _BASH.format(known="\n".join(known), words="\n".join(words), values="\n".join(values))


_BASH = """\
# aifactory: completion for bash
_aifactory() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" path="" next i flags="" words="" files=0
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; i++)); do
    next="${{path:+$path }}${{COMP_WORDS[i]}}"
    case "$next" in
{known}
    esac
  done
  case "$path" in
{words}
  esac
  case "$path $prev" in
{values}
  esac
  if [[ "$cur" == -* ]]; then words="$flags"; files=0; fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  if ((files)); then COMPREPLY+=($(compgen -f -- "$cur")); compopt -o filenames 2>/dev/null; fi
}}
complete -F _aifactory aifactory
"""

# ── zsh ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _zsh(root: Command) -> str:
    functions = [_zsh_function(each) for each in _every(root)]
    start = 'if [ "$funcstack[1]" = "_aifactory" ]; then _aifactory "$@"; else compdef _aifactory aifactory; fi'
    return "\n".join(["#compdef aifactory", "# aifactory: completion for zsh", *functions, start, ""])


def _zsh_function(command: Command) -> str:
    name = "_" + "_".join(("aifactory", *command.path))
    specs = []
    for option in command.options:
        value = f":{option.takes}:{_zsh_values(option)}" if option.takes else ""
        specs += [f"'*{each}[{option.help}]{value}'" for each in option.names]
    if not command.commands:
        specs += [
            f"'{number}:{argument.names[0]}:{_zsh_values(argument)}'"
            for number, argument in enumerate(command.arguments, start=1)
        ]
        listed = " \\\n    ".join(specs) or "'*: :'"
        return f"{name}() {{\n  _arguments -s \\\n    {listed}\n}}"
    described = "\n".join(f"    '{sub.path[-1]}:{sub.help}'" for sub in command.commands)
    cases = "\n".join(f"        {sub.path[-1]}) {name}_{sub.path[-1]} ;;" for sub in command.commands)
    listed = " \\\n    ".join([*specs, "'1: :->verb'", "'*:: :->rest'"])
    return (
        f"{name}() {{\n  local context state line\n  local -a verbs=(\n{described}\n  )\n  _arguments -C \\\n    {listed}\n"
        f"  case $state in\n    verb) _describe 'verb' verbs ;;\n    rest)\n      case $words[1] in\n{cases}\n      esac ;;\n"
        "  esac\n}"
    )


def _zsh_values(option: Option) -> str:
    choices, is_file = _values(option)
    if choices:
        return f"({' '.join(choices)})"
    if not is_file:
        return " "
    return '_files -g "*.(yaml|yml)(-.)"' if _YAML in (option.takes, option.names[0]) else "_files"


# ── fish ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fish(root: Command) -> str:
    lines = ["# aifactory: completion for fish", "complete -c aifactory -f"]
    for each in _every(root):
        here = _fish_condition(each)
        lines += [f"complete -c aifactory {here} -a {sub.path[-1]} -d {shlex.quote(sub.help)}" for sub in each.commands]
        for argument in each.arguments:
            choices, is_file = _values(argument)
            if choices:
                lines.append(f"complete -c aifactory {here} -a {shlex.quote(' '.join(choices))}")
            elif is_file:
                lines.append(f"complete -c aifactory {here} -F")
        for option in each.options:
            choices, is_file = _values(option)
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            takes = " -x" if option.takes and not is_file else " -r -F" if option.takes else ""
            given = f" -a {shlex.quote(' '.join(choices))}" if choices else ""
            lines.append(f"complete -c aifactory {here} {names}{takes}{given} -d {shlex.quote(option.help)}")
    return "\n".join([*lines, ""])


def _fish_condition(command: Command) -> str:
    """Where all words of the path were typed, and none that would lead further."""
    seen = [f"__fish_seen_subcommand_from {word}" for word in command.path]
    if command.commands:
        further = " ".join(sub.path[-1] for sub in command.commands)
        seen.append(f"not __fish_seen_subcommand_from {further}")
    return f"-n {shlex.quote('; and '.join(seen))}" if seen else ""


_SHELLS: Mapping[str, Callable[[Command], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
SHELLS = tuple(_SHELLS)
