"""A stored model: where it is, its `config.json`, and its tensors by name.

A model is given as a folder, as the id of a model on the Hugging Face Hub, or as a GGUF file.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.models.io import gguf_format, gguf_tokenizer
from ppo_jax.models.io.families import family_of
from ppo_jax.models.io.family import Family, HFConfig
from ppo_jax.models.io.safetensors_format import open_tensors, write_safetensors
from ppo_jax.models.io.weights import Rule, TensorReader
from ppo_jax.stores import check_local

_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
_SECOND_COPIES = ["consolidated*", "*/*"]  # The same weights again, in other formats.
# Keys of a config.json; that without "_config" is MLX's.
_QUANTISED = ("quantization_config", "compression_config", "quantization")


class FileFormat(NamedTuple):
    """A format in which a model is one file.

    Attributes:
      read: function from the path of a file to the equivalent of its `config.json`, and for each
        tensor, by its Hugging Face name, the function that reads it.
      load_tokenizer: function from the path of a file to a tokenizer of `transformers`.
    """

    read: Callable[[Path], tuple[HFConfig, dict[str, TensorReader]]]
    load_tokenizer: Callable[[Path], Any]


# The formats by the ends of the names of their files. A new format needs one file in this folder
# and a line here.
_FORMATS = {".gguf": FileFormat(gguf_format.read, gguf_tokenizer.load_tokenizer)}


def file_format(model: str | Path) -> FileFormat | None:
    """Return the format of a model that is given as one file, by the end of its name, or None."""
    return _FORMATS.get(os.path.splitext(model)[1])


def resolve(model: str | Path, files: Iterable[str] = _FILES) -> Path:
    """Return the folder of a model, and download it from the Hugging Face Hub if it is not local.

    Args:
      model: a folder or a Hugging Face id. The folder of a run stands for its final model, and that
        of a converted run for its policy; both are in the subfolder `model`.
      files: patterns of the names of the files to download.

    Raises:
      ValueError: if there is no such folder and the Hub gives no such model.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder / "model" if (folder / "model" / "config.json").is_file() else folder
    check_local(model, "models are read from local folders")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(model), allow_patterns=list(files), ignore_patterns=_SECOND_COPIES
            )
        )
    except Exception as error:  # The Hub raises many types; each means that there is no model.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"{str(model)!r} is not a local folder, and the Hugging Face Hub gave no such model"
        if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            what = (
                f"The Hugging Face Hub cannot be reached to look for {str(model)!r}, which is not "
                "a local folder"
            )
        raise ValueError(f"{what}: {reason}") from error


class StoredModel(NamedTuple):
    """A model that is opened but not loaded.

    Attributes:
      path: its folder or GGUF file.
      hf: its `config.json`, or the equivalent of a GGUF file.
      tensors: for each tensor, by its name in the files, the function that reads it.
    """

    path: Path
    hf: HFConfig
    tensors: dict[str, TensorReader]

    @property
    def family(self) -> Family:
        """The family of the model."""
        return family_of(self.hf["model_type"])


def read(model: str | Path) -> StoredModel:
    """Open a model.

    Args:
      model: a folder, a Hugging Face id or a .gguf file.

    Raises:
      ValueError: if the model cannot be found or read, its family is not supported, it is
        quantised, or it is an adapter.
    """
    if single := file_format(model):
        return StoredModel(Path(model), *single.read(Path(model)))
    folder = resolve(model)
    if adapter_base(folder) is not None:
        raise ValueError(
            f"{model} holds an adapter without its base model; merge the two first: ppo-jax "
            f"convert --model {model} --out FOLDER."
        )
    # The config comes first, so that the message for an unsupported family names the family.
    return StoredModel(folder, _config_in(folder), open_tensors(folder))


