"""Test `ppo-jax plan`, which compiles for TPU slices that are not attached, and its accounting.

Each command runs in its own process, because the compiler reads the environment only once.
"""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import run_command_strictly, run_script, start_process
from jax.sharding import AbstractMesh, AxisType

from ppo_jax.errors import SettingError
from ppo_jax.models.transformer import init_params
from ppo_jax.plan import report
from ppo_jax.plan.account import Collective, account
from ppo_jax.plan.compile import Program, TooLarge, compile_iteration
from ppo_jax.plan.decoding import DecodeStep, bound_seconds
from ppo_jax.plan.extrapolation import extrapolate
from ppo_jax.plan.flops import matmul_flops
from ppo_jax.plan.memory import load_config
from ppo_jax.plan.topology import CHIPS, slice_shape
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.sharding import AXES

HF_LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "max_position_embeddings": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
}
SMALL = [
    "--ppo.batch-size",
    "16",
    "--ppo.minibatches",
    "2",
    "--ppo.epochs",
    "2",
    "--ppo.max-new-tokens",
    "5",
    "--prompt-tokens",
    "6",
]


def command(folder, *args):
    """Run the command, in which warnings are errors, and return its exit status and output."""
    log, arguments = folder / "plan.log", ["plan", *SMALL, *map(str, args)]
    process = start_process(run_command_strictly, arguments, log=log, folder=folder)
    process.join(600)
    return process.exitcode, log.read_text()


def planned(folder, *args):
    status, printed = command(folder, "--out", folder / "plan.json", *args)
    assert status == 0, printed
    return json.loads((folder / "plan.json").read_text()), printed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of one layer; a plan only reads config.json."""
    return save_config(tmp_path_factory.mktemp("model"), HF_LLAMA)


def save_config(folder, hf):
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


@pytest.mark.slow
def test_all_programs_compile_for_a_mesh_with_every_axis(tmp_path, model):
    """Compile for data=2, fsdp=2, tensor=2 on 8 chips of a v5e and check the figures."""
    found, printed = planned(
        tmp_path,
        "--model",
        model,
        "--topology",
        "v5e:2x4",
        "--mesh",
        "data=2,fsdp=2,tensor=2",
        "--ppo.micro-batch",
        "4",
    )
    assert found["fits"] and printed.endswith("It fits.\n")
    rollout = found["rollout"]
    assert 0 < rollout["decode_bound_s"] < rollout["decode_step_s"] < rollout["seconds"]
    assert rollout["loop_collective_bytes"] > 0 and "a decode step" in printed
    for name in ("rollout", "scoring", "update"):
        program = found[name]
        assert 0 < program["loop_collective_s"] <= program["collective_s"] < program["seconds"]
        assert 0 < program["share_of_peak"] < 1
        assert 0 < program["arguments"] < program["peak"] <= program["needed"] < 2**30
        assert program["flops"] > 0 and program["moved"] > 0 and 0 < program["seconds"] < 1
        assert program["collectives"]["all-gather"]["count"] > 0  # parameters, over fsdp
        assert program["collectives"]["all-reduce"]["count"] > 0  # over tensor
    assert found["update"]["flops"] > 2 * found["scoring"]["flops"]


WIDE = HF_LLAMA | {
    "hidden_size": 1024,
    "intermediate_size": 2048,
}  # with these sizes, parameters outweigh activations
WIDE_LAYER = 2 * (
    2 * 1024 * (1024 + 256) + 3 * 1024 * 2048
)  # parameters per layer, of policy and critic


@functools.cache
def planned_wide(layers, *args):
    """Return the plan of the update of a wide Llama."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_config(Path(folder), WIDE | {"num_hidden_layers": layers})
        options = ("--topology", "v6e:2x2", "--mesh", "fsdp=4", "--phases", "update")
        found, _ = planned(model, "--model", model, *options, *args)
        assert set(found) == {"fits", "update"}
        return found["update"]


