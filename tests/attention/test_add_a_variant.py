"""The example of docs/add_a_variant.md: taken from the page, registered, and put through every gate."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import test_decoding
import test_gates

from attn_zoo import VARIANTS, make_attention

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
    assert len(example.read_text().splitlines()) <= 60


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_it_runs_on_the_engine_of_full(example, causal):
    """So that a benchmark compares variants."""
    plan, full = (make_attention(name, num_heads=4, head_dim=16, max_len=512, causal=causal).plan(512, 512) for name in (NAME, "full"))
    assert plan.items() <= full.items() and {"backend", "density", "q_block", "k_block", "computed_density"} <= plan.keys()


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


GATE_7 = {  # with the arguments of each
    test_decoding.test_steps_equal_the_parallel_form: (NAME,),
    test_decoding.test_steps_in_half_precision_equal_the_parallel_form: (NAME,),
    test_decoding.test_a_step_keeps_the_dtypes_of_its_query_and_of_the_state: (),
    test_decoding.test_the_state_grows_as_claimed: (NAME,),
    test_decoding.test_what_feeds_the_sequence_again_says_why: (NAME, None),
    test_decoding.test_rows_of_a_state_are_rows_of_the_batch: (),
    test_decoding.test_cross_attention_step_by_step_equals_the_parallel_form: (NAME, 13),
    test_decoding.test_a_decoder_asks_one_query_at_a_time_wherever_its_position_means_nothing: (NAME,),
}


@pytest.mark.parametrize("gate", GATE_7, ids=lambda gate: gate.__name__)
def test_gate_7(example, gate, monkeypatch):
    monkeypatch.setattr(test_decoding, "DECODERS", [NAME])  # for those that go over all of them
    gate(*GATE_7[gate])


def test_no_gate_is_left_out():
    """A gate that is added to the registry's tests is added here."""
    gates = lambda module: {name for name in vars(module) if name.startswith("test_")}
    here = {gate.__name__ for gate in (*GATES, *GATE_7)} | {"test_equals_reference", "test_causal_gradients_are_exactly_zero", "test_every_entry_is_complete"}
    assert gates(test_gates) - here == {"test_causal_is_refused_with_the_reason"}  # the example can be causal
    assert gates(test_decoding) - here == {
        "test_what_cannot_cross_is_refused_at_equal_lengths_too",  # the example can
        "test_keys_that_are_the_queries_are_kept_once_unless_heads_share_them",  # those of lsh
        "test_cross_attention_is_not_causal_and_no_longer_than_built",
        "test_a_decoder_is_causal_and_no_longer_than_built",
    }
