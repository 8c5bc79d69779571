"""A Hugging Face folder as a source of weights: `config.json`, safetensors, `tokenizer.json`."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .json_file import JsonObject, read_json
from .safetensors import SafetensorsFile
from .selected import select
from .source import TensorInfo
from .tokenizer_file import read_folder_tokenizer

COMPANIONS = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE"),
)


class CheckpointFolder:
    """A folder as Hugging Face's transformers writes it, without its weights: what there is to know of config and text.

    Raises ValueError where it has no config, or a damaged one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder")
        self.config: JsonObject = read_json(self.path / "config.json")

    @property
    def name(self) -> str:
        """The name of the model: that of the repository of a hub's cache, or of the folder."""
        snapshots = self.path.resolve().parent
        return snapshots.parent.name.rsplit("--")[-1] if snapshots.name == "snapshots" else self.path.resolve().name

    @property
    def companions(self) -> dict[str, Path]:
        """The files beside the weights that tell of text, by name: they go along when the checkpoint is converted."""
        return {name: self.path / name for name in COMPANIONS if (self.path / name).is_file()}

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into a prompt, where the folder has one; of several, the default."""
        own, described = self.path / "chat_template.jinja", self.path / "tokenizer_config.json"
        if own.is_file():
            return own.read_text(encoding="utf-8")
        found = read_json(described).get("chat_template") if described.is_file() else None
        if isinstance(found, list):
            defaults = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
            found = defaults[0].get("template") if defaults else None
        return found if isinstance(found, str) else None


class HuggingFaceFolder(CheckpointFolder):
    """A folder as Hugging Face's transformers writes it; a `Source`.

    Args:
        path: the folder.
        ignore: as of `select`.
        text_only: as of `select`.

    Raises ValueError where a file is missing, damaged, or names one outside of the folder, and as `select`.
    """

    def __init__(self, path: str | Path, *, ignore: Collection[str] = (), text_only: bool = False):
        super().__init__(path)
        files = {name: file for file in self._located() for name in file.tensors}
        self.config, self._names = select(self.config, files, ignore=ignore, text_only=text_only)
        self._files = {name: files[inner] for name, inner in self._names.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: file.tensors[self._names[name]] for name, file in self._files.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._files[name].read(self._names[name])

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, where the folder has one; see `read_folder_tokenizer`."""
        rows = self.config.get("vocab_size")
        return read_folder_tokenizer(self.path, rows if isinstance(rows, int) else None)

    def _located(self) -> list[SafetensorsFile]:
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if not index.is_file():
            if not single.is_file():
                raise ValueError(self._no_weights())
            return [SafetensorsFile(single)]
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files")
        for place in sorted(set(places.values())):
            if not place.endswith(".safetensors") or Path(place).name != place or "\\" in place:
                raise ValueError(f"{index} names {place!r}, which is not a .safetensors file in its folder")
        files = [SafetensorsFile(self.path / place) for place in sorted(set(places.values()))]
        found = [(name, file.path.name) for file in files for name in file.tensors]
        wrong = sorted(set(found) ^ set(places.items()))
        if wrong:
            name, place = wrong[0]
            raise ValueError(f"{index} and the files disagree on {len(wrong)} tensors, e.g. {name!r} in {place!r}")
        return files

    def _no_weights(self) -> str:
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in self.path.glob(kind))
        if not pickled:
            return f"{self.path} has no model.safetensors and no model.safetensors.index.json"
        return (
            f"{self.path} has its weights in {pickled[0]}, a pickle, which runs code when it is read and is never read "
            "here. Take a repository with safetensors, or convert it where you trust it, with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