GRADIENT_OF_PADDED_LOGITS = """
import jax, jax.numpy as jnp
from ppo_jax import TransformerConfig, init_params, language_model, make_mesh, make_topology
from ppo_jax.sharding import constrain_params, placed, rows_sharding

config = TransformerConfig(vocab_size=65, positions=8, width=128, layers=1, heads=2, mlp_width=64,
                           dtype=jnp.bfloat16)
mesh = make_mesh({"fsdp": 4}, make_topology("v5e:2x2"))
params = placed(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), mesh)
hidden = jax.ShapeDtypeStruct((1152, 1, 128), jnp.bfloat16, sharding=rows_sharding(mesh))
loss = lambda params, hidden: jnp.sum(language_model(config).logits(params, hidden) ** 2)
with jax.set_mesh(mesh):
    jax.jit(lambda *args: constrain_params(jax.grad(loss)(*args))).lower(params, hidden).compile()
"""


def test_the_gradient_of_a_padded_vocabulary_compiles_with_fsdp(tmp_path):
    """The compiler failed to fuse its sum over chips with the slice that drops the padding."""
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(GRADIENT_OF_PADDED_LOGITS)
    process = start_process(run_script, script, log=log, folder=tmp_path)
    process.join(300)
    assert process.exitcode == 0, log.read_text()


@pytest.mark.slow
def test_adapters_need_less_memory_per_chip():
    assert planned_wide(1, "--lora.rank", "2")["needed"] < 0.6 * planned_wide(1)["needed"]


@pytest.mark.slow
def test_fsdp_holds_one_gathered_layer_at_a_time():
    """One more layer adds a quarter of its gradient to the peak, but no gathered parameters."""
    more = [planned_wide(layers)["peak"] - planned_wide(layers)["arguments"] for layers in (1, 2)]
    gradient, gathered = 4 * WIDE_LAYER / 4, 2 * WIDE_LAYER  # float32, bfloat16
    assert more[1] - more[0] < gradient + 0.3 * gathered


@pytest.mark.slow
def test_plans_of_two_depths_extrapolate(tmp_path):
    model = save_config(tmp_path, HF_LLAMA | {"num_hidden_layers": 3})
    options = ("--topology", "v6e:2x2", "--mesh", "fsdp=4", "--phases", "scoring")
    full, _ = planned(tmp_path, "--model", model, *options)
    extrapolated, _ = planned(tmp_path, "--model", model, *options, "--depths", "1", "2")
    assert extrapolated["scoring"]["flops"] == pytest.approx(full["scoring"]["flops"], rel=1e-6)
    assert extrapolated["scoring"]["arguments"] == pytest.approx(
        full["scoring"]["arguments"], rel=0.02
    )
    assert extrapolated["scoring"]["collectives"]["all-gather"]["bytes"] == pytest.approx(
        full["scoring"]["collectives"]["all-gather"]["bytes"], rel=0.25
    )


def program(name="update", peak=3, needed=8, **more):
    """Return a program with 2 GiB of arguments."""
    gib, costs = 2**30, (1.0, 1, 1.0, 0.0, 0.0, {}, 1.0)
    return Program(name, 2 * gib, 0, peak * gib, needed * gib, *costs, **more)


@pytest.mark.slow
def test_a_plan_says_what_its_seconds_leave_out(tmp_path):
    """One step of bins of 1,024 tokens is planned, which the splash kernel reads."""
    model = save_config(tmp_path, HF_LLAMA | {"max_position_embeddings": 1024})
    options = ("--phases", "scoring", "--critic", "shared", "--mesh", "data=1")
    found, printed = planned(tmp_path, "--model", model, *options, "--ppo.pack", "1024")
    for note in ("which computes 1 x 1024 tokens on each", "no cycles for the splash kernel"):
        assert note in printed and note in " ".join(found["scoring"]["notes"])


def test_bins_that_are_too_short_are_refused_before_anything_is_compiled():
    config, ppo = load_config("gpt2", "bfloat16", False)[1], PPOConfig(pack=64)
    mesh = AbstractMesh((1, 1, 1), AXES)
    with pytest.raises(SettingError, match="pack=64 must be at least 128 to hold"):
        compile_iteration(config, ppo, mesh, CHIPS["v5e"], prompt_tokens=64)


