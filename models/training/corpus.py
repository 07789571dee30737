"""The training text: Python source files of the standard library, a committed list with hashes.

Every machine with the Python version named in ``corpus.json`` has the same text. The list also says which files are
held out: whole files, never seen by the tokenizer or the models.
"""

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

MANIFEST = Path(__file__).with_name("corpus.json")
HELD_OUT_ONE_IN = 40

# Tests, bundled packages, and machine-made tables (character maps, help topics, build settings).
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_SKIPPED_FILES = frozenset({"html/entities.py"})

Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One source file: path relative to the library folder, SHA-256 in hex, size in bytes, and split."""

    path: str
    sha256: str
    bytes: int
    split: Split


@dataclass(frozen=True, slots=True)
class Manifest:
    """The committed list: the Python version that it was made from, and its files in path order."""

    python: str
    files: tuple[CorpusFile, ...]


class CorpusChangedError(RuntimeError):
    """The library on this machine is not the text that the manifest lists."""


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def split_of(path: str) -> Split:
    """Split of a file, by a hash of its relative path alone: editing a file never moves it to the other side."""
    digest = hashlib.sha256(f"heldout:{path}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def scan(root: Path) -> tuple[CorpusFile, ...]:
    """Lists the corpus files under ``root`` in path order; files that are not UTF-8 or nearly empty are left out."""
    found = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if _is_skipped(path):
            continue
        data = file.read_bytes()
        if len(data) < 64 or not _is_utf8(data):
            continue
        found.append(CorpusFile(path, hashlib.sha256(data).hexdigest(), len(data), split_of(path)))
    return tuple(found)


def load_manifest(file: Path = MANIFEST) -> Manifest:
    """Reads a manifest written by `write_manifest`."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    return Manifest(raw["python"], tuple(CorpusFile(**entry) for entry in raw["files"]))


def write_manifest(manifest: Manifest, file: Path = MANIFEST) -> None:
    """Writes one file a line, so that a changed list is a readable diff."""
    lines = ",\n".join("  " + json.dumps(asdict(entry)) for entry in manifest.files)
    file.write_text(f'{{"python": "{manifest.python}", "files": [\n{lines}\n]}}\n', encoding="utf-8")


def differences(manifest: Manifest, root: Path) -> list[str]:
    """One line for each listed file that is missing under ``root`` or has another hash; empty if all is the same."""
    lines = []
    for entry in manifest.files:
        file = root / entry.path
        if not file.is_file():
            lines.append(f"{entry.path}: missing")
        elif (digest := hashlib.sha256(file.read_bytes()).hexdigest()) != entry.sha256:
            lines.append(f"{entry.path}: sha256 {digest[:12]}, listed {entry.sha256[:12]}")
    return lines


def read_texts(
    split: Split, manifest: Manifest | None = None, root: Path | None = None, allow_changed: bool = False
) -> dict[str, str]:
    """Reads the files of one split, byte for byte.

    Args:
        split: "train" or "heldout".
        manifest: the list of files; default the committed one.
        root: library folder; default that of the running interpreter.
        allow_changed: take the files as they are here, and leave out the missing ones.

    Returns:
        Relative path -> text, in path order.

    Raises:
        CorpusChangedError: files differ from the manifest and ``allow_changed`` is off; names them.
    """
    manifest = manifest or load_manifest()
    root = root or stdlib_root()
    changed = differences(manifest, root)
    if changed and not allow_changed:
        raise CorpusChangedError(
            f"{len(changed)} of {len(manifest.files)} corpus files under {root} differ from the list made with Python "
            f"{manifest.python} (this is {platform.python_version()}); --allow-changed trains on them as they are:\n  "
            + "\n  ".join(changed)
        )
    files = [entry for entry in manifest.files if entry.split == split and (root / entry.path).is_file()]
    return {entry.path: (root / entry.path).read_bytes().decode("utf-8") for entry in files}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: check this machine's files against the committed list, or write the list anew."""
    parser = argparse.ArgumentParser(prog="python -m models.training.corpus", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write corpus.json from this interpreter's library")
    if parser.parse_args(argv).write:
        write_manifest(Manifest(platform.python_version(), scan(stdlib_root())))
    manifest = load_manifest()
    for split in ("train", "heldout"):
        chosen = [entry for entry in manifest.files if entry.split == split]
        print(f"{split}: {len(chosen)} files, {sum(entry.bytes for entry in chosen):,} bytes")
    changed = differences(manifest, stdlib_root())
    for line in changed:
        print(line, file=sys.stderr)
    return 1 if changed else 0


def _is_skipped(path: str) -> bool:
    *folders, name = path.split("/")
    return (
        path in _SKIPPED_FILES
        or name.startswith(_SKIPPED_PREFIXES)
        or any(folder in _SKIPPED_FOLDERS or folder.startswith(_SKIPPED_PREFIXES) for folder in folders)
    )


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
