"""Test encoding and decoding with tokenizers that add special tokens around a text."""

import functools

import datasets
import numpy as np
import pytest
from helpers import simple_trainer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_jax import data
from ppo_jax.commands.fitting import read_answers
from ppo_jax.commands.supervised import Reward
from ppo_jax.data import tables
from ppo_jax.data.columns import ExampleColumns, PromptColumns
from ppo_jax.data.examples import encode_demonstrations, encode_judgements
from ppo_jax.data.files import is_table, names_a_file
from ppo_jax.data.labels import label_order, number_labels
from ppo_jax.data.tables import read_table
from ppo_jax.errors import SettingError
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.reward_functions import ModelReward, RewardError
from ppo_jax.run.collection import response_texts
from ppo_jax.run.encoding import stop_ids
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
    assert sft_rows(with_start_token(), prompt="a b", response=" c") == (
        [START, A, B, C, 0],
        [False] * 3 + [True] * 2,
    )
    assert sft_rows(with_start_token(), response="c") == ([START, C, 0], [True] * 3)
    assert sft_rows(with_start_and_separator(), prompt="a b", response=" c") == (
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


def test_packed_rows_hold_every_row_once_and_next_to_no_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 17, 300)
    mask = np.arange(16) < lengths[:, None]
    tokens = rng.integers(1, 1000, mask.shape)
    packed, segments, (new, same) = data.pack_examples(mask, tokens, tokens / 7, length=40)
    assert packed.mean() > 0.95 and np.array_equal(new / 7, same)
    assert not new[~packed].any() and new.dtype == tokens.dtype
    found = []
    for row, real, numbers in zip(new, packed, segments, strict=True):
        kept = numbers[real]
        assert kept[0] == 0 and set(np.diff(kept)) <= {0, 1}
        found += [tuple(row[real][kept == k]) for k in range(kept[-1] + 1)]
    rows = [tuple(row[:n]) for row, n in zip(tokens, lengths, strict=True) if n]
    assert sorted(found) == sorted(rows)


@pytest.mark.parametrize(
    ("mask", "tokens", "message"),
    [
        ([[True, True, True]], [[1, 2, 3]], "A row has 3 tokens, more than length=2."),
        ([[False, True]], [[1, 2]], "must begin in its first column, without gaps"),
        (
            [[True, True]],
            [[1, 2, 3]],
            r"must all be \[n, S\], but have the shapes \[\(1, 2\), \(1, 3",
        ),
        ([True, True], [1, 2], r"must all be \[n, S\], but have the shapes \[\(2,\), \(2,\)\]"),
    ],
)
def test_rows_that_cannot_be_packed_are_refused(mask, tokens, message):
    with pytest.raises(ValueError, match=message):
        data.pack_examples(np.array(mask), np.array(tokens), length=2)


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


