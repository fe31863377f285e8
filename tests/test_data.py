"""Texts into tokens and back: which marks stand where, with tokenizers that put their own around a text."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_jax import data
from ppo_jax.commands.loading import stop_ids
from ppo_jax.commands.supervised import SFT, Reward
from ppo_jax.models.pretrained import Pretrained
from ppo_jax.reward_functions import ModelReward

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
    told = data.encode_prompts([{"prompt": prompt}], tokenizer, positions=32, new_tokens=2, pad_id=0)
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
    assert sft_rows(tmp_path, opening(), prompt="a b", response="c") == ([START, A, B, C, 0], [False] * 3 + [True] * 2)
    assert sft_rows(tmp_path, opening(), response="c") == ([START, C, 0], [True] * 3)
    assert sft_rows(tmp_path, like_bert(), prompt="a b", response="c") == ([START, A, B, C, SEP], [False] * 3 + [True] * 2)
    assert sft_rows(tmp_path, like_bert(), response="c") == ([START, C, SEP], [True] * 3)


def test_a_reward_model_reads_a_whole_text_that_opens_once(tmp_path):
    seen = []
    score = lambda params, tokens, mask: seen.append(tokens[mask].tolist()) or np.zeros(len(tokens))
    stage = Reward(model="", data=tmp_path, out=tmp_path, learn_from="scores")
    for text in ("a b", "<s> a b"):
        ModelReward(score, None, like_bert(), 16, 0).score_texts([text])
        tokens, mask, _ = stage.encode([{"prompt": text[:-1], "response": "b", "score": 0}], like_bert(), 16)
        assert seen.pop() == tokens[mask].tolist() == [START, A, B, SEP]


@pytest.mark.parametrize("tokenizer, ends", [(like_bert, (SEP,)), (opening, (0,)), (lambda: marking("$A"), ())])
def test_the_separator_ends_a_response_where_there_is_no_end_token(tokenizer, ends):
    assert stop_ids(tokenizer(), Pretrained(None, None, {})) == ends
