"""Every row of the loss tables has a function of its name in both backends and in the reference.

The value computed by hand that a row needs too is held by the tests of each op.
"""

import inspect

import pytest

pytest.importorskip("triton")

from spo_kernels import linear_preference_loss, preference_loss
from spo_kernels.calls import loss_table
from spo_kernels.calls.preference_loss_checks import check_options
from spo_kernels.kernels import listwise_preference_loss as triton_listwise
from spo_kernels.kernels import preference_loss as triton_pairwise
from spo_kernels.kernels import unpaired_preference_loss as triton_unpaired
from spo_kernels.reference import listwise_preference_loss as reference_listwise
from spo_kernels.reference import preference_loss as reference_pairwise
from spo_kernels.reference import unpaired_preference_loss as reference_unpaired
from spo_kernels.torch_backend import listwise_preference_loss as torch_listwise
from spo_kernels.torch_backend import preference_loss as torch_pairwise
from spo_kernels.torch_backend import unpaired_preference_loss as torch_unpaired

FAMILIES = {
    "pairwise": (
        loss_table.LOSS_TYPES,
        {
            "triton": triton_pairwise.TERM_OF,
            "torch": torch_pairwise.TERM_OF,
            "reference": reference_pairwise.LOSS_OF,
        },
    ),
    "unpaired": (
        loss_table.UNPAIRED_LOSS_TYPES,
        {
            "triton": triton_unpaired.LOSS_OF,
            "torch": torch_unpaired.LOSS_OF,
            "reference": reference_unpaired.LOSS_OF,
        },
    ),
    "listwise": (
        loss_table.LISTWISE_LOSS_TYPES,
        {
            "triton": triton_listwise.LOSS_OF,
            "torch": torch_listwise.LOSS_OF,
            "reference": reference_listwise.LOSS_OF,
        },
    ),
}


@pytest.mark.parametrize("derivation", ["triton", "torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_has_its_function(family, derivation):
    """By name, so that no row is served by another one's function."""
    rows, functions_of = FAMILIES[family]
    functions = functions_of[derivation]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert set(functions) == set(names)
    assert {f.__name__.removeprefix("_"): name for name, f in functions.items()} == {
        name: name for name in names
    }


def test_both_ops_take_the_options_of_the_table():
    """Names and defaults, in the order of ``check_options``, which both hand them to."""
    of_pairs, of_hidden = (
        inspect.signature(op).parameters for op in (preference_loss, linear_preference_loss)
    )
    in_table = {row.name: row.default for row in loss_table.PARAMETERS}
    others = [name for name in inspect.signature(check_options).parameters if name != "parameters"]
    for name in (*others, *in_table):
        assert of_pairs[name].default == of_hidden[name].default, name
    assert {name: of_pairs[name].default for name in in_table} == in_table
    used = {name for row in loss_table.LOSS_TYPES for name in row.parameters}
    assert used <= set(in_table)
