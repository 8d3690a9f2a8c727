"""Files of a data set on the hub that `datasets` does not hand out, such as videos: downloaded once, archives unpacked."""

from __future__ import annotations

import os
import tarfile
import zipfile
from functools import cache
from pathlib import Path

from vlprune.errors import OptionError, VlpruneError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@cache
def hub_folders(name: str) -> list[Path]:
    """Folders with the files of a data set: as they are published, and what its archives hold.

    Args:
        name: id on the hub; or a folder in a layout that `datasets` loads, which is taken as it is.

    Raises:
        OptionError: the data set cannot be downloaded, or an archive cannot be unpacked.
    """
    if Path(name).is_dir():
        return [Path(name)]
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise VlpruneError("downloading a data set needs huggingface_hub, which is not installed: pip install 'vlprune[evals]'") from error
    try:
        folder = Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:                                           # whatever the hub or the network does
        raise OptionError(f"cannot download the files of the data set {name!r}: {' '.join(str(error).split())[:300]}") from error
    target = Path(constants.HF_HOME) / "vlprune" / name.replace("/", "--") / folder.name
    archives = sorted(file for file in folder.rglob("*") if file.name.endswith(ARCHIVES))
    for archive in archives:
        unpack(archive, target)
    return [folder, target] if archives else [folder]


def unpack(archive: Path, target: Path) -> None:
    """Unpack an archive into a folder, once: a file next to what it held says that it is done. Members that would land outside of the folder are refused."""
    mark = target / f".{archive.parent.name}-{archive.name}.unpacked"
    if mark.exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    try:
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as pack:
                pack.extractall(target)                                  # zipfile drops ".." and roots itself
        else:
            with tarfile.open(archive) as tape:
                tape.extractall(target, filter="data")
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise OptionError(f"cannot unpack {os.fspath(archive)!r}: {error}") from error
    mark.touch()
