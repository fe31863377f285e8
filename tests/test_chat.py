"""Test chat templates: prompts made of messages, and the tokens that end an answer."""

import json

import numpy as np
import pytest
import transformers
from helpers import tiny_policy, word_tokenizer
from tokenizers import AddedToken, processors

from ppo_jax import data
from ppo_jax.data import chat
from ppo_jax.data.examples import encode_demonstrations, encode_judgements
from ppo_jax.models.io import pretrained
from ppo_jax.reward_functions import ModelReward, RewardError
from ppo_jax.run.encoding import stop_ids

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }} t {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


def chat_tokenizer():
    words = word_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["t"]})  # ends a turn
    words.chat_template = TEMPLATE
    return words


def encode(rows, words):
    return data.encode_prompts(rows, words, positions=32, new_tokens=2, pad_id=0)


def test_messages_and_texts_of_a_chat_are_rendered_by_the_template():
    messages = [{"role": "user", "content": "b c"}]
    prompts = encode([{"prompt": messages, "answer": 1}], chat_tokenizer())
    assert (
        prompts.texts == ["u b c t a "]
        and prompts.rows[0]["messages"] == messages
        and prompts.rows[0]["answer"] == 1
    )
    # "u" is not in the vocabulary, so it becomes the unknown token "a".
    assert prompts.tokens[prompts.mask].tolist() == chat_tokenizer().convert_tokens_to_ids(
        ["a", "b", "c", "t", "a"]
    )
    plain = encode(
        chat.as_user_messages([{"prompt": "b c"}, {"prompt": messages}]), chat_tokenizer()
    )
    assert plain.texts == ["u b c t a "] * 2
    assert encode([{"prompt": "b c"}], chat_tokenizer()).texts == [
        "b c"
    ]  # without --chat a text is not rendered


def test_messages_need_a_template():
    with pytest.raises(ValueError, match="chat template; this one has none"):
        encode([{"prompt": [{"role": "user", "content": "b"}]}], word_tokenizer())


def test_stop_tokens_are_those_of_model_template_and_user(tmp_path):
    words, model = chat_tokenizer(), tiny_policy()._replace(generation={"eos_token_id": [3, 0]})
    turn = words.convert_tokens_to_ids("t")
    assert chat.end_of_turn_ids(words) == (turn,) and chat.end_of_turn_ids(word_tokenizer()) == ()
    assert stop_ids(words, model, ("b",)) == (0, 3, turn, words.convert_tokens_to_ids("b"))
    pretrained.save_policy(tmp_path, model, words)
    assert pretrained.load_policy(tmp_path).end_ids == model.end_ids == (3, 0)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == model.generation
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == TEMPLATE and chat.end_of_turn_ids(again) == (turn,)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "template, found",
    [
        ("{% for m in messages %}{{ m.role }} {{ m.content }}<turn>\n{% endfor %}", True),
        ("{% for m in messages %}{{ m.content|upper }}<turn>\n{% endfor %}", True),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
            + TEMPLATE.replace(" t ", "<turn>"),
            True,
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
            + TEMPLATE.replace(" t ", "<turn>"),
            True,
        ),
        (
            "{% for m in messages %}{% for part in m.content %}{{ part.text|trim }}{% endfor %}"
            "<turn>{% endfor %}",
            True,
        ),
        (
            "{% for m in messages %}{{ m.content }}{% if not loop.last %}<turn>{% endif %}"
            "{% endfor %}",
            True,
        ),
        ("{% for m in messages %}{{ m.role }}<end>{% endfor %}", False),
        ("{{ raise_exception('never') }}", False),
    ],
    ids=[
        "plain",
        "upper case",
        "demands system",
        "refuses system",
        "parts",
        "between turns",
        "without content",
        "raises",
    ],
)
def test_the_end_of_turn_token_is_found_in_any_template(tmp_path, template, found, special):
    words = word_tokenizer()
    words.add_tokens([AddedToken("\n", special=False), AddedToken("<turn>", special=special)])
    words.chat_template = template
    turn = words.convert_tokens_to_ids("<turn>")
    assert turn not in words.all_special_ids
    words.save_pretrained(tmp_path)
    for each in (words, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert chat.end_of_turn_ids(each) == ((turn,) if found else ())


def test_a_template_with_a_date_gives_the_same_text_every_day():
    words = chat_tokenizer()
    words.chat_template = "{{ strftime_now('%d %b %Y %H:%M:%S') }} " + TEMPLATE
    assert encode([{"prompt": [{"role": "user", "content": "b c"}]}], words).texts == [
        "26 Jul 2024 00:00:00 u b c t a "
    ]


def test_a_template_may_expect_content_in_parts():
    words = chat_tokenizer()
    words.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}"
        " t {% endfor %}"
    )
    assert encode(chat.as_user_messages([{"prompt": "b c"}]), words).texts == ["b c t "]
    words.chat_template = "{% for m in messages %}{{ m.content|upper }} t {% endfor %}"
    assert encode(chat.as_user_messages([{"prompt": "b c"}]), words).texts == ["B C t "]


