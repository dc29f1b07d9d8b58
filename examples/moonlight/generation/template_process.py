"""A chat template at arm's length: rendered by a process that can be ended.

jinja2's sandbox keeps a template from files and from Python's insides, not from looping for years
or from multiplying a text until the memory is gone. So a child process renders it, with a limit to
its memory, and is killed when a rendering takes too long. It imports jinja2 alone, starts in about
0.2 s when a template is loaded, and stays for the conversation's other messages.

What holds where: the time, and the length of the text, are limited everywhere; the memory is on
Linux. macOS ignores that limit and Windows has none, so that a template can ask there for as much
memory as it fills in the time.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.moonlight.common.untrusted import MEBIBYTE, shown_name

_WORKER = Path(__file__).with_name("template_worker.py")

# In seconds: how long an interpreter may take to start on a machine that is busy.
_START = 60

_REMEDY = "take the template out of the folder, or repair it"


class Limits(NamedTuple):
    """What a template may cost.

    Attributes:
        seconds: Time of one rendering; a published template takes milliseconds.
        memory: Bytes of the whole process, of which Python and jinja2 have about 25 MB.
        characters: Length of the text.
    """

    seconds: float = 10
    memory: int = 512 * MEBIBYTE
    characters: int = 8_000_000


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: All of it.
        marks: Where each `{% generation %}` block begins and ends in the text, in characters; none
            for the many templates without such a tag.
    """

    text: str
    marks: list[tuple[int, int]]


class TemplateProcess:
    """A template in a process of its own, which ends with this object, or with this program.

    Args:
        source: The template.
        path: The file that it comes from, for messages.
        limits: What it may cost.

    Raises:
        ValueError: The template cannot be compiled, or not within its limits.
        OSError: No process can be started.
    """

    def __init__(self, source: str, path: Path, limits: Limits):
        self._path, self._limits = shown_name(path), limits
        self._source = source
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize | None = None
        self._start()

    def render(self, variables: dict[str, Any]) -> str:
        """The text that a conversation becomes; see `render_marked`."""
        return self.render_marked([variables])[0].text

    def render_marked(self, asked: Sequence[dict[str, Any]]) -> list[Rendered]:
        """The texts that conversations become, and the parts that the assistant writes.

        Args:
            asked: What the template is given for each; as JSON has it. One exchange with the
                process, and one time limit, is for all.

        Raises:
            ValueError: The template refuses one of them, fails, or exceeds its limits.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        answer = self._exchange(list(asked), self._limits.seconds)
        if answer["error"]:
            raise ValueError(f"{self._path}: the chat template refuses this: {answer['error']}")
        return [
            Rendered(text, [(start, stop) for start, stop in spans])
            for text, spans in answer["texts"]
        ]

    def close(self) -> None:
        """Ends the process."""
        if self._end is not None:
            self._end()
        self._process = None

    def _start(self) -> None:
        self.close()
        # As here, whatever this program has made of its path; but not the worker's own folder.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            env=env,
        )
        self._end = weakref.finalize(self, _stop, self._process)
        self._exchange(None, _START)
        limits = self._limits
        answer = self._exchange({"source": self._source, **limits._asdict()}, limits.seconds)
        if answer["error"]:
            self.close()
            raise ValueError(
                f"{self._path}: the chat template cannot be compiled: {answer['error']}"
            )

    def _exchange(self, request: Any, seconds: float) -> dict[str, Any]:
        """Sends a line and waits for one; a process that does not answer in time is killed."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        answer = ""
        try:
            with contextlib.suppress(OSError):
                if request is not None:
                    process.stdin.write(json.dumps(request) + "\n")
                    process.stdin.flush()
                answer = process.stdout.readline()
        except BaseException:
            # The answer would be taken for that to the next question.
            self.close()
            raise
        finally:
            timer.cancel()
        if answer.endswith("\n"):
            return json.loads(answer)
        code = process.wait()
        self.close()
        if late.is_set():
            why = f"takes more than {seconds:g} seconds"
        else:
            why = f"ended the process that rendered it (with {code})"
        raise ValueError(f"{self._path}: the chat template {why}: {_REMEDY}")


def _stop(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):  # what could not be written to a process that has ended
            pipe.close()
