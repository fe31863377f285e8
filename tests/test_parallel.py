"""Test runs on meshes: each gives the result of one device, with no needless communication."""

import dataclasses
import functools
import re
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import FULL_PPO, full_trainer, has_zero_gradient, init_params, init_scorer, slow_but
from jax.sharding import PartitionSpec

from ppo_jax import sharding
from ppo_jax.distributed import compilation, meshes, placement, replicas
from ppo_jax.errors import SettingError
from ppo_jax.hashing import digest
from ppo_jax.models import heads, lora
from ppo_jax.models.io import pretrained
from ppo_jax.models.transformer import language_model
from ppo_jax.plan.topology import make_topology
from ppo_jax.ppo import iteration
from ppo_jax.ppo.packing import sum_bins
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run.compare import compare
from ppo_jax.types import Params, Rollout

PPO = PPOConfig(
    batch_size=32,
    epochs=2,
    minibatches=2,
    max_new_tokens=10,
    learning_rate=1e-4,
    kl_coef=0.1,
    kl_target=0.5,
    scale_scores=True,
    vf_coef=0.5,
    temperature=0.8,
    adam_eps=1e-5,  # larger than the rounding of a gradient, which Adam would turn into full steps
)
HF = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_positions": 40,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 8,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 64,
        "max_position_embeddings": 40,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-5,
        "head_dim": 4,
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 64,
        "max_position_embeddings": 40,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-6,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
}
LORA = lora.LoRA(rank=2, alpha=4.0, targets="(attn/(q|o)|mlp/up)$")


IN_PARTS = {"micro_batch": 8, "rollout_rows": 16, "rollout_slots": 8}
PACKED = {"micro_batch": 2, "pack": 192}
MOVING = {"reference_every": 2, "reference_decay": 0.5, "kl_loss_coef": 1.0}
ALL_AXES = "data=2,fsdp=2,tensor=2"


@functools.cache
def initial_params(family, adapters):
    """Return the config and the trained, frozen and reference parameters on the host."""
    config = dataclasses.replace(
        pretrained.config_of(HF[family]), init_std=0.2, lora_scale=LORA.scale if adapters else 1.0
    )
    policy = init_params(config, jax.random.key(0))
    params, frozen = (
        {"policy": policy, "critic": init_scorer(config, jax.random.key(1), trunk=policy)},
        None,
    )
    if adapters:
        params, frozen = lora.adapt(params, jax.random.key(3), LORA)
    return config, *jax.device_get((params, frozen, policy))


def start(family, optimizer, *, adapters=False, mesh=None, **changes):
    """Return the agent, and the state, reference and frozen parameters placed on the mesh."""
    ppo = dataclasses.replace(PPO, **changes)
    config, *trees = initial_params(family, adapters)
    agent = iteration.Agent(language_model(config), heads.separate_critic(config), ppo, (3, 4), 0)
    params, frozen, policy = (placement.place(tree, mesh) for tree in trees)
    state = compilation.start_state(agent, params, jax.random.key(2), updates=3, mesh=mesh)
    if optimizer == "sgd":
        train = TrainState.create(apply_fn=None, params=state.train.params, tx=optax.sgd(0.05))
        state = placement.place(state.replace(train=train.replace(step=jnp.int32(0))), mesh)
    return agent, state, policy, frozen


@functools.cache
def batch(number):
    key = jax.random.key(10 + number)
    prompts = np.asarray(jax.random.randint(key, (32, 6), 0, 61))
    return prompts, np.arange(6) >= np.asarray(jax.random.randint(key, (32, 1), 0, 5))


class Finished(NamedTuple):
    """Three updates: samples `[3, B, R]`, the parameters after them, and the HLO of an update."""

    samples: np.ndarray
    params: Params
    reference: Params | None
    hlo: str | None


