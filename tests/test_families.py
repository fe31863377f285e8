"""Compare every model family with `transformers` on small random models, and test weight files."""

import json
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import (
    FAMILIES,
    FAMILY_SIZE,
    compiled_logits,
    family_peer,
    generate,
    left_padded,
    save_random_peer,
    slow_but,
    tensors_in,
)

from ppo_jax import cli
from ppo_jax.models import heads
from ppo_jax.models.config import Activation
from ppo_jax.models.io import family as family_helpers
from ppo_jax.models.io import pretrained, safetensors_format, scorers, weights
from ppo_jax.models.transformer import language_model


@pytest.mark.parametrize("case", slow_but(("neo", "llama", "gemma3", "bert"), FAMILIES))
def test_logits_and_greedy_generation_equal_transformers(tmp_path, case):
    torch_model = family_peer(case, tmp_path)
    loaded = pretrained.load_policy(tmp_path)
    model = language_model(loaded.config)
    tokens, mask = left_padded()
    offset = (
        loaded.config.position_offset if "roberta" in loaded.hf_config["model_type"] else 0
    )  # the other families with an offset add it themselves
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0) + offset
    arguments = {
        "attention_mask": torch.tensor(mask).long(),
        "position_ids": torch.tensor(positions),
    }
    with torch.no_grad():
        want = torch_model(torch.tensor(tokens), **arguments).logits.numpy()
    got = compiled_logits(model, loaded.params, tokens, mask)
    np.testing.assert_allclose(np.asarray(got)[mask], want[mask], atol=1e-4)
    assert np.ptp(want) > 2

    if not offset:
        del arguments["position_ids"]  # `generate` counts positions itself, from 0
    texts = torch_model.generate(
        torch.tensor(tokens),
        **arguments,
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
        eos_token_id=1,
    ).numpy()
    out = generate(
        model,
        loaded.params,
        jax.random.key(0),
        tokens,
        mask,
        max_new_tokens=20,
        stop_ids=(1,),
        greedy=True,
    )
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, : texts.shape[1]], texts)


