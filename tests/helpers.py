"""Builders and checks shared by test modules: tiny models and runs, peers in PyTorch, commands.

Reference implementations in numpy are in `oracles`. PyTorch is imported only where it is needed,
because processes that tests start import this module too and should start quickly.
"""

import functools
import multiprocessing
import os
import re
import runpy
import warnings
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import AxisType, PartitionSpec
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_jax import cli, data
from ppo_jax.hashing import digest
from ppo_jax.models import heads, lora, transformer
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import pretrained, safetensors_format
from ppo_jax.models.io.families import gpt2
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.transformer import language_model
from ppo_jax.ops import losses
from ppo_jax.ops.clips import ratio_clip
from ppo_jax.ops.metrics import policy_metrics
from ppo_jax.ppo import rollout
from ppo_jax.ppo.estimators import gae
from ppo_jax.ppo.scoring import make_experience, score_rollout
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import Agent, init_key
from ppo_jax.reward_functions import TextReward
from ppo_jax.run.assembly import Learner
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.trainer import Trainer

# --- compiled functions ---

# Outside of jit, each operation of a call is compiled as a program of its own, which is slow.
init_params = jax.jit(transformer.init_params, static_argnames="config")
init_scorer = jax.jit(heads.init_scorer, static_argnames="config")
generate = jax.jit(
    rollout.generate,
    static_argnames=(
        "model",
        "max_new_tokens",
        "stop_ids",
        "pad_id",
        "min_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "greedy",
        "stop_at_end",
        "truncate_after",
        "slots",
    ),
)


def logits_of(model, params, tokens, mask) -> jax.Array:
    """Return the logits at every position."""
    return model.logits(params, model.hidden(params, jnp.asarray(tokens), jnp.asarray(mask))[0])


compiled_logits = jax.jit(logits_of, static_argnames="model")


# --- a tiny model over 20 letters ---