@functools.cache
def three_updates(family, optimizer, adapters, on, **changes):
    """Make three updates on one device, if `on` is None, on a mesh or under `pmap`."""
    mesh = meshes.make_mesh(meshes.parse_mesh(on)) if on not in (None, "pmap") else None
    agent, state, policy, frozen = start(family, optimizer, adapters=adapters, mesh=mesh, **changes)
    steps = (
        replicas.pmap_steps(agent) if on == "pmap" else compilation.jit_steps(agent, mesh, state)
    )
    samples, hlo = [], None
    for number in range(3):
        rollout = steps.sample(state, *placement.to_mesh(batch(number), mesh), frozen=frozen)
        scores = steps.score(state, policy, rollout, frozen=frozen)
        seen = placement.to_host(rollout)
        task = (seen.responses % 7 == 1).sum(axis=1).astype(np.float32)
        scored = (rollout, scores, placement.to_mesh(task, mesh))
        state, _ = steps.learn(state, *scored, frozen=frozen)
        samples.append(np.where(seen.response_mask, seen.responses, -1))
    if mesh is not None:  # The program that ran, which JAX still holds.
        with jax.set_mesh(mesh):
            learn = steps.learn.__wrapped__.lower(state, *scored, frozen=frozen)
        hlo = learn.compile().as_text()
    return Finished(
        np.stack(samples), *placement.to_host((state.train.params, state.reference)), hlo
    )


def on_one_device(family, optimizer="sgd", *, adapters=False, **changes):
    return three_updates(family, optimizer, adapters, None, **changes)


def gpt2_on(on):
    """Make updates with a moving reference: with AdamW where moments are sharded over all axes."""
    if on == ALL_AXES:
        return three_updates("gpt2", "adamw", False, on, micro_batch=8, **MOVING)
    return three_updates("gpt2", "sgd", False, on, **MOVING)


def gpt2_in_parts_on(on):
    return three_updates("gpt2", "sgd", False, on, **IN_PARTS, **MOVING)


def assert_same(found, expected, optimizer="sgd"):
    np.testing.assert_array_equal(found.samples, expected.samples)
    trees = [{"params": run.params, "reference": run.reference} for run in (found, expected)]
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(trees[0]), jax.tree.leaves(trees[1]), strict=True
    ):
        if optimizer == "sgd" or not has_zero_gradient(path):
            np.testing.assert_allclose(x, y, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize("on", ["data=8", "fsdp=8", "tensor=8", ALL_AXES, "pmap"])
def test_every_mesh_gives_the_result_of_one_device(on):
    """The reference moves between the second and the third update, sharded as the policy."""
    optimizer = "adamw" if on == ALL_AXES else "sgd"
    assert_same(gpt2_on(on), on_one_device("gpt2", optimizer, **MOVING), optimizer)


@pytest.mark.slow
def test_a_moving_reference_changes_the_result():
    moving = on_one_device("gpt2", **MOVING)
    fixed = on_one_device("gpt2", kl_loss_coef=1.0)
    apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), moving.params, fixed.params)
    assert max(jax.tree.leaves(apart["policy"])) > 1e-5


@pytest.mark.parametrize(
    "family, adapters, on, changes",
    slow_but(
        [("llama", True, "pmap", PACKED)],
        [
            ("qwen3", False, ALL_AXES, PACKED),
            ("llama", False, "data=2,fsdp=4", IN_PARTS | {"logit_chunk": 3}),
            ("llama", True, ALL_AXES, IN_PARTS | {"logit_chunk": 3}),
            ("llama", True, "pmap", PACKED),
        ],
    ),
    ids=str,
)
def test_every_family_gives_the_result_of_one_device(family, adapters, on, changes):
    """Each device packs its own rows, or computes them in parts."""
    found = three_updates(family, "sgd", adapters, on, **changes)
    assert_same(found, on_one_device(family, adapters=adapters))


@pytest.mark.slow
@pytest.mark.parametrize("on", ["data=8", "data=2,fsdp=4", "data=4,tensor=2"])
def test_micro_batches_and_slots_on_a_mesh(on):
    assert_same(gpt2_in_parts_on(on), on_one_device("gpt2", **MOVING))


@pytest.mark.slow
def test_devices_of_fsdp_compute_different_bins():
    """A step of 4 devices costs each of them as much as one bin, and there is a quarter as many."""
    mask = jnp.arange(40)[None] < 7 + jnp.arange(32)[:, None]
    prompts, shape = jnp.asarray(batch(0)[0]), (32, 34)
    tokens = jnp.concatenate([prompts, jax.random.randint(jax.random.key(9), shape, 0, 61)], axis=1)
    rollout = Rollout(tokens, mask, mask[:, 6:], jnp.zeros(shape), mask[:, 0])

    def scored(on, devices):
        mesh = meshes.make_mesh(on, devices)
        agent, state, policy, _ = start("llama", "sgd", mesh=mesh, pack=128)
        score = functools.partial(iteration.score, agent)
        with jax.set_mesh(mesh):
            program = jax.jit(score).lower(state, policy, rollout).compile()
            scores, bins = program(state, policy, rollout), agent.config.bins
            steps = sum_bins(lambda rows: jnp.int32(1), mask, bins)
        return scores, program.cost_analysis()["flops"], int(steps)

    one, flops, steps = scored({"data": 1}, jax.devices()[:1])
    four, flops_of_each, fewer = scored({"fsdp": 4}, jax.devices()[:4])
    assert (steps, fewer) == (16, 4) and flops_of_each < 1.1 * flops
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), four, one)


