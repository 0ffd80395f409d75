"""Specs: `local(window=256)` as text, shared by flags, configs, table rows and the API.

A spec is a name and literal keyword options, read with `ast` and never evaluated. The options are fields of a frozen
dataclass; anything it does not know is an error that names the nearest field. A spec may be composed of other specs, given
first and without names, each with a count: `mix(local(window=64)*6, full*2)`; they are the option `parts`.
"""

import ast
import dataclasses
import difflib
from typing import Any


class UserError(ValueError):
    """Bad input from a person: one line that gives the value, the rule and what would be valid."""


class Unsupported(UserError):
    """A variant was asked for what it cannot do; the message is the reason, and a table prints it."""


def nearest(name: str, valid) -> str:
    """' Did you mean ...?' for a mistyped name, with all valid names when none is near."""
    valid = [str(v) for v in valid]
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"


def parse(text: str) -> list["Spec | list[Spec]"]:
    """Reads 'full, local(window=128), [full, linear]' into specs; a bracketed list is one entry, its specs cycled over layers.

    Raises UserError on anything that is not a name, a call with literal keywords, or a list of those.
    """
    try:
        tree = ast.parse(f"({text}\n,)", mode="eval").body
    except SyntaxError:
        raise UserError(f"cannot read {text!r}: write specs as name or name(option=value), separated by commas") from None
    if not isinstance(tree, ast.Tuple):  # unbalanced brackets that happen to close ours
        raise UserError(f"cannot read {text!r}: write specs as name or name(option=value), separated by commas")
    return [[_spec(e) for e in _non_empty(node)] if isinstance(node, ast.List) else _spec(node) for node in tree.elts]


def parse_one(text: str) -> "Spec":
    """Reads exactly one 'name(option=value)'."""
    specs = parse(text)
    if len(specs) != 1 or isinstance(specs[0], list):
        raise UserError(f"expected one name(option=value), got {text!r}")
    return specs[0]


@dataclasses.dataclass(frozen=True)
class Spec:
    """A name with its options as given, in the order given."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        inside = ", ".join(", ".join(map(str, v)) if are_parts(v) else f"{k}={v!r}" for k, v in self.options)
        return f"{self.name}({inside})" if inside else self.name

    def resolve(self, kind: str, cls: type) -> Any:
        """The options dataclass `cls` filled from this spec. Raises UserError for an unknown option or a bad value."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for option, value in self.options:
            if option not in fields and are_parts(value):
                raise UserError(f"{kind} {self.name!r} is not composed of others, as in {self}; its options are given by name")
            if option not in fields:
                raise UserError(f"{kind} {self.name!r} has no option {option!r}; {nearest(option, fields) if fields else 'it takes none'}")
        try:
            return cls(**dict(self.options))
        except UserError as e:
            raise UserError(f"{self}: {e}") from None

    def canonical(self, kind: str, cls: type) -> "Spec":
        """The same spec with options in the dataclass's order and defaults left out: one text for one meaning."""
        options = self.resolve(kind, cls)
        values = [(f, getattr(options, f.name)) for f in dataclasses.fields(cls)]
        plain = lambda value: int(value) if isinstance(value, float) and value.is_integer() else value  # 64.0 and 64 are one value
        return Spec(self.name, tuple((f.name, plain(value)) for f, value in values if value != f.default))


@dataclasses.dataclass(frozen=True)
class Part:
    """A spec inside a composed one, and how many shares it has."""

    spec: Spec
    count: int = 1

    def __str__(self) -> str:
        return f"{self.spec}*{self.count}" if self.count != 1 else str(self.spec)


def are_parts(value: Any) -> bool:
    """Whether an option's value is the specs that a composed one is made of."""
    return isinstance(value, tuple) and value != () and all(isinstance(v, Part) for v in value)


def check(condition: bool, option: str, value: Any, rule: str) -> None:
    """For the validation of options: raises UserError 'option=value: rule' unless the condition holds."""
    if not condition:
        raise UserError(f"{option}={value!r}: {rule}")


def check_choice(option: str, value: Any, valid) -> None:
    """An option that names one of a few choices."""
    if value not in list(valid):  # not in a dict or set, where an unhashable value would be another error
        raise UserError(f"{option}={value!r}: must be one of {', '.join(map(repr, valid))}; {nearest(str(value), valid)}")


def check_int(option: str, value: Any, minimum: int, optional: bool = False) -> None:
    """An option that is a whole number of at least `minimum` (or None where it is optional)."""
    if optional and value is None:
        return
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    check(ok, option, value, f"must be a whole number of at least {minimum}" + (", or None" if optional else ""))


def check_number(option: str, value: Any, minimum: float, maximum: float = float("inf")) -> None:
    """An option that is a finite number in [minimum, maximum]."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and minimum <= value <= maximum and abs(value) != float("inf")
    check(ok, option, value, f"must be a number of at least {minimum:g}" + (f" and at most {maximum:g}" if maximum != float("inf") else ""))


def _non_empty(node: ast.List) -> list[ast.expr]:
    if not node.elts:
        raise UserError("an empty list [] names no attention; write e.g. [local(window=128), full]")
    return node.elts


def _spec(node: ast.expr) -> Spec:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # ['full', 'local'] reads as [full, local]
        return parse_one(node.value)
    if isinstance(node, ast.Name):
        return Spec(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        for arg in node.args:
            if isinstance(arg, (ast.Constant, ast.UnaryOp, ast.Tuple, ast.List, ast.Dict, ast.Set)):
                raise UserError(f"{ast.unparse(node)!r}: options are given by name, as in {node.func.id}(option={ast.unparse(arg)})")
        parts = (("parts", tuple(map(_part, node.args))),) if node.args else ()
        names = [name for name, _ in parts] + [k.arg for k in node.keywords]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{ast.unparse(node)!r}: option {twice!r} is given twice")
        try:
            if None in names:
                raise ValueError("** holds no literal")
            return Spec(node.func.id, parts + tuple((k.arg, ast.literal_eval(k.value)) for k in node.keywords))
        except (ValueError, TypeError):
            raise UserError(f"{ast.unparse(node)!r}: option values must be literals (numbers, strings, None, True, False)") from None
    raise UserError(f"cannot read {ast.unparse(node)!r} as name(option=value)")


def _part(node: ast.expr) -> Part:
    """`local(window=64)*6`, `6*local(window=64)`, or a spec alone."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return Part(_spec(node))
    sides = (node.left, node.right) if isinstance(node.right, ast.Constant) else (node.right, node.left)
    count = sides[1].value if isinstance(sides[1], ast.Constant) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"cannot read {ast.unparse(node)!r}: a part is written spec*count, with a whole number of at least 1")
    return Part(_spec(sides[0]), count)