WORDS = ["<end>", *(chr(ord("a") + i) for i in range(20))]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are the letters `a` to `t`.

    `<end>` is the end token, and an unknown word becomes `a`.
    """
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def tiny_config(**changes) -> TransformerConfig:
    """Return the config of a two-layer model for `word_tokenizer`."""
    sizes = {"vocab_size": len(WORDS), "positions": 16, "width": 16}
    return TransformerConfig(**{**sizes, "layers": 2, "heads": 2, "mlp_width": 32, **changes})


def tiny_policy(**changes) -> Pretrained:
    """Return a random model of `tiny_config(**changes)`, ready for `pretrained.save_policy`."""
    config = tiny_config(**changes)
    params = transformer.init_params(config, jax.random.key(0))
    return Pretrained(config, params, gpt2.config_to_hf(config, end_id=0))


def likes_b(prompts: list[str], responses: list[str]) -> list[float]:
    """Score a response by half the number of its words that are `b`."""
    return [response.split().count("b") / 2 for response in responses]


def encode_rows(rows: list, tokenizer, ppo: PPOConfig, positions: int = 16) -> data.Prompts:
    """Encode texts or rows as prompts of the tiny model."""
    rows = data.read_rows(rows)
    return data.encode_prompts(
        rows, tokenizer, positions=positions, new_tokens=ppo.max_new_tokens, pad_id=0
    )


# --- tiny runs ---

SIMPLE_PPO = PPOConfig(
    batch_size=32,
    epochs=2,
    minibatches=2,
    max_new_tokens=6,
    learning_rate=3e-3,
    kl_coef=0.01,
    vf_coef=0.5,
)
FULL_PPO = PPOConfig(
    batch_size=16,
    epochs=2,
    minibatches=2,
    micro_batch=4,
    max_new_tokens=5,
    learning_rate=0.1,
    vf_coef=0.5,
    kl_coef=0.1,
    kl_target=0.5,
    kl_horizon=200,
    scale_scores=True,
    target_kl=0.001,
    whiten_rewards=True,
)


def simple_trainer(
    out,
    *,
    ppo=SIMPLE_PPO,
    positions=16,
    shared=False,
    reward=likes_b,
    wrap=TextReward,
    resume="no",
    loss_fn=None,
    **loop,
) -> Trainer:
    """Return a run of plain PPO on the tiny model; `loop` overrides fields of `LoopConfig`."""
    model, tokenizer = tiny_policy(layers=1, positions=positions), word_tokenizer()
    prompts = encode_rows(["a b", "c", "d e f", "g"], tokenizer, ppo, positions)
    critic = heads.shared_critic() if shared else heads.separate_critic(model.config)
    fresh = heads.init_scorer(model.config, jax.random.key(1))
    params = {"policy": model.params, "critic": {"head": fresh["head"]} if shared else fresh}
    agent = Agent(language_model(model.config), critic, ppo, (0,), 0)
    config = LoopConfig(**{"updates": 4, "progress": False, "tensorboard": False, **loop})
    more = {"eval_prompts": prompts, "resume": resume, "loss_fn": loss_fn}
    learner = Learner(agent, params, tokenizer)
    return Trainer(learner, prompts, wrap(reward), out=out, loop=config, **more)


def full_trainer(
    out,
    *,
    ppo=FULL_PPO,
    reward=likes_b,
    resume="no",
    adapters=True,
    mesh=None,
    sampling=None,
    pmap=False,
    held_out=None,
    mirror=None,
    **loop,
) -> Trainer:
    """Return a run whose checkpoint must hold all that a checkpoint can hold.

    It has adapters, a separate critic, adaptive KL, score scaling and target KL. `loop` overrides
    fields of `LoopConfig`.
    """
    config = tiny_config(layers=1, lora_scale=2.0 if adapters else 1.0)
    tokenizer = word_tokenizer()
    prompts = encode_rows(["a b", "c", "d e f", "g", "h i", "j k l"], tokenizer, ppo)
    params = {
        "policy": transformer.init_params(config, init_key(0, 0)),
        "critic": heads.init_scorer(config, init_key(0, 1)),
    }
    frozen = None
    if adapters:
        spec = lora.LoRA(rank=2, alpha=4.0, targets="attn/(q|o)$")
        params, frozen = lora.adapt(params, init_key(0, 2), spec)
    agent = Agent(language_model(config), heads.separate_critic(config), ppo, (0,), 0)
    defaults = {"updates": 4, "progress": False, "tensorboard": False}
    return Trainer(
        Learner(agent, params, tokenizer, frozen, mesh=mesh, sampling=sampling, pmap=pmap),
        prompts,
        TextReward(reward),
        out=Path(out),
        loop=LoopConfig(**{**defaults, "save_every": 1, "eval_every": 3, **loop}),
        resume=resume,
        mirror=mirror,
        eval_prompts=prompts if held_out is None else encode_rows(held_out, tokenizer, ppo),
    )


def slow_but(fast: Container, cases: Iterable) -> list:
    """Mark the cases of a parametrized test as slow, except for those in `fast`."""
    marked = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
    slow = lambda case: marked(*case) if isinstance(case, tuple) else marked(case)
    return [case if case in fast else slow(case) for case in cases]


# --- processes ---

# A new process is a fork of one that has imported these modules, but has not used JAX.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [__name__, "ppo_jax.commands.training", "transformers.models.auto.tokenization_auto"]
)


def start_process(function: Callable, *args, log: Path, folder: Path, **environment: str):
    """Start a process that calls a function of this module in a folder and prints to `log`."""
    process = FORKS.Process(target=_call, args=(function, args, log, folder, environment))
    process.start()
    return process


def _call(function, args, log, folder, environment) -> None:
    """Call a function with other standard streams, working folder and environment variables."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.update(environment)
    try:
        function(*args)
    finally:
        # JAX does this at the end of an ordinary process, but multiprocessing leaves it out. A
        # process that ended first would take the others with it.
        jax.distributed.shutdown()


def run_command(args: list[str]) -> None:
    """Run `ppo-jax`."""
    cli.main(args)


def run_script(path: Path) -> None:
    """Run a Python file as the main program."""
    runpy.run_path(str(path), run_name="__main__")


def run_command_strictly(args: list[str]) -> None:
    """Run `ppo-jax` so that each warning is an error."""
    warnings.simplefilter("error")
    cli.main(args)


def run_full_trainer(folder: Path, updates: int) -> None:
    """Start or resume `full_trainer` and print the digest of the final parameters."""
    run = full_trainer(folder, updates=updates, resume="auto")
    print(digest(run.run().train.params), flush=True)


def has_zero_gradient(path: tuple) -> bool:
    """Whether a parameter is the bias of keys, whose gradient is 0 up to rounding.

    It shifts all attention scores of a query alike, which the softmax ignores. Adam turns the
    rounding noise into steps of the learning rate, so such parameters are not compared.
    """
    return [part.key for part in path][-2:] == ["k", "bias"]


# --- commands ---


def options(given: dict) -> list[str]:
    """Return `--name value` for each item."""
    return [str(x) for name, value in given.items() for x in (f"--{name}", value)]


def command_line(command: str, **given) -> list[str]:
    """Return a command followed by its options, as arguments of `cli.main`."""
    return [command, *options(given)]


# --- models of transformers ---