# --- communication in the compiled update ---


def collectives(hlo, kind):
    """Return, per computation, the numbers of elements that collectives of a kind produce."""
    found, name = {}, ""
    for line in hlo.splitlines():
        if line.endswith("{") and "=" not in line.split("(")[0]:
            name = line.split()[0]
        if match := re.search(rf"= (.*) {kind}(?:-start)?\(", line):
            shapes = re.findall(r"(f32|bf16)\[([\d,]*)\]", match[1])
            found.setdefault(name, []).extend(
                int(np.prod([int(n) for n in dims.split(",") if n])) for _, dims in shapes
            )
    return found


def bodies(hlo):
    """Return, per computation, the bodies of its while loops."""
    found, name = {}, ""
    for line in hlo.splitlines():
        if line.endswith("{") and "=" not in line.split("(")[0]:
            name = line.split()[0]
        found.setdefault(name, []).extend(re.findall(r" while\(.*body=(%[\w.-]+)", line))
    return found


@pytest.mark.slow
def test_slots_serve_the_rows_of_their_device():
    """Only the heads of `tensor` send activations; no device sends or gathers keys and values."""
    mesh = meshes.make_mesh({"data": 2, "tensor": 4})
    agent, state, _, _ = start("gpt2", "adamw", mesh=mesh, rollout_slots=16)
    sample, _, _ = compilation.lowerable_steps(agent, mesh, state)
    with jax.set_mesh(mesh):
        hlo = sample.lower(state, *placement.to_mesh(batch(0), mesh)).compile().as_text()
    assert not any(collectives(hlo, kind) for kind in ("all-gather", "collective-permute"))
    assert not collectives(hlo, "all-to-all")
    width, prompt_tokens, slots = 32, 16 * 6, 8  # on each device
    reduced = [n for part in collectives(hlo, "all-reduce").values() for n in part]
    assert set(reduced) <= {0, width * prompt_tokens, width * 16, width * slots}


def sizes(params):
    return sorted(x.size for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_fsdp_gathers_a_layer_at_a_time():
    run = gpt2_on("fsdp=8")
    gathered = [n for part in collectives(run.hlo, "all-gather").values() for n in part]
    parameters = sizes(run.params)
    assert max(gathered) <= parameters[-1] and sum(gathered) > sum(parameters) / 4


@pytest.mark.parametrize("on", ["fsdp=8", "fsdp=4,tensor=2"])
def test_decoding_moves_activations_and_not_parameters(on):
    mesh = meshes.make_mesh(meshes.parse_mesh(on))
    agent, state, _, _ = start("llama", "sgd", mesh=mesh)
    prompts = placement.to_mesh(tuple(x[:8] for x in batch(0)), mesh)
    sample = compilation.jit_steps(agent, mesh, state).sample.__wrapped__
    with jax.set_mesh(mesh):
        hlo = sample.lower(state, *prompts).compile().as_text()
    loops = {name for inside in bodies(hlo).values() for name in inside}
    moved = {
        kind: sum(sum(collectives(hlo, kind).get(name, [])) for name in loops)
        for kind in ("all-gather", "all-reduce", "all-to-all")
    }
    config, tensor = pretrained.config_of(HF["llama"]), mesh.shape["tensor"]
    # In each layer, inputs of q, k, v, up and gate, and of o and down, which tensor shards; and the
    # input of the output.
    of_sums = (config.width + config.mlp_width) / tensor
    inputs = config.layers * (5 * config.width + of_sums) + config.width
    logits = config.vocab_size * (tensor - 1) / mesh.shape["fsdp"]  # by all-to-all over fsdp
    assert 0 < moved["all-gather"] <= 8 * (inputs + logits)
    # The embeddings, and over tensor the sums of o and down.
    sums = 1 + 2 * config.layers * (tensor - 1)
    assert moved["all-reduce"] <= 8 * config.width * sums + 8
    policy = sum(x.size for x in jax.tree.leaves(state.policy))
    assert sum(moved.values()) < policy / 2


def test_no_device_holds_all_features_of_an_embedding():
    """Tokens are looked up in the features of each device, so the gradient stays sharded too."""
    mesh = meshes.make_mesh({"fsdp": 8})
    config = dataclasses.replace(pretrained.config_of(HF["llama"]), vocab_size=1000, tied=True)
    model = language_model(config)
    params = sharding.placed(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), mesh)
    tokens, mask = (
        jax.ShapeDtypeStruct((16, 6), dtype, sharding=sharding.rows_sharding(mesh))
        for dtype in (jnp.int32, bool)
    )

    @jax.jit
    @jax.grad
    def gradient(params, tokens, mask):
        return model.hidden(params, tokens, mask)[0].sum()

    with jax.set_mesh(mesh):
        hlo = gradient.lower(params, tokens, mask).compile().as_text()
    assert f"f32[1000,{config.width // 8}]" in hlo and f"[1000,{config.width}]" not in hlo


