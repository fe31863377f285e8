"""Prompts and training rows: reading texts, applying chat templates, tokenizing and padding.

`rows` reads texts from lists, files and data sets, `columns` finds the columns that hold them,
`chat` applies chat templates, `text` converts between texts and token ids, `prompts` makes the
batches of PPO, `examples` makes the training arrays of the supervised stages, and `packed` packs
rows of different lengths.
"""

from ppo_jax.data.chat import Message
from ppo_jax.data.packed import pack_examples
from ppo_jax.data.prompts import LongPrompts, Prompts, batch_rows, encode_prompts
from ppo_jax.data.rows import Row, read_rows
from ppo_jax.data.text import check_ids, decode, encode_text, end_id, pad

__all__ = (
    "LongPrompts",
    "Message",
    "Prompts",
    "Row",
    "batch_rows",
    "check_ids",
    "decode",
    "encode_prompts",
    "encode_text",
    "end_id",
    "pack_examples",
    "pad",
    "read_rows",
)
