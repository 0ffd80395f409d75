"""What an experiment is: frozen dataclasses, and the strict overlay of `--set a.b=c`."""

import ast
import dataclasses
import hashlib
import json
import types
import typing
from typing import Any, Literal

from attn_zoo.spec import UserError, check, check_choice, check_int, check_number, nearest


def _check_choices(node: Any) -> None:
    for name, hint in typing.get_type_hints(type(node)).items():
        if typing.get_origin(hint) is Literal:
            check_choice(name, getattr(node, name), typing.get_args(hint))


@dataclasses.dataclass(frozen=True)
class Model:
    """The model that all variants share; fields in capitals are the letters of attention/base.py. Which of them a body reads is in `SETTINGS`.

    What a variant is depends on the body: of the Transformer it is of the zoo, as in body='convnet', a convolutional network for pictures with one layer of
    attention (attn_zoo.models.picture_classifier), where D are the channels of its stages (the first has half) and `layers` their number. With
    body='recurrent' it is an alignment (attn_zoo.models.recurrent), with body='convolutional' a kind of convolution (attn_zoo.models.convolutional_stack), with
    body='reader' how an answer is found (attn_zoo.models.reader).
    """

    D: int = 256  # model dim
    layers: int = 4
    N: int = 4  # query heads
    K: int | None = None  # key/value heads; None: N
    H: int | None = None  # head dim; None: D / N
    F: int | None = None  # feed-forward dim; None: 4 D, or 8/3 D for swiglu
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_position: Literal["pre", "post"] = "pre"
    ffn: Literal["relu", "gelu", "swiglu", "none"] = "gelu"  # none: a block is its attention alone, as with persistent memory
    positions: Literal["learned", "sinusoidal", "sinusoidal_concat", "rotary", "none"] = "learned"
    dropout: float = 0.0  # of embeddings and of both residual branches, as in Vaswani 2017
    tie_embeddings: bool = True
    share_embeddings: bool = False  # one table for source and target tokens, where an encoder reads a source
    encoder_layers: int | None = None  # of the encoder before a decoder; None: layers
    where: tuple[str, ...] = ("encoder", "decoder")  # of an encoder and decoder: where the swept variant stands; elsewhere it is full, or `cross`
    cross: str = "full"  # the variant of cross-attention, unless `where` has it
    pool: Literal["mean", "first"] = "mean"  # how an encoder's output becomes one vector to classify
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    remat: bool = False  # recompute each block in the backward pass
    body: Literal["transformer", "recurrent", "convolutional", "reader", "convnet"] = "transformer"
    cell: Literal["gru", "lstm"] = "gru"  # of a recurrent body

    def __post_init__(self):
        for name in ("D", "layers", "N"):
            check_int(name, getattr(self, name), 1)
        for name in ("K", "H", "F", "encoder_layers"):
            check_int(name, getattr(self, name), 1, optional=True)
        check_number("dropout", self.dropout, 0, 0.99)
        _check_choices(self)
        if "N" in SETTINGS[self.body]:
            check(self.H is not None or self.D % self.N == 0, "D", self.D, f"must be a multiple of N={self.N}, unless H is given")
        if self.body == "transformer":
            check(self.N % (self.K or self.N) == 0, "K", self.K, f"must divide N={self.N}")
            if self.positions == "rotary" and self.head_dim % 2:
                raise UserError(f"H={self.head_dim}: rotary positions turn channels in pairs, so the head dim must be even; nearest: {self.head_dim + 1}")
        check(bool(self.where), "where", self.where, "must name a place for the variant: encoder, decoder or cross")
        for place in self.where:
            check_choice("where", place, ("encoder", "decoder", "cross"))
        check(self.F is None or self.ffn != "none", "F", self.F, "has no meaning with ffn='none'; leave it None")

    @property
    def head_dim(self) -> int:
        return self.H or self.D // self.N

    @property
    def num_kv_heads(self) -> int:
        return self.K or self.N


_RECURRENT = ("D", "layers", "dropout", "encoder_layers", "dtype", "cell")

SETTINGS: dict[str, tuple[str, ...]] = {  # the fields that have a meaning, by body
    "transformer": tuple(field.name for field in dataclasses.fields(Model) if field.name not in ("body", "cell")),
    "recurrent": _RECURRENT,
    "convolutional": ("D", "layers", "norm", "positions", "dropout", "tie_embeddings", "encoder_layers", "pool", "dtype"),
    "reader": _RECURRENT,
    "convnet": ("D", "layers", "N", "H", "norm", "dtype"),
}


@dataclasses.dataclass(frozen=True)
class Attention:
    """How attention runs, whatever the variant."""

    backend: str = "auto"  # auto, xla, native (CPUs), cudnn, pallas (NVIDIA GPUs), mosaic (Hopper) or splash (TPUs); see attn_zoo.ops.backends