def test_extrapolated_seconds_of_decoding_have_a_note():
    step, config = DecodeStep(1e-3, 0.0, 0), load_config("gpt2", "bfloat16", False)[1]
    made = {"rollout": program("rollout", decode_step=step, notes=("A.",)), "update": program()}
    found = extrapolate(lambda config: made, config, (2, 4))
    own, note = found["rollout"].notes
    assert own == "A." and note.startswith("The seconds of decoding say little about 12 layers")
    printed = report.summary(found, config, AbstractMesh((1, 1, 1), AXES), CHIPS["v5e"])
    assert f"  Note: {note}\n" in printed and found["update"].notes == ()
    assert report.plan_figures(found, CHIPS["v5e"])["rollout"]["notes"] == ("A.", note)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "gpt3-13b", "--topology", "v5e:2x2"], "The mesh"),
        (["--model", "gpt2", "--topology", "v5e:2x2", "--phases"], "phases must name at least one"),
        (["--model", "gpt2", "--topology", "v7:2x2"], "topology must be like v5e:4x4"),
        (["--model", "gpt2", "--topology", "v5e-3"], "a size that v5e does not come in: 1, 4, 8"),
        (["--model", "gpt2", "--topology", "v5e:3x77"], "No compiler for v5e:3x77"),
        (["--model", "gpt2", "--depths", "4", "2"], "depths must be"),
        (
            ["--model", "gpt2", "--depths", "2", "13"],
            "depths must be two numbers of layers, the smaller first, within the model's 12 layers",
        ),
        (["--model", "gpt2", "--prompt-tokens", "0"], "prompt_tokens"),
    ],
)
def test_an_impossible_plan_is_refused_in_one_sentence(tmp_path, args, message):
    more = ["--mesh", "data=3,fsdp=3"] if message == "The mesh" else []
    status, printed = command(tmp_path, *args, *more)
    assert status == 2 and message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    "name, shape",
    [
        ("v5e-1", "v5e:1x1"),
        ("v5e-4", "v5e:2x2"),
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-256", "v5e:16x16"),
        ("v6e-8", "v6e:2x4"),
        ("v4-8", "v4:2x2x1"),
        ("v4-32", "v4:2x2x4"),
        ("v4-4096", "v4:8x16x16"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p:4x4x8", "v5p:4x4x8"),
    ],
)
def test_accelerator_types_are_slices(name, shape):
    assert slice_shape(name) == shape


def test_advice_for_programs_that_do_not_fit():
    chip = CHIPS["v5e"]
    assert report.advice({"update": program(peak=3, needed=8)}, chip) == []
    assert "micro-batch" in report.advice({"update": program(peak=20, needed=21)}, chip)[0]
    assert "larger fsdp" in report.advice({"update": program(peak=3, needed=40)}, chip)[0]
    assert "rollout-rows" in report.advice({"rollout": TooLarge("no")}, chip)[0]
    assert "larger fsdp" in report.advice({"update": TooLarge("no", 14 * 2**30)}, chip)[0]


@pytest.mark.slow
def test_all_bytes_of_a_reduced_gradient_are_counted(tmp_path, model):
    """Data parallelism reduces each gradient once, in one operation with many arrays."""
    found, printed = planned(tmp_path, "--model", model, "--topology", "v5e-4", "--mesh", "data=4")
    assert "on v5e:2x2, 4 of 4 devices" in printed
    shapes = jax.eval_shape(
        lambda: init_params(load_config(str(model), "bfloat16", False)[1], jax.random.key(0))
    )
    gradient = 2 * sum(
        4 * x.size for x in jax.tree.leaves(shapes)
    )  # gradients of policy and critic
    # 2 epochs of 2 minibatches. The compiler leaves out rows of tables that have no gradient.
    assert 3.8 * gradient < found["update"]["collectives"]["all-reduce"]["bytes"] < 4.4 * gradient
    assert (
        found["update"]["flops"] > 2 * found["scoring"]["flops"]
        and "does not divide" not in printed
    )