def write(
    folder: str | Path,
    hf: HFConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: Any = None,
) -> None:
    """Write a model to a folder in the Hugging Face format.

    Args:
      folder: the folder; it is made if it does not exist.
      hf: the `config.json`.
      tensors: pairs of a name and a float32 tensor, taken one at a time.
      tokenizer: a tokenizer of `transformers`, or None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The saved tensors are float32, and `transformers` loads them in the dtype of the config.
    hf = {name: value for name, value in hf.items() if name != "torch_dtype"} | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    write_safetensors(folder, tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def read_config(model: str | Path) -> HFConfig:
    """Return the `config.json` of a model, or its equivalent of a .gguf file, without the weights.

    Args:
      model: a folder, a Hugging Face id or a .gguf file. For an adapter, the config is that of its
        base model.

    Raises:
      ValueError: if there is none, the family is not supported, or the model is quantised.
    """
    if single := file_format(model):
        return single.read(Path(model))[0]
    folder = resolve(model, ("config.json",))
    if not (folder / "config.json").is_file():
        folder = resolve(model, ("adapter_config.json",))
    base = adapter_base(folder)
    return _config_in(folder) if base is None else read_config(base)


def adapter_base(folder: Path) -> str | None:
    """Return the base model that the adapter in a folder names; None if it holds no adapter alone.

    Raises:
      ValueError: if the folder holds an adapter that does not name its base model.
    """
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() or any(folder.glob("model*.safetensors*")):
        return None
    base = read_json(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{adapter} does not name the base model of the adapter; pass the base model as the "
            f"model, after ppo-jax convert --model BASE --adapter {folder} --out FOLDER."
        )
    return base


def _config_in(folder: Path) -> HFConfig:
    file = folder / "config.json"
    if not file.exists() and (folder / "run.json").exists():
        raise ValueError(
            f"{folder} is the folder of a run of ppo-jax sft or reward that has not written its "
            "model yet; finish it with --resume auto."
        )
    if not file.exists():
        raise ValueError(
            f"{folder} has no config.json, so it is not a model in the Hugging Face format."
        )
    hf = read_json(file)
    if "model_type" not in hf and "hashes" in hf:
        raise ValueError(
            f"{folder} is the folder of a run that has not written its model yet; finish it with "
            f"--resume yes, or write a checkpoint with ppo-jax convert {folder} --out FOLDER."
        )
    family_of(hf.get("model_type"))
    for name in _QUANTISED:
        if hf.get(name):
            method = hf[name].get("quant_method") if isinstance(hf[name], dict) else None
            raise ValueError(
                f"{folder} holds a model that is quantised by {method or 'an unknown method'} "
                f"({name} in its config.json), which cannot be read; use the model that it was "
                "made from, in float32, float16 or bfloat16, or a GGUF file."
            )
    return hf


def read_json(file: Path) -> HFConfig:
    """Return the JSON object in a file.

    Raises:
      ValueError: if the file cannot be read or contains anything else.
    """
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return content


def table_tensors(
    model: StoredModel, rules: Iterable[Rule], *, tied: bool = False
) -> dict[str, TensorReader]:
    """Return the readers of a model's tensors by the names that its family's table has for them.

    These differ from the names in the files for norms that were converted from TensorFlow, and for
    files of the trunk alone, which lack the family's prefix. Tensors that are not parameters are
    left out, and tensors that the table does not have keep their names.

    Args:
      model: the model.
      rules: the table.
      tied: whether the output matrix is the embedding. If only one of the two is in the file, it
        may then be either.

    Raises:
      ValueError: if two tensors have the same name in the table.
    """
    known, prefix = {rule.stored for rule in rules}, model.family.prefix
    suffixes = {"gamma": "weight", "beta": "bias"}
    tensors: dict[str, TensorReader] = {}
    for name, read_tensor in model.tensors.items():
        new = re.sub(r"(?<=\.)(gamma|beta)$", lambda match: suffixes[match[0]], name)
        if new not in known and prefix + new in known:
            new = prefix + new
        if new in tensors:
            raise ValueError(f"One parameter is stored under two names: {name} is one of them.")
        if not model.family.ignored.fullmatch(name):
            tensors[new] = read_tensor
    family = model.family
    for path, copy in family.untied.items() if tied else ():
        name = family.tensors["embedding" if path == "unembedding" else path]
        if name not in tensors and copy in tensors:
            tensors[name] = tensors.pop(copy)
    return tensors
