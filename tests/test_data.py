"""Texts into tokens and back: which marks stand where, with tokenizers that put their own around a text."""

import numpy as np
import pytest
from helpers import simple_trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_jax import data
from ppo_jax.commands.supervised import SFT, Reward
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.reward_functions import ModelReward, RewardError
from ppo_jax.run.assembly import stop_ids
from ppo_jax.types import Rollout

WORDS = ["?", "<s>", "a", "b", "c", "[SEP]"]
START, A, B, C, SEP = range(1, 6)


def marking(template, **marks):
    """A tokenizer of words that frames a text as `template` says."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(word, WORDS.index(word)) for word in template.split() if word != "$A"]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=made, **marks)


def opening():
    return marking("<s> $A", bos_token="<s>", eos_token="?")


def like_bert():
    return marking("<s> $A [SEP]", cls_token="<s>", sep_token="[SEP]")


def prompt_ids(tokenizer, prompt):
    told = data.encode_prompts(
        [{"prompt": prompt}], tokenizer, positions=32, new_tokens=2, pad_id=0
    )
    return told.tokens[told.mask].tolist()


def test_a_prompt_is_open_at_its_end():
    assert prompt_ids(like_bert(), "a b") == [START, A, B]
    assert prompt_ids(like_bert(), "a [SEP]") == [START, A, SEP]  # typed
    assert prompt_ids(like_bert(), "") == prompt_ids(opening(), "") == [START]


def test_the_opening_mark_stands_once():
    assert prompt_ids(opening(), "<s> a") == prompt_ids(opening(), "a") == [START, A]
    assert prompt_ids(opening(), "<s><s> a") == [START, START, A]  # typed twice
    assert prompt_ids(marking("$A", eos_token="?"), "a a b") == [A, A, B]


def sft_rows(tmp_path, tokenizer, **row):
    stage = SFT(model="", data=tmp_path, out=tmp_path)
    tokens, mask, learned = stage.encode([row], tokenizer, 8)
    return tokens[mask].tolist(), learned[mask].tolist()


def test_supervised_rows_open_once_and_close_once(tmp_path):
    assert sft_rows(tmp_path, opening(), prompt="a b", response="c") == (
        [START, A, B, C, 0],
        [False] * 3 + [True] * 2,
    )
    assert sft_rows(tmp_path, opening(), response="c") == ([START, C, 0], [True] * 3)
    assert sft_rows(tmp_path, like_bert(), prompt="a b", response="c") == (
        [START, A, B, C, SEP],
        [False] * 3 + [True] * 2,
    )
    assert sft_rows(tmp_path, like_bert(), response="c") == ([START, C, SEP], [True] * 3)


def test_a_reward_model_reads_a_whole_text_that_opens_once(tmp_path):
    seen = []
    score = lambda params, tokens, mask: seen.append(tokens[mask].tolist()) or np.zeros(len(tokens))
    stage = Reward(model="", data=tmp_path, out=tmp_path, learn_from="scores")
    for text in ("a b", "<s> a b"):
        ModelReward(score, None, like_bert(), 16, 0).score_texts([text])
        tokens, mask, _ = stage.encode(
            [{"prompt": text[:-1], "response": "b", "score": 0}], like_bert(), 16
        )
        assert seen.pop() == tokens[mask].tolist() == [START, A, B, SEP]


@pytest.mark.parametrize(
    "tokenizer, ends", [(like_bert, (SEP,)), (opening, (0,)), (lambda: marking("$A"), ())]
)
def test_the_separator_ends_a_response_where_there_is_no_end_token(tokenizer, ends):
    assert stop_ids(tokenizer(), Pretrained(None, None, {})) == ends


def sentencepiece():
    """Metaspace as Llama's: a text's first space is lost in decoding."""
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
def test_a_response_reads_on_from_its_prompt(tokenizer, prompt, response, text):
    made = tokenizer()
    before, after = (made.convert_tokens_to_ids(part.split()) for part in (prompt, response))
    for padding in (0, 3, 40):
        tokens = np.array([[2] * padding + before + after + [2, 2]])
        mask = np.array([[False] * padding + [True] * len(before + after) + [False, False]])
        assert data.decode(made, tokens, mask, start=padding + len(before)) == [text]


def test_bytes_read_the_same_alone_and_after_a_prompt():
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


def test_rewards_and_samples_get_the_text_after_the_prompt(tmp_path):
    run, words = simple_trainer(tmp_path / "run"), sentencepiece()
    run.learner = run.learner._replace(tokenizer=words)
    ids = words.convert_tokens_to_ids(
        ["▁film", "▁film", "<s>", "▁The", "▁film", "▁is", "▁good", "ing", "<s>", "▁is"]
    )
    mask = np.array([[False] * 2 + [True] * 8])
    rollout = Rollout(
        np.array([ids]), mask, mask[:, 6:], np.zeros((1, 4), np.float32), np.array([True])
    )
    assert run.texts(rollout) == [" gooding"]


@pytest.mark.parametrize("name, text", [("a.txt", "b c\n"), ("a.jsonl", '{"prompt": "b c"}\n')])
def test_a_mark_of_the_byte_order_is_no_text(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert data.read_rows(tmp_path / name) == [{"prompt": "b c"}]


def test_ids_without_a_word_are_named():
    data.check_ids(np.array([[1, 2], [3, 4]]), 5)
    with pytest.raises(
        ValueError,
        match="Text 1 holds the token 4, for which the model, with vocab_size=4, has no word",
    ):
        data.check_ids(np.array([[1, 2], [3, 4]]), 4)


def test_a_text_with_a_token_that_the_reward_model_does_not_know_is_a_fault():
    reward = ModelReward(
        lambda params, tokens, mask: np.zeros(len(tokens)), None, like_bert(), 16, 0, 2
    )
    with pytest.raises(
        RewardError, match="The reward model cannot read it all: Text 0 holds the token"
    ):
        reward.score_texts(["a b"])
