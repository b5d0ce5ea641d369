"""What the rehearsals of all tasks need of a bundle's consumers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from job.errors import GateFailed, ResourceExhausted, blames_node


def ask_predict(bundle: Path, precision: str, texts: list[Any], *options: str) -> list[dict[str, Any]]:
    """Return the answers of `job predict`, a process of its own, to texts (or pairs).

    Raises GateFailed (15) where it refuses the bundle, ResourceExhausted (78) for what this node lacks.
    """
    command = [sys.executable, "-m", "job", "predict", str(bundle), "--precision", precision, "--format", "jsonl"]
    utf8, lines = os.environ | {"PYTHONUTF8": "1"}, "\n".join(json.dumps(text) for text in texts)
    done = subprocess.run([*command, *options], input=lines, capture_output=True, encoding="utf-8", env=utf8)
    lacking = done.returncode in (-signal.SIGKILL, ResourceExhausted.exit_code)
    if lacking or (done.returncode and blames_node(done.stderr)):
        reason = (done.stderr.strip().splitlines() or ["killed, as for memory"])[-1][:300]
        raise ResourceExhausted(f"release: this node lacks what `job predict` needs ({reason}); use a larger machine")
    if done.returncode:
        raise GateFailed(f"release: `job predict` does not open the bundle: {done.stderr.strip()[-300:]}")
    # not splitlines(): texts may hold what it takes for the end of a line
    return [json.loads(line) for line in done.stdout.split("\n") if line]


def refuse_to_open(error: Exception) -> Exception:
    """Return what an error of a consumer's loader means: itself for what this node lacks, else GateFailed (15)."""
    if blames_node(error) or isinstance(error, GateFailed):
        return error
    return GateFailed(f"release: the bundle does not open as consumers open it: {str(error)[:300]}")
