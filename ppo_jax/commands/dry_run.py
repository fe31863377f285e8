"""Read what a command needs, and report its memory and steps without compiling or writing."""

from functools import partial
from typing import Any

import jax

from ppo_jax.commands import fitting
from ppo_jax.commands.learner import make_devices
from ppo_jax.commands.supervised import SFT, Reward
from ppo_jax.commands.supervised_rows import encode_examples, read_examples
from ppo_jax.commands.train import Train
from ppo_jax.commands.training import (
    held_out_source,
    read_fork,
    read_functions,
    read_prompts,
    with_critic,
    with_split_seed,
)
from ppo_jax.commands.value import Value, value_training
from ppo_jax.data import Prompts, Row, examples
from ppo_jax.errors import SettingError
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import families, pretrained, stored
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.lora_settings import LoRA
from ppo_jax.models.transformer import init_params
from ppo_jax.plan.memory import estimate_memory, size_of
from ppo_jax.reward_functions import load_rewards
from ppo_jax.reward_functions.loading import check_columns
from ppo_jax.run import provenance
from ppo_jax.run.differences import setting_differences
from ppo_jax.run.encoding import check_top_k, encode_for, stop_ids
from ppo_jax.run.files import check_free
from ppo_jax.run.parts import (
    check_reference,
    check_vocabulary,
    read_critic,
    reference_model,
    starting_adapters,
)
from ppo_jax.run.remote import local_copy
from ppo_jax.run.resume import read_config
from ppo_jax.run.serialize import to_json
from ppo_jax.run.stored import find_checkpoint
from ppo_jax.stores import split_url, store_url


def dry_run(command: Any) -> None:
    """Print what a command would do, after everything but the weights of models is read.

    Args:
      command: a `Train`, `Value`, `SFT` or `Reward`.

    Raises:
      SettingError: if the settings do not fit one another or the devices.
      ValueError: if something cannot be read.
    """
    if isinstance(command, SFT | Reward):
        _supervised(command)
    else:
        _train(value_training(command.train) if isinstance(command, Value) else command)
    print("Nothing was compiled or written.")


def _train(options: Train) -> None:
    if options.deterministic:
        provenance.make_deterministic()
    options.processes.start()
    options = with_critic(options, options.out)
    make_devices(options)
    options = with_split_seed(options, options.out, read_fork(options))
    ppo, (rows, held_out_rows) = options.ppo, read_prompts(options)
    policy, tokenizer = _read_model(options.model, dtype=options.dtype, remat=options.remat)
    config = policy.config
    if not config.causal:
        raise ValueError(f"{options.model} is an encoder; a policy must be a decoder.")
    check_top_k(ppo.top_k, config)
    stop_ids(tokenizer, policy, options.stop_tokens)
    adapters, others = _read_other_models(options, policy, tokenizer)
    reward = load_rewards(
        options.reward, options.reward_given, options.reward_label, options.reward_timeout
    )
    limits = options.data_options.limits() | others

    def encode(rows: list[Row]) -> Prompts:
        prompts = encode_for(rows, tokenizer, config, ppo.max_new_tokens, **limits)
        check_columns(reward, prompts)
        return prompts

    prompts = encode(rows)
    held_out = encode(held_out_rows) if held_out_rows else None
    for found, source in ((prompts, options.prompts), (held_out, held_out_source(options))):
        if found and (note := options.data_options.report(found, source)) is not None:
            print(note)
    longest = max(p.tokens.shape[1] for p in (prompts, held_out) if p is not None)
    read_functions(options, longest)
    done = _updates_done(options, longest)
    _report_steps(options, done, len(prompts), 0 if held_out is None else len(held_out), longest)
    critic = options.critic if options.critic in ("shared", "none") else "separate"
    _report_memory(
        "a PPO step on one device, before anything is sharded",
        estimate_memory(config, ppo, prompt_tokens=longest, critic=critic, adapters=adapters),
    )


def _read_model(model: str, **options: Any) -> tuple[Pretrained, Any]:
    """Read the config and the tokenizer of a model, but no parameters, and print its size."""
    hf = stored.read_config(model)
    config, tokenizer = families.config_of(hf, **options), pretrained.load_tokenizer(model)
    pretrained.check_tokenizer(tokenizer, config)
    count = pretrained.count_params(_shapes(config))
    print(f"{model}: {hf['model_type']}, {count:,} parameters, {config.positions:,} positions.")
    return Pretrained(config, {}, hf), tokenizer


