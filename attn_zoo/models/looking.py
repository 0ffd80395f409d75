"""What a model looks at: the weights of every attention in it while it reads a batch."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attn_zoo.attention.base import Attention
from attn_zoo.attention.weights import attention_weights
from attn_zoo.models.multi_head import MultiHeadAttention
from attn_zoo.models.recurrent import Recurrent


class Watched(nnx.Module):
    """Stands in the place of an attention, and leaves the weights of its call."""

    def __init__(self, attention: Attention, rows: int | None):
        self.attention = attention
        self.rows = rows

    def __call__(self, q_BTNH, k_BSKH, v_BSKH, *, valid_BS=None, valid_BT=None, key=None):
        given = {"valid_BS": valid_BS, "valid_BT": valid_BT}
        self.weights = nnx.Intermediate(attention_weights(self.attention, q_BTNH, k_BSKH, v_BSKH, rows=self.rows, **given))
        return self.attention(q_BTNH, k_BSKH, v_BSKH, key=key, **given)


def look(
    model: nnx.Module,
    inputs_BT: Int[Array, "B T"],
    *,
    source: Array | None = None,
    source_valid: Bool[Array, "B S"] | None = None,
    valid_BT: Bool[Array, "B T"] | None = None,
    rows: int | None = None,
) -> dict[str, list[Float[Array, "B N _ _"]]]:
    """The weights of each layer by place, in evaluation: 'cross' (from decoder to source), 'decoder' and 'encoder' (self-attention); {} where there is none.

    Of a recurrent model its one alignment, as the one head of one layer of 'cross'. Only for the first `rows` queries, if given. The model should not be built
    with remat, nor for a backend other than xla, whose gradients can be taken many at a time.
    """
    graph, arrays = nnx.split(model)

    @jax.jit
    def run(arrays, inputs_BT, source, source_valid, valid_BT):
        model = nnx.merge(graph, arrays)
        if isinstance(model, Recurrent):
            if model.aligner.alignment.score == "none":
                return {}
            return {"cross": [model.alignments(inputs_BT, source=source, source_valid=source_valid)[:, None, :rows]]}
        places = mixers(model)
        for mixer in (mixer for found in places.values() for mixer in found):
            mixer.attention = Watched(mixer.attention, rows)
        model(inputs_BT, valid_BT=valid_BT, **({} if source is None else {"source": source, "source_valid": source_valid}))
        return {place: [mixer.attention.weights[...] for mixer in found] for place, found in places.items()}

    return run(arrays, inputs_BT, source, source_valid, valid_BT)


def mixers(model: nnx.Module) -> dict[str, list[MultiHeadAttention]]:
    """The attention layers of a Transformer by the place where they stand, first layer first; no place without any."""
    blocks, encoder = (list(getattr(stack, "blocks", ())) for stack in (model, getattr(model, "encoder", None)))
    decodes = [block for block in blocks if block.mixer.attention.dims.causal]
    found = {
        "cross": [block.cross for block in blocks if block.has_cross],
        "decoder": [block.mixer for block in decodes],
        "encoder": [block.mixer for block in encoder or (blocks if not decodes else [])],
    }
    return {place: layers for place, layers in found.items() if layers}
