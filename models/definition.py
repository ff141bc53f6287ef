"""The definition of a language model without its weights: its tokenizer and its configuration, as files.

Both change scores. Therefore the bundle holds both, and the identity of the base weights covers both.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
NAMES = (CONFIG, TOKENIZER, TOKENIZER_CONFIG)
# Keys of config.json that name the origin of the model or the storage of its weights; no score depends on them.
NO_SCORE = frozenset({"_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True)
class Definition:
    """The definition files of one language model, by name."""

    files: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> "Definition":
        """Read the definition files of a folder."""
        return cls({name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()})

    def write(self, folder: Path) -> None:
        """Create the folder and write the files into it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def identify(self, weights_id: str) -> str:
        """Return the identity of a language model: a hash of its weights' identity and of this definition.

        The hash is over the files, not over a library's objects: a bundle keeps its identity when the library is
        upgraded.
        """
        digest = hashlib.sha256(weights_id.encode())
        for name, content in sorted(self.files.items()):
            counted = _canonical(scoring_fields(json.loads(content))) if name == CONFIG else content
            digest.update(f"\n{name} {hashlib.sha256(counted).hexdigest()}".encode())
        return digest.hexdigest()


def scoring_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json that scores may depend on."""
    return {key: value for key, value in config.items() if key not in NO_SCORE}


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True).encode()
