"""What a cell's model can be, by model.body: the Transformer, whose variants are the zoo, or what it replaced: a recurrent model, whose variants are
alignments, or a stack of convolutions. Readers answer by pointing; pictures alone are read by a convolutional network with a variant of the zoo in it.

A variant of a sweep is of the body that `model.body` names, or it names its own: `recurrent(additive, layers=1)` is an alignment in a recurrent model of one layer, whatever
the model of the other rows; `transformer(local(window=8), full, D=128)` cycles two variants over the layers of a wider Transformer. All that its row
does not share with the others is in its name.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from attn_zoo import config
from attn_zoo.attention import VARIANTS, canonical, only, variant_text
from attn_zoo.models.convolutional_stack import CONVOLUTIONS, ConvolutionStack
from attn_zoo.models.picture_classifier import LAYERS, PictureClassifier
from attn_zoo.models.reader import READERS, Reader
from attn_zoo.models.recurrent import ALIGNMENTS, Recurrent
from attn_zoo.models.transformer import Transformer
from attn_zoo.spec import Part, Spec, UserError, are_parts, nearest, parse


@dataclasses.dataclass(frozen=True)
class Body:
    """`registry` holds what a variant of this body may be, `kind` is what they are called, `build` makes the model."""

    registry: Mapping[str, Any]
    kind: str
    plainest: str  # serves whatever the body serves
    build: Callable[..., nnx.Module]  # (config.Model, *, variant, attention, rngs, and the sizes of a task) -> model
    has_backends: bool = False  # whether its variants are the zoo's, with the backends of attention.backend


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a sweep: its specs, which the layers cycle through, and the model that they stand in."""

    specs: tuple[Spec, ...]
    model: config.Model
    text: str  # canonical: one for one meaning, beside one model that is shared

    @property
    def body(self) -> Body:
        return BODIES[self.model.body]


OF_THE_SWEEP = ("dtype", "remat")  # how a model computes, which is never a row's own


def read_variants(text: str, shared: config.Model) -> list[Entry]:
    """'full, [local(window=128), full], recurrent(additive, layers=1)' as rows, of the body and the settings in `shared` where they name no others.

    Raises UserError for a name, an option or a setting that there is not, or a bad value of it.
    """
    return [_entry(found if isinstance(found, list) else [found], shared) for found in parse(text)]


def read_variant(text: str, shared: config.Model) -> Entry:
    """One row."""
    return only(read_variants(text, shared), text)


def _entry(specs: list[Spec], shared: config.Model) -> Entry:
    named = [spec.name for spec in specs if spec.name in BODIES]
    if named and len(specs) > 1:
        raise UserError(f"[{', '.join(map(str, specs))}]: {named[0]} is a whole model, and no layer of one; write {named[0]}({BODIES[named[0]].plainest}) by itself")
    model = shared
    if named:
        specs, model = _own_model(specs[0], shared)
    body = BODIES[model.body]
    specs = [canonical(spec, body.registry, body.kind) for spec in specs]
    own = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name != "body" and getattr(model, f.name) != getattr(shared, f.name)}
    text = str(Spec(model.body, (("parts", tuple(map(Part, specs))), *own.items()))) if own or model.body != shared.body else variant_text(specs)
    return Entry(tuple(specs), model, text)


def _own_model(spec: Spec, shared: config.Model) -> tuple[list[Spec], config.Model]:
    """The variants inside `body(variant, ..., setting=value)`, and its model."""
    settings = dict(spec.options)
    parts = settings.pop("parts", ())
    example = f"{spec.name}({BODIES[spec.name].plainest})"
    if not are_parts(parts) or any(part.count != 1 for part in parts):
        raise UserError(f"{spec}: a model is given with its variant, or with those that its layers cycle through, as in {example}")
    hints, known = typing.get_type_hints(config.Model), [name for name in config.SETTINGS[spec.name] if name not in OF_THE_SWEEP]
    for name, value in settings.items():
        if name in OF_THE_SWEEP:
            raise UserError(f"{spec}: {name} is of the whole sweep; use --set model.{name}={value}")
        if name not in known:
            raise UserError(f"{spec}: a {spec.name} model has no setting {name!r}; {nearest(name, known)}")
        try:
            settings[name] = config.coerce(hints[name], value)
        except UserError as e:
            raise UserError(f"{spec}: {name}={value!r}: {e}") from None
    try:
        return [part.spec for part in parts], dataclasses.replace(shared, body=spec.name, **settings)
    except UserError as e:
        raise UserError(f"{spec}: {e}") from None


def _transformer(model: config.Model, *, inputs_vocab: int, **sizes: Any) -> Transformer:
    _needs_tokens("a Transformer", inputs_vocab)
    return Transformer(model, inputs_vocab=inputs_vocab, **sizes)


def _recurrent(
    model: config.Model, *, variant: list[Spec], attention: config.Attention, inputs_vocab: int, causal: bool, per_token: bool, **sizes: Any
) -> Recurrent:
    _needs_tokens("a recurrent model", inputs_vocab)
    _one(variant, "a recurrent model has one alignment, not one a layer")
    _decodes("a recurrent model", causal, per_token)
    return Recurrent(model, alignment=variant[0], inputs_vocab=inputs_vocab, **sizes)


def _convolutional(
    model: config.Model,
    *,
    variant: list[Spec],
    attention: config.Attention,
    inputs_vocab: int,
    causal: bool,
    per_token: bool,
    source_len: int,
    image_shape: tuple | None,
    **sizes: Any,
) -> ConvolutionStack:
    _needs_tokens("a convolutional model", inputs_vocab)
    _one(variant, "a convolutional model has one kind of convolution, not one a layer")
    if image_shape is not None:
        raise UserError("a convolutional model reads no pictures; use another task, or model.body='transformer' or 'recurrent'")
    if source_len:
        _decodes("a convolutional model with a source", causal, per_token)
    return ConvolutionStack(model, convolutions=variant[0], inputs_vocab=inputs_vocab, causal=causal, per_token=per_token, source_len=source_len, **sizes)


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
        raise UserError(f"a list of {len(variant)} variants: {rule}")


def _decodes(what: str, causal: bool, per_token: bool) -> None:
    if not (causal and per_token):
        raise UserError(f"{what} writes its target token by token, and this task asks for none; use another model.body")


def _needs_tokens(what: str, inputs_vocab: int) -> None:
    if not inputs_vocab:
        raise UserError(f"{what} reads tokens, of which this task, of pictures alone, has none; use model.body='convnet'")


BODIES = {
    "transformer": Body(VARIANTS, "attention variant", "full", _transformer, has_backends=True),
    "recurrent": Body(ALIGNMENTS, "alignment", "none", _recurrent),
    "convolutional": Body(CONVOLUTIONS, "convolution", "dilated", _convolutional),
    "reader": Body(READERS, "reader", "none", _reader),
    "convnet": Body(LAYERS, "attention variant", "none", _pictures, has_backends=True),
}
