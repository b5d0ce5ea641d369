"""What a process of a stage takes over of the environment of `job`: all but what speaks over the recipe.

Libraries heed variables that images, sites and other launchers leave behind, some above what they are told and without
a word. What is not passed on would make of a recipe's fp32 something with fewer bits, of one training another at its
next start, or an error of a good run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_OTHER_LAUNCHERS = (
    "ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "TORCHELASTIC_",
    "OMPI_COMM_", "PMI_", "MV2_COMM_", "MPI_LOCAL",
)  # fmt: skip
"""How the variables of `accelerate launch`, torchrun and mpirun begin: their precision, engine and ranks."""
_UNHEARD = frozenset({
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE",  # 10 bits of 23: NVIDIA's own images of PyTorch
    "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",  # 7 bits of 23: what AWS advises for Graviton
    "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_OVERRIDE_BACKENDS",
    "MKL_NUM_THREADS", "MKL_DOMAIN_NUM_THREADS", "MKL_DYNAMIC",  # above OMP_NUM_THREADS; other sums, too
    "OMP_DYNAMIC", "OMP_THREAD_LIMIT",
    "PYTHONOPTIMIZE", "PYTHONINSPECT",  # without docstrings transformers is not imported; a good process ends with 1
    "TRUST_REMOTE_CODE",  # lets a tokenizer of transformers read pickles
})  # fmt: skip
_SAID = {
    "OMP_PROC_BIND": "false",  # else the main threads of all ranks are tied to one processor, the same
    "USE_TORCH": "1",  # each to transformers
    "USE_TF": "0",
    "USE_FLAX": "0",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


def inherit(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a process that `job` starts takes over of `environment`, and what it is told in any case.

    Of PYTHONPATH its empty entries are left out: they are the folder where job is called, where a queue.py may lie.
    """
    kept = {name: value for name, value in environment.items() if _is_heard(name)} | _SAID
    folders = [folder for folder in kept.pop("PYTHONPATH", "").split(os.pathsep) if folder]
    return kept | ({"PYTHONPATH": os.pathsep.join(folders)} if folders else {})


def _is_heard(name: str) -> bool:
    return name not in _UNHEARD and not name.startswith(_OTHER_LAUNCHERS)
