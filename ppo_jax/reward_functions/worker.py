"""A process that runs a user's function on one response at a time, and can be ended.

`ProcessWorker` runs this file as a program. So that a new process starts in a fraction of a second,
the file imports nothing but the standard library, and the process imports nothing but the file of
the user's function. `multiprocessing` would import the main program, with JAX, in each process.
"""

import asyncio
import importlib
import importlib.util
import inspect
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a function is defined: its module, the module's file, and its name in the module."""

    module: str
    file: str
    name: str


class Answer(NamedTuple):
    """What a call gave: a value, or the description of an error, or that it took too long."""

    value: Any = None
    error: str | None = None
    too_long: bool = False


class ProcessWorker:
    """A process that calls a function, one call at a time."""

    def __init__(self, place: Place) -> None:
        """Start the process, which imports the function before its first call.

        Args:
          place: where the function is defined.
        """
        self._place = place
        self._start()

    def _start(self) -> None:
        self._pipe, other = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            start_new_session=True,  # Ctrl-C is handled by the main process.
        )
        other.close()
        self._pipe.send((sys.path, *self._place))
        self._ready = False

    def call(self, args: list[Any], named: dict[str, Any], seconds: float) -> Answer:
        """Call the function; a call that takes longer than `seconds` ends the process.

        Args:
          args: the arguments by position.
          named: the arguments by name.
          seconds: the time limit, which the import of the function's file does not count towards.

        Returns:
          The answer.
        """
        try:
            if not self._ready:
                imported = Answer(*self._pipe.recv())
                if imported.error is not None:
                    return imported
                self._ready = True
            self._pipe.send((args, named, seconds))
            if self._pipe.poll(seconds):
                return Answer(*self._pipe.recv())
        except (EOFError, ConnectionError):
            status = self._process.wait()
            self._start()
            return Answer(error=f"The process of the reward function ended with status {status}.")
        self.close()
        self._start()
        return Answer(too_long=True)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def run_file(file: Path, module_name: str) -> ModuleType:
    """Run a Python file as a module of the given name, and return the module."""
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None  # It ends in .py.
    # Dataclasses and pickle look their classes up in sys.modules.
    sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(error: BaseException) -> str:
    """Describe what a reward function raised, and the line of its file where it was raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
    ]
    # The first frame is the caller's; there are no more if the function is not written in Python.
    where = (
        f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if len(frames) > 1 else ""
    )
    try:
        message = str(error)
    except Exception:  # The exception's own __str__ may fail.
        message = "its message cannot be printed"
    return f"The reward function raised {type(error).__name__}{where}: {message}"


def _plain(scores: Any) -> Any:
    """Convert arrays and tensors to lists, which need no import to be read."""
    if isinstance(scores, dict):
        return {name: _plain(part) for name, part in scores.items()}
    scores = scores.detach().cpu() if hasattr(scores, "detach") else scores
    scores = scores.tolist() if hasattr(scores, "tolist") else scores
    return [_plain(x) for x in scores] if isinstance(scores, list | tuple) else scores


async def _result(value: Any) -> Any:
    return await value


def _call(function: Any, args: list[Any], named: dict[str, Any]) -> Answer:
    try:
        value = function(*args, **named)
        value = asyncio.run(_result(value)) if inspect.isawaitable(value) else value
        return Answer(_plain(value))
    except BaseException as error:
        return Answer(error=describe(error))


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    """Import a function, and call it with what comes through the pipe until that is closed.

    Answers are sent as plain tuples, because this file is another module in the main process.
    """
    sys.path[:], module_name, file, name = pipe.recv()
    try:
        if "." in module_name:  # It may import from its package.
            module = importlib.import_module(module_name)
        else:
            module = run_file(Path(file), module_name)
        function = getattr(module, name)
    except BaseException as error:
        pipe.send((None, describe(error)))
        return
    pipe.send(())
    while True:
        args, named, seconds = pipe.recv()
        # The kernel ends this process if the main process has gone and cannot end it.
        signal.setitimer(signal.ITIMER_REAL, seconds + 60)
        answer = _call(function, args, named)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            pipe.send(tuple(answer))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            pipe.send((None, f"The reward function returned no numbers: {error}."))


if __name__ == "__main__":
    try:
        _serve(multiprocessing.connection.Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):
        sys.exit(0)
