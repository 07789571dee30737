"""From the name of a model to a folder with its files."""

import re
from pathlib import Path

from models.errors import ModelError

FILES = ("*.safetensors", "*.json", "*.jinja")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(model: str | Path) -> Path:
    """The folder of a model.

    Args:
      model: a folder, used as it is; or a name on the Hugging Face hub: a complete copy in the local cache is used
        without asking the network, otherwise the files are downloaded (`HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN`
        have their usual meaning).

    Raises:
      ModelError: no such folder, and no such model in the cache or on the hub.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    if path.exists():
        raise ModelError(f"{name}: not a folder; a checkpoint folder or the name of a model on the hub is expected")
    if isinstance(model, Path) or not _HUB_NAME.fullmatch(name):
        raise ModelError(f"{name}: no such folder")
    cached = _cached(name)
    return cached if cached is not None else _download(name)


def _cached(name: str) -> Path | None:
    # Imported where it is needed: the client is slow to import, and a folder needs none.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
    return folder if _has_model(folder) else None


def _has_model(folder: Path) -> bool:
    """Whether there is more than, say, the tokenizer that another program put into the cache."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"{name}: no such folder, not in the local hub cache, and not downloaded "
            f"({type(error).__name__}{': ' + reason[0] if reason else ''})"
        ) from error
    # Without a network the client answers with whatever the cache has.
    if not _has_model(folder):
        raise ModelError(f"{name}: {folder} lacks config.json or *.safetensors files, and they are not downloaded")
    return folder
