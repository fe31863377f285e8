"""Prompts that are messages: through a tokenizer's chat template, and where an answer ends."""

import contextlib
import datetime
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_DAY = datetime.datetime(
    2024, 7, 26
)  # stands for it: that which Llama 3.1's template falls back on


def as_chat(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose text prompts are a user's messages."""
    return [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
        if isinstance(row["prompt"], str)
        else row
        for row in rows
    ]


def _said(error: Exception) -> str:
    return str(error).rstrip(".") + "."


def render(
    messages: list[dict[str, Any]], tokenizer: Any, *, parts: bool = False, answer: bool = True
) -> str:
    """Text of messages; `parts`: with a list of parts in the place of each text; `answer`: up to where the answer begins."""
    if parts:
        messages = [
            {
                **m,
                "content": [{"type": "text", "text": m["content"]}]
                if isinstance(m["content"], str)
                else m["content"],
            }
            for m in messages
        ]
    # A template that prints today's date would make other prompts of the same ones tomorrow.
    template = _TODAY.sub(
        lambda call: json.dumps(_DAY.strftime(call[2])), tokenizer.get_chat_template()
    )
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=answer
    )


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, `{"role": ..., "content": ...}`."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
    )


def through_template(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A row whose prompt is messages, with the text that the template makes of them; they stay in its column `messages`.

    Raises:
      ValueError: with what the template raised.
    """
    try:
        text = render(row["prompt"], tokenizer)
    except Exception as error:  # whatever the template raises
        raise ValueError(
            f"The tokenizer's chat template does not take the prompt {row['prompt']!r:.200}: {_said(error)}"
        ) from error
    last = row["prompt"][-1]["content"]
    if (
        isinstance(last, str) and last.strip() not in text
    ):  # a template that wants parts may pass over a text
        with contextlib.suppress(Exception):
            other = render(row["prompt"], tokenizer, parts=True)
            text = other if last.strip() in other and "'type'" not in other else text
    return {**row, "prompt": text, "messages": row["prompt"]}


def joined(prompt: Any, answer: Any) -> list[dict[str, Any]] | None:
    """Messages of a prompt and those of its answer, which may repeat the prompt's; None, where neither is messages.

    Example:
      >>> [message["role"] for message in joined("2 + 2?", [{"role": "assistant", "content": "4"}])]
      ['user', 'assistant']
    """
    if not (is_chat(prompt) or is_chat(answer)):
        return None
    said = answer if is_chat(answer) else [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str) and said[0]["role"] == "assistant":
        prompt = [{"role": "user", "content": prompt}]
    return [*prompt, *said] if is_chat(prompt) and said[: len(prompt)] != prompt else said


def conversation(prompt: Any, answer: Any, tokenizer: Any) -> str | None:
    """Text of messages and the answer to them, as the template closes it; None, where neither is messages.

    Args:
      prompt: a text, messages, or None.
      answer: a text, or messages: the assistant's alone, or all from the first on, as in many sets of preferences.
      tokenizer: with the chat template.

    Raises:
      ValueError: with what the template raised.
    """
    said = joined(prompt, answer)
    if said is None:
        return None
    try:
        return render(said, tokenizer, answer=False)
    except Exception as error:  # whatever the template raises
        raise ValueError(
            f"The tokenizer's chat template does not take {said!r:.200}: {_said(error)}"
        ) from error


def end_of_turn(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the added token that a chat template puts after an assistant's words, if there is one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return ()
    mark = "18446744073709551557"  # digits have no case for a template to change
    said = [
        {"role": role, "content": text}
        for role, text in (("system", "?"), ("user", "?"), ("assistant", mark), ("user", "?"))
    ]
    ends = {
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content.strip()
    }  # not mere space
    # Some templates refuse a system's turn, some demand it; some take texts, some parts; some end a turn where another begins.
    for turns, parts in itertools.product((said[1:3], said[:3], said[1:], said), (False, True)):
        try:
            _, found, after = render(turns, tokenizer, parts=parts, answer=False).rpartition(mark)
        except Exception:  # a template may raise anything; prompts that go through it will say so
            continue
        after = tokenizer(after, add_special_tokens=False).input_ids if found else []
        for i in after:
            if i in ends or i in tokenizer.all_special_ids:
                return (i,)
    return ()
