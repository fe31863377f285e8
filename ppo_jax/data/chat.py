"""Chat messages: applying a tokenizer's chat template, and finding the token that ends a turn."""

import datetime
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_FIXED_DATE = datetime.datetime(2024, 7, 26)  # the default date of Llama 3.1's own template
# Arguments of `apply_chat_template` that a row must not change.
_RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "content_parts",
    "continue_final_message",
    "messages",
    "tokenize",
    "tokenizer",
    "tools",
}


def is_messages(value: Any) -> bool:
    """Return whether `value` is a non-empty list of messages.

    A message is a dictionary with a `role` and a `content`, which is a text or a list of parts
    `{"type": "text", "text": ...}`. An assistant's message with `tool_calls` needs no content.
    """
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("role"), str)):
        return False
    content = value.get("content")
    if isinstance(content, list):
        return all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content)
    return isinstance(content, str) or (content is None and bool(value.get("tool_calls")))


def content_of(message: Message) -> str:
    """Return the text of a message, whose parts are joined; it is empty if there is none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the columns `tools` and `chat_template_kwargs` of a row give to the template.

    Args:
      row: the row. Each of the two columns may be missing, and may be a text of JSON. `tools` is a
        list of JSON schemas, and `chat_template_kwargs` a dictionary such as
        `{"enable_thinking": False}`.

    Returns:
      The keyword arguments of `apply_template`.

    Raises:
      ValueError: if a column is of another kind, or names an argument that is not the template's.

    Example:
      >>> template_options({"prompt": [], "chat_template_kwargs": {"enable_thinking": False}})
      {'enable_thinking': False}
    """
    tools, options = (_json_column(row, name) for name in ("tools", "chat_template_kwargs"))
    if not (tools is None or (isinstance(tools, list) and all(isinstance(x, dict) for x in tools))):
        raise ValueError(f"The column 'tools' must be a list of JSON schemas, not {tools!r:.80}.")
    if options is None:
        options = {}
    if not isinstance(options, dict) or _RESERVED & set(options):
        raise ValueError(
            "The column 'chat_template_kwargs' must be a dictionary of variables of the chat "
            f"template, such as enable_thinking, not {options!r:.80}."
        )
    return {**options, "tools": tools} if tools else dict(options)


def _json_column(row: dict[str, Any], name: str) -> Any:
    """Return a column of a row, decoded if it is a text."""
    value = row.get(name)
    try:
        return (json.loads(value) if value.strip() else None) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The column {name!r} must be JSON, not {value!r:.80}.") from error


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
      All messages, from the first to the answer's last. If the prompt ends with the assistant's
      opening words, the answer continues that message. None if neither is a list of messages.

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
    if not is_messages(prompt) or turns[: len(prompt)] == prompt:
        return turns
    *earlier, opening = prompt
    if opening["role"] != "assistant" or opening.get("tool_calls"):
        return [*prompt, *turns]
    # The prompt ends with the assistant's opening words, which the answer repeats or continues.
    if turns[: len(earlier)] == earlier and len(turns) > len(earlier):
        same = turns[len(earlier)]
        if same["role"] == "assistant" and content_of(same).startswith(content_of(opening)):
            return turns
    if turns[0]["role"] == "assistant":
        text = content_of(opening) + content_of(turns[0])
        return [*earlier, {**opening, **turns[0], "content": text}, *turns[1:]]
    return [*prompt, *turns]


def apply_template(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    content_parts: bool = False,
    **options: Any,
) -> str:
    """Render messages as text with the tokenizer's chat template.

    A template that prints today's date gets a fixed one, so that the same messages give the same
    text every day.

    Args:
      messages: the conversation.
      tokenizer: a tokenizer with a chat template.
      content_parts: whether to pass each content as a list with one text part, the form that
        templates of multimodal models expect, instead of as a text.
      **options: further arguments of the tokenizer's `apply_chat_template`, such as
        `add_generation_prompt`, `continue_final_message`, `tools`, and the template's variables.

    Returns:
      The rendered text.

    Raises:
      ValueError: if the template raises any exception.
    """
    turns = []
    for message in messages:
        text = content_of(message)
        content = [{"type": "text", "text": text}] if content_parts else text
        # Data sets hold None where a message lacks a field that another one has.
        given = {name: value for name, value in message.items() if value is not None}
        turns.append({**given, "content": content})
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "Messages need a tokenizer with a chat template; this one has none. Put the template "
            "of another model, chat_template.jinja, into the model's folder, or use texts."
        )
    try:
        return tokenizer.apply_chat_template(
            turns,
            chat_template=_DATE_CALL.sub(
                lambda call: json.dumps(_FIXED_DATE.strftime(call[2])),
                tokenizer.get_chat_template(tools=options.get("tools")),
            ),
            tokenize=False,
            **options,
        )
    except Exception as error:  # A template may raise anything.
        raise ValueError(
            f"The tokenizer's chat template does not take {messages!r:.200}: "
            f"{str(error).rstrip('.')}."
        ) from error


def _render(messages: Sequence[Message], tokenizer: Any, **options: Any) -> str:
    """Apply the template to contents as texts or, if it drops or refuses those, as text parts."""
    last, texts, errors = content_of(messages[-1]).strip(), [], []
    for content_parts in (False, True):
        try:
            text = apply_template(messages, tokenizer, content_parts=content_parts, **options)
        except ValueError as error:
            errors.append(error)
            continue
        if last in text and not (content_parts and "'type'" in text):
            return text
        texts.append(text)
    if not texts:
        raise errors[0]
    return texts[0]


def render_prompt(messages: Sequence[Message], tokenizer: Any, **options: Any) -> str:
    """Render messages as the text of a prompt, up to where the assistant's answer begins.

    If the last message is the assistant's, it is the beginning of the answer, and the text ends
    with its last word.

    Args:
      messages: the conversation so far.
      tokenizer: a tokenizer with a chat template.
      **options: what `template_options` returns.

    Returns:
      The rendered text.

    Raises:
      ValueError: if the template raises any exception.
    """
    opened = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    ending = "continue_final_message" if opened else "add_generation_prompt"
    return _render(messages, tokenizer, **{**options, ending: True})


def render_conversation(prompt: Any, answer: Any, tokenizer: Any, **options: Any) -> str | None:
    """Render a prompt and its answer as one text, with the marks that the template ends it with.

    Args:
      prompt: a text, a list of messages, or None.
      answer: a text, or a list of messages: the assistant's alone, or the whole conversation, as in
        many preference data sets.
      tokenizer: a tokenizer with a chat template.
      **options: what `template_options` returns.

    Returns:
      The rendered text, or None if neither is a list of messages.

    Raises:
      ValueError: if the template raises any exception.
    """
    messages = join_messages(prompt, answer)
    return None if messages is None else _render(messages, tokenizer, **options)


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