@pytest.mark.slow
@pytest.mark.parametrize("run_on", [gpt2_on, gpt2_in_parts_on])
def test_a_minibatch_reduces_its_gradient_once(run_on):
    run = run_on("data=8")
    total = sum(sizes(run.params))
    reduced = {name: sum(part) for name, part in collectives(run.hlo, "all-reduce").items()}
    assert total <= max(reduced.values()) < total * 1.02  # the rest are sums for averages
    assert sum(reduced.values()) < total * 1.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "run_on, on",
    [
        (gpt2_in_parts_on, "data=2,fsdp=4"),
        (gpt2_in_parts_on, "data=4,tensor=2"),
        (gpt2_on, ALL_AXES),
    ],
)
def test_gradients_are_reduced_over_data_once_per_minibatch(run_on, on):
    """The loop over minibatches reduces the gradient over `data`.

    The loop over micro-batches inside it reduces only what `fsdp` scatters, or activations of
    `tensor`.
    """
    run = run_on(on)
    total = sum(sizes(run.params))
    reduced = {name: sum(part) for name, part in collectives(run.hlo, "all-reduce").items()}
    around = [
        name
        for name in reduced
        if set(bodies(run.hlo).get(name, ())) & set(reduced) and name != "ENTRY"
    ]
    minibatch = max(around, key=reduced.get)
    share = total * meshes.parse_mesh(on)["data"] / 8
    assert (
        share <= reduced[minibatch] < share * 1.25
    )  # norms are replicated on all devices, position embeddings over tensor
    assert sum(reduced.values()) - reduced[minibatch] < total * 1.05


def test_parameters_and_moments_are_sharded():
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    _, state, _, _ = start("llama", "adamw", mesh=mesh)
    for path, x in jax.tree_util.tree_leaves_with_path((state.train.params, state.train.opt_state)):
        if x.ndim == 2 and x.shape[-1] > 1:
            assert x.addressable_shards[0].data.size * 8 == x.size, jax.tree_util.keystr(path)


def test_a_moving_reference_is_sharded_as_the_policy():
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    _, state, _, _ = start("llama", "adamw", mesh=mesh, reference_decay=0.5)
    layout = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert layout(state.reference) == layout(state.policy)
    buffers = [
        x.addressable_data(0).unsafe_buffer_pointer()
        for x in jax.tree.leaves((state.reference, state.policy))
    ]
    assert len(set(buffers)) == len(buffers)


# --- sharding rules, meshes, loading ---


def test_every_family_has_a_rule_for_every_parameter():
    mesh = meshes.make_mesh({"fsdp": 8})
    for kind in ("gpt2", "llama", "qwen3"):
        shapes = jax.eval_shape(
            lambda kind=kind: init_params(pretrained.config_of(HF[kind]), jax.random.key(0))
        )
        assert jax.tree.structure(sharding.shardings(shapes, mesh)) == jax.tree.structure(shapes)
    with pytest.raises(
        ValueError, match="No sharding rule matches the parameter layer_0/attn/new/kernel"
    ):
        sharding.shardings({"layer_0": {"attn": {"new": {"kernel": jnp.ones((2, 2))}}}}, mesh)
    with pytest.raises(ValueError, match="has 2 axes; the parameter attn/q/kernel has 1"):
        sharding.shardings({"attn": {"q": {"kernel": jnp.ones(2)}}}, mesh)


