"""Test LoRA adapters: initialisation, merging, training, and files that `peft` reads and writes."""

import dataclasses
import functools
import json
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from helpers import (
    compiled_logits,
    family_peer,
    gpt2_peer,
    left_padded,
    logits_of,
    noisy_adapters,
    slow_but,
    word_tokenizer,
)

from ppo_jax.errors import SettingError
from ppo_jax.models import heads, lora
from ppo_jax.models.io import adapter_files, pretrained, scorers, stored
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import iteration
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import overlay

ALL_LAYERS = lora.LoRA(rank=3, alpha=7.0, targets=r"(attn|mlp)/")
SOME_LAYERS = lora.LoRA(rank=4, alpha=4.0, targets=r"layer_[02]/attn/(q|v)$", stabilised=True)

# Other tests compile with XLA's older emitters, whose sums may depend on the whole program.
DEFAULT_EMITTERS = (
    {"xla_cpu_use_fusion_emitters": True} if version("jaxlib").startswith("0.10.") else {}
)


def load(kind, folder):
    (gpt2_peer if kind == "gpt2" else functools.partial(family_peer, kind))(folder)
    return pretrained.load_policy(folder)


def with_scale(loaded, spec):
    config = dataclasses.replace(loaded.config, lora_scale=spec.scale)
    return config, language_model(config)


KINDS = ("gpt2", "neo", "neox", "llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "bert")


@pytest.mark.parametrize(
    "kind, spec",
    slow_but(
        [("gpt2", ALL_LAYERS), ("llama", ALL_LAYERS), ("qwen2", SOME_LAYERS)],
        [
            *((kind, ALL_LAYERS) for kind in KINDS),
            ("qwen2", ALL_LAYERS),
            ("qwen2", SOME_LAYERS),
            ("qwen2", lora.LoRA(rank=2, targets="attn/o$")),
            ("qwen2", lora.LoRA(rank=2, targets="mlp/")),
        ],
    ),
)
def test_fresh_adapters_change_nothing_and_merged_ones_agree(tmp_path, kind, spec):
    loaded = load(kind, tmp_path)
    _, model = with_scale(loaded, spec)
    fresh, batch = lora.init_lora(loaded.params, jax.random.key(0), spec), left_padded()
    np.testing.assert_array_equal(
        logits_of(model, overlay(loaded.params, fresh), *batch),
        logits_of(model, loaded.params, *batch),
    )
    compiled = jax.jit(functools.partial(logits_of, model), compiler_options=DEFAULT_EMITTERS)
    np.testing.assert_array_equal(
        compiled(overlay(loaded.params, fresh), *batch), compiled(loaded.params, *batch)
    )
    full = overlay(loaded.params, noisy_adapters(fresh))
    want = compiled(full, *batch)
    assert np.abs(np.asarray(want - compiled(loaded.params, *batch))).max() > 0.1
    merged = lora.merge(full, spec.scale)
    assert jax.tree.structure(merged) == jax.tree.structure(loaded.params)
    # Relative to the largest logit: merging rounds each weight, by up to 8e-6 on the CPUs tried.
    np.testing.assert_allclose(
        compiled(merged, *batch)[batch[1]],
        want[batch[1]],
        atol=4e-5 * np.abs(want).max(),
    )


STABILISED = lora.LoRA(
    rank=2, alpha=16.0, targets=r"(attn|mlp)/", stabilised=True
)  # a scale that is not exact in binary


@pytest.mark.parametrize(
    "kind, spec",
    [
        *(
            (kind, spec)
            for kind in ("gpt2", "neox", "qwen2")
            for spec in (ALL_LAYERS, SOME_LAYERS, STABILISED, lora.LoRA(targets="mlp/up"))
        ),
        *(
            (kind, ALL_LAYERS)
            for kind in ("neo", "llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "bert")
        ),
        ("phi3", SOME_LAYERS),
    ],
)
def test_an_adapter_equals_peft_after_loading_and_saving(tmp_path, kind, spec):
    loaded = load(kind, tmp_path / "base")
    config, model = with_scale(loaded, spec)
    adapters = noisy_adapters(lora.init_lora(loaded.params, jax.random.key(0), spec))
    adapter_files.save_adapter(
        tmp_path / "adapter",
        adapters,
        spec,
        config,
        loaded.hf_config["model_type"],
        str(tmp_path / "base"),
    )
    base = (gpt2_peer if kind == "gpt2" else functools.partial(family_peer, kind))(
        tmp_path / "base"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens, mask = left_padded()
    positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    with torch.no_grad():
        want = theirs(
            torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), position_ids=positions
        ).logits.numpy()
    got = compiled_logits(model, overlay(loaded.params, adapters), tokens, mask)
    # Relative to the largest logit; 5e-5 was seen with a stabilised adapter of a large scale.
    tolerance = 2e-4 * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got)[mask], want[mask], atol=tolerance)

    loaded_adapters, scale = adapter_files.load_adapter(
        tmp_path / "adapter", config, loaded.hf_config["model_type"]
    )
    assert scale == pytest.approx(spec.scale)
    np.testing.assert_allclose(
        compiled_logits(model, overlay(loaded.params, loaded_adapters), tokens, mask)[mask],
        np.asarray(got)[mask],
        atol=1e-5,
    )
    theirs.save_pretrained(tmp_path / "again")
    back, scale = adapter_files.load_adapter(
        tmp_path / "again", config, loaded.hf_config["model_type"]
    )
    assert scale == pytest.approx(spec.scale)
    np.testing.assert_allclose(
        compiled_logits(model, overlay(loaded.params, back), tokens, mask)[mask],
        np.asarray(got)[mask],
        atol=1e-5,
    )