def _shapes(config: TransformerConfig) -> Any:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _read_other_models(
    options: Train, policy: Pretrained, tokenizer: Any
) -> tuple[LoRA | None, dict[str, int | None]]:
    """Read the critic's config and head, the reference's config, and the adapter.

    Returns:
      The settings of the adapters, or None; and the positions of the other models for `encode_for`.
    """
    others: dict[str, int | None] = {}
    check_reference(options.reference is not None, options.ppo)
    if options.critic not in ("shared", "separate", "none"):
        others["critic_positions"] = read_critic(options.critic, policy.config).config.positions
    if options.reference is not None:
        hf = stored.read_config(options.reference)
        check_vocabulary(tokenizer, pretrained.load_tokenizer(options.reference), options.reference)
        reference = Pretrained(families.config_of(hf), {}, hf)
        others["ref_positions"] = reference_model(reference, policy.config)[1]
    if options.adapter is not None:
        return starting_adapters(options.adapter, policy)[1], others
    return options.lora if options.lora.rank else None, others


def _updates_done(options: Train, longest: int) -> int:
    """Return the number of updates of the checkpoint that the run would start from.

    Raises:
      ValueError: if the folder holds another run, or one with other settings.
    """
    out, may_resume = options.out, options.resume in ("yes", "auto")
    if (fork := read_fork(options)) is not None:
        return find_checkpoint(local_copy(fork.run), fork.which)
    if (url := store_url(out)) is not None:
        split_url(url)
        print(f"{url} is in an object store, which is not opened.")
        return 0
    check_free(out, resume=may_resume)
    exists = any((out / "checkpoints").glob("*"))
    if not may_resume or not (exists or options.resume == "yes"):
        return 0
    done = find_checkpoint(out)
    now = {
        "ppo": options.ppo,
        "loop": options.loop,
        "command": options,
        "data": {"longest_prompt": longest},
        "jax": provenance.numerics(),
    }
    for name, old, new in setting_differences(read_config(out)["settings"], to_json(now)):
        raise ValueError(
            f"{name} was {old} in the run in {out} and is {new} now; to resume, set it to {old}."
        )
    if done > options.loop.updates:
        raise SettingError(
            f"The run in {out} has made {done} updates; updates={options.loop.updates} is fewer."
        )
    return done


def _report_steps(options: Train, done: int, prompts: int, held_out: int, longest: int) -> None:
    ppo, loop = options.ppo, options.loop
    left, per_update = loop.updates - done, ppo.batch_size // ppo.group_size
    print(f"{prompts:,} prompts and {held_out:,} held-out ones of at most {longest} tokens.")
    print(
        f"{left:,} updates{f' after {done:,}' if done else ''} of {ppo.batch_size:,} responses to "
        f"{per_update:,} prompts, of at most {ppo.max_new_tokens} tokens: "
        f"{left * per_update / prompts:.2g} passes over the prompts."
    )
    print(
        f"{left * ppo.epochs * ppo.minibatches:,} optimizer steps on {ppo.minibatch_size:,} "
        f"responses, {f'{ppo.rows_at_a_time:,} at a time' if ppo.bins is None else 'in bins'}."
    )


def _report_memory(what: str, parts: dict[str, int]) -> None:
    print(f"Memory of {what} (estimate):")
    for name, size in {**parts, "together": sum(parts.values())}.items():
        print(f"  {name:34}{size / 2**30:10.3f} GiB")


def _supervised(command: SFT | Reward) -> None:
    check_free(command.out, resume=command.run_options.resume != "no")
    command = fitting.with_split_seed(command)
    options = command.training
    if isinstance(command, SFT):
        rows = read_examples(command.data, options, ("response",), command.columns.names())
        if command.model is None:
            start, tokenizer = fitting.start_model(command, rows[0])
        else:
            start, tokenizer = _read_model(command.model)
        encode: Any = examples.encode_demonstrations
        reason = "their prompts leave no room for a response"
    else:
        rows = fitting.read_answers(command)
        start, tokenizer = _read_model(command.model)
        encode = partial(examples.encode_judgements, learn_from=command.learn_from)
        reason = "their two texts end with the same tokens"
    config = start.config
    length = min(options.length, config.positions)
    encode = partial(encode, tokenizer=tokenizer, length=length)
    train, held_out = arrays = encode_examples(command.data, options, rows, encode, reason)
    if isinstance(command, Reward):
        fitting.class_thresholds(command, arrays)
    fitting.check_tokens(arrays, config.vocab_size)
    count = len(train[0])
    if not (steps := count // options.batch_size):
        raise ValueError(
            f"{count} rows are left to learn from, fewer than batch_size={options.batch_size}."
        )
    others = 0 if held_out is None else len(held_out[0])
    print(f"{count:,} rows and {others:,} held-out ones of at most {length} tokens.")
    print(f"{options.epochs} epochs of {steps:,} steps: {options.epochs * steps:,} steps.")
    size = size_of(_shapes(config))
    _report_memory(
        "training on one device, without activations",
        {"parameters": size, "gradients": size, "AdamW's moments": 2 * size},
    )
