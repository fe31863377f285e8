"""The reward that wraps a user's function of texts."""

import asyncio
import copy
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ppo_jax import data
from ppo_jax.data.chat import content_of
from ppo_jax.errors import RewardError
from ppo_jax.reward_functions.protocol import TaskScores, as_reward_error, as_task_scores
from ppo_jax.types import Rollout


class TextReward(NamedTuple):
    """A reward that calls a function of texts.

    Attributes:
      function: `function(prompts, responses)` with two lists of `B` texts, in the other order if
        the parameters have these names in the other order. A third parameter called `rows` gets the
        prompts' rows. Any other parameter gets the `B` values of the column of its name, which must
        exist unless it has a default, and `**kwargs` gets all columns. A function with a parameter
        `completions`, as in TRL, is called by the names `prompts` and `completions`; for a prompt
        that was a list of messages, it gets those, and the response as a list of one message of the
        assistant. It returns `B` numbers, with None for a response that cannot be scored, or a
        dictionary of named parts with `B` numbers each, whose sum is the score. It may be an
        `async def`.

    Example:
      >>> import numpy as np
      >>> reward = TextReward(lambda prompts, responses: [-len(text) for text in responses])
      >>> prompts = data.Prompts([{"prompt": "2 + 2 ="}], np.array([[7]]), np.array([[True]]))
      >>> reward(None, prompts, [" four"]).response  # It does not read the tokens.
      array([-5.], dtype=float32)
    """

    function: Callable[..., Any]

    def __call__(
        self, rollout: Rollout, prompts: data.Prompts, responses: Sequence[str]
    ) -> TaskScores:
        """Score responses with the function; see `RewardFn`.

        Args:
          rollout: not read.
          prompts: the `B` prompts.
          responses: `B` texts.

        Returns:
          A score for each response.

        Raises:
          RewardError: if the function needs a column that does not exist, raises an exception, or
            does not return `B` finite numbers.
        """
        args, named = arguments(self.function, prompts, list(responses))
        try:
            scores = self.function(*args, **named)
            if inspect.isawaitable(scores):
                scores = in_event_loop(scores)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and CancelledError are no Exceptions.
            raise as_reward_error(error) from error
        return as_task_scores(scores, len(responses))


def in_event_loop(awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable."""
    # In a thread of its own, because a notebook's event loop runs in this one.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, _result(awaitable)).result()


async def _result(scores: Awaitable[Any]) -> Any:
    return await scores


def _as_trl(prompts: data.Prompts, responses: list[str]) -> dict[str, list[Any]]:
    """Return prompts and completions as texts or, for prompts of messages, as messages."""
    before: list[Any] = []
    after: list[Any] = []
    for text, messages, response in zip(prompts.texts, prompts.messages, responses, strict=True):
        if messages is None:
            before.append(text)
            after.append(response)
            continue
        opened = messages[-1]["role"] == "assistant"  # The response continues this message.
        opening = content_of(messages[-1]) if opened else ""
        before.append(copy.deepcopy(messages))
        after.append([{"role": "assistant", "content": opening + response}])
    return {"prompts": before, "completions": after}


def arguments(
    function: Callable[..., Any], prompts: data.Prompts, responses: list[str]
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a user's function, by position and by name.

    The columns are copied, because the function may change them.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # Some functions written in C have no signature.
        return [prompts.texts, responses], {}
    rows = prompts.rows
    columns = {name for row in rows for name in row}
    by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    args: list[Any] = [prompts.texts, responses]
    if [p.name for p in parameters[:2]] == ["responses", "prompts"]:
        args.reverse()
    named: dict[str, Any] = {}
    if "completions" in by_name:
        texts = _as_trl(prompts, responses)
        args, named = [], {n: text for n, text in texts.items() if takes_all or n in by_name}
        taken = set(texts)
    else:
        if any(p.name == "rows" and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters[2:3]):
            args.append(copy.deepcopy(rows))
        taken = {p.name for p in parameters[: len(args)]}
    taken |= set(getattr(function, "keywords", {}))  # What a functools.partial has bound.
    if not takes_all:
        columns &= set(by_name)
    given = taken | columns | {p.name for p in parameters if p.default is not p.empty}
    if lacking := [name for name in by_name if name not in given]:
        raise RewardError(
            f"The reward function needs the column {lacking[0]!r}, but the columns of the prompts "
            f"are: {', '.join(sorted({name for row in rows for name in row}))}. A third parameter "
            "called rows gets the whole rows."
        )
    for name in sorted(columns - taken):
        named[name] = copy.deepcopy([row.get(name) for row in rows])
    return args, named
