"""Test encoding and decoding with tokenizers that add special tokens around a text."""

import numpy as np
import pytest
from helpers import simple_trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_jax import data
from ppo_jax.data.examples import encode_demonstrations, encode_judgements
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.reward_functions import ModelReward, RewardError
from ppo_jax.run.assembly import stop_ids
from ppo_jax.run.collection import response_texts
from ppo_jax.types import Rollout

WORDS = ["?", "<s>", "a", "b", "c", "[SEP]"]
START, A, B, C, SEP = range(1, 6)


def framing_tokenizer(template, **marks):
    """Return a word-level tokenizer that adds special tokens to a text according to `template`."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(word, WORDS.index(word)) for word in template.split() if word != "$A"]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=made, **marks)


def with_start_token():
    return framing_tokenizer("<s> $A", bos_token="<s>", eos_token="?")


def with_start_and_separator():
    return framing_tokenizer("<s> $A [SEP]", cls_token="<s>", sep_token="[SEP]")


def prompt_ids(tokenizer, prompt):
    prompts = data.encode_prompts(
        [{"prompt": prompt}], tokenizer, positions=32, new_tokens=2, pad_id=0
    )
    return prompts.tokens[prompts.mask].tolist()


def test_a_prompt_gets_no_closing_token():
    assert prompt_ids(with_start_and_separator(), "a b") == [START, A, B]
    assert prompt_ids(with_start_and_separator(), "a [SEP]") == [
        START,
        A,
        SEP,
    ]  # written in the text
    assert (
        prompt_ids(with_start_and_separator(), "") == prompt_ids(with_start_token(), "") == [START]
    )


def test_the_start_token_is_not_added_twice():
    assert (
        prompt_ids(with_start_token(), "<s> a") == prompt_ids(with_start_token(), "a") == [START, A]
    )
    assert prompt_ids(with_start_token(), "<s><s> a") == [
        START,
        START,
        A,
    ]  # written twice in the text
    assert prompt_ids(framing_tokenizer("$A", eos_token="?"), "a a b") == [A, A, B]


def sft_rows(tokenizer, **row):
    tokens, mask, learned = encode_demonstrations([row], tokenizer, length=8)
    return tokens[mask].tolist(), learned[mask].tolist()


def test_supervised_rows_have_one_start_and_one_end_token():
    assert sft_rows(with_start_token(), prompt="a b", response="c") == (
        [START, A, B, C, 0],
        [False] * 3 + [True] * 2,
    )
    assert sft_rows(with_start_token(), response="c") == ([START, C, 0], [True] * 3)
    assert sft_rows(with_start_and_separator(), prompt="a b", response="c") == (
        [START, A, B, C, SEP],
        [False] * 3 + [True] * 2,
    )
    assert sft_rows(with_start_and_separator(), response="c") == (
        [START, C, SEP],
        [True] * 3,
    )


def test_a_reward_model_is_trained_and_used_on_the_same_tokens():
    seen = []
    score = lambda params, tokens, mask: seen.append(tokens[mask].tolist()) or np.zeros(len(tokens))
    for text in ("a b", "<s> a b"):
        ModelReward(score, None, with_start_and_separator(), 16, 0).score_texts([text])
        tokens, mask, _ = encode_judgements(
            [{"prompt": text[:-1], "response": "b", "score": 0}],
            with_start_and_separator(),
            "scores",
            length=16,
        )
        assert seen.pop() == tokens[mask].tolist() == [START, A, B, SEP]


@pytest.mark.parametrize(
    "tokenizer, ends",
    [
        (with_start_and_separator, (SEP,)),
        (with_start_token, (0,)),
        (lambda: framing_tokenizer("$A"), ()),
    ],
)
def test_the_separator_is_the_end_token_of_a_tokenizer_without_one(tokenizer, ends):
    assert stop_ids(tokenizer(), Pretrained(None, None, {})) == ends


def sentencepiece():
    """Return a tokenizer like Llama's, which drops the first space of a text when it decodes."""
    words = ["<s>", "</s>", *["▁The", "▁film", "▁is", "▁good", "ing", "<0x80>", "<0xE2>"]]
    made = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate([*words, *"▁Thefilmsgood"])}, [], byte_fallback=True
        )
    )
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(content=" ", left=1),
    ]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def wordpiece():
    made = Tokenizer(
        models.WordPiece(
            {w: i for i, w in enumerate(["[UNK]", "[CLS]", "film", "is", "good", "##ing", "."])}
        )
    )
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, cls_token="[CLS]")


