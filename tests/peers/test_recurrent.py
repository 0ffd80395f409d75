"""Our recurrent cells against torch.nn.LSTM and torch.nn.GRU, in both directions, weights copied.

torch's GRU is not that of Cho et al. 2014, which ours is: it lets the reset gate act on the product, r * (U h), where the paper multiplies what was reset,
U (r * h). Where U of the candidate is diagonal the two are one, and gates, candidate and their mixture are compared there.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from peers import peer

torch = peer("torch")

from flax import nnx

from attn_zoo.models.recurrent import Cell
from peers.agreement import agree, normal

B, S, I, D = 2, 9, 5, 6
ORDER = {"lstm": (0, 1, 2, 3), "gru": (1, 0, 2)}  # of torch's gates among ours: theirs are r, z, candidate


def both(kind, diagonal):
    """(theirs, in both directions; our cells forwards and backwards)."""
    theirs = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](I, D, batch_first=True, bidirectional=True)
    cells = []
    for suffix in ("l0", "l0_reverse"):
        weights = {name: getattr(theirs, f"{name}_{suffix}").data for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        if kind == "gru":
            weights["bias_hh"][2 * D :] = 0  # a bias inside of what r multiplies, which the paper has not
            if diagonal:
                weights["weight_hh"][2 * D :] *= torch.eye(D)
        ours = lambda x: np.concatenate([np.split(np.asarray(x), len(ORDER[kind]))[n] for n in ORDER[kind]]).T
        cell = Cell(kind, I, D, jnp.float32, nnx.Rngs(0))
        cell.input_kernel[...], cell.state_kernel[...] = (jnp.asarray(ours(weights[name])) for name in ("weight_ih", "weight_hh"))
        cell.bias[...] = jnp.asarray(ours(weights["bias_ih"] + weights["bias_hh"]))
        cells.append(cell)
    return theirs, cells


def read(cells, x):
    """Forwards and backwards, side by side."""
    return jnp.concatenate([cell.read(x, None, reverse)[0] for cell, reverse in zip(cells, (False, True))], axis=-1)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_states_and_gradients(kind):
    theirs, cells = both(kind, diagonal=True)
    x = normal(B, S, I)
    np.testing.assert_allclose(read(cells, jnp.asarray(x)), theirs(torch.tensor(x))[0].detach(), rtol=0, atol=1e-5)
    agree(lambda x: read(cells, x), lambda x: theirs(x)[0], x)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_padding_is_that_of_packed_sequences(kind):
    """States, and the last one of each direction, of sequences of unequal lengths."""
    theirs, cells = both(kind, diagonal=True)
    x, lengths = normal(B, S, I), np.array([S, 4])
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.tensor(x), torch.tensor(lengths), batch_first=True)
    outputs, last = theirs(packed)
    outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
    last = last[0] if kind == "lstm" else last
    valid = jnp.arange(S) < jnp.asarray(lengths)[:, None]
    for n, (cell, reverse) in enumerate(zip(cells, (False, True))):
        ours, ours_last = cell.read(jnp.asarray(x), valid, reverse)
        np.testing.assert_allclose(ours, outputs[:, :, n * D : (n + 1) * D].detach(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours_last, last[n].detach(), rtol=0, atol=1e-5)


def test_the_gru_of_torch_is_another_where_the_reset_matters():
    theirs, cells = both("gru", diagonal=False)
    x = normal(B, S, I)
    difference = np.abs(np.asarray(read(cells, jnp.asarray(x))) - theirs(torch.tensor(x))[0].detach().numpy())
    assert (difference[:, 0, :D] < 1e-6).all() and difference.max() > 1e-2  # from the same first state