def metaspace():
    """Return a tokenizer like Mistral's, which writes "▁" before the first word of a text."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁Answer", ":", "four", "▁four", "</t>"]
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "prompt, response, before, learned",
    [
        ("Answer:", "four", ["<s>", "▁Answer", ":"], ["four", "</s>"]),
        ("Answer:", " four", ["<s>", "▁Answer", ":"], ["▁four", "</s>"]),
        ("Answer: ", "four", ["<s>", "▁Answer", ":"], ["▁four", "</s>"]),
        ("", "four", [], ["<s>", "▁four", "</s>"]),
        ("Answer:", "", ["<s>", "▁Answer", ":"], ["</s>"]),
    ],
)
def test_a_prompt_and_its_response_are_tokenized_as_one_text(prompt, response, before, learned):
    words = metaspace()
    tokens, mask, marked = encode_demonstrations(
        [{"prompt": prompt, "response": response}], words, length=8
    )
    assert words.convert_ids_to_tokens(tokens[mask & ~marked].tolist()) == before
    assert words.convert_ids_to_tokens(tokens[marked].tolist()) == learned
    if prompt + response:
        joint = words(prompt + response).input_ids
        assert tokens[mask].tolist() == [*joint, words.eos_token_id]


def test_rows_whose_prompt_fills_the_length_are_left_out():
    rows = [{"prompt": "a " * n, "response": "c"} for n in (2, 6, 7, 8, 60)]
    tokens, mask, learned = encode_demonstrations(rows, with_start_token(), length=8)
    assert learned.sum(axis=1).tolist() == [2, 1] and mask.sum(axis=1).tolist() == [5, 8]
    tokens, _, _ = encode_demonstrations(rows[3:], with_start_token(), length=8)
    assert tokens.shape == (0, 8)


def test_long_answers_are_cut_at_the_beginning_and_equal_pairs_are_left_out():
    rows = [
        {"prompt": "a " * 60, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b " + "c " * 60, "rejected": "a " + "c " * 60},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    ]
    words = with_start_and_separator()
    chosen, mask, rejected, _ = encode_judgements(rows, words, "pairs", length=8)
    assert chosen.tolist() == [[START, A, A, A, A, A, B, SEP]] and mask.all()
    assert rejected.tolist() == [[START, A, A, A, A, A, C, SEP]]
    seen = []
    score = lambda params, tokens, mask: seen.append(tokens[mask].tolist()) or np.zeros(len(tokens))
    ModelReward(score, None, words, 8, 0).score_texts(["a " * 60 + "b"])
    assert seen == chosen.tolist()  # training reads what scoring reads
    words.truncation_side = "left"
    assert seen == [words("a " * 60 + "b", truncation=True, max_length=8).input_ids]


@pytest.mark.parametrize("special", [True, False])
def test_the_mark_of_the_end_is_no_part_of_a_response(tmp_path, special):
    words = sentencepiece()
    words.add_tokens([AddedToken("<|im_end|>", special=special)])
    run, end = simple_trainer(tmp_path / "run"), words.convert_tokens_to_ids("<|im_end|>")
    agent = run.learner.agent._replace(stop_ids=(1, end))
    ids = words.convert_tokens_to_ids(["▁The", "▁film", "▁is", "▁good", "<|im_end|>", "▁is"])
    mask = np.array([[True] * 6])
    rollout = Rollout(
        np.array([ids]), mask, mask[:, 2:], np.zeros((1, 4), np.float32), np.array([True])
    )
    assert response_texts(agent, words, rollout) == [" is good"]
    # An end token may be an entry of the vocabulary like any other.
    vocabulary = {"The": 0, "film": 1, "is": 2, "good": 3, "</s>": 4}
    old = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="The"))
    )
    found = rollout.replace(tokens=np.array([[0, 1, 2, 3, 4, 2]]))
    assert response_texts(agent._replace(stop_ids=(4,)), old, found) == [" is good"]
    # An ordinary word that ends a response is a part of it.
    agent = agent._replace(stop_ids=(1, ids[3]))
    assert response_texts(agent, words, rollout) == [" is good"]


CSV = 'prompt,answer\n"b, ""c""\nd", 7\nb;c,\n'


@pytest.mark.parametrize(
    "name, text, rows",
    [
        (
            "a.csv",
            CSV,
            [{"prompt": 'b, "c"\nd', "answer": " 7"}, {"prompt": "b;c", "answer": None}],
        ),
        ("a.CSV", "prompt;x\r\nb c;1\r\n", [{"prompt": "b c", "x": "1"}]),
        ("a.tsv", "x\tprompt\n\n1\tb, c\n", [{"prompt": "b, c", "x": "1"}]),
        ("a.csv", "prompt\n" + "b" * 200_000 + "\n", [{"prompt": "b" * 200_000}]),
        (
            "a.csv",
            'prompt\n"[{""role"": ""user"", ""content"": ""b""}]"\n',
            [{"prompt": [{"role": "user", "content": "b"}]}],
        ),
        ("a.json", '[\n {"prompt": "b"},\n "c"\n]', [{"prompt": "b"}, {"prompt": "c"}]),
        ("a.json", '{\n "prompt": "b"\n}', [{"prompt": "b"}]),
        ("a.ndjson", '{"prompt": "b"}\n\n"c"\n', [{"prompt": "b"}, {"prompt": "c"}]),
        ("a", "b, c\n\nd\n", [{"prompt": "b, c"}, {"prompt": "d"}]),
        ("a", "Text, and more\n[1]\n", [{"prompt": "Text, and more"}, {"prompt": "[1]"}]),
    ],
)
def test_a_file_is_read_as_what_its_name_says(tmp_path, name, text, rows):
    (tmp_path / name).write_bytes(text.encode())
    assert data.read_rows(tmp_path / name) == rows


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.parquet", "PAR1", r"a\.parquet cannot be read: .*4 bytes.*footer"),
        ("a.xlsx", "PK", r"\.xlsx is not the ending of a text file"),
        ("a.txt", "b\0c", "is not a file of text in UTF-8"),
        ("a.txt", '{"prompt": "b"}\n', r"begins like JSON, whose name must end in \.jsonl"),
        ("a.txt", '[\n{"prompt": "b"}\n]', r"begins like JSON, whose name must end in \.jsonl"),
        ("a.txt", '[\n"b",\n"c"\n]', r"begins like JSON, whose name must end in \.jsonl"),
        ("a.txt", '{\n"prompt": "b"\n}', r"begins like JSON, whose name must end in \.jsonl"),
        ("a.txt", '{"prompt": "b"},\n{"prompt": "c"}', r"begins like JSON, whose name must end in"),
        ("a.txt", "answer,prompt\n1,b\n", r"begins like a table, whose name must end in \.csv"),
        ("a", '"text","label"\nb c,1\n', r"begins like a table, whose name must end in \.csv"),
        ("a.csv", "prompt,x,prompt\nb,c,d\n", "has several columns of the name 'prompt'"),
        (
            "a.json",
            '[\n{"prompt":"a"},\n{"prompt" "b"}\n]',
            "but line 3 is not JSON: Expecting ':'",
        ),
        ("a.jsonl", '{"prompt" "b"}\n{"prompt": "b"}\n', "but line 1 is not JSON: Expecting ':'"),
        (
            "a.csv",
            "x\nb\n",
            "column 'prompt', .* or 'text', but its columns are: 'x'. Name the right.*--prompt",
        ),
        ("a.csv", "prompt,x\nb,c\nb, c, d\n", "must have 2 cells in every row.* line 3 has more"),
        ("a.csv", 'prompt\nb\n"b\n', "is not a table of the kind CSV: line 2"),
        ("a.csv", "prompt\n", "There is no prompt in"),
        ("a.jsonl", '{"prompt": "b"}\n{"prompt"\n', "but line 2 is not JSON"),
        (
            "a.jsonl",
            '\n{"prompt": "b"}\n\n{"x": 1}\n',
            "Line 4 of .*, but its columns are: 'x'",
        ),
        ("a.jsonl", '{"prompt": null}', "Line 1 of .* in its column 'prompt', which is None"),
        ("a.jsonl", "5\n", "Line 1 of .* needs columns with names, but is 5"),
        ("a.json", '[{"prompt": "b"}, 5]', "Row 1 of .* needs columns with names"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        data.read_rows(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("data/a.xlsx", "none/a.xlsx", "a.csv", "data/a.parquet", "a"):
        with pytest.raises(ValueError, match=f"^{name} does not exist.$"):
            data.read_rows(name)
    with pytest.raises(ValueError, match=r"data/a does not exist.*its split too.*data/a:train"):
        data.read_rows("data/a")
    assert is_table("data/a:train") and is_table("none/a")


def test_a_file_in_another_encoding_is_told_how_to_be_saved(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt\nb\nnaïve\n".encode("latin-1"))
    with pytest.raises(ValueError, match="because line 3 is not UTF-8; save it as UTF-8"):
        data.read_rows(tmp_path / "a.csv")


def test_an_unreachable_hub_is_told_from_unknown_data(monkeypatch):
    def load(error):
        monkeypatch.setattr(tables, "_load", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError) as raised:
            data.read_rows("none/a")
        return str(raised.value)

    assert load(ConnectionError("no route")).startswith("The Hugging Face hub cannot be reached")
    assert load(ValueError("unknown")).startswith("none/a is neither a file nor a folder here")


TURNS = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]


def test_parquet_saved_data_and_data_sets_with_splits_are_read(tmp_path):
    rows = [{"messages": TURNS, "label": n} for n in (0, 1)]
    saved = datasets.Dataset.from_list(rows)
    saved.to_parquet(tmp_path / "a.parquet")
    saved.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict(test=saved.select([1]), other=saved)
    splits.save_to_disk(tmp_path / "several")
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        splits["test"].to_parquet(tmp_path / f"hub/{split}.parquet")
    expected = [{**row, "prompt": TURNS[:1]} for row in rows]
    for name, some in [
        ("a.parquet", expected),
        ("one", expected),
        ("several:other", expected),
        ("several:test", expected[1:]),
        ("hub", expected[1:]),  # the split `train`
        ("hub:default:test", expected[1:]),
    ]:
        assert data.read_rows(tmp_path / name) == some
    assert names_a_file(f"{tmp_path / 'several'}:test")
    for name, message in [
        ("several", "no split 'train'; its splits are: test, other; append one, such as"),
        ("one:test", "it has no splits, so leave out :test"),
        ("hub:nothing", "no split 'nothing'"),
        ("c:d:e:f", "must be NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_table(str(tmp_path / name))


@pytest.mark.parametrize(
    "options, row, prompt, response",
    [
        ({}, {"question": "a", "answer": "b", "text": "c"}, "a", "b"),
        ({}, {"prompt": "a", "text": "c"}, None, "c"),
        ({}, {"prompt": "a", "messages": TURNS, "text": "c"}, None, TURNS),
        ({"messages_column": "none"}, {"messages": TURNS, "text": "c"}, None, "c"),
        ({"prompt_column": "response", "response_column": "prompt"}, {}, "r", "p"),
        ({"prompt_column": "none"}, {}, None, "r"),
        ({"text_column": "prompt"}, {}, None, "p"),
        ({"text_column": "prompt", "prompt_column": "response"}, {}, "r", "p"),
    ],
)
def test_the_columns_of_examples_are_named_or_found(options, row, prompt, response):
    names = ExampleColumns(**options).names()
    given = [row or {"prompt": "p", "response": "r"}]
    (read,) = data.read_rows(given, columns=("response",), optional=("prompt",), names=names)
    assert (read.get("prompt"), read["response"]) == (prompt, response)


@pytest.mark.parametrize(
    "options, row, prompt",
    [
        ({}, {"text": "a", "messages": TURNS}, TURNS[:1]),
        ({}, {"query": "b", "messages": TURNS}, "b"),
        ({"messages_column": "none"}, {"text": "a", "messages": TURNS}, "a"),
        ({"prompt_column": "x"}, {"x": TURNS, "prompt": "a"}, TURNS),
        ({"messages_column": "x"}, {"x": TURNS, "prompt": "a"}, TURNS[:1]),
        ({"prompt_column": "none"}, {"prompt": "a", "messages": TURNS}, TURNS[:1]),
    ],
)
def test_the_column_of_prompts_is_named_or_found(options, row, prompt):
    assert data.read_rows([row], names=PromptColumns(**options).names()) == [
        {**row, "prompt": prompt}
    ]


def test_two_columns_for_the_same_texts_are_refused():
    with pytest.raises(SettingError, match="prompt_column=a and messages_column=b name two"):
        PromptColumns(prompt_column="a", messages_column="b")
    with pytest.raises(ValueError, match="needs a column 'x', but its columns are: 'prompt'"):
        data.read_rows(["a"], names=PromptColumns(prompt_column="x").names())


def test_labels_that_are_words_get_class_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("text,mood\nb,Positive\nc,negative\n")
    given = {"model": "", "out": tmp_path / "out", "data": str(tmp_path / "a.csv")}
    rows, _ = read_answers(Reward(**given, learn_from="classes", label_column="mood"))
    assert [(row["response"], row["score"]) for row in rows] == [("b", 1), ("c", 0)]
    rows = [{"score": label} for label in ("ham", 2.0, "spam")]
    assert number_labels(rows, label_order(rows, ("Spam", "2", "ham"))) == [
        {"score": n} for n in (2, 1, 0)
    ]
    assert label_order([{"score": "0"}, {"score": 1}, {"score": None}]) == ()
    with pytest.raises(ValueError, match=r"'ham', '2.0', 'spam' have no order .* --labels ham"):
        label_order(rows)
    with pytest.raises(ValueError, match=r"Row 1 has the label 2.0, which is none of"):
        number_labels(rows, ("ham", "spam"))
    order = label_order([{"score": "good"}, {"score": None}, {"score": " "}])
    for empty in (None, " "):
        with pytest.raises(ValueError, match="Row 1 has no label; add it, or remove the row"):
            number_labels([{"score": "good"}, {"score": empty}], order)
    with pytest.raises(ValueError, match="To learn from labels instead of pairs, pass --learn"):
        read_answers(Reward(**given))


@pytest.mark.parametrize(
    "long_prompts, limit, kept, too_long",
    [
        ("error", 4, [[START, A], [START, A, B, C]], 0),
        ("drop", 3, [[START, A]], 1),
        ("truncate", 3, [[START, A], [START, B, C]], 1),
        ("truncate", None, [[START, A], [START, C]], 1),
    ],
)
def test_long_prompts_are_dropped_or_cut_at_the_beginning(long_prompts, limit, kept, too_long):
    rows, words = [{"prompt": "a"}, {"prompt": "a b c"}], with_start_token()
    options = {"long_prompts": long_prompts, "max_prompt_tokens": limit, "pad_id": 0}
    positions = 8 if limit else 4
    encode = functools.partial(data.encode_prompts, positions=positions, new_tokens=2, **options)
    prompts = encode(rows, words)
    assert [x[m].tolist() for x, m in zip(prompts.tokens, prompts.mask, strict=True)] == kept
    assert (
        prompts.too_long == too_long
        and prompts.texts == [row["prompt"] for row in rows][: len(kept)]
    )
    encode = functools.partial(encode, long_prompts="error", max_prompt_tokens=1)
    with pytest.raises(ValueError, match=r"max_prompt_tokens=1 allows fewer. 2 of 2 prompts"):
        encode(rows, words)


def test_names_of_files_are_told_from_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my prompts.md", "b"):
        (tmp_path / name).write_text("c")
    files = ["my prompts.md", "prompts.txt", "dir/p.jsonl", "a.CSV", "prompts.md", "a.xlsx"]
    texts = ["b", "Open prompts.txt", "See e.g", "", "Dr.", "b " * 3000 + "c.txt"]
    assert [text for text in files + texts if names_a_file(text)] == files


def test_scores_of_a_table_are_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("response,score\nb,1.5\nc,x\n")
    rows = data.read_rows(tmp_path / "a.csv", columns=("response",), optional=("prompt",))
    encode = lambda rows: encode_judgements(rows, with_start_token(), "scores", length=4)
    assert encode(rows[:1])[-1].tolist() == [1.5]
    with pytest.raises(ValueError, match="Row 1 needs a number in 'score', not 'x'"):
        encode(rows)