@pytest.mark.parametrize(
    "tokenizer, prompt, response, text",
    [
        (sentencepiece, "<s> ▁The ▁film ▁is", "▁good </s>", " good"),
        (sentencepiece, "<s> ▁The ▁film", "ing ▁is", "ing is"),
        (sentencepiece, "<s>", "▁The ▁film", "The film"),
        (sentencepiece, "<s> ▁The <0xE2>", "<0x80> ▁is", "\ufffd is"),
        (wordpiece, "[CLS] film is", "good .", " good."),
        (wordpiece, "[CLS] film", "##ing is", "ing is"),
    ],
)
def test_a_response_is_decoded_as_the_continuation_of_its_prompt(tokenizer, prompt, response, text):
    made = tokenizer()
    before, after = (made.convert_tokens_to_ids(part.split()) for part in (prompt, response))
    for padding in (0, 3, 40):
        tokens = np.array([[2] * padding + before + after + [2, 2]])
        mask = np.array([[False] * padding + [True] * len(before + after) + [False, False]])
        assert data.decode(made, tokens, mask, start=padding + len(before)) == [text]


def test_byte_level_responses_decode_the_same_with_and_without_the_prompt():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    words, chance = (
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token="!"),
        np.random.default_rng(0),
    )
    for prompt in ("a", "The film is ☕", "naïve — café ☕☕☕☕☕☕☕ ", "ends!"):
        ids = words(prompt).input_ids
        tokens = np.concatenate(
            [np.tile(ids, (50, 1)), chance.integers(0, len(alphabet), (50, 9))], axis=1
        )
        mask, start = chance.random(tokens.shape) < 0.9, len(ids)
        mask[:, :start] = True
        assert data.decode(words, tokens, mask, start=start) == data.decode(
            words, tokens[:, start:], mask[:, start:]
        )


def test_a_trainer_decodes_responses_as_continuations(tmp_path):
    run, words = simple_trainer(tmp_path / "run"), sentencepiece()
    ids = words.convert_tokens_to_ids(
        ["▁film", "▁film", "<s>", "▁The", "▁film", "▁is", "▁good", "ing", "<s>", "▁is"]
    )
    mask = np.array([[False] * 2 + [True] * 8])
    rollout = Rollout(
        np.array([ids]), mask, mask[:, 6:], np.zeros((1, 4), np.float32), np.array([True])
    )
    assert response_texts(run.learner.agent, words, rollout) == [" gooding"]


@pytest.mark.parametrize("name, text", [("a.txt", "b c\n"), ("a.jsonl", '{"prompt": "b c"}\n')])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert data.read_rows(tmp_path / name) == [{"prompt": "b c"}]


def test_tokens_outside_the_vocabulary_are_refused():
    data.check_ids(np.array([[1, 2], [3, 4]]), 5)
    with pytest.raises(
        ValueError,
        match="holds the token id 4, but the model's vocabulary has only vocab_size=4 tokens",
    ):
        data.check_ids(np.array([[1, 2], [3, 4]]), 4)


def test_a_token_outside_the_reward_models_vocabulary_is_a_reward_error():
    reward = ModelReward(
        lambda params, tokens, mask: np.zeros(len(tokens)),
        None,
        with_start_and_separator(),
        16,
        0,
        2,
    )
    with pytest.raises(
        RewardError, match="The reward model cannot read every response: Text 0 holds the token id"
    ):
        reward.score_texts(["a b"])
