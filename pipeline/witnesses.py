"""Files by which a machine can tell whether it sees what the driver sees, where a job has local paths."""

import os

import numpy as np

from pipeline.addresses import absolute, is_chained, join, scheme
from pipeline.record import require_record
from pipeline.sources.manifest import part_named, read_rows
from pipeline.storage import filesystem, is_local
from schemas.spec import JobSpec


def local_witnesses(spec: JobSpec) -> list[str]:
    """Paths of this machine's disk that must lead to the same files on every machine, once the manifest is frozen: of
    a local output the last part of the manifest, whose name no other run has; the file with the image of the last row,
    where that lies here. The last one, since rows are done in order: what is local and done need not be seen."""
    out = absolute(spec.out)
    fs, path = filesystem(out, spec.storage_options)
    part = part_named(require_record(out, spec.storage_options).manifest_parts[-1])
    found = [join(path, "manifest", part.name)] if is_local(fs) else []
    last = next(read_rows(out, [part], np.array([[part.stop - 1, part.stop]]), spec.storage_options))
    image = last["container"][0].as_py() or last["uri"][0].as_py()
    # One that is not here either is a failure of its row.
    here = scheme(image) == "file" and not is_chained(image) and os.path.exists(absolute(image))
    return [*found, absolute(image)] if here else found
