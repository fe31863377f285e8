"""Find the columns of a data set that hold prompts, responses and labels."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ppo_jax.errors import SettingError

# For each column that the package reads, the columns of the data that may hold it; the first that
# the data has is taken. Columns of whole conversations have the key "messages".
Names = Mapping[str, Sequence[str]]

PROMPT_NAMES = ("prompt", "query", "question")
RESPONSE_NAMES = ("response", "completion", "answer")
# A text or a conversation that holds the prompt as well as the response.
WHOLE_NAMES = ("messages", "text")
COMMON_NAMES: Names = {
    "prompt": (*PROMPT_NAMES, *WHOLE_NAMES),
    "response": (*RESPONSE_NAMES, *WHOLE_NAMES),
    "score": ("score", "label"),
    "messages": ("messages",),
}
_OPTIONS = {
    "prompt": "--prompt-column or --messages-column",
    "response": "--response-column, --text-column or --messages-column",
    "score": "--label-column",
}


def _candidates(option: str, common: Sequence[str]) -> tuple[str, ...]:
    """Return the common names for "auto", no name for "none", and otherwise the given name."""
    return {"auto": tuple(common), "none": ()}.get(option, (option,))


def _only_one(**options: str) -> str | None:
    """Return the name of the option that names a column, and refuse two of them."""
    given = [name for name, value in options.items() if value not in ("auto", "none")]
    if len(given) > 1:
        both = " and ".join(f"{name}={options[name]}" for name in given)
        raise SettingError(f"{both} name two columns for the same texts; give only one of them.")
    return given[0] if given else None


@dataclass(frozen=True, kw_only=True)
class PromptColumns:
    """The column that holds the prompts of PPO.

    Example:
      >>> PromptColumns(messages_column="chat").names()["prompt"]
      ('chat',)
    """

    prompt_column: str = "auto"
    """Column of the prompts. auto: the first of prompt, query, question, messages and text that the
    data has. none: do not look for such a column."""
    messages_column: str = "auto"
    """Column of conversations, whose last message is left out if it is the assistant's. auto:
    messages, if no column of prompts is found before it. none: do not look for such a column."""

    def __post_init__(self) -> None:
        _only_one(prompt_column=self.prompt_column, messages_column=self.messages_column)

    def names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the columns, as `read_rows` takes them."""
        messages = _candidates(self.messages_column, ("messages",))
        if self.messages_column not in ("auto", "none"):
            return {"prompt": messages, "messages": messages}
        if self.prompt_column == "none":
            return {"prompt": messages, "messages": messages}
        if self.prompt_column != "auto":
            return {"prompt": (self.prompt_column,), "messages": ()}
        return {"prompt": (*PROMPT_NAMES, *messages, "text"), "messages": messages}


@dataclass(frozen=True, kw_only=True)
class ExampleColumns:
    """The columns that hold the texts of supervised training.

    Example:
      >>> ExampleColumns(text_column="review").names()
      {'prompt': (), 'response': ('review',)}
    """

    prompt_column: str = "auto"
    """Column of the prompts. auto: the first of prompt, query and question that the data has. none:
    do not look for such a column."""
    response_column: str = "auto"
    """Column of the responses. auto: the first of response, completion and answer. none: do not
    look for such a column."""
    messages_column: str = "auto"
    """Column of conversations, whose last message is the response. auto: messages, if there are no
    responses. none: do not look for such a column."""
    text_column: str = "auto"
    """Column of texts without a prompt. auto: text, if there are no responses or conversations.
    none: do not look for such a column."""

    def __post_init__(self) -> None:
        self._given()

    def _given(self) -> str | None:
        return _only_one(
            response_column=self.response_column,
            messages_column=self.messages_column,
            text_column=self.text_column,
        )

    def names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the columns, as `read_rows` takes them."""
        given = self._given()
        whole = given in ("messages_column", "text_column")
        found = (
            *_candidates(self.response_column, RESPONSE_NAMES),
            *_candidates(self.messages_column, ("messages",)),
            *_candidates(self.text_column, ("text",)),
        )
        return {
            "prompt": _candidates(self.prompt_column, () if whole else PROMPT_NAMES),
            "response": found if given is None else (getattr(self, given),),
        }


def choose_columns(
    found: Collection[str], columns: Sequence[str], optional: Sequence[str], names: Names, data: str
) -> dict[str, str]:
    """Choose the columns of a data set.

    Args:
      found: the columns of the data set.
      columns: the columns that are needed.
      optional: the columns that are read if the data has them.
      names: for each of them, the columns of the data that may hold it.
      data: what the data is called in an error.

    Returns:
      For each column, the column of the data that holds it.

    Raises:
      ValueError: if a column that is needed, or that was asked for by its name, does not exist.

    Example:
      >>> choose_columns(["question", "answer"], ["response"], ["prompt"], COMMON_NAMES, "a.csv")
      {'response': 'answer', 'prompt': 'question'}
    """
    chosen = {}
    has = ", ".join(map(repr, found)) or "none"
    for column in (*columns, *optional):
        candidates = names.get(column, (column,))
        if column in optional and len(candidates) > 1:
            candidates = [name for name in candidates if name not in WHOLE_NAMES]
        name = next((name for name in candidates if name in found), None)
        if name is not None:
            chosen[column] = name
        elif column in columns or (len(candidates) == 1 and candidates[0] != column):
            called = " or ".join(", ".join(map(repr, candidates)).rsplit(", ", 1))
            called = called or f"for its {column}s"
            raise ValueError(
                f"{data} needs a column {called}, but its columns are: {has}. {_advice(column)}"
            )
    if chosen.get("response") in WHOLE_NAMES and len(names.get("prompt", ())) > 1:
        chosen.pop("prompt", None)  # The text or the conversation holds the prompt as well.
    return chosen


def _advice(column: str) -> str:
    """Say what to do if a data set has no such column."""
    if column in ("chosen", "rejected"):
        return "To learn from labels instead of pairs, pass --learn-from classes or scores."
    option = _OPTIONS.get(column)
    return f"Name the right column with {option}." if option else "Rename the right column."
