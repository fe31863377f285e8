"""The tokenizer that lies in a GGUF file: byte-level BPE is built here; other kinds through `transformers`, which needs PyTorch."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ppo_jax.models.io import gguf_format

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _OWN = 3, 4  # kinds of tokens: special, and added by a user


def load_tokenizer(file: Path) -> Any:
    """The tokenizer in the file, with its chat template, as one of `transformers`.

    Raises:
      ValueError: if it is of a kind that only PyTorch's part of `transformers` reads, and there is no PyTorch.
    """
    from transformers import PreTrainedTokenizerFast

    fields = {
        name.removeprefix("tokenizer."): field
        for name, field in gguf_format.open_file(file).fields.items()
    }
    of = lambda name, default=None: fields[name].contents() if name in fields else default
    kind, split = of("ggml.model"), of("ggml.pre", "default")
    if kind != "gpt2" or split not in _SPLITS or "ggml.merges" not in fields:
        return _by_transformers(file, kind, split)
    tokens = of("ggml.tokens")
    named = {
        f"{name}_token": of(f"ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(tokens, of("ggml.merges"), of("ggml.token_type", ()), split),
        add_bos_token=of("ggml.add_bos_token", split == "llama-bpe"),
        add_eos_token=of("ggml.add_eos_token", False),
        chat_template=of("chat_template"),
        **{name: tokens[number] for name, number in named.items() if number is not None},
    )


def _by_transformers(file: Path, kind: Any, split: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise ValueError(
            f"The tokenizer in {file}, {kind} with {split} splits, is read by transformers with PyTorch: "
            "pip install torch."
        ) from error


def _byte_level(tokens: list[str], merges: list[str], kinds: Any, split: str) -> Tokenizer:
    """Byte-level BPE (GPT-2's), on pieces of text that `split` names as llama.cpp does."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=pairs,
            ignore_merges=split == "llama-bpe",
        )
    )
    tokenizer.pre_tokenizer = _SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    added = lambda wanted: [
        token for token, kind in zip(tokens, kinds, strict=False) if kind == wanted
    ]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in added(_CONTROL)]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added(_OWN)])
    return tokenizer


def _by_pattern(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex(_SPLIT.format(digits=digits))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behavior="isolated"), bytes_])


def _as_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _with_single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _as_gpt2()])


_SPLITS = {
    "default": _as_gpt2,
    "gpt-2": _as_gpt2,
    "smollm": _with_single_digits,
    "qwen2": lambda: _by_pattern(""),
    "llama-bpe": lambda: _by_pattern("{1,3}"),
}
