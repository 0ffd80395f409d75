"""What a cell's model can be, by model.body: the Transformer, whose variants are the zoo, or what it replaced: a recurrent model, whose variants are
alignments, or a stack of convolutions. Readers answer by pointing; pictures alone are read by a convolutional network with a variant of the zoo in it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from attn_zoo import config
from attn_zoo.attention import VARIANTS
from attn_zoo.models.convolutional_stack import CONVOLUTIONS, ConvolutionStack
from attn_zoo.models.picture_classifier import LAYERS, PictureClassifier
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


def _transformer(model: config.Model, *, inputs_vocab: int, **sizes: Any) -> Transformer:
    _needs_tokens("a Transformer", inputs_vocab)
    return Transformer(model, inputs_vocab=inputs_vocab, **sizes)


def _recurrent(
    model: config.Model, *, variant: list[Spec], attention: config.Attention, inputs_vocab: int, causal: bool, per_token: bool, **sizes: Any
) -> Recurrent:
    _needs_tokens("a recurrent model", inputs_vocab)
    _one(variant, "a recurrent model has one alignment, not one a layer")
    return Recurrent(model, alignment=variant[0], inputs_vocab=inputs_vocab, **sizes)


def _convolutional(
    model: config.Model,
    *,
    variant: list[Spec],
    attention: config.Attention,
    inputs_vocab: int,
    source_vocab: int,
    source_len: int,
    image_shape: tuple | None,
    **sizes: Any,
) -> ConvolutionStack:
    _needs_tokens("a convolutional model", inputs_vocab)
    _one(variant, "a convolutional model has one kind of convolution, not one a layer")
    if source_len or image_shape is not None:
        raise UserError("a convolutional model reads no source; use joined=True of a task of pairs, or another task")
    return ConvolutionStack(model, convolutions=variant[0], inputs_vocab=inputs_vocab, **sizes)


def _pictures(
    model: config.Model,
    *,
    variant: list[Spec],
    inputs_vocab: int,
    image_shape: tuple | None,
    causal: bool,
    per_token: bool,
    source_vocab: int,
    source_len: int,
    **sizes: Any,
) -> PictureClassifier:
    _one(variant, "a convolutional network has one layer of attention, not one a stage")
    if image_shape is None or inputs_vocab:
        raise UserError("model.body='convnet' reads a picture and no tokens; use a task such as shapes(objective='same'), or another body")
    return PictureClassifier(model, variant=variant[0], image_shape=image_shape, **sizes)


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
    _one(variant, "a reader has one attention, not one a layer")
    if causal or per_token or not source_len or not inputs_vocab == source_vocab == num_outputs:
        raise UserError("a reader answers a query with a word of a document: use the task cloze, or another model.body")
    return Reader(model, variant=variant[0], vocab=num_outputs, max_len=max_len, document_len=source_len, rngs=rngs)


def _one(variant: list[Spec], rule: str) -> None:
    if len(variant) > 1:
        raise UserError(f"[{', '.join(map(str, variant))}]: {rule}")


def _needs_tokens(what: str, inputs_vocab: int) -> None:
    if not inputs_vocab:
        raise UserError(f"{what} reads tokens, of which this task, of pictures alone, has none; use model.body='convnet'")


BODIES = {
    "transformer": Body(VARIANTS, "attention variant", _transformer),
    "recurrent": Body(ALIGNMENTS, "alignment", _recurrent),
    "convolutional": Body(CONVOLUTIONS, "convolution", _convolutional),
    "reader": Body(READERS, "reader", _reader),
    "convnet": Body(LAYERS, "attention variant", _pictures),
}
