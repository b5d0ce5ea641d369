"""Models that foretell tokens: loss, what is kept of 49,152 logits, and the likelihood by which they are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from job.tasks.intervals import count_rows, normal_interval, spread_ratio
from job.tasks.protocol import IGNORED_LABEL, Task, Truth

if TYPE_CHECKING:
    import torch

_TARGET, _TOTAL, _BEST, _SECOND, _SAID = range(5)
_LOGITS = slice(_TARGET, _SAID)


class TokenLikelihood(Task):
    """Cross-entropy of tokens, judged by the mean log-likelihood of one: −ln(perplexity).

    An answer has five columns: the label's logit, the logarithm of the sum of all exponentials, the largest and the
    second largest logit, and the id of the largest. That is all that anybody asks for.
    """

    metric: ClassVar[str] = "log_likelihood"
    limits: ClassVar[
        str
    ] = """It was trained and measured on rows of at most {max_length} tokens. It writes what is likely,
  not what is true. log_likelihood is the mean of all tokens, in nats; a drop of 0.01 is 1 % of perplexity, agreement
  the share of tokens that both files would write next."""
    per_token: ClassVar[bool] = True
    max_abs_diff: ClassVar[float] = 1e-2
    """Logits of language models are an order of magnitude larger than a classifier's, and pass more layers."""
    max_batch_tokens: ClassVar[int] = 2048

    def sum_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the cross-entropy summed over labelled tokens; logits float [rows, tokens, vocabulary]."""
        from torch.nn.functional import cross_entropy

        asked = labels != IGNORED_LABEL
        return cross_entropy(logits[asked].float(), labels[asked], reduction="sum", label_smoothing=smoothing)

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return answers float32 [rows, tokens, 5] of logits float [rows, tokens, vocabulary], which it overwrites."""
        if isinstance(logits, np.ndarray):
            xp, flat = np, logits.reshape(-1, logits.shape[-1]).astype(np.float32, copy=False)
        else:
            import torch

            xp, flat = torch, logits.reshape(-1, logits.shape[-1]).float()
        token, target = xp.arange(len(flat)), xp.where(labels == IGNORED_LABEL, 0, labels).reshape(-1)
        best, said = xp.amax(flat, -1), xp.argmax(flat, -1)
        columns = [flat[token, target], best + xp.log(xp.exp(flat - best[:, None]).sum(-1)), best]
        flat[token, said] = -math.inf
        columns += [xp.amax(flat, -1), xp.asarray(said, dtype=flat.dtype)]  # an id below 2²⁴ is exact in fp32
        return xp.stack(columns, -1).reshape(*labels.shape, len(columns))

    def logits_of(self, answers: np.ndarray) -> np.ndarray:
        """Return the four columns that are logits, the sum of all among them."""
        return answers[:, _LOGITS]

    def decide(self, answers: np.ndarray) -> np.ndarray:
        """Return the likeliest token, int64 [units]."""
        return answers[:, _SAID].astype(np.int64)

    def lead(self, answers: np.ndarray) -> np.ndarray:
        """Return how far the likeliest token is ahead of the second."""
        return np.asarray(answers[:, _BEST] - answers[:, _SECOND])

    def per_row_score(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return for each text how likely its tokens are, in nats, so that their mean is that of a token.

        0.01 is 1 % of perplexity.
        """
        logs = (answers[:, _TARGET] - answers[:, _TOTAL]).astype(np.float64)
        counts = np.bincount(truth.rows)
        return spread_ratio(np.bincount(truth.rows, weights=logs)[counts > 0], counts[counts > 0])

    def score(self, answers: np.ndarray, truth: Truth) -> dict[str, Any]:
        """Return the mean log-likelihood of a token, perplexity, and the share of tokens that are foretold."""
        texts = self.per_row_score(answers, truth)
        mean = float(texts.mean())
        return {
            "log_likelihood": round(mean, 6),
            "log_likelihood_interval": normal_interval(texts),
            "perplexity": round(math.exp(min(-mean, 700.0)), 4),
            "token_accuracy": round(float((self.decide(answers) == truth.labels).mean()), 6),
            "tokens": len(answers),
            "n": len(texts),
        }

    def confirms(self, told: Sequence[dict[str, Any]], answers: np.ndarray, truth: Truth, tolerance: float) -> bool:
        """Not to be asked of a model that writes: `job/export/rehearse_writing.py` compares token by token."""
        raise NotImplementedError

    def min_rows(self, max_drop: float) -> int:
        """Return what the rule of three wants, 30 at least: a loss that few texts show must not stay unseen."""
        return max(count_rows(max_drop), 30)
