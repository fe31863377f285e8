"""Models in GGUF files, read through the `gguf` package: the Llama and Qwen families; `gguf_tokenizer` has the tokenizer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.models.io.family import rotary

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
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


def is_gguf(model: str | Path) -> bool:
    return str(model).endswith(".gguf")


def open_file(file: Path) -> Any:
    """A `gguf.GGUFReader`.

    Raises:
      ValueError: if the package or the file is missing, or the file is damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "Reading GGUF needs the gguf package: pip install 'ppo-jax[gguf]'."
        ) from error
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # it trusts its file, so a damaged one can raise anything
        raise ValueError(
            f"{file} is no readable GGUF file: {type(error).__name__}: {error}."
        ) from error


def read(file: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """A GGUF file as a `config.json` and tensors by the names of the Hugging Face format.

    Raises:
      ValueError: if the file is damaged, of another family, or holds a quantisation that is not supported.
    """
    reader = open_file(file)
    try:
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.merges")
        }
    except Exception as error:
        raise ValueError(
            f"{file} is no readable GGUF file: {type(error).__name__}: {error}."
        ) from error
    odd = sorted({tensor.tensor_type.name for tensor in reader.tensors} - set(TYPES))
    if odd:
        raise ValueError(
            f"{file} holds tensors of type {', '.join(odd)}; supported are {', '.join(TYPES)}."
        )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(fields, tied="output.weight" not in stored)
        if "rope_freqs.weight" in stored:
            config["rope_scaling"] = _rope_scaling(
                np.asarray(stored.pop("rope_freqs.weight").data, np.float64), config, file
            )
    except KeyError as error:
        raise ValueError(f"{file} lacks the field {error}.") from error
    return config, _Tensors(stored, config)


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    kind = fields["general.architecture"]
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ValueError(
            f"A GGUF of architecture {kind!r} is not supported; known: llama, qwen2, qwen3."
        )
    scaled = fields.get(f"{kind}.rope.scale_linear", 1) != 1 or fields.get(
        f"{kind}.rope.scaling.type"
    ) not in (None, "none")
    if scaled or fields.get(f"{kind}.expert_count"):
        raise ValueError("A GGUF with scaled rotary positions or experts is not supported.")

    def number(name: str, default: Any = None, *, whole: bool = True) -> Any:
        value = (
            fields[f"{kind}.{name}"] if default is None else fields.get(f"{kind}.{name}", default)
        )
        if (
            not isinstance(value, int if whole else float | int)
            or isinstance(value, bool)
            or not 0 < value < 2**31
        ):
            raise ValueError(
                f"A GGUF's field {kind}.{name} must be a positive {'whole ' * whole}number, not {value!r:.60}."
            )
        return value

    width, heads = number("embedding_length"), number("attention.head_count")
    head = number("attention.key_length", max(width // heads, 1))
    if number("rope.dimension_count", head) != head:
        raise ValueError("A GGUF whose heads rotate in part is not supported.")
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    return {
        "model_type": kind,
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head,
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        # A float32 in the file: 1e-5 there is 9.999999747e-6 read as a double.
        "rms_norm_eps": float(f"{number('attention.layer_norm_rms_epsilon', whole=False):.6g}"),
        "rope_theta": number("rope.freq_base", 10000.0, whole=False),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def _rope_scaling(factors: np.ndarray, config: dict[str, Any], file: Path) -> dict[str, Any]:
    """What each frequency is divided by, as the settings of Llama 3.1 and later that it comes from."""
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
            f"{file} scales its rotary positions in a way that is not Llama 3.1's; that is not supported."
        )
    return settings


class _Tensors(Mapping[str, np.ndarray]):
    """Tensors under their Hugging Face names, each dequantised to float32 when it is asked for."""

    def __init__(self, stored: dict[str, Any], config: dict[str, Any]):
        self._stored = {_hf_name(name): tensor for name, tensor in stored.items()}
        self._config = config

    def __getitem__(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._stored[name]
        array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        array = array.reshape(tuple(int(n) for n in reversed(tensor.shape)))
        if self._config["model_type"] == "llama" and name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):
            heads = self._config[
                "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            ]
            # GGUF pairs neighbours where the Hugging Face format pairs the halves of a head.
            array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{_LAYER.get(part, part)}.{kind}"
    return f"{_TOP.get(stem, stem)}.{kind}"
