"""Labels that are words: their order, and the class number of each."""

from collections.abc import Sequence
from typing import Any

from ppo_jax.data.rows import Row

# Words whose order, from worst to best, is known.
_ORDERS = (
    ("negative", "neutral", "positive"),
    ("neg", "neutral", "pos"),
    ("bad", "neutral", "good"),
    ("worse", "same", "better"),
    ("rejected", "chosen"),
    ("low", "medium", "high"),
    ("false", "true"),
    ("no", "yes"),
)


def label_order(rows: Sequence[Row], given: Sequence[str] = ()) -> tuple[str, ...]:
    """Find the ascending order of labels that are words.

    Args:
      rows: dictionaries with a column `score`.
      given: the labels in ascending order, or nothing to find a well-known order.

    Returns:
      The labels in ascending order, in lower case; nothing if they are numbers.

    Raises:
      ValueError: if they are words whose order is not known.

    Example:
      >>> label_order([{"score": "positive"}, {"score": "Negative"}])
      ('negative', 'positive')
    """
    if given:
        return tuple(label.lower() for label in given)
    labels = [row["score"] for row in rows if _has_label(row)]
    found = {_as_word(label): label for label in labels}
    if all(_is_number(label) for label in found):
        return ()
    for order in _ORDERS:
        if set(found) <= set(order):
            return tuple(label for label in order if label in found)
    words = [str(label) for label in found.values()]
    shown = ", ".join(map(repr, words[:6])) + (", ..." if len(words) > 6 else "")
    raise ValueError(
        f"The labels {shown} have no order that is known; pass all of them from the worst to the "
        f"best, such as --labels {' '.join(words[:6])}."
    )


def number_labels(rows: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """Replace labels in the column `score` by their class numbers.

    Args:
      rows: dictionaries with a column `score`.
      order: what `label_order` returned. If it is empty, the rows stay as they are.

    Returns:
      The rows with class numbers from 0.

    Raises:
      ValueError: if a row has no label, or another one.

    Example:
      >>> number_labels([{"score": "Positive"}], ("negative", "positive"))
      [{'score': 1}]
    """
    if not order:
        return list(rows)
    classes = {label: number for number, label in enumerate(order)}
    for i, row in enumerate(rows):
        if not _has_label(row):
            raise ValueError(f"Row {i} has no label; add it, or remove the row.")
        if _as_word(row.get("score")) not in classes:
            raise ValueError(
                f"Row {i} has the label {row.get('score')!r}, which is none of the labels "
                f"{', '.join(map(repr, order))}; add it to --labels at its place in their order."
            )
    return [{**row, "score": classes[_as_word(row["score"])]} for row in rows]


def _has_label(row: Row) -> bool:
    return row.get("score") is not None and _as_word(row["score"]) != ""


def _as_word(label: Any) -> str:
    """Return a label as text without case, and a whole number without a decimal point."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip().lower()


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