@pytest.mark.parametrize("case", FAMILIES)
def test_load_and_save_is_bit_identical(tmp_path, case):
    torch_model = family_peer(case, tmp_path / "a")
    loaded = pretrained.load_policy(tmp_path / "a")
    pretrained.save_policy(tmp_path / "b", loaded)
    again = type(torch_model).from_pretrained(tmp_path / "b")
    tokens = torch.tensor([[2, 3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(torch_model(tokens).logits, again(tokens).logits)
    for a, b in zip(
        jax.tree.leaves(loaded.params),
        jax.tree.leaves(pretrained.load_policy(tmp_path / "b").params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Llama", "Qwen2", "Bert", "Roberta"])
def test_scores_equal_transformers_after_loading_and_saving(tmp_path, name):
    """A reward model equals its `ForSequenceClassification`; BERT and RoBERTa are encoders."""
    torch.manual_seed(0)
    options = {
        **FAMILY_SIZE,
        "num_key_value_heads": 4,
        **({"n_embd": 32, "n_layer": 3, "n_head": 4} if name == "GPT2" else {}),
    }
    model = getattr(transformers, f"{name}ForSequenceClassification")(
        getattr(transformers, f"{name}Config")(**options, num_labels=1)
    )
    model.eval().save_pretrained(tmp_path / "a")
    tokens = np.array([[2, 3, 4, 5], [6, 7, 8, 0], [9, 0, 0, 0]])
    with torch.no_grad():
        want = (
            model(torch.tensor(tokens), attention_mask=torch.tensor(tokens != 0).long())
            .logits[:, 0]
            .numpy()
        )
    loaded = scorers.load_scorer(tmp_path / "a")
    got = heads.reward_model(loaded.config)(
        loaded.params, jnp.asarray(tokens), jnp.asarray(tokens != 0)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    if loaded.config.causal:
        del loaded.hf_config[
            "pad_token_id"
        ]  # GPT-2 has none either; the end id, 1, is used instead
    scorers.save_scorer(tmp_path / "b", loaded)
    again = type(model).from_pretrained(tmp_path / "b").eval()
    if loaded.config.causal:
        with torch.no_grad():
            together = again(
                torch.tensor(np.where(tokens, tokens, 1)),
                attention_mask=torch.tensor(tokens != 0).long(),
            )
        np.testing.assert_allclose(together.logits[:, 0], want, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(
            again(torch.tensor(tokens[:1])).logits, model(torch.tensor(tokens[:1])).logits
        )


@pytest.mark.parametrize("name", ["GPT2", "GPTNeo", "GPTNeoX", "Llama", "Qwen3", "Gemma2", "Phi3"])
@pytest.mark.parametrize("pad", [1, 7, 0, None])
def test_a_scorer_reads_the_token_that_transformers_reads(tmp_path, name, pad):
    """Texts that hold and end in the pad id, which may be the end id 1; alone, and with padding."""
    sizes = {**FAMILY_SIZE, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes |= {"GPTNeo": {"attention_types": [[["global"], 1]], "num_layers": 1}}.get(name, {})
    sizes |= {"GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4}}.get(name, {})
    if name == "GPTNeo":
        del sizes["num_hidden_layers"]
    config = getattr(transformers, f"{name}Config")(**sizes | {"pad_token_id": pad}, num_labels=1)
    kind = getattr(transformers, f"{name}ForSequenceClassification")
    theirs = save_random_peer(kind, config, tmp_path)
    loaded = scorers.load_scorer(tmp_path)
    score = jax.jit(heads.reward_model(loaded.config))
    texts = [[2, 3, 1], [4, 7, 7, 7], [5, 1, 1, 6, 1], [0, 8, 0], [1, 7, 9, 7], [7], [1, 1]]
    for text in texts:
        with torch.no_grad():
            want = theirs(torch.tensor([text])).logits[0, 0]
            positions = torch.arange(len(text))
            for left, right in ((0, 8 - len(text)), (8 - len(text), 0)):
                mask = np.array([[False] * left + [True] * len(text) + [False] * right])
                row = np.array([[pad or 0] * left + text + [pad or 0] * right])
                got = score(loaded.params, jnp.asarray(row), jnp.asarray(mask))[0]
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=str(text))
                if pad is None or (left and set(text) == {pad}):
                    continue  # transformers needs a pad id, and reads padding in such a text
                order = torch.tensor([[0] * left + positions.tolist() + [0] * right])
                same = theirs(
                    torch.tensor(row),
                    attention_mask=torch.tensor(mask).long(),
                    position_ids=order,
                ).logits[0, 0]
                np.testing.assert_allclose(got, same, rtol=1e-4, atol=1e-5, err_msg=str(text))


def test_a_config_without_a_pad_id_has_the_one_of_its_class(tmp_path):
    for name in ("Llama", "Gemma2", "Gemma3Text", "Phi3", "GPT2", "Qwen2"):
        config = getattr(transformers, f"{name}Config")
        family = pretrained.family_of(config.model_type)
        assert family.pad_id == config().pad_token_id


def test_every_name_of_a_supported_activation_is_accepted():
    """Of the names that transformers has, those are refused that mean another function."""
    x = np.linspace(-20, 20, 401, dtype=np.float32)
    with torch.no_grad():
        theirs = {
            name: transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
            for name in transformers.activations.ACT2FN
            if name != "xielu"  # has parameters
        }
    for name, want in theirs.items():
        try:
            ours = family_helpers.activation({"hidden_act": name}, "hidden_act", "gelu")
        except ValueError:
            same = [a for a in Activation if np.allclose(theirs[a.value], want, atol=1e-6)]
            assert not same, f"{name} is {same}"
        else:
            np.testing.assert_allclose(ours(jnp.asarray(x)), want, atol=2e-6)
    assert pretrained.config_of(
        {**transformers.LlamaConfig(**FAMILY_SIZE).to_dict(), "hidden_act": "swish"}
    ) == pretrained.config_of(transformers.LlamaConfig(**FAMILY_SIZE).to_dict())
    roberta = {"model_type": "roberta", "hidden_act": "gelu_python"}
    assert pretrained.config_of(roberta).activation is Activation.GELU


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_shards_load(tmp_path, dtype):
    """Sharded 16-bit weights as written by `transformers` are loaded as float32."""
    model = family_peer("llama", tmp_path / "a").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    loaded = pretrained.load_policy(tmp_path / "b")
    want = model.model.layers[1].mlp.up_proj.weight.float().detach().numpy().T
    np.testing.assert_array_equal(loaded.params["layer_1"]["mlp"]["up"]["kernel"], want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_tensor_goes_from_the_file_to_the_host_and_to_the_device_once(
    tmp_path, monkeypatch, dtype
):
    model = family_peer("llama", tmp_path / "peer").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "model")
    made = []
    with monkeypatch.context() as patch:
        for module, name in ((jnp, "array"), (jnp, "asarray"), (jax, "device_put")):
            patch.setattr(module, name, lambda *_, name=name, **__: made.append(name))
        stored = tensors_in(tmp_path / "model")
    assert not made
    for name, want in model.state_dict().items():
        assert type(stored[name]) is np.ndarray and stored[name].dtype == dtype
        assert stored[name].tobytes() == want.contiguous().view(torch.uint8).numpy().tobytes()

    placed, put = [], jax.device_put
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", lambda x: placed.append(x) or put(x))
        loaded = pretrained.load_policy(tmp_path / "model")
    assert len(placed) == len(jax.tree.leaves(loaded.params)) == len(stored)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in placed)
    for name, x in pretrained.from_params(
        loaded.params, pretrained.family_of("llama").table(loaded.config)
    ):
        np.testing.assert_array_equal(x, model.state_dict()[name].float().numpy(), strict=True)


def test_written_shards_load_in_both_libraries(tmp_path):
    family_peer("llama", tmp_path / "a")
    loaded = pretrained.load_policy(tmp_path / "a")
    table = pretrained.family_of("llama").table(loaded.config)
    safetensors_format.write_safetensors(
        tmp_path / "a",
        weights.from_params(loaded.params, table),
        shard_bytes=20_000,
    )
    again = pretrained.load_policy(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, again.params)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; known are bert, distilbert, gemma2"),
        ({"hidden_act": "swiglu"}, "hidden_act 'swiglu' is not supported"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type 'yarn' is not supported",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"num_key_value_heads": 3}, "must be a multiple of kv_heads=3"),
        ({"hidden_size": None}, "'hidden_size'"),
    ],
)
def test_an_unsupported_config_is_refused(changes, message):
    hf = transformers.LlamaConfig(**FAMILY_SIZE).to_dict()
    hf = {k: v for k, v in {**hf, **changes}.items() if not (k in changes and v is None)}
    with pytest.raises(ValueError, match=message):
        pretrained.config_of(hf)


@pytest.mark.parametrize(
    "name",
    [
        "GPT2",
        "GPTNeo",
        "GPTNeoX",
        "Llama",
        "Mistral",
        "Qwen2",
        "Qwen3",
        "Gemma2",
        "Gemma3Text",
        "Phi3",
        "Bert",
        "Roberta",
        "XLMRoberta",
        "StableLm",
    ],
)
def test_missing_config_keys_have_the_defaults_of_transformers(name):
    sizes = {
        key: FAMILY_SIZE[key]
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    }
    few = (
        {"num_attention_heads": 32, **sizes, "hidden_size": 128}
        if name[:4] in ("Llam", "Mist", "Qwen", "Gemm")
        else {}
    )
    for more in (
        {},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": None},
    ):
        if more and not few:
            continue
        theirs = getattr(transformers, f"{name}Config")(**few, **more)
        assert pretrained.config_of(
            {"model_type": theirs.model_type, **few, **more}
        ) == pretrained.config_of(theirs.to_dict())


def test_a_bfloat16_base_is_saved_as_float32(tmp_path):
    family_peer("llama", tmp_path / "full").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded = pretrained.load_policy(tmp_path / "half")
    tuned = loaded._replace(
        params=jax.tree.map(lambda x: x + 1e-4, loaded.params)
    )  # too small a change for bfloat16
    pretrained.save_policy(tmp_path / "tuned", tuned)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    tokens, model = np.arange(2, 12)[None], language_model(loaded.config)
    with torch.no_grad():
        want = again(torch.tensor(tokens)).logits.numpy()
    got = compiled_logits(model, tuned.params, tokens, np.asarray(tokens) > 0)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_norms_with_tensorflow_names_are_read(tmp_path):
    family_peer("bert", tmp_path)
    stored = tensors_in(tmp_path)
    want = pretrained.load_policy(tmp_path).params
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in stored.items()
    }
    assert set(old) != set(stored)
    safetensors_format.write_safetensors(tmp_path, old.items())
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_policy(tmp_path).params, want)


def test_loading_holds_at_most_two_stored_tensors(tmp_path):
    family_peer("llama", tmp_path)
    want = pretrained.load_policy(tmp_path)
    alive, most = weakref.WeakSet(), 0

    class Tensor(np.ndarray):
        """An array that can be weakly referenced and hashed."""

        __hash__ = object.__hash__

    def watched(read):
        nonlocal most
        tensor = np.array(read()).view(Tensor)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    readers = {
        name: partial(watched, read)
        for name, read in safetensors_format.open_tensors(tmp_path).items()
    }
    rules = pretrained.family_of("llama").table(want.config)
    params = weights.to_params(readers, rules, want.params, source=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, want.params)
    assert 1 <= most <= 2  # A variable still refers to the last one while the next is read.


def test_shards_respect_the_size_limit(tmp_path):
    made = {f"x{i}": np.full((4, 4), i, np.float32) for i in range(7)}
    safetensors_format.write_safetensors(tmp_path, iter(made.items()), shard_bytes=130)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    stored = tensors_in(tmp_path)
    assert set(stored) == set(made) and all((stored[name] == x).all() for name, x in made.items())
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_writing_removes_the_weights_of_an_older_model_only(tmp_path):
    kept = {
        name: np.full((4, 4), i, np.float32)
        for i, name in enumerate(("notes.safetensors", "x", "y"))
    }
    safetensors_format.save_file({"x": kept["x"]}, tmp_path / "notes.safetensors")
    for names, bound, files in ((("x", "y"), 64, 2), (("y",), 128, 1), (("x", "y"), 64, 2)):
        safetensors_format.write_safetensors(
            tmp_path, [(name, kept[name]) for name in names], shard_bytes=bound
        )
        assert set(tensors_in(tmp_path)) == set(names)
        assert len(list(tmp_path.glob("model*.safetensors"))) == files
        assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    assert (tmp_path / "notes.safetensors").exists()  # not part of a model
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "../../outside.safetensors", "y": "notes.txt"}}')
    (tmp_path / "notes.txt").touch()
    safetensors_format.write_safetensors(tmp_path, [("x", kept["x"])])
    assert not index.exists() and (tmp_path / "notes.txt").exists()
    single = tmp_path / "model.safetensors"
    assert single.stat().st_mode == (tmp_path / "notes.txt").stat().st_mode  # as the umask sets it


def test_a_single_file_has_priority_over_an_index(tmp_path):
    safetensors_format.write_safetensors(
        tmp_path, [("old", np.zeros(2, np.float32)), ("x", np.zeros(2, np.float32))], shard_bytes=8
    )
    safetensors_format.save_file({"new": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    assert set(tensors_in(tmp_path)) == {"new"}


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("model.norm.weight", np.int8, r"tensor model\.norm\.weight has dtype I8"),
        ("norm.weight", np.float32, r"stored under two names: (model\.)?norm\.weight"),
    ],
)
def test_integer_tensors_and_duplicate_names_are_refused(tmp_path, name, kind, message):
    family_peer("llama", tmp_path)
    safetensors_format.write_safetensors(
        tmp_path, {**tensors_in(tmp_path), name: np.ones(32, kind)}.items()
    )
    with pytest.raises(ValueError, match=message):
        pretrained.load_policy(tmp_path)


@pytest.mark.parametrize(
    "case, output", [("llama 3.1", "lm_head.weight"), ("bert", "cls.predictions.decoder.weight")]
)
def test_a_stored_output_matrix_unties_the_embedding(tmp_path, case, output, caplog):
    kind = type(family_peer(case, tmp_path))
    stored = tensors_in(tmp_path)
    other = np.random.default_rng(0).normal(size=(61, 32)).astype(np.float32)
    bias = {
        name.replace("predictions", "predictions.decoder"): x
        for name, x in stored.items()
        if name == "cls.predictions.bias"
    }
    safetensors_format.write_safetensors(tmp_path, {**stored, **bias, output: other}.items())
    loaded = pretrained.load_policy(tmp_path)
    assert not loaded.config.tied and "holds another matrix" in caplog.text
    tokens = np.array([[2, 3, 4, 5]])
    model = language_model(loaded.config)
    got = compiled_logits(model, loaded.params, tokens, np.ones((1, 4), bool))
    pretrained.save_policy(tmp_path / "saved", loaded)
    for folder in (tmp_path, tmp_path / "saved"):
        with torch.no_grad():
            want = kind.from_pretrained(folder).eval()(torch.tensor(tokens)).logits
        np.testing.assert_allclose(got, want, atol=1e-4)

    caplog.clear()
    safetensors_format.write_safetensors(tmp_path, stored.items())
    assert pretrained.load_policy(tmp_path).config.tied and not caplog.records


@pytest.mark.parametrize("case", ["llama 3.1", "gemma2", "qwen2", "bert", "stablelm, tied"])
def test_a_tied_model_may_store_its_output_matrix_alone(tmp_path, case):
    theirs = family_peer(case, tmp_path)
    want, trunk = pretrained.load_policy(tmp_path), scorers.load_trunk(tmp_path)
    family, stored = pretrained.family_of(want.hf_config["model_type"]), tensors_in(tmp_path)
    for path, name in family.untied.items():
        stored[name] = stored.pop(family.tensors["embedding" if "un" in path else path])
    safetensors_format.write_safetensors(tmp_path, stored.items())
    jax.tree.map(
        np.testing.assert_array_equal, pretrained.load_policy(tmp_path).params, want.params
    )
    jax.tree.map(np.testing.assert_array_equal, scorers.load_trunk(tmp_path).params, trunk.params)
    tokens = np.array([[2, 3, 4]])
    again = type(theirs).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(tokens)).logits, theirs(torch.tensor(tokens)).logits)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads(config) | {"tie_word_embeddings": False})
    )
    with pytest.raises(ValueError, match="missing tensors"):  # nothing says that it is tied
        pretrained.load_policy(tmp_path)


