"""From a source to its target: an encoder reads the one, a decoder writes the other, greedily, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from job.errors import DataError, NoValidCheckpoint
from job.predict.runtime import open_session
from job.predict.tokens import Input, check_text, read_json
from job.predict.writing import Writer, run_session
from job.tasks import list_parts


class Rewriter(Writer):
    """An encoder and a decoder that writes a target for each source; see `Writer`."""

    def __init__(self, folder: Path, precision: str, threads: int, max_new_tokens: int) -> None:
        super().__init__(folder, precision, threads, max_new_tokens)
        self._encoder_path, _ = list_parts(self.model_path)
        self._encoder = open_session(self._encoder_path, self.threads)
        wishes = self.config | read_json(folder / "generation_config.json", {})
        start, self._forced = wishes.get("decoder_start_token_id"), wishes.get("forced_bos_token_id")
        if not isinstance(start, int):
            raise NoValidCheckpoint(
                f"{folder / 'generation_config.json'}: has no decoder_start_token_id; export the model again"
            )
        self._start = start

    def count_positions(self) -> int:
        """Return how many tokens the decoder can tell apart by place; what T5 calls n_positions limits nothing."""
        return int(self.config.get("max_position_embeddings") or 1 << 20)

    def encode(self, text: Input, row: int) -> list[int]:
        """Return the ids of a source; too long, it keeps its beginning."""
        source = check_text(text, row)
        if not isinstance(source, str):
            raise DataError(f"text {row}: is a pair; this model takes one source text")
        (encoding,) = self.tokenizer.encode([source])
        if not encoding.ids:
            raise DataError(f"text {row}: is empty; give a source text")
        return list(encoding.ids)

    def answer(self, text: Input, source: list[int]) -> dict[str, Any]:
        """Return what is written of a source with these ids."""
        read = {"input_ids": np.array([source], dtype=np.int64)}
        read["attention_mask"] = np.ones_like(read["input_ids"])
        hidden, *_ = run_session(self._encoder, read, self._encoder_path)
        context = {"encoder_hidden_states": hidden, "encoder_attention_mask": read["attention_mask"]}
        ids, said, ended = self.write([self._start], context)
        return {"text": text, "written": self.tokenizer.decode(said), "ids": ids, "ended": ended}

    def choose(self, logits: np.ndarray, place: int) -> int:
        """Return the likeliest token, or that which every target of this model must begin with."""
        return self._forced if place == 0 and isinstance(self._forced, int) else super().choose(logits, place)
