"""The tokenizer in a GGUF file.

Byte-level BPE tokenizers are built here. Other kinds are read by `transformers`, which needs
PyTorch for it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ppo_jax.models.io import gguf_format

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"qwen2": "", "llama-bpe": "{1,3}"}  # The quantifier of digits in the pattern.
_SPLITS = ("default", "gpt-2", "smollm", *_DIGITS)
_CONTROL, _USER_DEFINED = 3, 4  # Types of tokens in a GGUF file.


def load_tokenizer(file: Path) -> Any:
    """Load the tokenizer in a GGUF file, with its chat template.

    Args:
      file: a file with a tokenizer.

    Returns:
      A tokenizer of `transformers`.

    Raises:
      ValueError: if the tokenizer is of a kind that needs PyTorch, and PyTorch is not installed.
    """
    from transformers import PreTrainedTokenizerFast

    fields = gguf_format.open_file(file).fields

    def value(name: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.{name}")
        return default if field is None else field.contents()

    kind, split, merges = value("ggml.model"), value("ggml.pre", "default"), value("ggml.merges")
    if kind != "gpt2" or split not in _SPLITS or merges is None:
        return _by_transformers(file, kind, split)
    tokens = value("ggml.tokens")
    special = {
        f"{name}_token": value(f"ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(tokens, merges, value("ggml.token_type", ()), split),
        add_bos_token=value("ggml.add_bos_token", split == "llama-bpe"),
        add_eos_token=value("ggml.add_eos_token", False),
        chat_template=value("chat_template"),
        **{name: tokens[i] for name, i in special.items() if i is not None},
    )


def _by_transformers(file: Path, kind: Any, split: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise ValueError(
            f"The tokenizer in {file}, {kind} with {split} splits, is read by transformers with "
            "PyTorch: pip install torch."
        ) from error


def _byte_level(
    tokens: list[str], merges: list[str], types: Sequence[int], split: str
) -> Tokenizer:
    """Return a byte-level BPE tokenizer, as GPT-2's, that splits text as llama.cpp's `split`."""
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _splitter(split)
    tokenizer.decoder = decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    for add, wanted in (
        (tokenizer.add_special_tokens, _CONTROL),
        (tokenizer.add_tokens, _USER_DEFINED),
    ):
        add(
            [
                AddedToken(token, normalized=False, special=wanted == _CONTROL)
                for token, type_ in zip(tokens, types, strict=False)
                if type_ == wanted
            ]
        )
    return tokenizer


def _splitter(split: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer that llama.cpp calls `split`; all end with GPT-2's bytes."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in _DIGITS)
    first: pre_tokenizers.PreTokenizer
    if split in _DIGITS:
        pattern = Regex(_PATTERN.format(digits=_DIGITS[split]))
        first = pre_tokenizers.Split(pattern, behavior="isolated")
    elif split == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        return bytes_
    return pre_tokenizers.Sequence([first, bytes_])
