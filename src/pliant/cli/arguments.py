"""From a command line to options; whatever is wrong with it becomes one sentence."""

import contextlib
import dataclasses
import difflib
import io
import typing
from typing import Annotated, Any, TypeVar

T = TypeVar("T")


class Misuse(ValueError):
    """A command line that cannot be understood; a `UsageError` that needs no torch."""


def choose(prog: str, name: str, known: dict[str, T]) -> T:
    """What a word after `prog` stands for; `Misuse` if it is not known."""
    if name in known:
        return known[name]
    raise Misuse(f"{prog} has no command {name!r}{nearest(name, list(known))}; it has {', '.join(known)}")


def nearest(name: str, known: list[str]) -> str:
    """A question after the known name that may have been meant, empty if none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def require(arguments: list[str], what: str) -> None:
    """Raise `Misuse` saying `what` is needed if nothing but options is given, none of them for help."""
    if all(argument.startswith("-") for argument in arguments) and not {"-h", "--help"} & set(arguments):
        raise Misuse(what)


def parse(kind: Any, arguments: list[str], prog: str, default: Any, positional: tuple[str, ...] = ()) -> Any:
    """Parse with tyro; whatever is wrong becomes one sentence."""
    import tyro

    if positional:
        kind = Annotated[kind, tyro.conf.PositionalRequiredArgs]
    known = _option_names(default if default is not None else kind)
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and name.replace("_", "-") not in known:
            raise Misuse(f"{prog} has no option {name}{nearest(name, sorted(known))} See {prog} --help")
    arguments = _apart(arguments, default)
    _describe(type(default) if default is not None else kind)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=arguments, prog=prog)
            return tyro.cli(kind, args=arguments, prog=prog, default=default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise Misuse(f"{prog}: {_sentence(said.getvalue())}; see {prog} --help") from None


def _describe(kind: Any) -> None:
    """Give each field its docstring as one paragraph; tyro would keep the line breaks of those that take several."""
    import docstring_parser
    import tyro

    kind = getattr(kind, "__origin__", kind)
    docs = {one.arg_name: one.description for one in docstring_parser.parse_from_object(kind).params}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        own = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(own):
            _describe(own)
        elif docs.get(name):
            kind.__annotations__[name] = Annotated[hint, tyro.conf.arg(help=" ".join(str(docs[name]).split()))]


def _apart(arguments: list[str], default: Any) -> list[str]:
    """The arguments, with words that belong to an option of several words parted at commas: `--keep a,b`."""
    several, parted, inside = _several(default), list[str](), False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            inside = name in several
            parted += [name, *_words(value)] if inside and equals else [argument]
        else:
            parted += _words(argument) if inside else [argument]
    return parted


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


def _several(default: Any) -> set[str]:
    """Options that take several of a few known words; a name of a column may have a comma in it."""
    names: set[str] = set()
    for field in dataclasses.fields(default) if dataclasses.is_dataclass(default) else ():
        value = getattr(default, field.name)
        if isinstance(value, tuple):
            words = typing.get_args(typing.get_type_hints(type(default))[field.name])
            if words and typing.get_origin(words[0]) is typing.Literal:
                names.add("--" + field.name.replace("_", "-"))
        names |= _several(value)
    return names


def _option_names(of: Any) -> set[str]:
    kind = of if isinstance(of, type) else getattr(of, "__origin__", type(of))
    names = {"--help"}
    for field in dataclasses.fields(kind):
        value = getattr(of, field.name, None)
        if dataclasses.is_dataclass(value):
            names |= _option_names(value)
        else:
            option = field.name.replace("_", "-")
            names |= {f"--{option}", f"--no-{option}"}
    return names


def _sentence(box: str) -> str:
    """What tyro prints in a box, between the title and the first rule, as one line."""
    lines = [line.strip("│|╭╮╰╯ ") for line in box.splitlines()]
    lines = [line for line in lines if line]
    rules = [i for i, line in enumerate(lines) if not line.strip("─-")]
    # A plain box has a rule of its own below the title.
    said = lines[1 : rules[0]] if rules and rules[0] > 1 else lines[2 : rules[1]] if len(rules) > 1 else lines
    return " ".join(said).rstrip(".") or "the arguments could not be understood"
