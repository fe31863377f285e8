"""Prompts and texts: reading rows, chat templates, token ids and batches."""

from ppo_jax.data.prompts import Prompts, batch_rows, encode_prompts
from ppo_jax.data.rows import read_rows
from ppo_jax.data.text import check_ids, decode, encode_text, end_id, pad

__all__ = (
    "Prompts",
    "batch_rows",
    "check_ids",
    "decode",
    "encode_prompts",
    "encode_text",
    "end_id",
    "pad",
    "read_rows",
)