def test_a_column_named_messages_does_not_make_a_chat():
    words = chat_tokenizer()
    words.add_special_tokens({"bos_token": "<s>"})
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.bos_token_id)]
    )
    rows = [{"prompt": "b c", "messages": "mine"}, {"prompt": "b c"}]
    prompts = encode(rows, words)
    assert (
        prompts.tokens[0].tolist() == prompts.tokens[1].tolist()
        and prompts.tokens[0][0] == words.bos_token_id
    )


QUESTION = [{"role": "user", "content": "b"}]
ANSWER = [{"role": "assistant", "content": "c d"}]


@pytest.mark.parametrize(
    "prompt, answer",
    [
        (QUESTION, "c d"),
        (QUESTION, ANSWER),
        (None, QUESTION + ANSWER),
        ("b", QUESTION + ANSWER),
        (QUESTION, QUESTION + ANSWER),
        ("b", ANSWER),
    ],
)
def test_supervised_rows_of_messages_are_rendered_by_the_template(prompt, answer):
    words, row = chat_tokenizer(), {"prompt": prompt, "response": answer, "score": 1}
    ids = words.convert_tokens_to_ids
    tokens, mask, learned = encode_demonstrations([row], words, length=16)
    assert tokens[mask].tolist() == ids(["a", "b", "t", "a", "c", "d", "t"]) and tokens[
        learned
    ].tolist() == ids(["c", "d", "t"])
    tokens, mask, _ = encode_judgements([row], words, "scores", length=16)
    assert tokens[mask].tolist() == ids(["a", "b", "t", "a", "c", "d", "t"])


def test_all_messages_before_the_answer_are_kept():
    system = [{"role": "system", "content": "e f"}]
    row = {"prompt": system, "response": QUESTION + ANSWER}
    tokens, mask, _ = encode_demonstrations([row], chat_tokenizer(), length=16)
    assert tokens[mask].tolist() == chat_tokenizer().convert_tokens_to_ids(
        ["s", "e", "f", "t", "a", "b", "t", "a", "c", "d", "t"]
    )
    assert (
        chat.render_conversation(system, QUESTION + ANSWER, chat_tokenizer())
        == "s e f t u b t a c d t "
    )


PARTS = [{"type": "text", "text": "c"}, {"type": "text", "text": " d"}]


def test_text_parts_are_joined():
    parts = [{"role": "user", "content": PARTS}]
    row = {"prompt": parts, "response": [{"role": "assistant", "content": PARTS}]}
    assert encode([row], chat_tokenizer()).texts == ["u c d t a "]
    tokens, mask, learned = encode_demonstrations([row], chat_tokenizer(), length=16)
    ids = chat_tokenizer().convert_tokens_to_ids
    assert tokens[learned].tolist() == ids(["c", "d", "t"])
    tokens, mask, _ = encode_judgements([{**row, "score": 1}], chat_tokenizer(), "scores", length=9)
    assert tokens[mask].tolist() == ids(["a", "c", "d", "t", "a", "c", "d", "t"])
    picture = [{"role": "user", "content": [{"type": "image", "url": "b.png"}]}]
    with pytest.raises(ValueError, match="needs a text or messages in its column 'prompt'"):
        data.read_rows([{"prompt": picture}])


def test_a_conversation_is_rendered_by_a_template_that_expects_parts():
    words = chat_tokenizer()
    words.chat_template = TEMPLATE.replace("m.content", "m.content[0].text")
    assert chat.render_conversation(QUESTION, ANSWER, words) == "u b t a c d t "
    assert chat.render_prompt(QUESTION, words) == "u b t a "


OPENED = [*QUESTION, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    "prompt, answer",
    [
        (OPENED, " d"),
        (OPENED, [{"role": "assistant", "content": " d"}]),
        (OPENED, QUESTION + ANSWER),
        ([*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}], " d"),
    ],
)
def test_the_opening_words_of_the_assistant_are_continued(prompt, answer):
    words, row = chat_tokenizer(), {"prompt": prompt, "response": answer, "score": 1}
    assert encode([row], words).texts == ["u b t a c"]
    assert chat.render_conversation(prompt, answer, words) == "u b t a c d t "
    ids = words.convert_tokens_to_ids
    tokens, mask, learned = encode_demonstrations([row], words, length=16)
    assert tokens[mask].tolist() == ids(["a", "b", "t", "a", "c", "d", "t"])
    assert tokens[learned].tolist() == ids(["d", "t"])
    tokens, mask, _ = encode_judgements([row], words, "scores", length=16)
    assert tokens[mask].tolist() == ids(["a", "b", "t", "a", "c", "d", "t"])


