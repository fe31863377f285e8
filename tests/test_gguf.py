"""Test GGUF files of every supported type and family against `transformers` on the same weights."""

import subprocess
import sys
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from experiments import assets
from ppo_jax.models.io import gguf_format, pretrained
from ppo_jax.models.io.gguf_format import _LAYER, _TOP
from ppo_jax.models.io.gguf_tokenizer import load_tokenizer
from ppo_jax.models.transformer import language_model

SIZE = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMES = {theirs: ours for ours, theirs in {**_LAYER, **_TOP}.items()}


def write(path, kind, model, quantisation, factors=None):
    """Quantise the matrices of a model in place and write it to a file."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_feed_forward_length(96)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list([str(i) for i in range(40)])
    for name, x in model.state_dict().items():
        kinds = gguf.GGMLQuantizationType
        type_ = kinds[quantisation] if x.ndim == 2 else kinds.F32
        array = (
            gguf.dequantize(gguf.quantize(x.numpy(), type_), type_)
            .reshape(x.shape)
            .astype(np.float32)
        )
        x.copy_(torch.tensor(array))
        if kind == "llama" and name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):  # llama.cpp rotates neighbouring pairs, `transformers` pairs half a head apart
            array = (
                array.reshape(4 if "q_proj" in name else 2, 2, -1, 64)
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        module, _, part = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, layer, inner = module.split(".", 3)
            stored = f"blk.{layer}.{NAMES[inner]}.{part}"
        else:
            stored = f"{NAMES[module]}.{part}"
        writer.add_tensor(
            stored, gguf.quantize(np.ascontiguousarray(array), type_), raw_dtype=type_
        )
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(path, model):
    loaded, tokens = pretrained.load_policy(path), np.arange(2, 34)[None]
    ours = language_model(loaded.config)
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    got = ours.logits(
        loaded.params, ours.hidden(loaded.params, jnp.asarray(tokens), jnp.asarray(tokens) > 0)[0]
    )
    np.testing.assert_allclose(got, want, atol=1e-4)
    return loaded


def peer(kind, **more):
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SIZE, **more)
    ).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantisation", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_quantisation_type_is_read(tmp_path, kind, quantisation):
    model = peer(kind)
    write(tmp_path / "x.gguf", kind, model, quantisation)
    check(tmp_path / "x.gguf", model)


def random_blocks(kind, rows, columns, rng):
    """Return the bytes of random quantised rows, in which no float16 scale is infinite or NaN."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return rng.integers(0, 60, (rows, columns // block * size), np.uint8)  # 60 is below 0x3c


def test_every_type_that_the_gguf_package_dequantizes_is_read(tmp_path):
    """Among them all K-quants; a file of other types is refused by the name of the type."""
    rng, read, refused = np.random.default_rng(0), set(), set()
    for kind in gguf.GGMLQuantizationType:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        for name in ("embedding_length", "head_count", "block_count", "feed_forward_length"):
            getattr(writer, f"add_{name}")(8)
        writer.add_context_length(8)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_token_list([str(i) for i in range(4)])
        blocks = random_blocks(kind, 4, 1024, rng)
        writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            want = gguf.dequantize(blocks, kind)
        except NotImplementedError:
            with pytest.raises(
                ValueError, match=f"tensors of type {kind.name}, which this version"
            ):
                gguf_format.read(tmp_path / "x.gguf")
            refused.add(kind.name)
            continue
        got = gguf_format.read(tmp_path / "x.gguf")[1]["model.embed_tokens.weight"]()
        np.testing.assert_array_equal(got, want.reshape(4, 1024), err_msg=kind.name)
        read.add(kind.name)
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "IQ4_XS"} <= read
    assert {"I8", "F64"} <= refused


def test_a_model_of_mixed_k_quants_equals_transformers(tmp_path):
    """The mixture of a Q4_K_M file: matrices in Q4_K and Q6_K, norms in float32."""
    rng, kinds = np.random.default_rng(0), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_feed_forward_length(512)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list([str(i) for i in range(40)])
    writer.add_vocab_size(40)
    for name, rows, columns, kind in (
        ("token_embd", 40, 256, kinds.Q6_K),
        ("blk.0.attn_q", 256, 256, kinds.Q4_K),
        ("blk.0.attn_k", 128, 256, kinds.Q4_K),
        ("blk.0.attn_v", 128, 256, kinds.Q6_K),
        ("blk.0.attn_output", 256, 256, kinds.Q4_K),
        ("blk.0.ffn_gate", 512, 256, kinds.Q4_K),
        ("blk.0.ffn_up", 512, 256, kinds.Q5_K),
        ("blk.0.ffn_down", 256, 512, kinds.Q6_K),
    ):
        blocks = random_blocks(kind, rows, columns, rng)
        # The float16 scales of a block, which make the entries small.
        places = (-2,) if kind is kinds.Q6_K else (0, 2)
        by_block = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
        scale = np.float16(1e-4 if kind is kinds.Q6_K else 1e-3).tobytes()
        for place in places:
            by_block[:, place % by_block.shape[1]] = scale[0]
            by_block[:, place % by_block.shape[1] + 1] = scale[1]
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    )
    check(tmp_path / "x.gguf", model.eval())


