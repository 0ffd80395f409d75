"""What a cell's model can be, by model.body: the Transformer, whose variants are the zoo, or what it replaced: a recurrent model, whose variants are
alignments, or a stack of convolutions; or a reader, which answers by pointing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from attn_zoo import config
from attn_zoo.attention import VARIANTS
from attn_zoo.models.convolutional_stack import CONVOLUTIONS, ConvolutionStack
from attn_zoo.models.reader import READERS, Reader
from attn_zoo.models.recurrent import ALIGNMENTS, Recurrent
from attn_zoo.models.transformer import Transformer
from attn_zoo.spec import Spec, UserError


@dataclasses.dataclass(frozen=True)
class Body:
    """`registry` holds what a variant of this body may be, `kind` is what they are called, `build` makes the model."""

    registry: Mapping[str, Any]
    kind: str
    build: Callable[..., nnx.Module]  # (config.Model, *, variant, attention, rngs, and the sizes of a task) -> model


def _recurrent(
    model: config.Model, *, variant: list[Spec], attention: config.Attention, inputs_vocab: int, num_outputs: int, max_len: int, causal: bool, per_token: bool, rngs: nnx.Rngs, **source: Any
) -> Recurrent:
    if len(variant) > 1:
        raise UserError(f"[{', '.join(map(str, variant))}]: a recurrent model has one alignment, not one a layer")
    return Recurrent(model, alignment=variant[0], inputs_vocab=inputs_vocab, num_outputs=num_outputs, max_len=max_len, rngs=rngs, **source)


def _convolutional(
    model: config.Model, *, variant: list[Spec], attention: config.Attention, source_vocab: int, source_len: int, image_shape: tuple | None, **sizes: Any
) -> ConvolutionStack:
    if len(variant) > 1:
        raise UserError(f"[{', '.join(map(str, variant))}]: a convolutional model has one kind of convolution, not one a layer")
    if source_len or image_shape is not None:
        raise UserError("a convolutional model reads no source; use joined=True of a task of pairs, or another task")
    return ConvolutionStack(model, convolutions=variant[0], **sizes)


def _reader(
    model: config.Model,
    *,
    variant: list[Spec],
    attention: config.Attention,
    inputs_vocab: int,
    num_outputs: int,
    max_len: int,
    causal: bool,
    per_token: bool,
    source_vocab: int,
    source_len: int,
    image_shape: tuple | None,
    rngs: nnx.Rngs,
) -> Reader:
    if len(variant) > 1:
        raise UserError(f"[{', '.join(map(str, variant))}]: a reader has one attention, not one a layer")
    if causal or per_token or not source_len or not inputs_vocab == source_vocab == num_outputs:
        raise UserError("a reader answers a query with a word of a document: use the task cloze, or another model.body")
    return Reader(model, variant=variant[0], vocab=num_outputs, max_len=max_len, document_len=source_len, rngs=rngs)


BODIES = {
    "transformer": Body(VARIANTS, "attention variant", Transformer),
    "recurrent": Body(ALIGNMENTS, "alignment", _recurrent),
    "convolutional": Body(CONVOLUTIONS, "convolution", _convolutional),
    "reader": Body(READERS, "reader", _reader),
}
