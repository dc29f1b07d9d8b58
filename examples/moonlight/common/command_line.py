"""A program's command line, made of a dataclass of its options and the module's docstring.

tyro reads the options and prints their help. What it does not do by itself is added here: options
in groups though the dataclass is flat, paragraphs that break where the terminal ends, the command
to type in the place of a file's path, the examples and the tables below the options, and a shell
completion of a command that begins with `python -m`.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from rich.console import Console, RenderableType

from examples.moonlight.common.program import TRACEBACK, run_program

Args = TypeVar("Args")

_WORDS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH", bool: "{True,False}"}


@dataclasses.dataclass(frozen=True)
class CommandLine(Generic[Args]):
    """What a program is called, which options it has, and what its help says.

    Attributes:
        module: What stands behind `python -m`.
        args: The options, a flat dataclass with a docstring below each field. A field that is a
            dataclass itself stands for its own options, as a group.
        text: The module's docstring. Its first paragraph is what the program does, in a sentence;
            the others, with the examples, stand below the options.
        groups: The titles of groups of options, by the first option of each; a group goes on to
            the next one's first option.
        left_out: What an option whose default is None stands for when it is left out, where its
            own text does not say it.
        tables: Makes what stands between the options and the examples.
        underscores: Whether flags are spelled with underscores, and booleans have a value.
        keeps_programs: Whether what is compiled is kept for the next start. What times compilation
            leaves it.
    """

    module: str
    args: type[Args]
    text: str | None
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tables: Callable[[], Sequence[RenderableType]] = tuple
    underscores: bool = False
    keeps_programs: bool = True

    @property
    def command(self) -> str:
        """What a user types."""
        return f"python -m {self.module}"

    @property
    def short_name(self) -> str:
        """The command that the shell completion is for: moonlight-train, for example."""
        return self.module.removeprefix("examples.").replace(".", "-").replace("_", "-")

    def run(self, main: Callable[[Args], object]) -> None:
        """Runs a program with the options of the process: see `run_program`."""
        run_program(lambda: main(self.parse()), keeps_programs=self.keeps_programs)

    def parse(self, argv: Sequence[str] | None = None) -> Args:
        """Reads options.

        Args:
            argv: The words behind the program's name; None is the process's.

        Raises:
            SystemExit: The help or a completion was asked for, and is printed (code 0); the
                shell has none (code 1); or an option is unknown, missing, or has a value of
                another type (code 2).
        """
        argv = sys.argv[1:] if argv is None else [*argv]
        if argv and re.match(r"--tyro.print.completion$", argv[0]):
            if argv[1:] not in (["bash"], ["fish"], ["zsh"]):
                sys.exit(
                    f"{argv[0]} takes bash, fish or zsh, got {' '.join(argv[1:]) or 'nothing'}"
                )
            print(self._completion(argv[1]))
            sys.exit()
        try:
            read = self._read(argv, self.command)
        except SystemExit as ended:
            if not ended.code:
                self._print_epilogue()
            raise
        groups = (getattr(read, field.name) for field in dataclasses.fields(read))
        values = [vars(group) for group in groups if dataclasses.is_dataclass(group)]
        flat = {name: value for group in values for name, value in group.items()}
        return made(self.args, flat)

    def _read(self, argv: Sequence[str], prog: str) -> Any:
        return tyro.cli(
            _grouped(self),
            prog=prog,
            # tyro joins lines, but for those that begin with a space.
            description=_filled(self._paragraphs[0], _width(), indent="  "),
            args=argv,
            use_underscores=self.underscores,
            config=(tyro.conf.OmitArgPrefixes,),
        )

    def _completion(self, shell: str) -> str:
        """What a shell evaluates: tyro's script, and the command that it completes.

        A shell completes by a command's first word, which for all modules is `python`.
        """
        asked = ["--tyro-print-completion", shell]
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            self._read(asked, self.short_name)
        script, command = printed.getvalue(), f"{sys.executable} -m {self.module}"
        if shell != "zsh":
            return f"{script}\nalias {self.short_name}='{command}'"
        # tyro's is a file for zsh to load, whose last line calls its function; and zsh completes
        # what an alias stands for, so that the command is a function.
        function = f"_tyro_{self.short_name.replace('-', '_')}"
        script = script.rstrip().removesuffix(f'{function} "$@"')
        return f"""{script}
{self.short_name}() {{ {command} "$@" }}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
compdef {function} {self.short_name}"""

    @property
    def _paragraphs(self) -> list[str]:
        return inspect.cleandoc(self.text or "").split("\n\n")

    def _print_epilogue(self) -> None:
        console = Console(highlight=False, markup=False, width=_width())
        for table in self.tables():
            console.print()
            console.print(table)
        for paragraph in self._paragraphs[1:]:
            print(f"\n{_filled(paragraph, _width())}")


def _width() -> int:
    return max(40, shutil.get_terminal_size().columns)


def _filled(paragraph: str, width: int, indent: str = "") -> str:
    """A paragraph whose lines end where the terminal does; code, which is indented, as it is."""
    if paragraph.startswith(" "):
        return paragraph
    return textwrap.fill(
        " ".join(paragraph.split()), width, subsequent_indent=indent, break_on_hyphens=False
    )


@functools.cache
def documentation(args: type) -> dict[str, str]:
    """What stands below each field of a dataclass, on one line; nothing without its source."""
    try:
        source = inspect.getsource(args)
    except OSError:
        return {}
    [tree] = ast.parse(textwrap.dedent(source)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def _grouped(line: CommandLine[Any]) -> Any:
    """A dataclass for tyro, with one of the same fields for each group inside."""
    groups: dict[str, list[Any]] = {}
    title = ""
    for owner, field, first in options(line.args):
        title = line.groups.get(first, title)
        kind = typing.get_type_hints(owner, include_extras=True)[field.name]
        shown = tyro.conf.arg(
            help=documentation(owner).get(field.name),
            metavar=_metavar(kind, line.underscores),
            help_behavior_hint=_hint(field, line),
        )
        if line.underscores:
            kind = Annotated[kind, tyro.conf.FlagConversionOff]
        default = dataclasses.field(default=field.default)
        groups.setdefault(title, []).append((field.name, Annotated[kind, shown], default))
    fields: list[Any] = []
    for number, (title, members) in enumerate(groups.items()):
        group = dataclasses.make_dataclass(f"Group{number}", members, kw_only=True)
        group.__doc__ = ""
        fields.append((f"group_{number}", Annotated[group, tyro.conf.arg(name=title)]))
    trace = tyro.conf.arg(
        help="After an error, show also where in the program it arose.", help_behavior_hint=""
    )
    flag = Annotated[bool, trace, tyro.conf.FlagCreatePairsOff]
    fields.append((TRACEBACK.strip("-"), flag, False))
    made = dataclasses.make_dataclass(line.args.__name__, fields)
    made.__doc__ = ""
    return made


def made(args: type[Args], values: dict[str, Any]) -> Args:
    """A dataclass of options, and those that it has inside; what is left out has its default.

    Args:
        args: The dataclass.
        values: The options by name, those of inner dataclasses among them.
    """
    fields: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(args).items():
        if dataclasses.is_dataclass(kind):
            fields[name] = made(typing.cast(Any, kind), values)
        elif name in values:
            fields[name] = values[name]
    return args(**fields)


def options(args: Any) -> Iterator[tuple[Any, dataclasses.Field[Any], str]]:
    """Each option: the dataclass that it is a field of, the field, and the outermost one's."""
    kinds = typing.get_type_hints(args)
    for field in dataclasses.fields(args):
        if dataclasses.is_dataclass(kinds[field.name]):
            for owner, inner, _ in options(kinds[field.name]):
                yield owner, inner, field.name
        else:
            yield args, field, field.name


def _metavar(kind: Any, underscores: bool) -> str | None:
    """What stands behind a flag: its type, without the None that stands for leaving it out."""
    inner = typing.get_args(kind)
    if underscores and bool in (kind, *inner):
        return "{true,false}"
    if underscores and typing.get_origin(kind) is tuple:
        return f"{_WORDS[inner[0]]} ..."
    if typing.get_origin(kind) not in (typing.Union, types.UnionType) or len(inner) != 2:
        return None
    [first] = (each for each in inner if each is not types.NoneType)
    if typing.get_origin(first) is Literal:
        return f"{{{','.join(map(str, typing.get_args(first)))}}}"
    return _WORDS.get(first)


def _hint(field: dataclasses.Field[Any], line: CommandLine[Any]) -> str | None:
    """What is shown behind an option's text; None is tyro's own hint, the default."""
    if field.name in line.left_out:
        return f"({line.left_out[field.name]})"
    if line.underscores and isinstance(field.default, bool):
        return f"(default: {str(field.default).lower()})"
    empty = field.default == () and line.underscores  # else tyro says that it may be repeated
    return "" if field.default is None or field.default is False or empty else None