def test_collectives_are_counted_once_each():
    # Different collectives share channel 1; the two all-gathers on channel 5 are parts of one.
    text = """HloModule m
%fused_a (p: f32[2]) -> f32[8] {
  %x = f32[2]{0} parameter(0)
  ROOT %ga = f32[8]{0} all-gather(%x), channel_id=5, dimensions={0}
}
%fused_b (p: f32[2]) -> f32[8] {
  %y = f32[2]{0} parameter(0)
  ROOT %gb = f32[8]{0:S(1)} all-gather(%y), channel_id=5, dimensions={0}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  %p1 = f32[2]{0} parameter(1)
  %a = (f32[8]{0}, f32[2]{0}) all-reduce(%p0, %p1), channel_id=1, to_apply=%add
  %b = f32[]{0} all-reduce(%c), channel_id=1, to_apply=%add
  %s = (f32[2]{0}, f32[16]{0}) all-gather-start(%p1), channel_id=1, dimensions={0}
  %f = f32[8]{0} fusion(%p1), kind=kCustom, calls=%fused_a
  ROOT %g = f32[8]{0} fusion(%p1), kind=kCustom, calls=%fused_b
}
"""
    total = account(text, CHIPS["v5e"]).total
    assert total.collectives == {
        "all-reduce": Collective(2, 44),
        "all-gather": Collective(2, 64 + 32),
    }
    assert total.collective_s == pytest.approx((2 * 44 + 64 + 32) / 200e9)


def test_flops_of_a_mapped_function_count_on_every_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_rows = (jax.P("data"), jax.P())
    mapped = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=over_rows, out_specs=jax.P("data")
    )
    assert matmul_flops(mapped, jnp.ones((16, 4)), jnp.ones((4, 4))) == 2 * 16 * 16


def test_loops_count_once_per_iteration():
    def step(carry, _):
        with jax.named_scope("trips=3"):
            return jax.lax.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ c[1]), (0, carry)
            )[1], None

    function = lambda x: jax.lax.scan(jax.checkpoint(step), x, length=5)[0]
    assert matmul_flops(function, jnp.ones((8, 8))) == 5 * 3 * 2 * 8**3
    assert (
        matmul_flops(
            lambda x: jax.lax.cond(x[0, 0] > 0, function, lambda x: x, x), jnp.ones((8, 8))
        )
        == 5 * 3 * 2 * 8**3
    )
    text = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
%cond (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %r = f32[8,4]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%add, CYCLES
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%j, %r)
}
ENTRY %main (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p0 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,4]{1,0}) while(%p0), condition=%cond, body=%body
}
""".replace("CYCLES", 'backend_config={"estimated_cycles":"10"}')
    v5e = CHIPS["v5e"]
    found = account(text, v5e)
    assert found.total.collectives == {"all-reduce": Collective(7, 7 * 128)}
    assert found.total.cycles == 70 and found.step_count == 0
    # The tiles of an array of f32[8,4] take 4,096 bytes. The comparison reads and writes scalars.
    assert found.total.bytes == 7 * (2 * 4096) + 7 * (1 + 4 + 4)
    assert found.loops == found.total
    assert found.total.collective_s == pytest.approx(7 * 2 * 128 / 200e9)
    assert found.total.compute_s == pytest.approx(70 / 1.5e9 + 7 * 9 / 819e9)
    named = text.replace("body=%body", 'body=%body, metadata={op_name="jit(f)/trips=3/while"}')
    found = account(named, v5e)
    assert found.total.cycles == 30 and found.step_count == 3 and found.steps == found.total


def test_a_counter_need_not_start_at_0_and_advance_by_1():
    text = """HloModule m
