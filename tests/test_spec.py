"""Specs: one text for one meaning, read and never evaluated; what cannot be read is said in one line."""

import dataclasses
import keyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_zoo.spec import Part, Spec, Unsupported, UserError, check_choice, check_int, check_number, nearest, parse, parse_one

NAMES = st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
LITERALS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
PLAIN = st.builds(lambda name, options: Spec(name, tuple(options.items())), NAMES, st.dictionaries(NAMES, LITERALS, max_size=3))
PARTS = st.lists(st.builds(Part, PLAIN, st.integers(1, 9)), min_size=1, max_size=3).map(tuple)
COMPOSED = st.builds(lambda name, parts, options: Spec(name, (("parts", parts), *options.items())), NAMES, PARTS, st.dictionaries(NAMES.filter("parts".__ne__), LITERALS, max_size=2))
SPECS = PLAIN | COMPOSED


@dataclasses.dataclass(frozen=True)
class Options:
    window: int = 256
    kind: str = "soft"
    scale: float = 1.0

    def __post_init__(self):
        check_int("window", self.window, 1)
        check_choice("kind", self.kind, ("soft", "hard"))


@given(SPECS)
def test_a_spec_is_the_text_it_prints(spec):
    assert parse_one(str(spec)) == spec


@given(st.lists(SPECS | st.lists(SPECS, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_list_of_specs_is_the_text_it_prints(entries):
    text = ", ".join(f"[{', '.join(map(str, e))}]" if isinstance(e, list) else str(e) for e in entries)
    assert parse(text) == entries
    assert parse(f" {text}  # as in a config\n") == entries


@given(st.fixed_dictionaries({}, optional={"window": st.integers(1, 300), "kind": st.sampled_from(["soft", "hard"]), "scale": st.sampled_from([1.0, 2.0])}), st.randoms())
def test_one_meaning_has_one_canonical_text(options, random):
    shuffled = list(options.items())
    random.shuffle(shuffled)
    canonical = Spec("soft", tuple(shuffled)).canonical("variant", Options)
    assert canonical == Spec("soft", tuple(options.items())).canonical("variant", Options) == canonical.canonical("variant", Options)
    assert canonical.resolve("variant", Options) == Options(**options)
    assert all(value != getattr(Options(), name) for name, value in canonical.options)


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "cannot read ''"),
        ("local(", "cannot read 'local('"),
        ("local window", "cannot read"),
        ("local(128)", "given by name, as in local(option=128)"),
        ("local(window=W)", "must be literals"),
        ("mix(full*0)", "a part is written spec*count, with a whole number of at least 1"),
        ("mix(full*n)", "a part is written spec*count"),
        ("mix(full, parts=1)", "'parts' is given twice"),
        ("mix(full + local)", "cannot read 'full + local'"),
        ("local(window=print('!'))", "must be literals"),
        ("local(**{'window': [1]})", "must be literals"),
        ("local(window=1, window=2)", "window"),
        ("full) + (local", "cannot read"),
        ("full\0", "cannot read"),
        ("zoo.local", "cannot read 'zoo.local'"),
        ("1", "cannot read '1'"),
        ("full, []", "empty list"),
        ("[full, [local]]", "cannot read '[local]'"),
        ("local(window=__import__('os').abort())", "must be literals"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line_and_not_evaluated(text, why, capsys):
    with pytest.raises(UserError) as error:
        parse(text)
    assert why in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_quoted_names_read_as_names():
    assert parse("['local(window=128)', 'full']") == parse("[local(window=128), full]")


@pytest.mark.parametrize("text", ["full, local", "[full]"])
def test_one_spec_is_one(text):
    with pytest.raises(UserError, match="expected one"):
        parse_one(text)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("local(windw=3)", "variant 'local' has no option 'windw'; did you mean 'window'?"),
        ("local(w=3)", "variant 'local' has no option 'w'; valid: window, kind, scale"),
        ("local(window=0)", "local(window=0): window=0: must be a whole number of at least 1"),
        ("local(kind='sft')", "local(kind='sft'): kind='sft': must be one of 'soft', 'hard'; did you mean 'soft'?"),
    ],
)
def test_a_bad_option_is_told_with_what_would_be_right(spec, message):
    with pytest.raises(UserError) as error:
        parse_one(spec).resolve("variant", Options)
    assert str(error.value) == message


def test_a_name_without_options_takes_none():
    with pytest.raises(UserError, match="'full' has no option 'window'; it takes none"):
        parse_one("full(window=3)").resolve("variant", dataclasses.make_dataclass("Empty", []))


@pytest.mark.parametrize("value, ok", [(2, True), (1, False), (2.0, False), (True, False), ("2", False), (None, False)])
def test_whole_numbers(value, ok):
    if ok:
        check_int("n", value, 2)
    else:
        with pytest.raises(UserError, match="n=.*: must be a whole number of at least 2"):
            check_int("n", value, 2)
    check_int("n", None, 2, optional=True)


@pytest.mark.parametrize("value, ok", [(0, True), (1.0, True), (0.5, True), (-0.1, False), (1.1, False), (float("nan"), False), (True, False), ("0", False)])
def test_numbers_in_a_range(value, ok):
    if ok:
        check_number("p", value, 0, 1)
    else:
        with pytest.raises(UserError, match="p=.*: must be a number of at least 0 and at most 1"):
            check_number("p", value, 0, 1)


def test_infinity_is_no_number():
    with pytest.raises(UserError):
        check_number("p", float("inf"), 0)


def test_the_nearest_name_or_all_of_them():
    assert nearest("locl", ["full", "local"]) == "did you mean 'local'?"
    assert nearest("xyz", ["full", "local"]) == "valid: full, local"


def test_unsupported_is_a_user_error_and_that_a_value_error():
    assert issubclass(Unsupported, UserError) and issubclass(UserError, ValueError)