@pytest.mark.parametrize(
    "text, message",
    [
        ("data", "mesh must be like"),
        ("data=0", "mesh must be like"),
        ("rows=2", "mesh must be like"),
        ("fsdp=2,fsdp=2", "each once"),
        ("fsdp=16", "needs 16 devices; there are 8"),
        ("data=3,fsdp=4", "needs 12 devices"),
    ],
)
def test_an_invalid_mesh_is_refused(text, message):
    with pytest.raises(SettingError, match=message):
        meshes.make_mesh(meshes.parse_mesh(text))


@pytest.mark.parametrize(
    "text, message",
    [
        ("rollout=8", "rollout=8 leaves no device to learn on; there are 8 devices"),
        ("data=7,rollout=2", "The mesh data=7 needs 7 devices; there are 6"),
        ("rollout=0", "each once at most, but is 'rollout=0'"),
    ],
)
def test_invalid_groups_of_devices_are_refused(text, message):
    with pytest.raises(SettingError, match=message):
        meshes.make_meshes(meshes.parse_mesh(text, meshes.GROUPS))


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 1])
def test_devices_that_only_sample_change_no_bit(tmp_path, every):
    learning, sampling = meshes.make_meshes({"data": 2, "rollout": 2})
    assert not set(learning.devices.flat) & set(sampling.devices.flat)
    ppo = dataclasses.replace(FULL_PPO, reference_every=every)
    options = {"ppo": ppo, "updates": 2, "staleness": 1, "mesh": learning}
    plain = full_trainer(tmp_path / "plain", **options)
    plain.run()
    first = full_trainer(tmp_path / "apart", sampling=sampling, **options)
    updates = iter(range(2))

    def stop_at_second(metrics):
        if next(updates) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(on_update=stop_at_second)
    apart = full_trainer(tmp_path / "apart", sampling=sampling, resume="yes", **options)
    apart.run()
    assert digest(apart.state.train) == digest(plain.state.train)
    assert digest(apart.state.reference) == digest(plain.state.reference)
    assert digest(apart.state.pending) == digest(plain.state.pending)
    assert compare(tmp_path / "plain", tmp_path / "apart") == []
    on = lambda tree: {device for x in jax.tree.leaves(tree) for device in x.devices()}
    assert on(apart.state.pending) == set(sampling.devices.flat)
    assert on(apart.state.train.params) == set(learning.devices.flat)
    assert every is None or on(apart.state.reference) == set(learning.devices.flat)
    three = meshes.make_mesh({"data": 3}, jax.devices()[5:])
    with pytest.raises(SettingError, match="batch_size=16 does not divide evenly over the 3"):
        full_trainer(tmp_path / "three", sampling=three, **options)


def gpus(hosts, each):
    """Return devices as JAX shows those of several hosts, where each host is a slice."""
    numbers = np.random.default_rng(0).permutation(hosts * each).tolist()
    return [
        types.SimpleNamespace(id=i, slice_index=i // each, platform="gpu", device_kind="H100")
        for i in numbers
    ]


@pytest.mark.parametrize(
    "shape, distances",  # distance: the difference of the device ids of neighbours on each axis
    [
        ((8, 1, 4), (4, 0, 1)),
        ((32, 1, 1), (1, 0, 0)),
        ((1, 4, 8), (0, 8, 1)),
        ((2, 4, 4), (16, 4, 1)),
        ((1, 1, 32), (0, 0, 1)),
    ],
)
def test_a_mesh_over_hosts_keeps_the_last_axes_within_a_host(shape, distances):
    found = np.vectorize(lambda device: device.id)(meshes.arrange_devices(shape, gpus(4, 8)))
    assert found.shape == shape
    for axis, distance in enumerate(distances):
        assert set(np.diff(found, axis=axis).ravel()) <= {distance}


def test_hosts_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="cannot be divided among 3 slices or hosts"):
        meshes.arrange_devices(
            (8, 1, 1), [device for device in gpus(3, 4) if device.id not in (4, 5, 8, 9)]
        )


