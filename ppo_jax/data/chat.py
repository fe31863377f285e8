"""Chat messages: applying a tokenizer's chat template, and finding the token that ends a turn."""

import contextlib
import datetime
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_FIXED_DATE = datetime.datetime(2024, 7, 26)  # the default date of Llama 3.1's own template


def is_messages(value: Any) -> bool:
    """Return whether `value` is a non-empty list of `{"role": ..., "content": ...}` messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )


def as_user_messages(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Wrap each prompt that is a text as one message of the user; leave other rows unchanged."""
    return [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
        if isinstance(row["prompt"], str)
        else row
        for row in rows
    ]


def join_messages(prompt: Any, answer: Any) -> list[Message] | None:
    """Join a prompt and its answer into one conversation.

    Args:
      prompt: a text, a list of messages, or None.
      answer: a text, or a list of messages, which may begin with the messages of the prompt.

    Returns:
      All messages, from the first to the answer's last. None if neither is a list of messages.

    Example:
      >>> answer = [{"role": "assistant", "content": "4"}]
      >>> [message["role"] for message in join_messages("2 + 2?", answer)]
      ['user', 'assistant']
    """
    if not (is_messages(prompt) or is_messages(answer)):
        return None
    turns = answer if is_messages(answer) else [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str) and turns[0]["role"] == "assistant":
        prompt = [{"role": "user", "content": prompt}]
    return [*prompt, *turns] if is_messages(prompt) and turns[: len(prompt)] != prompt else turns


def apply_template(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    content_parts: bool = False,
    add_generation_prompt: bool = False,
) -> str:
    """Render messages as text with the tokenizer's chat template.

    A template that prints today's date gets a fixed one, so that the same messages give the same
    text every day.

    Args:
      messages: the conversation.
      tokenizer: a tokenizer with a chat template.
      content_parts: whether to pass each content that is a text as a list with one text part, the
        form that templates of multimodal models expect.
      add_generation_prompt: whether to append the text after which the assistant's answer begins.

    Returns:
      The rendered text.

    Raises:
      ValueError: if the template raises any exception.
    """
    turns = [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if content_parts and isinstance(m["content"], str)
        else m
        for m in messages
    ]
    try:
        return tokenizer.apply_chat_template(
            turns,
            chat_template=_DATE_CALL.sub(
                lambda call: json.dumps(_FIXED_DATE.strftime(call[2])),
                tokenizer.get_chat_template(),
            ),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # A template may raise anything.
        raise ValueError(
            f"The tokenizer's chat template does not take {messages!r:.200}: "
            f"{str(error).rstrip('.')}."
        ) from error


def render_prompt(messages: Sequence[Message], tokenizer: Any) -> str:
    """Render messages as the text of a prompt, up to where the assistant's answer begins.

    Args:
      messages: the conversation so far.
      tokenizer: a tokenizer with a chat template.

    Returns:
      The rendered text.

    Raises:
      ValueError: if the template raises any exception.
    """
    text = apply_template(messages, tokenizer, add_generation_prompt=True)
    last = messages[-1]["content"]
    # A template that expects content parts may drop a content that is a plain text.
    if isinstance(last, str) and last.strip() not in text:
        with contextlib.suppress(ValueError):
            other = apply_template(
                messages, tokenizer, content_parts=True, add_generation_prompt=True
            )
            text = other if last.strip() in other and "'type'" not in other else text
    return text


def render_conversation(prompt: Any, answer: Any, tokenizer: Any) -> str | None:
    """Render a prompt and its answer as one text, with the marks that the template ends it with.

    Args:
      prompt: a text, a list of messages, or None.
      answer: a text, or a list of messages: the assistant's alone, or the whole conversation, as in
        many preference data sets.
      tokenizer: a tokenizer with a chat template.

    Returns:
      The rendered text, or None if neither is a list of messages.

    Raises:
      ValueError: if the template raises any exception.
    """
    messages = join_messages(prompt, answer)
    return None if messages is None else apply_template(messages, tokenizer)


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """Find the added token that the chat template writes after an assistant's message.

    Args:
      tokenizer: a tokenizer, with or without a chat template.

    Returns:
      A tuple with the id of that token, or an empty tuple if there is none.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return ()
    marker = "18446744073709551557"  # Digits, because a template may change the case of letters.
    turns = [
        {"role": role, "content": text}
        for role, text in (("system", "?"), ("user", "?"), ("assistant", marker), ("user", "?"))
    ]
    # An added token that is mere whitespace, such as a line break, does not end a turn.
    end_ids = {
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content.strip()
    }.union(tokenizer.all_special_ids)
    # Some templates require a system message and some refuse it, some take texts and some content
    # parts, and some write the end of a turn only before the next turn.
    for messages, parts in itertools.product(
        (turns[1:3], turns[:3], turns[1:], turns), (False, True)
    ):
        try:
            text = apply_template(messages, tokenizer, content_parts=parts)
        except ValueError:  # If none renders, encoding the prompts reports it.
            continue
        _, found, after = text.rpartition(marker)
        for i in tokenizer(after, add_special_tokens=False).input_ids if found else ():
            if i in end_ids:
                return (i,)
    return ()