FAMILY_SIZE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {**GROUPED, "head_dim": 6, "query_pre_attn_scalar": 10, "sliding_window": 4}
FAMILIES = {
    "neo": (
        "GPTNeo",
        {
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "local"], 1]],
            "window_size": 4,
            "num_hidden_layers": None,
            "num_attention_heads": None,
        },
    ),
    "neox": ("GPTNeoX", {}),
    "neox, in a row, all turns": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 1.0},
        },
    ),
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama 3.1": ("Llama", {**GROUPED, "rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "llama, linear, biases, wide": (
        "Llama",
        {
            "num_key_value_heads": 1,
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        },
    ),
    "llama, a share of turns that counts for nothing": (
        "Llama",
        {
            **GROUPED,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "mistral, no window": ("Mistral", {**GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2, windows": (
        "Qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 12}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": (
        "Gemma3",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 1.0,
        },
    ),
    "phi3": (
        "Phi3",
        {
            **GROUPED,
            "sliding_window": 4,
            "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
        },
    ),
    "bert": ("Bert", {"is_decoder": True, "type_vocab_size": 3}),
    "bert, apart": ("Bert", {"is_decoder": True, "tie_word_embeddings": False}),
    "roberta": ("Roberta", {"is_decoder": True, "pad_token_id": 0}),
    "xlm-roberta, apart": (
        "XLMRoberta",
        {"is_decoder": True, "pad_token_id": 3, "tie_word_embeddings": False},
    ),
    "stablelm": ("StableLm", {**GROUPED, "use_qkv_bias": True}),
    "stablelm, tied": ("StableLm", {**GROUPED, "tie_word_embeddings": True}),
}


def gpt2_peer(folder, **changes):
    """Save a small random GPT-2 of `transformers` in a folder and return it."""
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=48,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        **changes,
    )
    return save_random_peer(transformers.GPT2LMHeadModel, config, folder)


def family_peer(case: str, folder):
    """Save the small random model `FAMILIES[case]` of `transformers` in a folder and return it."""
    name, changes = FAMILIES[case]
    given = {
        k: v
        for k, v in {**FAMILY_SIZE, **changes}.items()
        if not (k in changes and v is None and k.startswith("num_"))
    }
    config = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))(**given)
    head = "LMHeadModel" if name == "Bert" else "ForCausalLM"
    return save_random_peer(getattr(transformers, name + head), config, folder)


def save_random_peer(model_class, config, folder):
    """Save and return a random model with noise on every parameter.

    Without noise, biases are 0 and norms are 1, and tests would not notice if they were mixed up.
    """
    import torch

    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def tensors_in(folder) -> dict[str, np.ndarray]:
    """Return the stored tensors of a model folder by name."""
    return {name: read() for name, read in safetensors_format.open_tensors(folder).items()}


def left_padded(rows=5, length=10, vocab=61):
    """Return random tokens and their mask, with padding of random width on the left."""
    rng = np.random.default_rng(1)
    mask = np.arange(length)[None] >= rng.integers(0, length - 2, (rows, 1))
    return np.where(mask, rng.integers(2, vocab, (rows, length)), 0), mask


