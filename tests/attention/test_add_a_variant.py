"""The example of docs/add_a_variant.md: taken from the page, registered, and put through every gate."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import test_gates

from attn_zoo import VARIANTS

PAGE = (Path(__file__).parents[2] / "docs" / "add_a_variant.md").read_text()
NAME = "linear_bias"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Registers the page's example for the tests of this file."""
    file = tmp_path_factory.mktemp("example") / f"{NAME}.py"
    file.write_text(re.search(rf"<!-- example: {NAME}.py -->\n```python\n(.*?)```", PAGE, re.DOTALL)[1])
    spec = importlib.util.spec_from_file_location(NAME, file)
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    VARIANTS[NAME] = module.LINEAR_BIAS
    yield file
    del VARIANTS[NAME], sys.modules[NAME]


def test_it_is_short(example):
    assert len(example.read_text().splitlines()) < 60


@pytest.mark.parametrize("shape", test_gates.SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_gate_1(example, causal, shape):
    test_gates.test_equals_reference((NAME, causal), shape)


GATES = [
    test_gates.test_equals_full_in_its_limit,
    test_gates.test_padding_changes_nothing,
    test_gates.test_memory_grows_as_claimed,
    test_gates.test_no_quadratic_array,
    test_gates.test_work_grows_as_claimed,
    test_gates.test_compiles_once_a_shape,
    test_gates.test_large_logits_keep_gradients_finite,
    test_gates.test_checkpoint_vmap_and_sharded_batch_change_nothing,
]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.__name__)
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_the_other_gates(example, causal, gate):
    gate((NAME, causal))


def test_gate_3_and_the_entry(example):
    test_gates.test_causal_gradients_are_exactly_zero(NAME)
    test_gates.test_every_entry_is_complete()


def test_no_gate_is_left_out():
    """A gate that is added to the registry's tests is added here."""
    gates = {name for name in vars(test_gates) if name.startswith("test_")}
    here = {gate.__name__ for gate in GATES} | {"test_equals_reference", "test_causal_gradients_are_exactly_zero", "test_every_entry_is_complete"}
    assert gates - here == {"test_causal_is_refused_with_the_reason"}  # the example can be causal
