"""What `ppo-jax generate` does."""

import sys
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from ppo_jax import data
from ppo_jax.commands.inference import PROMPT_OPTIONS, Generate, SamplingOptions
from ppo_jax.commands.prompts import PromptOptions
from ppo_jax.data.chat import as_user_messages
from ppo_jax.data.files import names_a_file
from ppo_jax.data.rows import Row
from ppo_jax.data.text import pad_id, without_stops
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import rollout
from ppo_jax.run.assembly import load_model
from ppo_jax.run.encoding import check_top_k, encode_for, stop_ids
from ppo_jax.types import Rollout


def sample_responses(
    model: str,
    rows: list[Row],
    options: SamplingOptions,
    prompt_options: PromptOptions = PROMPT_OPTIONS,
) -> Iterator[tuple[Rollout, data.Prompts, list[str]]]:
    """Load a model and sample one response to each prompt.

    Args:
      model: a folder or a Hugging Face id in safetensors, or a .gguf file.
      rows: the prompts, as `data.read_rows` returns them.
      options: how to sample.
      prompt_options: what happens to long prompts.

    Yields:
      For each batch the responses as arrays, their prompts, and the responses as texts.

    Raises:
      ValueError: if the model cannot be loaded, or a prompt or an option does not fit it.
    """
    policy, tokenizer = load_model(model)
    check_top_k(options.top_k, policy.config)
    rows = as_user_messages(rows) if options.chat else rows
    new_tokens, limits = options.max_new_tokens, prompt_options.limits()
    prompts = encode_for(rows, tokenizer, policy.config, new_tokens, **limits)
    if (note := prompt_options.report(prompts, "the data")) is not None:
        print(note, file=sys.stderr)
    stops = stop_ids(tokenizer, policy, options.stop_tokens)
    generate = jax.jit(
        partial(
            rollout.generate,
            language_model(policy.config),
            max_new_tokens=options.max_new_tokens,
            stop_ids=stops,
            pad_id=pad_id(tokenizer, policy.config.vocab_size),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            greedy=options.greedy,
        )
    )
    size, key = min(options.batch_size, len(prompts)), jax.random.key(options.seed)
    for first in range(0, len(prompts), size):
        # The last batch is filled up with the first prompts, so that one shape is compiled.
        ids = np.arange(first, first + size)
        batch = prompts.take(ids % len(prompts))
        out = generate(policy.params, key, batch.tokens, batch.mask, row_ids=ids)
        kept = np.arange(min(size, len(prompts) - first))
        out, batch = jax.tree.map(lambda x, n=len(kept): x[:n], out), batch.take(kept)
        text_mask = without_stops(tokenizer, out.responses, out.response_mask, stops)
        mask = np.concatenate([batch.mask, text_mask], axis=1)
        yield out, batch, data.decode(tokenizer, out.tokens, mask, start=out.prompt_length)


def generate(options: Generate) -> None:
    """Sample and print the responses."""
    rows = [
        row
        for text in options.prompts
        for row in (
            data.read_rows(text, names=options.data_options.names())
            if names_a_file(text)
            else [{"prompt": text}]
        )
    ]
    sampled = sample_responses(options.model, rows, options.sampling, options.data_options)
    for _, batch, responses in sampled:
        for prompt, response in zip(batch.texts, responses, strict=True):
            print(f"{prompt}|{response}")