def test_a_model_without_the_scale_refuses_adapters(tmp_path):
    """A scale of 1 would be used silently otherwise; it has to be given even if it is 1."""
    loaded, spec = load("gpt2", tmp_path), lora.LoRA(rank=2, alpha=2.0)
    full = overlay(loaded.params, lora.init_lora(loaded.params, jax.random.key(0), spec))
    model, batch = language_model(loaded.config), left_padded()
    for run in (model.hidden, jax.jit(model.hidden)):
        with pytest.raises(ValueError, match=r"has no lora_scale; make the model with .*replace"):
            run(full, *map(jnp.asarray, batch))
        run(loaded.params, *map(jnp.asarray, batch))
    with_scale(loaded, spec)[1].hidden(full, *map(jnp.asarray, batch))
    with pytest.raises(ValueError, match=r"scale 1\.0, but the model was made with lora_scale=4"):
        config = dataclasses.replace(loaded.config, lora_scale=4.0)
        adapter_files.save_adapter(tmp_path / "adapter", full, spec, config, "gpt2", "base")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_folder_of_an_adapter_is_read_as_the_merged_model(tmp_path, kind):
    loaded = load(kind, tmp_path / "base")
    adapters = noisy_adapters(lora.init_lora(loaded.params, jax.random.key(0), ALL_LAYERS))
    folder, name = tmp_path / "adapter", loaded.hf_config["model_type"]
    adapter_files.save_adapter(
        folder, adapters, ALL_LAYERS, loaded.config, name, str(tmp_path / "base")
    )
    word_tokenizer().save_pretrained(tmp_path / "base")
    want = lora.merge(overlay(loaded.params, adapters), ALL_LAYERS.scale)
    got = pretrained.load_policy(folder)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got.params, want)
    assert got.hf_config == loaded.hf_config == stored.read_config(folder)
    assert pretrained.load_tokenizer(folder).get_vocab() == word_tokenizer().get_vocab()
    with pytest.raises(ValueError, match="adapter without its base model; merge the two first"):
        scorers.load_scorer(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="does not name the base model"):
        pretrained.load_policy(folder)


@pytest.mark.slow
def test_only_adapters_train_and_the_base_is_the_reference(tmp_path):
    loaded = load("llama", tmp_path)
    spec = lora.LoRA(rank=2)
    config, model = with_scale(loaded, spec)
    ppo = PPOConfig(batch_size=8, epochs=2, minibatches=2, max_new_tokens=6, learning_rate=1e-2)
    agent = iteration.Agent(model, heads.separate_critic(config), ppo, (1,), 0)
    head = heads.init_head(config.width, jax.random.key(1))
    adapters = lora.init_lora(loaded.params, jax.random.key(0), spec)
    frozen = {
        "policy": loaded.params,
        "critic": {"trunk": loaded.params},
    }  # policy and critic share spec base
    params = {"policy": adapters, "critic": {"trunk": adapters, "head": head}}
    state = iteration.init_state(agent, params, jax.random.key(2), updates=3)
    moments = sum(x.size for x in jax.tree.leaves(state.train.opt_state))
    assert moments < 3 * sum(x.size for x in jax.tree.leaves(params))
    tokens, mask = (jnp.asarray(np.resize(x, (8, 10))) for x in left_padded())

    @jax.jit
    def update(state, frozen):
        rollout = iteration.sample(agent, state, tokens, mask, frozen=frozen)
        scores = iteration.score(agent, state, frozen["policy"], rollout, frozen=frozen)
        return iteration.learn(
            agent, state, rollout, scores, rollout.responses[:, 0] / 30, frozen=frozen
        )

    state, first = update(state, frozen)
    assert first["objective/kl"] == 0 and first["policy/first_ratio_error_max"] < 2e-6
    state, second = update(state, frozen)
    assert second["objective/kl"] != 0
    assert all(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(state.train.params), jax.tree.leaves(params), strict=True)
    )