def test_only_the_scaled_rotary_positions_of_llama_3_1_are_accepted(tmp_path):
    model = peer("llama", rope_parameters=LLAMA_3_1)
    plain = 1 / 1e4 ** (np.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq.numpy()
    assert factors.max() == pytest.approx(8) and factors.min() == pytest.approx(1)
    write(tmp_path / "x.gguf", "llama", model, "F32", factors)
    loaded = check(tmp_path / "x.gguf", model)
    pretrained.save_policy(tmp_path / "saved", loaded)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    check(tmp_path / "x.gguf", again)
    write(tmp_path / "odd.gguf", "llama", model, "F32", np.linspace(1, 3, 8))
    with pytest.raises(ValueError, match=r"not Llama 3\.1's"):
        pretrained.load_policy(tmp_path / "odd.gguf")


TEXTS = [
    "What is 12+345? 7 8 9",
    "  two  spaces\n\n\ttab it's 1 2",
    "ü日本語 🙂 <|im_end|>x<|im_start|>",
    "",
    " ",
    "\r\n a1b22 3.14 <think>x",
]


def assert_same_tokenizer(file, texts):
    ours, theirs = (
        load_tokenizer(file),
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )
    for text in texts:
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids and ours.decode(ids) == theirs.decode(ids), text
    assert (len(ours), ours.special_tokens_map) == (len(theirs), theirs.special_tokens_map)
    assert (
        ours.all_special_ids == theirs.all_special_ids
        and ours.chat_template == theirs.chat_template
    )


@pytest.mark.slow
def test_the_tokenizer_of_smollm2_equals_that_of_transformers():
    assert_same_tokenizer(
        assets.smollm2_gguf(), TEXTS + [review.sentence for review in assets.movie_reviews()[::10]]
    )


def write_tokenizer(path, split, kind="gpt2"):
    writer = gguf.GGUFWriter(path, "llama")
    for name in (
        "embedding_length",
        "block_count",
        "head_count",
        "feed_forward_length",
        "context_length",
    ):
        getattr(writer, f"add_{name}")(8)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "12 3", "Ġ a", "t h", "th e", "' s", "Ġ Ġ"]
    tokens = [
        *alphabet,
        *(merge.replace(" ", "") for merge in merges),
        "<think>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 4) + [4, 3, 3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_unk_token_id(len(tokens) - 3)
    writer.add_add_bos_token(split == "llama-bpe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("split", ["gpt-2", "default", "qwen2", "llama-bpe"])
def test_tokenizers_split_words_like_transformers(tmp_path, split):
    write_tokenizer(tmp_path / "x.gguf", split)
    assert_same_tokenizer(tmp_path / "x.gguf", [*TEXTS, "the 1234 a's", "don't  THE'S\n \n x"])


WITHOUT_PYTORCH = """
import sys
sys.modules["torch"] = None
from ppo_jax.models.io.pretrained import load_tokenizer
print(load_tokenizer(sys.argv[1])("a 12").input_ids)
"""


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_pytorch_is_needed_for_other_tokenizers_only(tmp_path, kind):
    write_tokenizer(tmp_path / "x.gguf", "gpt-2", kind)
    command = [sys.executable, "-c", WITHOUT_PYTORCH, str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if kind == "gpt2":
        assert done.stdout.strip() == str(load_tokenizer(tmp_path / "x.gguf")("a 12").input_ids), (
            done.stderr
        )
    else:
        assert (
            "is read by transformers with PyTorch: pip install torch."
            in done.stderr.splitlines()[-1]
        )


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "llama.attention.head_count",
            0,
            "llama.attention.head_count must be a positive whole number, not 0",
        ),
        (
            "llama.attention.head_count",
            [4, 4],
            r"head_count must be a positive whole number, not \[4, 4\]",
        ),
        ("llama.attention.head_count_kv", 0, "head_count_kv must be"),
        (
            "llama.attention.layer_norm_rms_epsilon",
            "x",
            "epsilon must be a positive number, not 'x'",
        ),
        ("llama.rope.freq_base", float("nan"), "freq_base must be a positive number"),
        ("llama.rope.scale_linear", 4.0, "scaled rotary positions"),
        ("llama.rope.dimension_count", 8, "rotate in part"),
        ("llama.block_count", 10**9, "at most 4095 layers"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(tmp_path, name, value, message):
    write(tmp_path / "x.gguf", "llama", peer("llama"), "F32")
    fields = {
        key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "x.gguf").fields.items()
    }
    with pytest.raises(ValueError, match=message):
        pretrained.config_of(gguf_format._config({**fields, name: value}, tied=True))
