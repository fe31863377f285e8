"""What `ppo-jax train` does."""

import contextlib
from dataclasses import replace
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from ppo_jax import data, hashing
from ppo_jax.commands.learner import read_learner
from ppo_jax.commands.prompts import PromptOptions, hold_out
from ppo_jax.commands.stored import split_seed
from ppo_jax.commands.train import Train
from ppo_jax.data.chat import as_user_messages
from ppo_jax.distributed import processes
from ppo_jax.errors import SettingError
from ppo_jax.ops.losses import PolicyLossFn
from ppo_jax.ppo.critic_settings import choose_critic
from ppo_jax.ppo.loss import agent_loss_fn
from ppo_jax.ppo.own_functions import check_advantage_fn, check_policy_loss
from ppo_jax.ppo.presets import PRESETS
from ppo_jax.ppo.unread import check_replaced
from ppo_jax.reward_functions import load_function, load_rewards
from ppo_jax.reward_functions.loading import check_columns
from ppo_jax.run import provenance
from ppo_jax.run.assembly import Learner
from ppo_jax.run.export import export_result
from ppo_jax.run.files import check_free, lock_folder
from ppo_jax.run.forks import Fork
from ppo_jax.run.remote import Mirror, local_copy
from ppo_jax.run.resume import read_config
from ppo_jax.run.serialize import to_json
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.summary import print_before_and_after, write_summary
from ppo_jax.run.trainer import Trainer
from ppo_jax.stores import store_url
from ppo_jax.types import AdvantageFn


def train(options: Train) -> None:
    """Train, and write the fine-tuned model and the summary."""
    if options.deterministic:
        provenance.make_deterministic()
    options.processes.start()
    if options.mesh == "pmap" and jax.process_count() > 1:
        raise SettingError(
            f"mesh=pmap runs in one process; for {jax.process_count()} processes use "
            f"mesh=data={jax.device_count()}."
        )
    settings = flatten_dict(to_json(options), sep=".")
    own = ("out", "processes.")  # These options may differ between processes.
    processes.check_same({name: x for name, x in settings.items() if not name.startswith(own)})
    mirror = None if (url := store_url(options.out)) is None else Mirror(url)
    out = options.out if mirror is None else mirror.folder
    check_free(out, resume=options.resume in ("yes", "auto"))
    fork = read_fork(options)
    options = with_critic(options, out)
    trainer = build(options, out, fork=fork, mirror=mirror)
    with contextlib.ExitStack() as stack:
        if mirror is not None:
            stack.callback(mirror.close)
        if processes.is_first():
            # The trainer releases its own lock before the model is written.
            stack.callback(lock_folder(out).release)
        _train(options, trainer)
        if mirror is not None:
            mirror.push()


def read_fork(options: Train) -> Fork | None:
    """Return the checkpoint to fork, once it is checked that there is such a run."""
    if (options.resume == "fork") != (options.fork_from is not None):
        raise SettingError(
            f"resume=fork and fork_from go together, but resume={options.resume} and "
            f"fork_from={options.fork_from}."
        )
    if options.fork_from is None:
        return None
    if store_url(options.fork_from) is None:
        read_config(options.fork_from)
    return Fork(options.fork_from, options.fork_update)


def with_critic(options: Train, out: Path) -> Train:
    """Return the options with the critic that a new run, or the run that it continues, has.

    Args:
      options: the options of the command.
      out: the folder of the run on this machine.

    Raises:
      SettingError: if the settings do not go with the critic that the options name.
    """
    if options.critic == "auto" and options.resume != "no":
        run = options.fork_from or out
        exists = store_url(run) is None and (run / "config.json").is_file()
        command = read_config(run)["settings"].get("command") if exists else None
        if command and "critic" in command:
            return replace(options, critic=command["critic"])
    own = options.advantage is not None
    critic = choose_critic(options.critic, options.ppo, own_advantage=own)
    return replace(options, critic=str(critic))


def build(
    options: Train,
    out: Path,
    loop: LoopConfig | None = None,
    fork: Fork | None = None,
    mirror: Mirror | None = None,
) -> Trainer:
    """Read model, prompts and reward, and make a trainer.

    Args:
      options: the options of the command, as `with_critic` returns them.
      out: the folder that the trainer writes to.
      loop: settings that replace `options.loop`, or None.
      fork: the checkpoint of another run that the run starts from, or None.
      mirror: what keeps `out` in an object store, or None.

    Returns:
      The trainer.

    Raises:
      SettingError: if the settings do not fit one another or the devices.
      ValueError: if the model, the prompts or the reward cannot be read.
    """
    options = with_split_seed(options, out, fork)
    rows, held_out_rows = read_prompts(options)
    reward = load_rewards(  # Before the models, which take longer to read.
        options.reward, options.reward_given, options.reward_label, options.reward_timeout
    )
    learner = read_learner(options)
    prompts = encode_prompts(options.data_options, learner, rows, options.prompts)
    source = held_out_source(options)
    held_out = encode_prompts(options.data_options, learner, held_out_rows, source)
    assert prompts is not None  # There are rows to learn from.
    for part in (prompts, held_out):
        if part is not None:
            check_columns(reward, part)
    advantage_fn, policy_loss = read_functions(options, prompts.tokens.shape[1])
    return Trainer(
        learner,
        prompts,
        reward,
        out=out,
        loop=loop or options.loop,
        eval_prompts=held_out,
        settings=options,
        resume="no" if options.resume == "fork" else options.resume,
        fork=fork,
        advantage_fn=advantage_fn,
        loss_fn=agent_loss_fn(learner.agent, policy_loss=policy_loss) if policy_loss else None,
        mirror=mirror,
    )


