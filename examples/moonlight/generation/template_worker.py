"""Renders one chat template, in a process of its own that `template_process.py` starts.

It imports nothing but jinja2 and the standard library, and talks in lines of JSON: the limits and
the template come first, then lists of conversations, which are answered with texts or an error.
"""

import contextlib
import datetime
import functools
import json
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows, where the time limit holds and the memory limit does not
    resource = None

# Of an error's text, which the template may choose.
_LONGEST_MESSAGE = 500


class Generation(Extension):
    """transformers' `{% generation %}...{% endgeneration %}`, around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.marks = Marks()
        environment.extend(marks=self.marks)  # for `render`; a template does not see it

    def parse(self, parser: Any) -> nodes.Node:
        """The tag as a call with what is in it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.CallBlock(self.call_method("_mark"), [], [], body)
        return call.set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.marks.found.append((self.marks.size, text))
        return text


class Marks:
    """How much of a text has been rendered, and the marked parts with where each begins."""

    def __init__(self):
        self.size = 0
        self.found: list[tuple[int, str]] = []

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the marked parts lie in the whole.

        A part inside a macro or a `set` block is rendered before what stands in front of it.
        """
        spans = [(start, start + len(part)) for start, part in self.found]
        if any(text[a:b] != part for (a, b), (_, part) in zip(spans, self.found, strict=True)):
            raise jinja2.TemplateError("{% generation %} stands inside a macro or a set block")
        return spans


def limit_memory(size: int) -> None:
    """Lets an allocation beyond a number of bytes fail; macOS takes the call and ignores it."""
    if resource is None:
        return
    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, size)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most, most))


def limit_time(seconds: float) -> None:
    """Ends the process that many seconds of computing from now, even where its parent is gone."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def compile_template(source: str) -> jinja2.Template:
    """A template with the names and the white space that transformers gives templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    return environment.from_string(source)


def render(
    template: jinja2.Template, variables: dict[str, Any], longest: int
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, given up once it is too long, and the spans that `generation` marks."""
    marks: Marks = template.environment.marks  # pyright: ignore[reportAttributeAccessIssue]
    marks.size, marks.found = 0, []
    pieces = []
    for piece in template.generate(variables):
        marks.size += len(piece)
        if marks.size > longest:
            raise jinja2.TemplateError(f"its text is longer than {longest:,} characters")
        pieces.append(piece)
    text = "".join(pieces)
    return text, marks.spans(text)


def render_all(
    template: jinja2.Template, asked: list[dict[str, Any]], longest: int
) -> list[tuple[str, list[tuple[int, int]]]]:
    """`render` for several conversations."""
    return [render(template, variables, longest) for variables in asked]


def attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """What some work returns, or why it does not."""
    try:
        return work(), ""
    except jinja2.TemplateSyntaxError as error:
        return None, f"its line {error.lineno}: {error}"[:_LONGEST_MESSAGE]
    except jinja2.TemplateError as error:
        return None, str(error)[:_LONGEST_MESSAGE]
    except MemoryError:
        return None, "it needs more memory than a template gets"
    except RecursionError:
        return None, "it is nested too deep"
    except Exception as error:  # whatever a template makes Python raise
        return None, f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]


def main(lines: TextIO) -> None:
    """Answers requests until there are no more."""
    # Ctrl-C is meant for the answer that the model is writing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tell({"ready": True})
    if not (line := lines.readline()):
        return
    first = json.loads(line)
    limit_memory(first["memory"])
    limit_time(first["seconds"])
    template, error = attempt(lambda: compile_template(first["source"]))
    _tell({"error": error})
    for line in lines if template else ():
        limit_time(first["seconds"])
        work = functools.partial(render_all, template, json.loads(line), first["characters"])
        texts, error = attempt(work)
        _tell({"error": error, "texts": texts})


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _to_json(value: Any, indent: int | None = None) -> str:
    """Without the escapes for HTML of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


if __name__ == "__main__":
    main(sys.stdin)
