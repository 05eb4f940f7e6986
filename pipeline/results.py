"""Which results `kmeans` and `duplicates` left in a run, for all who show or query them."""

from fsspec import AbstractFileSystem


def list_results(fs: AbstractFileSystem, home: str) -> list[str]:
    """Names of the folders under `home`, such as `DIR/clusters`, that have a record `NAME.json` beside them, sorted.

    Where there is none, a result was being put in place, and the files may be some of it only.
    """
    try:
        entries = fs.ls(home, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = {(str(entry["name"]).rstrip("/").rpartition("/")[2], entry["type"]) for entry in entries}
    return sorted(name for name, kind in found if kind == "directory" and (f"{name}.json", "file") in found)
