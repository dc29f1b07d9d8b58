"""Renders one chat template, in a process of its own that `template_process.py` starts.

It imports nothing but jinja2 and the standard library, and talks in lines of JSON: the limits and
the template come first, then conversations, each of which is answered with a text or an error.
"""

import contextlib
import datetime
import json
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows, where the time limit holds and the memory limit does not
    resource = None

# Of an error's text, which the template may choose.
_LONGEST_MESSAGE = 500


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
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    return environment.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any], longest: int) -> str:
    """The rendered text, given up once it is too long."""
    pieces, size = [], 0
    for piece in template.generate(variables):
        size += len(piece)
        if size > longest:
            raise jinja2.TemplateError(f"its text is longer than {longest:,} characters")
        pieces.append(piece)
    return "".join(pieces)


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
        variables = json.loads(line)
        text, error = attempt(lambda: render(template, variables, first["characters"]))  # noqa: B023
        _tell({"error": error, "text": text})


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
