"""`genai_config.json` at a bundle's top: onnxruntime-genai opens the folder, where the extra `genai` is installed.

Its own builder writes the config; no other graph is made: it names a file that has passed its gate. It stays only
that runtime, in a process of its own, cuts prompts as the tokenizer does and writes what `job predict` writes.
`python -m job.export.genai BUNDLE FILE PROMPTS TOKENS OUTPUT` makes the config and answers the prompts.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from job.errors import GateFailed, JobError
from job.export.measure import call_process
from job.liveness import die_with_parent
from job.recipe import Run
from job.tasks import encode_prompt

log = logging.getLogger("job.export")

CONFIG = "genai_config.json"
_BUILDER = "onnxruntime_genai.models.builder"


def offer_genai(run: Run, prompts: list[str], file: str, expected: list[list[int]]) -> dict[str, Any] | None:
    """Add genai_config.json for `onnx/<file>` to the bundle; return {file, same} or {left_out: why}.

    `expected` are the ids that `job predict` writes on from each prompt with that file, `same` on how many of them
    onnxruntime-genai writes the same. None where the extra is not installed. Nothing else hangs on this config, so what
    fails here leaves it out, and the release goes on.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return None
    try:
        found, ends = _ask(run, file, prompts, max(map(len, expected))), _list_ends(run.bundle)
        # this runtime keeps the end to itself
        same = sum(
            ids in (told, told[:-1] if told[-1] in ends else told) for ids, told in zip(found, expected, strict=True)
        )
        if same < len(prompts):
            raise GateFailed(f"it writes something else than `job predict` after {len(prompts) - same} prompts")
    except JobError as error:
        (run.bundle / CONFIG).unlink(missing_ok=True)
        log.warning("no %s: %s", CONFIG, error)
        return {"left_out": str(error)}
    log.info("onnxruntime-genai writes what `job predict` writes with onnx/%s after %d prompts", file, same)
    return {"file": file, "same": same}


def _ask(run: Run, file: str, prompts: list[str], tokens: int) -> list[list[int]]:
    scratch = run.folder / "measured"
    asked, output = scratch / "genai-prompts.json", scratch / "genai.json"
    asked.write_text(json.dumps(prompts))
    call_process("job.export.genai", [str(run.bundle), file, str(asked), str(tokens), str(output)])
    return list(json.loads(output.read_text()))


def write_config(bundle: Path, file: str) -> None:
    """Let the builder write the config of a bundle's model, and name in it `onnx/<file>` and what that takes."""
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        options = ["-m", bundle.name, "-i", str(bundle), "-o", scratch, "-c", scratch, "-p", "int4", "-e", "cpu"]
        command = [sys.executable, "-m", _BUILDER, *options, "--extra_options", "config_only=true"]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        built = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=offline)
        if built.returncode:
            raise ValueError(f"its builder: {(built.stderr.strip().splitlines() or ['killed'])[-1]}")
        about = json.loads((Path(scratch) / CONFIG).read_text())
    graph = onnx.load(str(bundle / "onnx" / file), load_external_data=False).graph
    names = {entry.name for entry in graph.input}
    decoder = about["model"]["decoder"]
    decoder["filename"] = f"onnx/{file}"
    # the builder's own graph makes positions inside
    decoder["inputs"] |= {name: name for name in ("position_ids",) if name in names}
    (bundle / CONFIG).write_text(json.dumps(about, indent=2) + "\n")


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
    ends = json.loads((bundle / "generation_config.json").read_text()).get("eos_token_id")
    return ends if isinstance(ends, list) else [ends]


def main(bundle: str, file: str, prompts: str, tokens: str, output: str) -> None:
    """Make the config and answer the prompts in this process; the arguments are those of the command line."""
    die_with_parent()
    write_config(Path(bundle), file)
    asked = json.loads(Path(prompts).read_text())
    Path(output).write_text(json.dumps(write_on(Path(bundle), asked, int(tokens))))


if __name__ == "__main__":
    main(*sys.argv[1:])