def noisy_adapters(adapters):
    """Return adapters of the same shapes with random entries, since fresh ones change nothing."""
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return tree.unflatten(
        [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


# --- checks of numeric functions ---

DEVICES = 8
MAPPINGS = ("vmap", "pmap", "shard_map", "unchecked_shard_map", "shard_map_of_two_axes")


def assert_jit_and_vmap_agree(
    function: Callable, *arrays, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Assert that `function` gives the same results plain, under `jit`, and under `jit` of `vmap`.

    `vmap` maps over a new leading axis, which stacks the arrays and the arrays with reversed rows.
    """
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    arrays = tuple(jnp.asarray(x) for x in arrays)
    reversed_rows = tuple(x[::-1] for x in arrays)
    compiled = jax.jit(function)
    plain = [function(*arrays), compiled(*reversed_rows)]
    jax.tree.map(close, compiled(*arrays), plain[0])
    mapped = jax.jit(jax.vmap(function))(
        *(jnp.stack(pair) for pair in zip(arrays, reversed_rows, strict=True))
    )
    jax.tree.map(close, mapped, jax.tree.map(lambda *xs: jnp.stack(xs), *plain))


def axis_of(mapping: str) -> str | tuple[str, ...]:
    """Return the axis, or the axes, over which `on_devices` splits the rows."""
    return ("hosts", "chips") if mapping == "shard_map_of_two_axes" else "devices"


def on_devices(mapping: str, function: Callable, *arrays):
    """Run `function` on 8 shards of the rows, mapped over `axis_of(mapping)`.

    Returns:
      The results, stacked along a new leading axis of size 8.
    """
    pieces = [jnp.asarray(x).reshape(DEVICES, -1, *x.shape[1:]) for x in arrays]
    if mapping == "vmap":
        return jax.vmap(function, axis_name="devices")(*pieces)
    if mapping == "pmap":
        return jax.pmap(function, axis_name="devices")(*pieces)
    assert mapping in MAPPINGS, mapping
    axis = axis_of(mapping)
    sizes, axes = ((DEVICES,), (axis,)) if isinstance(axis, str) else ((2, DEVICES // 2), axis)
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
    spec = PartitionSpec(axis)
    on_shard = lambda *xs: jax.tree.map(lambda y: y[None], function(*(x[0] for x in xs)))
    mapped = jax.shard_map(
        on_shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma="unchecked" not in mapping
    )
    return jax.jit(mapped)(*pieces)


def assert_mask_hides(function: Callable, arrays: tuple, mask) -> None:
    """Assert that masked entries of the arrays change neither value nor gradient, even if NaN.

    The gradient of masked entries must be 0. A NaN that the forward pass drops would return in the
    gradient as `0 · NaN`, unless it is replaced before any arithmetic.
    """
    mask = np.asarray(mask)
    run = jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(arrays)))))
    fill = lambda filler: tuple(jnp.asarray(np.where(mask, x, np.float32(filler))) for x in arrays)
    value, gradients = run(*fill(0))
    assert np.isfinite(value)
    for filler in (1e6, np.inf, np.nan):
        value_now, gradients_now = run(*fill(filler))
        np.testing.assert_array_equal(value_now, value)
        for now, before in zip(gradients_now, gradients, strict=True):
            np.testing.assert_array_equal(now, before)
            np.testing.assert_array_equal(np.asarray(now)[~mask], 0)


# --- documentation ---

ROOT = Path(__file__).parents[1]


def code_blocks(page: Path, *languages: str) -> list[str]:
    """Return the code blocks of a page that are marked with one of the languages."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [code for language, code in blocks if language in languages]


def save_tiny_gpt2(folder: Path) -> None:
    """Save a tiny model as `gpt2` in a folder, where the name refers to it and not to the hub."""
    small = tiny_policy(positions=64, layers=1, width=8, mlp_width=16)
    pretrained.save_policy(folder / "gpt2", small, word_tokenizer())


def run_python_blocks(page: Path, folder: Path) -> dict:
    """Run the Python blocks of a page as one program, and return its variables.

    A block whose first line is a comment with a file name is written to that file instead.
    """
    variables: dict = {"__name__": "page"}
    for block in code_blocks(page, "python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            (folder / named[1]).write_text(block)
        else:
            exec(compile(block, str(page), "exec"), variables)
    return variables


def table_rows(page: Path) -> list[list[str]]:
    """Return the cells of all table rows of a page."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def documented_metrics() -> set[str]:
    """Return the names in the table of metrics."""
    cells = [row[0] for row in table_rows(ROOT / "docs/presets_and_metrics.md")]
    return {name for cell in cells for name in re.findall(r"`(\w+/\w+)`", cell)}


# --- one update ---

ROWS = 16
LOSS = (  # with its metrics, as `ppo_loss_fn` takes them
    functools.partial(
        losses.ppo_loss, clip_low=0.2, clip_high=0.2, value_clip=0.2, vf_coef=0.1, entropy_coef=0.01
    ),
    functools.partial(
        policy_metrics, clip=functools.partial(ratio_clip, clip_low=0.2, clip_high=0.2)
    ),
)


@functools.cache
def small_problem(dtype=jnp.float32):
    """Return a model, a critic, parameters and one scored batch of experience."""
    config = TransformerConfig(
        vocab_size=97,
        positions=32,
        width=32,
        layers=2,
        heads=4,
        mlp_width=64,
        init_std=0.2,
        dtype=dtype,
    )
    model, critic = language_model(config), heads.separate_critic(config)
    key = jax.random.key(0)
    params = {
        "policy": init_params(config, key),
        "critic": init_scorer(config, jax.random.key(1)),
    }
    prompts = jax.random.randint(key, (ROWS, 6), 0, 97)
    mask = jnp.arange(6)[None, :] >= jax.random.randint(key, (ROWS, 1), 0, 5)
    sampled = generate(
        model,
        params["policy"],
        key,
        prompts,
        mask,
        max_new_tokens=12,
        stop_ids=(3, 4, 5),
        temperature=0.7,
    )
    assert bool((~sampled.response_mask).any())
    scores = jax.jit(
        lambda p, ro: score_rollout(
            model, critic, p, p["policy"], ro, temperature=0.7, micro_batch=4
        )
    )(params, sampled)
    np.testing.assert_array_equal(scores.kl, 0)  # of the model with itself
    experience, _ = make_experience(
        sampled,
        scores,
        jax.random.normal(key, (ROWS,)),
        kl_coef=0.1,
        advantage_fn=gae(gamma=1.0, lam=0.95),
    )
    return model, critic, params, experience