def test_unusable_adapters_are_refused(tmp_path):
    loaded = load("llama", tmp_path / "base")
    with pytest.raises(
        ValueError, match="targets='nothing' adapts no layer; it must match some of"
    ):
        lora.init_lora(loaded.params, jax.random.key(0), lora.LoRA(targets="nothing"))
    with pytest.raises(SettingError, match="alpha must be a finite number, not nan"):
        lora.LoRA(alpha=float("nan"))
    for alpha in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"alpha={alpha} above 0"):
            lora.init_lora(loaded.params, jax.random.key(0), lora.LoRA(alpha=alpha))
    with pytest.raises(ValueError, match="adapter in the format of peft, because it has no"):
        adapter_files.load_adapter(tmp_path, loaded.config, "llama")
    adapters = lora.init_lora(loaded.params, jax.random.key(0), ALL_LAYERS)
    adapter_files.save_adapter(
        tmp_path / "adapter", adapters, ALL_LAYERS, loaded.config, "llama", "base"
    )
    wider = dataclasses.replace(loaded.config, mlp_width=80)
    with pytest.raises(ValueError, match=r"mlp.gate_proj is \(32, 80\) in the model"):
        adapter_files.load_adapter(tmp_path / "adapter", wider, "llama")
    with pytest.raises(ValueError, match="left over"):
        adapter_files.load_adapter(
            tmp_path / "adapter", load("neox", tmp_path / "other").config, "gpt_neox"
        )
    file, settings = (
        tmp_path / "adapter/adapter_model.safetensors",
        tmp_path / "adapter/adapter_config.json",
    )
    whole, settings_text = file.read_bytes(), settings.read_text()
    for content, text, message in (
        (whole[:90], settings_text, "holds no adapter"),
        (whole, "[1]", "not a JSON object"),
        (whole, settings_text.replace("lora_alpha", "alpha"), "lora_alpha is None"),
    ):
        file.write_bytes(content)
        settings.write_text(text)
        with pytest.raises(ValueError, match=message):
            adapter_files.load_adapter(tmp_path / "adapter", loaded.config, "llama")


def peft_adapter(folder, **settings):
    """Save a noisy adapter of peft for a Llama; return the loaded Llama and peft's logits."""
    base = family_peer("llama", folder / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **settings)).eval()
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if "lora_" in name:
                x.add_(0.1 * torch.randn_like(x))
        theirs.save_pretrained(folder / "adapter", save_embedding_layers=False)
        want = theirs(torch.arange(2, 14)[None]).logits.numpy()
    return pretrained.load_policy(folder / "base"), want


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"v_proj": 2}},
        {"alpha_pattern": {r"layers.1.self_attn.v_proj": 16}},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_each_layer_keeps_its_own_scale(tmp_path, settings):
    loaded, want = peft_adapter(tmp_path, target_modules=["q_proj", "v_proj"], **settings)
    adapters, scale = adapter_files.load_adapter(tmp_path / "adapter", loaded.config, "llama")
    assert scale == 2
    model = language_model(dataclasses.replace(loaded.config, lora_scale=scale))
    tokens = np.arange(2, 14)[None]
    np.testing.assert_allclose(
        logits_of(model, overlay(loaded.params, adapters), tokens, tokens > 0), want, atol=1e-4
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init_lora_weights": "olora"}, "base that init_lora_weights 'olora' changed"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights 'pissa_niter_2' changed"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens is \[5, 6\]"),
        ({"use_dora": True}, "use_dora is True"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no output matrix such as lm_head"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path, settings, message):
    loaded, _ = peft_adapter(
        tmp_path, **{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}
    )
    with pytest.raises(ValueError, match=message):
        adapter_files.load_adapter(tmp_path / "adapter", loaded.config, "llama")