%cond (p: (u32[], f32[])) -> pred[] {
  %p = (u32[], f32[]) parameter(0)
  %n = u32[]{:T(128)} constant(9)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (p: (u32[], f32[])) -> (u32[], f32[]) {
  %q = (u32[], f32[]) parameter(0)
  %j = u32[] get-tuple-element(%q), index=0
  %two = u32[] constant(2)
  %k = u32[] add(%j, %two)
  %x = f32[] get-tuple-element(%q), index=1
  %y = f32[] multiply(%x, %x), backend_config={"estimated_cycles":"10"}
  ROOT %t = (u32[], f32[]) tuple(%k, %y)
}
ENTRY %main (x: f32[]) -> (u32[], f32[]) {
  %x0 = f32[] parameter(0)
  %one = u32[] constant(1)
  %t0 = (u32[], f32[]) tuple(%one, %x0)
  ROOT %w = (u32[], f32[]) while(%t0), condition=%cond, body=%body
}
"""
    assert account(text, CHIPS["v5e"]).total.cycles == 4 * 10  # 1, 3, 5, 7


def test_what_is_read_and_written_in_place_is_counted_with_its_tiles():
    """A step writes one position of a cache, reads one row of a table, and passes arrays on."""
    text = """HloModule m
%put (a: bf16[64,12,575,64], u: bf16[64,12,1,64]) -> bf16[64,12,575,64] {
  %a = bf16[64,12,575,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %u = bf16[64,12,1,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %z = s32[] constant(0)
  ROOT %d = bf16[64,12,575,64]{3,2,1,0:T(8,128)(2,1)} dynamic-update-slice(%a, %u, %z, %z, %z, %z)
}
%look (t: f32[50257,768], i: s32[64]) -> f32[64,768] {
  %t = f32[50257,768]{1,0:T(8,128)} parameter(0)
  %i = s32[64]{0} parameter(1)
  %b = f32[50257,768]{1,0:T(8,128)} bitcast(%t)
  ROOT %g = f32[64,768]{1,0:T(8,128)S(1)} gather(%b, %i), slice_sizes={1,768}
}
%pass (t: f32[50257,768], x: f32[8]) -> (f32[50257,768], f32[8]) {
  %s = f32[50257,768]{1,0:T(8,128)} parameter(0)
  %x = f32[8]{0} parameter(1)
  %y = f32[8]{0} negate(%x)
  ROOT %o = (f32[50257,768]{1,0:T(8,128)}, f32[8]{0}) tuple(%s, %y)
}
ENTRY %main (c: bf16[64,12,575,64]) -> f32[8] {
  %c = bf16[64,12,575,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %n = bf16[64,12,1,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %t1 = f32[50257,768]{1,0:T(8,128)} parameter(2)
  %ids = s32[64]{0} parameter(3)
  %x1 = f32[8]{0} parameter(4)
  CASE
}
"""
    tile = 64 * 12 * 8 * 128 * 2  # of one position of all rows and heads, whose 64 features pad
    cases = {
        "%f = bf16[64,12,575,64]{3,2,1,0:T(8,128)(2,1)} fusion(%c, %n), calls=%put": 2 * tile,
        "%f = f32[64,768]{1,0:T(8,128)S(1)} fusion(%t1, %ids), calls=%look": 64 * 768 * 4 + 64 * 4,
        "%f = (f32[50257,768]{1,0:T(8,128)}, f32[8]{0}) fusion(%t1, %x1), calls=%pass": 64,
        "%f = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x1)": 32,
        "%f = ((f32[50257,768]{1,0:T(8,128)}), f32[16,768]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
        "slice-start(%t1), slice={[0:16], [0:768]}": 16 * 768 * 4,
        "%f = f32[64,768]{1,0:T(8,128)} slice(%t1), slice={[0:64], [0:768]}": 2 * 64 * 768 * 4,
        "%f = f32[8]{0:T(1024)} negate(%x1)": 32 + 4096,
    }
    for case, size in cases.items():
        assert account(text.replace("CASE", case), CHIPS["v5e"]).total.bytes == size, case


def test_the_bound_of_a_decode_step_reads_parameters_and_the_filled_cache_once():
    config = load_config("llama3-8b", "bfloat16", False)[1]
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    mesh = AbstractMesh((1, 4, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    ppo = PPOConfig(batch_size=64, max_new_tokens=11)
    bound = lambda config: bound_seconds(config, params, ppo, mesh, CHIPS["v5p"], prompt_tokens=100)
    vectors = 4 * (2 * config.layers + 1) * config.width  # scales of norms, whole in float32
    matrices = 2 * (sum(x.size for x in jax.tree.leaves(params)) - vectors // 4)
    looked_up = 2 * config.vocab_size * config.width
    position = 2 * config.layers * 8 // 2 * 128 * 2
    read = (matrices - looked_up) / 8 + vectors + 16 * position * (100 + 9 / 2)
    assert bound(config) == pytest.approx(read / 2765e9)
    short = replace(config, windows=(50, *(None,) * (config.layers - 1)))
    saved = 16 * position / config.layers * (100 + 9 / 2 - 50)
    assert bound(short) == pytest.approx((read - saved) / 2765e9)
