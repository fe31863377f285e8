"""Models of the Llama and Qwen families in GGUF files, read with the `gguf` package.

`gguf_tokenizer` reads the tokenizer of such a file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.models.io.family import HFConfig, rotary
from ppo_jax.models.io.weights import TensorReader

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Names of modules in a GGUF file and in the Hugging Face format, within a layer and outside.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def open_file(file: Path) -> Any:
    """Open a GGUF file.

    Returns:
      A `gguf.GGUFReader`.

    Raises:
      ValueError: if the `gguf` package is not installed, or the file is missing or damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "Reading GGUF needs the gguf package: pip install 'ppo-jax[gguf]'."
        ) from error
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    with _reading(file):
        return gguf.GGUFReader(file)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # The reader does not check the file, so it can raise any type.
        raise ValueError(
            f"{file} is not a readable GGUF file: {type(error).__name__}: {error}."
        ) from error


def read(file: Path) -> tuple[HFConfig, dict[str, TensorReader]]:
    """Read a GGUF file as a model in the Hugging Face format.

    Args:
      file: a file with the weights of a model.

    Returns:
      The equivalent of its `config.json`, and for each tensor, by its Hugging Face name, the
      function that reads it and dequantizes it to float32.

    Raises:
      ValueError: if the file is damaged, or its architecture or quantization is not supported.
    """
    reader = open_file(file)
    with _reading(file):
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.merges")
        }
    unsupported = [t.name for t in {x.tensor_type for x in reader.tensors} if not _is_readable(t)]
    if unsupported:
        raise ValueError(
            f"{file} holds tensors of type {', '.join(sorted(unsupported))}, which this version of "
            "the gguf package cannot dequantize; a newer version may, or convert the file to Q8_0."
        )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(fields, tied="output.weight" not in stored)
        if "rope_freqs.weight" in stored:
            factors = np.asarray(stored.pop("rope_freqs.weight").data, np.float64)
            config["rope_scaling"] = _rope_scaling(factors, config, file)
    except KeyError as error:
        raise ValueError(f"{file} lacks the field {error}.") from error
    rotated = {}
    if config["model_type"] == "llama":
        rotated = {
            "attn_q.weight": config["num_attention_heads"],
            "attn_k.weight": config["num_key_value_heads"],
        }
    return config, {
        _hf_name(name): partial(_dequantized, tensor, rotated.get(name.split(".", 2)[-1]))
        for name, tensor in stored.items()
    }


def _config(fields: dict[str, Any], *, tied: bool) -> HFConfig:
    """Return the `config.json` for the metadata fields of a file."""
    kind = _architecture(fields)
    number = partial(_number, fields, kind)
    width, heads = number("embedding_length"), number("attention.head_count")
    head = number("attention.key_length", max(width // heads, 1))
    if number("rope.dimension_count", head) != head:
        raise ValueError("A GGUF whose heads rotate in part is not supported.")
    epsilon = number("attention.layer_norm_rms_epsilon", integer=False)
    return {
        "model_type": kind,
        "architectures": [f"{kind.title()}ForCausalLM"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head,
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        # The file stores a float32, in which 1e-5 is 9.999999747e-6 when read as a double.
        "rms_norm_eps": float(f"{epsilon:.6g}"),
        "rope_theta": number("rope.freq_base", 10000.0, integer=False),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def _architecture(fields: dict[str, Any]) -> str:
    """Return the architecture of a file, or raise ValueError if the decoder does not support it."""
    kind = fields["general.architecture"]
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"A GGUF of architecture {kind!r} is not supported; known: {', '.join(_ARCHITECTURES)}."
        )
    if (
        fields.get(f"{kind}.rope.scale_linear", 1) != 1
        or fields.get(f"{kind}.rope.scaling.type") not in (None, "none")
        or fields.get(f"{kind}.expert_count")
    ):
        raise ValueError("A GGUF with scaled rotary positions or experts is not supported.")
    return kind


def _number(
    fields: dict[str, Any], kind: str, name: str, default: Any = None, *, integer: bool = True
) -> Any:
    """Return a positive number below 2**31 from the fields of an architecture.

    Raises:
      KeyError: if the field is missing and has no default.
      ValueError: if the field has another value.
    """
    name = f"{kind}.{name}"
    value = fields[name] if default is None else fields.get(name, default)
    if type(value) not in ((int,) if integer else (int, float)) or not 0 < value < 2**31:
        raise ValueError(
            f"A GGUF's field {name} must be a positive {'whole ' * integer}number, not "
            f"{value!r:.60}."
        )
    return value


def _rope_scaling(factors: np.ndarray, config: HFConfig, file: Path) -> HFConfig:
    """Return the rope settings of Llama 3.1 and later that give the factors in a file.

    Args:
      factors: what each frequency is divided by.
      config: the rest of the config.
      file: the file, for the message of the ValueError that is raised if no settings give them.
    """
    settings = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head, base = config["head_dim"], config["rope_theta"]
    plain, scaled = (
        rotary(s, base=base, head=head, positions=8192).frequencies() for s in ({}, settings)
    )
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-3):
        raise ValueError(
            f"{file} scales its rotary positions in a way that is not Llama 3.1's, which is not "
            "supported."
        )
    return settings


def _is_readable(kind: Any) -> bool:
    """Return whether the `gguf` package can dequantize tensors of a `gguf.GGMLQuantizationType`."""
    import gguf

    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def _dequantized(tensor: Any, heads: int | None) -> np.ndarray:
    """Return a tensor in float32.

    Args:
      tensor: a `gguf.ReaderTensor`.
      heads: the number of heads, if the tensor is a query or key matrix of the architecture llama.
    """
    import gguf

    array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    array = array.reshape(tensor.shape.tolist()[::-1])
    if heads is None:
        return array
    # Rotary pairs are neighbours in GGUF, and the two halves of a head in the Hugging Face format.
    pairs = array.reshape(heads, -1, 2, array.shape[-1])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _hf_name(name: str) -> str:
    """Return the Hugging Face name of a GGUF tensor; the names of unknown modules are kept."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{_LAYER.get(part, part)}.{kind}"
    return f"{_TOP.get(stem, stem)}.{kind}"
