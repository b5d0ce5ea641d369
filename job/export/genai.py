"""`genai_config.json` at a bundle's top: onnxruntime-genai opens the folder, where the extra `genai` is installed.

Its own builder writes the config; no other graph is made: it names a file that has passed its gate. It stays only
where that runtime, in a process of its own, cuts prompts as the tokenizer does and writes what `job predict` writes.
`python -m job.export.genai BUNDLE FILE TOKENS` makes the config and answers the prompts, a JSON list on stdin.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import runpy
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from job.liveness import die_with_parent
from job.tasks import encode_prompt

log = logging.getLogger("job.export")

CONFIG = "genai_config.json"
_BUILDER = "onnxruntime_genai.models.builder"
_TIMEOUT_S = 900


def offer_genai(bundle: Path, prompts: list[str], file: str, expected: list[list[int]]) -> dict[str, Any] | None:
    """Add genai_config.json for `onnx/<file>` to the bundle; return {file, same} or {left_out: why}.

    `expected` are the ids that `job predict` writes on from each prompt with that file, `same` on how many of them
    onnxruntime-genai writes the same. None where the extra is not installed. Nothing else hangs on this config, so what
    fails here leaves it out, and the release goes on.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return None
    try:
        ends = _list_ends(bundle)
        # this runtime keeps the end to itself
        said = [ids[:-1] if ids and ids[-1] in ends else ids for ids in expected]
        found = _ask(bundle, prompts, file, max(map(len, expected)))
        same = sum(ids == told for ids, told in zip(found, said, strict=True))
        if same < len(prompts):
            raise ValueError(f"it writes something else than `job predict` after {len(prompts) - same} prompts")
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        (bundle / CONFIG).unlink(missing_ok=True)
        log.warning("onnxruntime-genai: no %s: %s", CONFIG, error)
        return {"left_out": str(error)}
    log.info("onnxruntime-genai writes what `job predict` writes with onnx/%s after %d prompts", file, same)
    return {"file": file, "same": same}


def _ask(bundle: Path, prompts: list[str], file: str, tokens: int) -> list[list[int]]:
    command = [sys.executable, "-m", "job.export.genai", str(bundle), file, str(tokens)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, input=json.dumps(prompts), capture_output=True, encoding="utf-8", env=offline, timeout=_TIMEOUT_S
    )
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["killed"])[-1][:300])
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def write_config(bundle: Path, file: str) -> None:
    """Let the builder write the config of a bundle's model, and name in it `onnx/<file>` and what that takes."""
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        options = ["-m", bundle.name, "-i", str(bundle), "-o", scratch, "-c", scratch, "-p", "int4", "-e", "cpu"]
        sys.argv = [_BUILDER, *options, "--extra_options", "config_only=true"]
        with redirect_stdout(sys.stderr):
            runpy.run_module(_BUILDER, run_name="__main__")
        about = json.loads((Path(scratch) / CONFIG).read_text(encoding="utf-8"))
    graph = onnx.load(str(bundle / "onnx" / file), load_external_data=False).graph
    names = {entry.name for entry in graph.input}
    decoder = about["model"]["decoder"]
    decoder["filename"] = f"onnx/{file}"
    # the builder's own graph makes positions inside
    decoder["inputs"] |= {name: name for name in ("position_ids",) if name in names}
    (bundle / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def write_on(bundle: Path, prompts: list[str], tokens: int) -> list[list[int]]:
    """Return the ids that onnxruntime-genai writes on from each prompt; ValueError where it reads one otherwise."""
    import onnxruntime_genai
    from transformers import AutoTokenizer

    ends, released = _list_ends(bundle), AutoTokenizer.from_pretrained(bundle)
    model = onnxruntime_genai.Model(str(bundle))
    tokenizer, written = onnxruntime_genai.Tokenizer(model), []
    for prompt in prompts:
        ids = [int(token) for token in tokenizer.encode(prompt)]
        if ids != encode_prompt(released, prompt, ends):
            raise ValueError(f"it cuts {prompt[:40]!r} into other tokens than the tokenizer does")
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + tokens, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        written.append([int(token) for token in generator.get_sequence(0)][len(ids) :])
    return written


def _list_ends(bundle: Path) -> list[int]:
    ends = json.loads((bundle / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    return ends if isinstance(ends, list) else [ends]


def main(bundle: str, file: str, tokens: str) -> None:
    """Make the config and answer the prompts in this process; the arguments are those of the command line."""
    die_with_parent()
    write_config(Path(bundle), file)
    print(json.dumps(write_on(Path(bundle), json.load(sys.stdin), int(tokens))))


if __name__ == "__main__":
    main(*sys.argv[1:])