@dataclasses.dataclass(frozen=True)
class Train:
    """Optimization: AdamW, linear warm-up, cosine or inverse-square-root decay, global-norm clipping."""

    steps: int = 500
    tokens_per_step: int = 16384  # batch = tokens_per_step / seq_len, so every length sees as many tokens
    lr: float = 1e-3
    warmup: int = 50
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"  # after warm-up; inverse_sqrt: lr sqrt(warmup / step) (Vaswani et al. 2017, eq. 3)
    label_smoothing: float = 0.0  # share of the target's probability spread over all outputs, in training alone (Szegedy et al. 2016, sec. 7)
    final_lr: float = 0.1  # of lr, at the last step
    weight_decay: float = 0.1  # on matrices only
    b1: float = 0.9
    b2: float = 0.98
    clip: float = 1.0
    log_every: int = 10
    eval_every: int = 0  # steps between evaluations; 0: at the end only
    eval_tokens: int = 65536  # of held-out data, an evaluation
    checkpoint_every: int = 0  # steps; 0: never

    def __post_init__(self):
        for name in ("steps", "warmup", "eval_every", "checkpoint_every"):
            check_int(name, getattr(self, name), 0)
        for name in ("tokens_per_step", "log_every", "eval_tokens"):
            check_int(name, getattr(self, name), 1)
        for name in ("lr", "weight_decay", "clip"):
            check_number(name, getattr(self, name), 0)
        for name in ("final_lr", "b1", "b2"):
            check_number(name, getattr(self, name), 0, 1)
        check_number("label_smoothing", self.label_smoothing, 0, 0.99)
        _check_choices(self)
        check(self.schedule == "cosine" or self.warmup > 0, "warmup", self.warmup, "must be at least 1 with schedule='inverse_sqrt'")


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is timed, and how long."""

    modes: tuple[str, ...] = ("forward", "forward_backward", "train_step")  # and "decode", of a decoder
    warmup: int = 2  # calls before the clock starts
    min_steps: int = 10
    min_seconds: float = 1.0

    MODES: typing.ClassVar = ("forward", "forward_backward", "train_step", "decode")

    def __post_init__(self):
        for mode in self.modes:
            check_choice("modes", mode, self.MODES)
        check_int("warmup", self.warmup, 0)
        check_int("min_steps", self.min_steps, 1)
        check_number("min_seconds", self.min_seconds, 0)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A sweep: variants x sequence lengths x seeds of one model on one task. A file in experiments/ ends in one of these.

    A variant may bring a body or settings of its own, as `recurrent(additive, layers=1)` does (attn_zoo.models.bodies): then several models stand in one table.
    """

    name: str
    task: str  # a spec, e.g. "bytes(objective='masked')"
    variants: tuple[str, ...]
    seq_lens: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    model: Model = Model()
    attention: Attention = Attention()
    train: Train = Train()
    measure: Measure = Measure()
    timeout_s: float = 3600.0  # a cell that takes longer is stopped, and its row says so
    keep_parameters: bool = False  # of every cell, in parameters/<id>.npz, for --plot_attention; no part of a cell, since no result depends on it

    def __post_init__(self):
        for name in ("variants", "seq_lens", "seeds"):
            check(isinstance(getattr(self, name), (tuple, list)), name, getattr(self, name), "must be a tuple, with a comma even for one: (x,)")
            check(len(getattr(self, name)) > 0, name, getattr(self, name), "must not be empty")
        for T in self.seq_lens:
            check_int("seq_lens", T, 2)
        for seed in self.seeds:
            check_int("seeds", seed, 0)
        check_number("timeout_s", self.timeout_s, 1e-3)
        check_choice("keep_parameters", self.keep_parameters, (False, True))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the table: everything that determines its result, and nothing else."""

    variant: str
    seq_len: int
    seed: int
    task: str
    model: Model
    attention: Attention
    train: Train
    measure: Measure

    @property
    def id(self) -> str:
        """A hash of the content: the same cell has the same id in every process, on every machine."""
        return digest(self)

    @classmethod
    def from_json(cls, content: dict) -> "Cell":
        """The inverse of dataclasses.asdict, after a trip through JSON."""
        return _from_json(cls, content)


def digest(content: Any) -> str:
    """12 hex digits of the SHA-256 of a dataclass's canonical JSON."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(content), sort_keys=True).encode()).hexdigest()[:12]


def overlay(experiment: Experiment, settings: list[str]) -> Experiment:
    """Applies 'a.b=c' settings in order. Raises UserError for an unknown key, with the nearest one, or a value of the wrong type."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting!r}: write key=value, e.g. --set train.steps=500")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # model.norm=rmsnorm needs no quotes
        experiment = _replace(experiment, path.strip(), path.strip().split("."), value)
    return experiment


def _replace(node: Any, path: str, keys: list[str], value: Any) -> Any:
    fields = typing.get_type_hints(type(node))
    fields = {f.name: fields[f.name] for f in dataclasses.fields(node)}
    key, rest = keys[0], keys[1:]
    prefix = path[: len(path) - len(".".join(keys))]
    if key not in fields:
        raise UserError(f"--set {path}: there is no {prefix + key!r}; {nearest(prefix + key, [prefix + f for f in fields])}")
    inner = getattr(node, key)
    if rest and not dataclasses.is_dataclass(inner):
        raise UserError(f"--set {path}: {prefix + key!r} has no fields")
    if dataclasses.is_dataclass(inner) and not rest:
        inside = ", ".join(f"{prefix}{key}.{f.name}" for f in dataclasses.fields(inner))
        raise UserError(f"--set {path}: {prefix + key!r} is a group; set one of its fields: {inside}")
    try:
        new = _replace(inner, path, rest, value) if rest else coerce(fields[key], value)
        return dataclasses.replace(node, **{key: new})
    except UserError as e:
        raise e if str(e).startswith("--set") else UserError(f"--set {path}={value!r}: {e}") from None


def coerce(hint: Any, value: Any) -> Any:
    """The value as the field's type, where that loses nothing (an int for a float, a list for a tuple). Raises UserError where it is of another."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        return None if value is None else coerce(typing.get_args(hint)[0], value)
    if origin is Literal:
        return value  # the dataclass's own check names the choices
    if origin is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerce(typing.get_args(hint)[0], v) for v in values)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"must be of type {hint.__name__}")
    return value


def _from_json(cls: type, content: dict) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        value, hint = content[field.name], hints[field.name]
        values[field.name] = _from_json(hint, value) if dataclasses.is_dataclass(hint) else tuple(value) if isinstance(value, list) else value
    return cls(**values)

