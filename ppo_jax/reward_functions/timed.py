"""The reward that calls a user's function once for each response, with a time limit."""

import asyncio
import functools
import inspect
import os
import queue
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ppo_jax import data
from ppo_jax.errors import RewardError
from ppo_jax.reward_functions.protocol import TaskScores, as_reward_error, as_task_scores
from ppo_jax.reward_functions.text import arguments, in_event_loop
from ppo_jax.reward_functions.worker import Answer, Place, ProcessWorker
from ppo_jax.types import Rollout


class TimedReward(NamedTuple):
    """A reward that calls a function of texts for each response alone, with a time limit.

    A response whose call takes longer has no score. An `async def` is called for all responses at
    once in one event loop, which cancels a call at the limit. Any other function is called in
    processes, as many as there are CPU cores, which are ended at the limit.

    Attributes:
      function: as in `TextReward`. It gets lists of one prompt and one response. Unless it is an
        `async def`, it must be defined at the top of a file that a process can import.
      seconds: the time limit of a call.
      module: the module that defines the function; by default the function's own.
      name: the function's name in that module; by default the function's own.

    Example:
      >>> async def judge(prompts, responses):
      ...     await asyncio.sleep(60 if responses == [" five"] else 0)
      ...     return [float(responses == [" four"])]
      >>> prompts = data.Prompts([{"prompt": "2 + 2 ="}] * 2, np.array([[7]] * 2), np.ones((2, 1)))
      >>> scores = TimedReward(judge, seconds=0.5)(None, prompts, [" four", " five"])
      >>> scores.response, scores.parts
      (array([ 1., nan], dtype=float32), {'timeouts': array([0., 1.], dtype=float32)})
    """

    function: Callable[..., Any]
    seconds: float
    module: str = ""
    name: str = ""

    def __call__(
        self, rollout: Rollout, prompts: data.Prompts, responses: Sequence[str]
    ) -> TaskScores:
        """Score responses with the function; see `RewardFn`.

        Args:
          rollout: not read.
          prompts: the `B` prompts.
          responses: `B` texts.

        Returns:
          A score for each response, NaN for one that took too long, and the part `timeouts`, which
          is 1 for a response that took too long and 0 for any other.

        Raises:
          RewardError: if the function raises an exception, or does not return one finite score.
        """
        args, named = arguments(self.function, prompts, list(responses))
        rows = [
            ([x[i : i + 1] for x in args], {name: x[i : i + 1] for name, x in named.items()})
            for i in range(len(responses))
        ]
        answers = self._in_loop(rows) if is_async(self.function) else self._in_processes(rows)
        for i, answer in enumerate(answers):
            if answer.error is not None:
                raise RewardError(answer.error, (i,))
        scores = as_task_scores(_joined(answers), len(answers))
        timeouts = np.array([answer.too_long for answer in answers], np.float32)
        return scores._replace(parts={**(scores.parts or {}), "timeouts": timeouts})

    def _in_loop(self, rows: Sequence[tuple[list[Any], dict[str, Any]]]) -> list[Answer]:
        async def call(args: list[Any], named: dict[str, Any]) -> Answer:
            try:
                return Answer(await _limited(self.function(*args, **named), self.seconds))
            except _TooLong:
                return Answer(too_long=True)

        async def calls() -> list[Answer]:
            return await asyncio.gather(*(call(*row) for row in rows))

        try:
            return in_event_loop(calls())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and CancelledError are no Exceptions.
            raise as_reward_error(error) from error

    def _in_processes(self, rows: Sequence[tuple[list[Any], dict[str, Any]]]) -> list[Answer]:
        place = self._place()
        workers = _workers(place, os.stat(place.file).st_mtime_ns)
        free: queue.SimpleQueue[ProcessWorker] = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)

        def call(row: tuple[list[Any], dict[str, Any]]) -> Answer:
            worker = free.get()
            try:
                return worker.call(*row, self.seconds)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(len(workers)) as threads:
            return list(threads.map(call, rows))

    def _place(self) -> Place:
        """Return where the function is defined, so that a process finds it."""
        name = self.name or getattr(self.function, "__qualname__", "")
        module_name = self.module or getattr(self.function, "__module__", "")
        module = sys.modules.get(module_name)
        file = getattr(module, "__file__", None)
        if module_name == "__main__" or file is None or getattr(module, name, None) is None:
            raise RewardError(
                f"TimedReward calls {name or self.function!r} in other processes, which cannot "
                "import it; define it at the top of a file of its own, or make it an async def."
            )
        return Place(module_name, file, name)


class _TooLong(Exception):
    """A call took longer than its limit; TimeoutError could come from the function itself."""


async def _limited(scores: Awaitable[Any], seconds: float) -> Any:
    """Wait for a result for at most so many seconds."""
    task = asyncio.ensure_future(scores)
    done, _ = await asyncio.wait([task], timeout=seconds)
    if not done:
        task.cancel()
        raise _TooLong
    return task.result()


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a function, or the `__call__` of an object, is an `async def`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  It is its kind that matters.
    )


@functools.cache
def _workers(place: Place, modified: int) -> list[ProcessWorker]:
    """Return the processes that call a function; they last as long as this process.

    Args:
      place: where the function is defined.
      modified: when its file was written, so that a file that is edited gets new processes.
    """
    return [ProcessWorker(place) for _ in os.sched_getaffinity(0)]


def _joined(answers: Sequence[Answer]) -> Any:
    """Join the scores of single responses to one list, or to one list for each named part."""
    given = [None if answer.too_long else answer.value for answer in answers]
    parts = list(dict.fromkeys(name for x in given if isinstance(x, dict) for name in x))
    if not parts:
        return [_single(x) for x in given]
    return {
        name: [_single(x.get(name, [None]) if isinstance(x, dict) else x) for x in given]
        for name in parts
    }


def _single(scores: Any) -> Any:
    """Return the only score of a list; None for a response that took too long."""
    if scores is None:
        return None
    if not hasattr(scores, "__len__") or len(scores) != 1:
        raise RewardError(
            "With a time limit, the reward function gets one response at a time and must return "
            f"one score for it in a list, not {scores!r:.80}."
        )
    return scores[0]
