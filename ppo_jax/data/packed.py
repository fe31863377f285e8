"""Training rows of different lengths, several of them in one row without padding between them."""

import numpy as np


def pack_examples(
    mask: np.ndarray, *arrays: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Put rows one after the other into fewer rows, which have little padding.

    Each row, in the given order, goes to the packed row with the least room that suffices (best
    fit). Rows without a real token are left out. For supervised training, shuffle the rows before,
    take the packed rows as the rows of a batch, and pass their segments to the model and the loss,
    such as `sft_loss`, so that no token sees another row or is predicted from one.

    Args:
      mask: `[n, S]` bool, the real tokens, which begin in the first column.
      *arrays: `[n, S]` of any dtype, such as the tokens and which of them to learn.
      length: number of columns of a packed row, at least that of the longest row.

    Returns:
      The mask `[m, length]` bool of the packed rows; their segments `[m, length]` int32, the number
      of the row within its packed row; and the arrays, `[m, length]` each, 0 where the mask is
      false.

    Raises:
      ValueError: if the arrays differ in shape, a row is longer than `length`, or its real tokens
        do not begin in the first column without gaps.

    Example:
      >>> mask = np.array([[True, True, True], [True, False, False], [True, True, False]])
      >>> tokens = np.array([[1, 2, 3], [4, 0, 0], [5, 6, 0]])
      >>> mask, segments, [tokens] = pack_examples(mask, tokens, length=4)
      >>> tokens
      array([[1, 2, 3, 4],
             [5, 6, 0, 0]])
      >>> segments
      array([[0, 0, 0, 1],
             [0, 0, 0, 0]], dtype=int32)
    """
    mask, arrays = np.asarray(mask), tuple(map(np.asarray, arrays))
    if mask.ndim != 2 or any(x.shape != mask.shape for x in arrays):
        shapes = [x.shape for x in (mask, *arrays)]
        raise ValueError(
            f"The mask and the arrays must all be [n, S], but have the shapes {shapes}."
        )
    lengths = mask.sum(axis=1)
    if (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any():
        raise ValueError(
            "The real tokens of each row must begin in its first column, without gaps."
        )
    if lengths.max(initial=0) > length:
        raise ValueError(f"A row has {lengths.max()} tokens, more than length={length}.")
    rows, numbers, starts, count = _places(lengths, length)
    # The packed row and the column of every real token.
    place = np.nonzero(mask)
    to = rows[place[0]], starts[place[0]] + place[1]
    packed = np.zeros((count, length), bool)
    packed[to] = True
    segments = np.zeros((count, length), np.int32)
    segments[to] = numbers[place[0]]
    moved = [np.zeros((count, length), x.dtype) for x in arrays]
    for new, old in zip(moved, arrays, strict=True):
        new[to] = old[place]
    return packed, segments, tuple(moved)


def _places(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return each row's packed row, its number and its first column there; and the packed rows."""
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # packed rows by their room
    rooms = 0  # A bit for each room that a packed row has.
    held: list[int] = []  # number of rows in each packed row
    rows, numbers, starts = (np.zeros(len(lengths), np.int64) for _ in range(3))
    for i in np.flatnonzero(lengths).tolist():
        size = int(lengths[i])
        if enough := rooms >> size:
            room = size + (enough & -enough).bit_length() - 1  # the lowest bit
            row = with_room[room].pop()
            rooms &= ~(0 if with_room[room] else 1 << room)
        else:
            room, row = length, len(held)
            held.append(0)
        rows[i], numbers[i], starts[i] = row, held[row], length - room
        held[row] += 1
        with_room[room - size].append(row)
        rooms |= 1 << room - size
    return rows, numbers, starts, len(held)