TOOLS = [{"type": "function", "function": {"name": "e", "parameters": {}}}]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "e", "arguments": {}}}]}
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}"
    "{% for call in m.tool_calls or [] %}f {{ call.function.name }}{% endfor %} t {% endfor %}"
    "{% if add_generation_prompt %}a {% if enable_thinking is defined %}"
    "{{ 'g' if enable_thinking else 'h' }} {% endif %}{% endif %}"
)


@pytest.mark.parametrize("packed", [lambda value: value, json.dumps], ids=["values", "json"])
def test_tools_and_variables_of_a_row_reach_the_template(packed):
    words = chat_tokenizer()
    words.chat_template = TOOL_TEMPLATE
    options = {"tools": packed(TOOLS), "chat_template_kwargs": packed({"enable_thinking": False})}
    row = {"prompt": QUESTION, "response": "c", "score": 1, **options}
    prompts = encode([row], words)
    assert prompts.texts == ["e u b t a h "]
    ids = words.convert_tokens_to_ids
    tokens, mask, learned = encode_demonstrations([row], words, length=16)
    assert tokens[mask & ~learned].tolist() == ids(["e", "a", "b", "t", "a", "h"])
    tokens, mask, _ = encode_judgements([row], words, "scores", length=16)
    assert tokens[mask].tolist() == ids(["e", "a", "b", "t", "a", "c", "t"])
    seen = []
    score = lambda params, tokens, mask: seen.append(tokens[mask].tolist()) or np.zeros(len(tokens))
    ModelReward(score, None, words, 32, 0)(None, prompts, ["c"])
    assert seen == [tokens[mask].tolist()]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tools": {"name": "e"}}, "'tools' must be a list of JSON schemas"),
        ({"tools": "e"}, "'tools' must be JSON, not 'e'"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be a dictionary"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'chat_template_kwargs' must be a dict"),
    ],
)
def test_other_tools_and_variables_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encode([{"prompt": QUESTION, **options}], chat_tokenizer())


@pytest.mark.parametrize("call", [CALL, {**CALL, "content": None}])
def test_calls_of_tools_need_no_content(call):
    words, ids = chat_tokenizer(), chat_tokenizer().convert_tokens_to_ids
    words.chat_template = TOOL_TEMPLATE
    answer = {"role": "tool", "content": "d", "tool_calls": None}
    [row] = data.read_rows([{"prompt": [*QUESTION, call, answer]}])
    assert encode([row], words).texts == ["u b t a f e t t d t a "]
    tokens, mask, learned = encode_demonstrations(
        [{"prompt": QUESTION, "response": [call]}], words, length=16
    )
    assert tokens[mask & ~learned].tolist() == ids(["a", "b", "t", "a"])
    assert tokens[learned].tolist() == ids(["f", "e", "t"])
    words.chat_template = TOOL_TEMPLATE.replace("a {% if", "b {% if")
    with pytest.raises(ValueError, match="does not write tool calls as an answer"):
        encode_demonstrations([{"prompt": QUESTION, "response": [call]}], words, length=16)


def test_a_reward_model_reads_a_chat_through_its_own_template():
    own, seen = chat_tokenizer(), []
    own.chat_template = "e {% for m in messages %}{{ m.role[0] }} f {{ m.content }} {% endfor %}"
    score = lambda params, tokens, mask: (
        seen.extend(x[m].tolist() for x, m in zip(tokens, mask, strict=True))
        or np.zeros(len(tokens))
    )
    prompts = (
        encode([{"prompt": QUESTION}, {"prompt": "b", "messages": QUESTION}], chat_tokenizer())
        .padded(9)
        .take(np.array([1, 0]))
    )
    reward = lambda: ModelReward(score, None, own, 32, 0)(
        None, prompts, ["c d", "c"]
    ).response.tolist()
    ids = own.convert_tokens_to_ids
    assert reward() == [0, 0] and seen == [
        ids(["a", "d"]),
        ids(["e", "a", "f", "b", "a", "f", "c"]),
    ]  # "bc" and "u" are not in the vocabulary
    own.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(
        RewardError, match="reward model cannot read every response: The tokenizer's chat template"
    ):
        reward()
    own.chat_template = None
    del seen[:]
    assert reward() == [0, 0] and seen[1] == ids(["a", "b", "t", "a", "c"])
