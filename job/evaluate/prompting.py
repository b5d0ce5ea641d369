"""Baselines of a model that writes: how likely it is to go on with the name of a label.

The score of a label is the log-likelihood of its name after the text, less that of its name after no text (domain
conditional PMI, Holtzman et al. 2021): names that are likely anywhere do not win by that. Shots are shown before it
(in-context learning, Brown et al. 2020).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from job.data import TokenTable, draw_shots
from job.evaluate.inference import open_base
from job.recipe import Run

_TEXT, _LABEL, _BETWEEN = "Text: ", "\nLabel:", "\n\n"
_MAX_TOKENS = 2048
"""Of a prompt, where the model has positions for it: longer ones take too long for a baseline."""
_LEAST_TOKENS = 48
"""Of an example, its question and its label; more examples than have room so are left out."""

log = logging.getLogger("job.evaluate")


class Prompter:
    """Answers float32 [test rows, labels] of the base model, which is a causal language model."""

    def __init__(self, run: Run, train: TokenTable, test: TokenTable) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._run, self._train, self._test = run, train, test
        self._names = [str(name) for name in run.read("data.json")["labels"]]
        self._tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
        self._model = open_base(AutoModelForCausalLM, run)
        positions = getattr(self._model.config, "max_position_embeddings", None) or _MAX_TOKENS
        self._limit = min(int(positions), _MAX_TOKENS)

    def zero_shot(self) -> np.ndarray:
        """Answer without an example."""
        return self._score([])

    def few_shot(self, shots: int) -> np.ndarray:
        """Answer after `shots` train rows of every label, in an order drawn by seed."""
        seed = self._run.recipe.training.seed
        drawn = draw_shots(self._train.labels, len(self._names), shots, np.random.default_rng([seed, shots]))
        in_turn = [places[shot] for shot in range(shots) for places in drawn if shot < len(places)]
        shown = in_turn[: self._limit // _LEAST_TOKENS]
        if len(shown) < len(in_turn):
            log.warning("few-shot:%d: %d of %d examples have room in a prompt", shots, len(shown), len(in_turn))
        return self._score([int(place) for place in np.random.default_rng(seed).permutation(shown)])

    def _score(self, shown: Sequence[int]) -> np.ndarray:
        names = [self._encode(f" {name}") for name in self._names]
        # every text has the same share of the room, so that the last example is as whole as the first
        share = (self._limit - max(map(len, names))) // (len(shown) + 1) - 16
        before: list[int] = []
        for place in shown:
            before += self._ask(self._train, place, share) + names[int(self._train.labels[place])]
            before += self._encode(_BETWEEN)
        nothing = self._measure(before + self._encode(_TEXT) + self._encode(_LABEL), names)
        rows = [
            self._measure(before + self._ask(self._test, place, share), names) - nothing
            for place in range(len(self._test))
        ]
        return np.stack(rows).astype(np.float32)

    def _ask(self, table: TokenTable, place: int, room: int) -> list[int]:
        """Return the tokens of a row as a question for its label, its text cut to `room` tokens."""
        row = table.tokens[table.offsets[place] : table.offsets[place + 1]]
        text = self._tokenizer.decode(row, skip_special_tokens=True).strip()
        return self._encode(_TEXT) + self._encode(text)[: max(room, 1)] + self._encode(_LABEL)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _measure(self, prompt: list[int], names: list[list[int]]) -> np.ndarray:
        """Return the log-likelihood of each name after a prompt, float64 [labels]; the prompt is computed once."""
        import torch

        device, longest = self._model.device, max(map(len, names))
        ids = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            seen = self._model(input_ids=ids, use_cache=True)
            first = seen.logits[0, -1].float().log_softmax(-1)
            scores = np.array([float(first[name[0]]) for name in names])
            if longest > 1:
                cache = seen.past_key_values
                cache.batch_repeat_interleave(len(names))
                padded = torch.tensor([name + [0] * (longest - len(name)) for name in names], device=device)
                logs = self._model(input_ids=padded, past_key_values=cache).logits.float().log_softmax(-1)
                for row, name in enumerate(names):
                    scores[row] += sum(float(logs[row, at, token]) for at, token in enumerate(name[1:]))
        return scores
