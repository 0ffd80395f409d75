"""Predictors made of counts, the floors that need training data but no model."""

import numpy as np


def count_model_score(counts: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """(cross-entropy in nats, accuracy) of predicting an outcome, given its context, by how often it was counted.

    counts [contexts, outcomes], all positive, make the predictor; seen, of the same shape, is how often what is scored occurred.
    """
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    hits = seen[np.arange(len(seen)), counts.argmax(axis=1)]
    return float(-(seen * log_p).sum() / seen.sum()), float(hits.sum() / seen.sum())