@pytest.mark.parametrize(
    "sizes, fits", [({"data": 2, "fsdp": 4, "tensor": 8}, True), ({"fsdp": 3}, False)], ids=str
)
def test_mesh_axes_may_share_the_axes_of_a_slice(sizes, fits):
    devices = make_topology("v5p:4x4x4")
    if fits:
        assert set(meshes.make_mesh(sizes, devices).devices.ravel()) == set(devices)
    else:
        with pytest.raises(
            SettingError, match="The mesh data=21,fsdp=3 cannot be laid over 63 of 64 devices"
        ):
            meshes.make_mesh(sizes, devices)


def test_batches_that_do_not_divide_over_devices_are_refused():
    with pytest.raises(SettingError, match="batch_size=12 does not divide evenly over 8 devices"):
        meshes.check_rows(dataclasses.replace(PPO, batch_size=12), 8)
    with pytest.raises(SettingError, match="batch_size / minibatches=4 does"):
        meshes.check_rows(dataclasses.replace(PPO, batch_size=16, minibatches=4), 8)
    meshes.check_rows(dataclasses.replace(PPO, micro_batch=3, pack=128), 8)  # of 3 bins each


def test_a_model_is_loaded_into_its_sharding(tmp_path):
    config = pretrained.config_of(HF["gpt2"])
    pretrained.save_policy(
        tmp_path, pretrained.Pretrained(config, init_params(config, jax.random.key(0)), HF["gpt2"])
    )
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    whole, cut = (
        pretrained.load_policy(tmp_path).params,
        pretrained.load_policy(tmp_path, mesh=mesh).params,
    )
    assert cut["layer_0"]["mlp"]["up"]["kernel"].sharding.shard_shape((32, 128)) == (8, 64)
    assert digest(whole) == digest(cut)
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


@pytest.mark.slow
def test_a_run_is_resumed_on_another_mesh_and_compiles_once_on_each(tmp_path, caplog):
    ppo = dataclasses.replace(
        FULL_PPO, batch_size=16, minibatches=2, micro_batch=None, rollout_rows=None
    )
    run = lambda name, **options: full_trainer(tmp_path / name, ppo=ppo, **options)
    all_axes = meshes.make_mesh(meshes.parse_mesh(ALL_AXES))
    one = run("one")
    one.run()
    with jax.log_compiles():
        run("many", updates=2, mesh=all_axes).run()
        run("many", updates=3, mesh=meshes.make_mesh({"fsdp": 8}), resume="yes").run()
        again = run("again", staleness=2, seed=1, mesh=all_axes)
        again.step(), again.step()
    many = run("many", resume="yes")
    many.run()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        one.state.train.params,
        many.state.train.params,
    )
    assert (tmp_path / "many/samples.jsonl").read_text().count("\n") == (
        tmp_path / "one/samples.jsonl"
    ).read_text().count("\n")
    for name in ("sample", "score", "learn"):
        assert caplog.text.count(f"Compiling jit({name})") == 2


def test_a_loss_that_cannot_be_hashed_may_be_jitted():
    @dataclasses.dataclass
    class Loss:
        clip: float = 0.2

    agent = iteration.Agent(None, None, FULL_PPO, (0,), 0)
    assert compilation.jit_steps(agent, loss_fn=Loss()).learn is not None
    assert compilation.jit_steps(agent) == compilation.jit_steps(agent)


@pytest.mark.slow
def test_rows_are_mapped_over_a_free_data_axis():
    """Inside a `shard_map` they are not mapped again; rows that do not divide are refused."""
    mesh = meshes.make_mesh({"data": 8})

    def total(params, rows, axis_name):
        return rows.sum() if axis_name is None else 10 * jax.lax.psum(rows.sum(), axis_name)

    rows = jnp.ones((16, 3))
    mapped = jax.jit(lambda rows: sharding.map_over_data(total, None, rows, parts=2))
    inner = lambda rows: jax.lax.psum(sharding.map_over_data(total, None, rows, parts=2), "data")
    with jax.set_mesh(mesh):
        assert mapped(rows) == 480
        inside = jax.shard_map(
            inner,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
            axis_names={"data"},
            check_vma=False,
        )
        assert jax.jit(inside)(rows) == 48
        with pytest.raises(
            ValueError, match="12 rows does not divide into 2 micro-batches on data=8"
        ):
            mapped(rows[:12])