@pytest.mark.parametrize("case", ["llama", "neox", "qwen2"])
def test_a_checkpoint_of_trl_with_a_value_head_is_a_policy_and_a_critic(tmp_path, case, caplog):
    family_peer(case, tmp_path)
    want, rng = pretrained.load_policy(tmp_path), np.random.default_rng(0)
    head = {
        "v_head.summary.weight": rng.normal(size=(1, 32)).astype(np.float32),
        "v_head.summary.bias": np.float32([0.5]),
    }
    safetensors_format.write_safetensors(tmp_path, {**tensors_in(tmp_path), **head}.items())
    loaded = pretrained.load_policy(tmp_path)
    assert "holds a value head" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, loaded.params, want.params)
    scorer, (tokens, mask) = scorers.load_scorer(tmp_path), left_padded()
    states, _ = language_model(want.config).hidden(want.params, jnp.asarray(tokens), mask)
    values = heads.separate_critic(scorer.config)(scorer.params, states, jnp.asarray(tokens), mask)
    ours = np.asarray(states)[mask] @ head["v_head.summary.weight"][0] + 0.5
    np.testing.assert_allclose(np.asarray(values)[mask], ours, rtol=1e-4, atol=1e-4)


def test_the_folder_of_an_unfinished_run_is_no_model(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="not written its model yet; finish it with --resume auto"):
        pretrained.load_policy(tmp_path)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_a_quantised_config_is_refused_wherever_it_is_read(tmp_path, key, capsys):
    family_peer("llama", tmp_path)
    file = tmp_path / "config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps({**plain, key: {"quant_method": "gptq", "bits": 4}}))
    for read in (
        pretrained.load_policy,
        scorers.load_scorer,
        scorers.load_trunk,
        lambda folder: scorers.start_scorer(folder, jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match=f"quantised by gptq .{key} in its config.json"):
            read(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["info", str(tmp_path), "--prompt-tokens", "8", "--ppo.max-new-tokens", "8"])
    assert "quantised by gptq" in capsys.readouterr().err
    for nothing in (None, {}):
        file.write_text(json.dumps({**plain, key: nothing}))
        pretrained.load_policy(tmp_path)


@pytest.mark.parametrize("case", ["llama", "gemma2", "bert", "roberta"])
def test_a_missing_tokenizer_is_an_error(tmp_path, case):
    family_peer(case, tmp_path)
    with pytest.raises(
        ValueError, match=r"holds no tokenizer that can be loaded: none of tokenizer\.json, "
    ):
        pretrained.load_tokenizer(tmp_path)
