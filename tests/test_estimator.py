"""The variance of the score-function estimator, against gradients drawn one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import estimator, train
from tiny import Staircase, make_cell

DRAWS = 12


@pytest.fixture(scope="module")
def trained():
    """(model, state, batch) after a few steps, so that there is a baseline."""
    cell = make_cell(variant="hard(expected=0.3)")
    task, mesh = Staircase(cell.seq_len), train.make_mesh(1)
    model = train.Model(cell, task)
    state, batches = train.fresh_state(model, cell), task.train_iterator(4, 0)
    steps = train.make_steps(model, cell.train, mesh)
    for _ in range(3):
        state, _ = steps.train(state, next(batches))
    return model, state, jax.tree.map(jnp.asarray, next(batches))


def test_variance_is_that_of_gradients_drawn_one_by_one(trained):
    model, state, batch = trained
    found = estimator.variance(model, state, batch, draws=DRAWS)
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"]), DRAWS)
    assert found["draws"] == DRAWS and found["batch"] == len(batch["inputs"])
    assert found["baseline"] == pytest.approx(float(state["baseline"]) / (1 - train.BASELINE_DECAY**3), rel=1e-6)

    def score(params, key, baseline):
        sums, _ = model.sums(params, state["rest"], batch, key, baseline)
        return sums["score"] / sums["weight"]

    for name, baseline in (("with_baseline", found["baseline"]), ("without_baseline", 0.0)):
        gradient = jax.jit(jax.grad(score))
        drawn = [gradient(state["params"], key, baseline) for key in keys]
        flat = np.stack([np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in drawn]).astype(np.float64)
        assert found[name] == pytest.approx(flat.var(axis=0, ddof=1).sum(), rel=1e-3)
        if name == "with_baseline":
            assert found["mean_norm"] == pytest.approx((flat.mean(axis=0) ** 2).sum(), rel=1e-3)
    assert 0 < found["with_baseline"] < found["without_baseline"], "losses of about log V are far from 0, and near their own mean"


def test_only_models_that_sample_have_one(trained):
    assert estimator.samples(trained[0])
    for variant in ("full", "hard(estimator='straight_through')"):
        cell = make_cell(variant=variant)
        assert not estimator.samples(train.Model(cell, Staircase(cell.seq_len)))