def read_functions(
    options: Train, prompt_tokens: int
) -> tuple[AdvantageFn | None, PolicyLossFn | None]:
    """Return the user's own advantage estimator and loss, or None where no option names one.

    Args:
      options: the options of the command.
      prompt_tokens: the length of the longest prompt.

    Raises:
      SettingError: if a function does not return what it must, or a setting is for the method that
        it replaces.
      ValueError: if there is no such function.
    """
    ppo, advantage_fn, policy_loss = options.ppo, None, None
    check_replaced(ppo, PRESETS[options.preset], advantage=options.advantage, loss=options.loss)
    if options.advantage is not None:
        advantage_fn = load_function(options.advantage, "advantage")
        if options.mesh != "pmap":  # There it may use the mapped axis.
            name = f"advantage={options.advantage}"
            check_advantage_fn(advantage_fn, ppo, prompt_tokens=prompt_tokens, name=name)
    if options.loss is not None:
        if ppo.entropy_target is not None:
            raise SettingError(
                f"loss={options.loss} does not read the weight that entropy_target adapts; leave "
                "out one of the two."
            )
        policy_loss = load_function(options.loss, "loss")
        check_policy_loss(policy_loss, ppo, name=f"loss={options.loss}")
    return advantage_fn, policy_loss


def with_split_seed(options: Train, out: Path, fork: Fork | None = None) -> Train:
    """Return options whose seed of the split is known: that of the run that goes on, or 0."""
    if not options.eval_fraction or options.eval_seed is not None:
        return options
    seed = 0
    if fork is not None:
        seed = split_seed(local_copy(fork.run, only="config.json"))
    elif options.resume in ("yes", "auto"):
        seed = split_seed(out)
    return replace(options, eval_seed=seed)


def read_prompts(options: Train) -> tuple[list[data.Row], list[data.Row]]:
    """Read the prompts to learn from and those that are held out."""

    def read(source: str) -> list[data.Row]:
        rows = data.read_rows(source, names=options.data_options.names())
        return as_user_messages(rows) if options.chat else rows

    rows = read(options.prompts)
    if options.eval_prompts is not None:
        return rows, read(options.eval_prompts)
    if not options.eval_fraction:
        return rows, []
    fraction, seed = options.eval_fraction, options.eval_seed or 0
    return hold_out(rows, options.prompts, fraction=fraction, seed=seed)


def held_out_source(options: Train) -> str:
    """Return where the held-out prompts come from, for a message."""
    return options.eval_prompts or f"the held-out part of {options.prompts}"


def _place(options: Train) -> str:
    return store_url(options.out) or str(options.out)


def _train(options: Train, trainer: Trainer) -> None:
    done = int(trainer.state.update)
    forked = options.resume == "fork"
    processes.print_once(
        f"A run starts in {_place(options)} from {options.fork_from} after {done} updates."
        if forked
        else f"The run in {_place(options)} continues after {done} updates."
        if done
        else f"A run starts in {_place(options)}; the first update takes longer, as it is compiled."
    )
    state = trainer.run()
    digest = hashing.digest(state.params)
    export_result(trainer.out, trainer, state, base_name=options.model)
    updates = int(state.update)
    processes.on_first_process(
        lambda: print_before_and_after(write_summary(trainer.out, updates, digest))
    )
    learns = options.ppo.critic.warmup_updates < options.loop.updates  # unlike ppo-jax value
    if trainer.eval_prompts is None and learns:
        processes.print_once(
            "Nothing was evaluated; --eval-fraction 0.1 would hold a tenth of the prompts out, and "
            "compare the responses to them before and after training."
        )
    processes.print_once(
        f"The fine-tuned model is in {_place(options)}/model; every update's metrics are in "
        f"{_place(options)}/metrics.jsonl.\nDigest of the final parameters: {digest}"
    )


def encode_prompts(
    options: PromptOptions, learner: Learner, rows: list[data.Row], source: str
) -> data.Prompts | None:
    """Tokenize prompts for a learner, and print how many of them are too long.

    Args:
      options: what happens to long prompts.
      learner: what is trained.
      rows: the rows of the prompts.
      source: where they come from.

    Returns:
      The prompts; None if there are no rows.
    """
    if not rows:
        return None
    prompts = learner.encode(rows, **options.limits())
    if (note := options.report(prompts, source)) is not None:
        processes.print_once(note)
    return prompts
