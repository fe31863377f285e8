"""Test encoders, classifiers and the pretrained MiniLM and SmolLM2 against `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import tensors_in, word_tokenizer

from experiments import assets
from ppo_jax.models import heads
from ppo_jax.models.io import encoder, pretrained, safetensors_format, scorers
from ppo_jax.models.transformer import language_model
from ppo_jax.reward_functions.likeness import LikenessReward
from ppo_jax.reward_functions.loading import load_reward

TEXTS = [
    "A warm and funny film.",
    "the plot makes no sense at all , and the acting is worse",
    "Yes.",
    "naïve — café ☕ " * 30,
]


@pytest.fixture(scope="module")
def minilm():
    return encoder.load_encoder(assets.minilm(), length=64)


def test_embeddings_equal_pytorch(minilm):
    folder = assets.minilm()
    tokenizer, model = (
        cls.from_pretrained(folder) for cls in (transformers.AutoTokenizer, transformers.AutoModel)
    )
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        states, mask = model.eval()(**batch).last_hidden_state, batch["attention_mask"][..., None]
    want = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(minilm(TEXTS), want, atol=1e-5)


def test_similarity_is_highest_for_the_target_itself(minilm):
    reward = LikenessReward(minilm, "I love this movie")
    scores = reward(
        ["I love", "I really like", "The train"], [" this movie", " this film", " to Leeds is late"]
    )
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores[0] > scores[1] > scores[2]


def test_an_encoder_cannot_be_a_critic_nor_a_decoder_an_encoder(minilm, tmp_path):
    with pytest.raises(ValueError, match="must not see later tokens"):
        heads.separate_critic(scorers.load_trunk(assets.minilm()).config)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a decoder"):
        encoder.load_encoder(tmp_path)


def test_an_encoder_needs_its_own_tokenizer(tmp_path):
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives ids up to 20, but the model has vocab_size=20"):
        encoder.load_encoder(tmp_path)


@pytest.mark.slow
def test_smollm2_equals_transformers(tmp_path):
    """SmolLM2-135M is read from GGUF as in `transformers`, and a saved copy agrees too."""
    file = assets.smollm2_gguf()
    loaded, tokenizer = pretrained.load_policy(file), pretrained.load_tokenizer(file)
    pretrained.check_tokenizer(tokenizer, loaded.config)
    pretrained.save_policy(tmp_path, loaded, tokenizer)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name
    ).eval()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = tokenizer("The film is a wonderful story of a boy who", return_tensors="pt").input_ids
    with torch.no_grad():
        want, saved = peer(tokens).logits.numpy(), again(tokens).logits.numpy()
    ids, model = jnp.asarray(tokens.numpy()), language_model(loaded.config)
    got = model.logits(loaded.params, model.hidden(loaded.params, ids, ids >= 0)[0])
    np.testing.assert_allclose(got, want, atol=1e-3)
    np.testing.assert_allclose(saved, want, atol=1e-3)
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template
        == tokenizer.chat_template
    )


def test_a_trunk_is_loaded_without_heads_and_unknown_tensors_are_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    transformers.BertForPreTraining(config).save_pretrained(tmp_path)
    trunk = scorers.load_trunk(tmp_path).params
    stored = tensors_in(tmp_path)
    safetensors_format.write_safetensors(
        tmp_path, {name.removeprefix("bert."): x for name, x in stored.items()}.items()
    )
    jax.tree.map(np.testing.assert_array_equal, scorers.load_trunk(tmp_path).params, trunk)
    for name in (
        "bert.embeddings.extra.weight",
        "embeddings.extra.weight",
        "bert.encoder.layer.1.output.dense.weight",
    ):
        safetensors_format.write_safetensors(
            tmp_path, {**stored, name: np.ones(8, np.float32)}.items()
        )
        with pytest.raises(ValueError, match=f"left over .*{name}"):
            scorers.load_trunk(tmp_path)


DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def classifier(kind, folder, **more):
    """Save a random model of the class `kind`, with noise on every bias and norm, and return it."""
    torch.manual_seed(0)
    config = getattr(transformers, kind.partition("For")[0] + "Config")(
        **(DISTILBERT if kind.startswith("Distil") else BERT),
        vocab_size=50,
        max_position_embeddings=20,
        pad_token_id=0,
        initializer_range=0.2,
        **more,
    )
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_distilbert_equals_transformers_after_loading_and_saving(tmp_path, tied):
    peer = classifier("DistilBertForMaskedLM", tmp_path / "a", tie_word_embeddings=tied)
    loaded = pretrained.load_policy(tmp_path / "a")
    model, ids = language_model(loaded.config), np.array([[2, 3, 4, 5], [6, 7, 8, 0]])
    with torch.no_grad():
        want = peer(torch.tensor(ids), attention_mask=torch.tensor(ids > 0).long()).logits.numpy()
    got = model.logits(
        loaded.params, model.hidden(loaded.params, jnp.asarray(ids), jnp.asarray(ids > 0))[0]
    )
    np.testing.assert_allclose(np.asarray(got)[ids > 0], want[ids > 0], atol=1e-5)
    pretrained.save_policy(tmp_path / "b", loaded)
    again = transformers.DistilBertForMaskedLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(ids)).logits, peer(torch.tensor(ids)).logits)
    jax.tree.map(
        np.testing.assert_array_equal,
        scorers.load_trunk(tmp_path / "a").params["layer_0"],
        loaded.params["layer_0"],
    )


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_one_label_of_a_classifier_is_the_score(tmp_path, kind):
    """The label is chosen by name or number; the saved model has that label only."""
    names = {0: "BAD", 1: "1", 2: "GOOD"}
    peer = classifier(
        f"{kind}ForSequenceClassification",
        tmp_path / "a",
        id2label=names,
        label2id={n: i for i, n in names.items()},
    )
    ids = np.array([[2, 3, 4, 5], [6, 7, 8, 0]])
    arguments = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids > 0).long()}
    with torch.no_grad():
        want = peer(**arguments).logits.numpy()
    assert np.ptp(want, axis=1).min() > 0.05
    for label, column in (("GOOD", 2), ("0", 0), ("BAD", 0), ("1", 1)):
        loaded = scorers.load_scorer(tmp_path / "a", label=label)
        got = heads.reward_model(loaded.config)(
            loaded.params, jnp.asarray(ids), jnp.asarray(ids > 0)
        )
        np.testing.assert_allclose(got, want[:, column], atol=1e-5)
        scorers.save_scorer(tmp_path / "b", loaded)
        again = type(peer).from_pretrained(tmp_path / "b").eval()
        with torch.no_grad():
            np.testing.assert_allclose(again(**arguments).logits[:, 0], want[:, column], atol=1e-6)
    for label in (None, "3", "good"):
        with pytest.raises(
            ValueError,
            match=rf"labels \(BAD, 1, GOOD\): reward_label must name one, .* not {label!r}",
        ):
            scorers.load_scorer(tmp_path / "a", label=label)


@pytest.mark.parametrize(
    "name, cut",
    [
        ("classifier.weight", np.s_[0]),
        ("classifier.weight", np.s_[:, 1:]),
        ("classifier.bias", np.s_[1:]),
        ("pre_classifier.weight", np.s_[1:]),
        ("pre_classifier.bias", np.s_[:0]),
    ],
)
def test_a_head_of_wrong_shape_is_refused(tmp_path, name, cut):
    classifier("DistilBertForSequenceClassification", tmp_path)
    stored = tensors_in(tmp_path)
    safetensors_format.write_safetensors(
        tmp_path, {**stored, name: np.ascontiguousarray(stored[name][cut])}.items()
    )
    with pytest.raises(ValueError, match=r"holds a head whose .* is .*, not "):
        scorers.load_scorer(tmp_path, label="0")


def test_a_distilbert_can_start_a_reward_model(tmp_path):
    """A language model gets a fresh head; a classifier keeps the hidden layer of its head."""
    classifier("DistilBertForMaskedLM", tmp_path / "words")
    fresh = scorers.start_scorer(tmp_path / "words", jax.random.key(0))
    assert set(fresh.params["head"]) == {"pre_classifier", "kernel", "bias"}
    peer = classifier("DistilBertForSequenceClassification", tmp_path / "classes", num_labels=4)
    kept = scorers.start_scorer(tmp_path / "classes", jax.random.key(0)).params["head"]
    np.testing.assert_array_equal(
        kept["pre_classifier"]["kernel"], peer.pre_classifier.weight.detach().numpy().T
    )
    np.testing.assert_array_equal(kept["kernel"], fresh.params["head"]["kernel"])
    scorers.save_scorer(tmp_path / "scorer", fresh)
    loaded = scorers.load_scorer(tmp_path / "scorer")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, fresh.params)


def test_a_distilbert_config_uses_its_own_names_and_defaults(tmp_path):
    """Keys that DistilBERT does not have are ignored; error messages use DistilBERT's names."""
    hf = {
        "model_type": "distilbert",
        "dim": 16,
        "n_heads": 2,
        "layer_norm_eps": 1.0,
        "hidden_act": "none",
        "is_decoder": True,
    }
    config = pretrained.config_of(hf)
    assert (config.norm_eps, config.activation.value, config.causal, config.layers) == (
        1e-12,
        "gelu",
        False,
        6,
    )
    with pytest.raises(ValueError, match="activation 'mish' is not supported"):
        pretrained.config_of({**hf, "activation": "mish"})


def test_a_reward_function_has_no_labels():
    with pytest.raises(
        ValueError,
        match=r"reward_label=GOOD selects a label of a reward model, but my.py:score is a func",
    ):
        load_reward("my.py:score", label="GOOD")
