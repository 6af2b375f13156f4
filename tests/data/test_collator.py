"""PreferenceCollator: TRL's batch, and beside it levels, offsets and views."""

import pytest
import torch

from spo_kernels.data.collator import PreferenceCollator

PAIRS = [
    {
        "prompt_ids": [1, 2, 3],
        "chosen_ids": [4, 5, 6, 7],
        "rejected_ids": [8],
        "chosen_removal_levels": [0, 1, 2, 0],
        "rejected_removal_levels": [0],
        "chosen_view_ids": [[4, 6, 7], [4, 7]],
        "chosen_view_starts": [3, 2],
        "rejected_view_ids": [[], []],
        "rejected_view_starts": [3, 3],
    },
    {
        "prompt_ids": [11],
        "chosen_ids": [12, 13],
        "rejected_ids": [14, 15, 16],
        "chosen_removal_levels": [2, 0],
        "rejected_removal_levels": [1, 1, 0],
        "chosen_view_ids": [[], [13]],
        "chosen_view_starts": [1, 1],
        "rejected_view_ids": [[16], []],
        "rejected_view_starts": [1, 1],
    },
]
TRL_KEYS = ("input_ids", "attention_mask", "completion_mask")


@pytest.mark.parametrize("view", ["hidden", "text"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_length": 4},
        {"max_length": 3, "truncation_mode": "keep_end"},
        {"pad_to_multiple_of": 8},
    ],
    ids=str,
)
def test_agrees_with_trl(view, settings):
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    pairs = [{**pair, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5} for pair in PAIRS]
    expected = trl.DataCollatorForPreference(pad_token_id=99, **settings)(pairs)
    found = PreferenceCollator(pad_token_id=99, view=view, **settings)(pairs)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype
    assert found["scored_rows"] == int(expected["completion_mask"][:, 1:].sum())
    assert isinstance(found["scored_rows"], int)


def test_levels():
    batch = PreferenceCollator(pad_token_id=0)(PAIRS)
    assert batch["removal_levels"].tolist() == [
        [-1, -1, -1, 0, 1, 2, 0],
        [-1, 2, 0, -1, -1, -1, -1],
        [-1, -1, -1, 0, -1, -1, -1],
        [-1, 1, 1, 0, -1, -1, -1],
    ]
    assert batch["removal_levels"].dtype == torch.int8
    assert batch["segment_offsets"].tolist() == [0, 7, 14, 21, 28]
    assert batch["segment_offsets"].dtype == torch.int64
    # levels are cut with their tokens
    batch = PreferenceCollator(pad_token_id=0, max_length=5)(PAIRS)
    assert batch["removal_levels"][0].tolist() == [-1, -1, -1, 0, 1]
    # a prompt that fills the length leaves no response
    batch = PreferenceCollator(pad_token_id=0, max_length=3)(PAIRS[:1])
    assert batch["removal_levels"].tolist() == [[-1, -1, -1]] * 2
    assert batch["scored_rows"] == 0


def test_views():
    batch = PreferenceCollator(pad_token_id=0, view="text")(PAIRS)
    assert batch["view_input_ids"].tolist() == [
        [1, 2, 3, 4, 6, 7, 0],
        [1, 2, 4, 7, 0, 0, 0],
        [11, 13, 0, 0, 0, 0, 0],
        [11, 16, 0, 0, 0, 0, 0],
    ]
    assert batch["view_attention_mask"].sum(dim=1).tolist() == [6, 4, 2, 2]
    assert batch["view_completion_mask"].sum(dim=1).tolist() == [3, 2, 1, 1]
    # chosen 0 has views 0, 1, 2; chosen 1 views 0, 2; rejected 0 none; rejected 1 views 0, 1
    assert batch["view_order"].tolist() == [0, 4, 5, 1, 6, 2, 3, 7]
    assert batch["removal_levels"].tolist() == [1, 2, 0, 2, 0, 0, 1, 0]
    assert batch["segment_offsets"].tolist() == [0, 3, 5, 6, 8]


def test_views_that_equal_the_one_before():
    # after the cut view 1 is the whole response and view 2 differs from it
    pair = {
        **PAIRS[0],
        "chosen_view_ids": [[4, 5, 7], [4, 7]],
        "chosen_view_starts": [3, 3],
    }
    batch = PreferenceCollator(pad_token_id=0, view="text", max_length=5)([pair])
    assert batch["view_input_ids"].tolist() == [[1, 2, 3, 4, 7]]
    assert batch["removal_levels"].tolist() == [2, 0, 0]
    # nothing of a response is left after a cut inside the prompt
    batch = PreferenceCollator(pad_token_id=0, view="text", max_length=3)([pair])
    assert batch["view_input_ids"].shape == (0, 3)
    assert batch["view_order"].tolist() == [0, 1]
    # a longer view widens the batch
    longer = {**PAIRS[0], "chosen_view_ids": [[9] * 6, []]}
    batch = PreferenceCollator(pad_token_id=0, view="text")([longer])
    assert batch["input_ids"].shape == batch["completion_mask"].shape == (2, 9)
    assert batch["view_input_ids"].shape == (1, 9)


def test_one_response_a_row():
    rows = [
        {name.replace("chosen", "completion"): value for name, value in pair.items()}
        for pair in PAIRS
    ]
    for view in ("hidden", "text"):
        found = PreferenceCollator(pad_token_id=0, view=view, sides=("completion",))(rows)
        expected = PreferenceCollator(pad_token_id=0, view=view, sides=("chosen",))(PAIRS)
        assert found.keys() == expected.keys()
        assert len(found["input_ids"]) == 2 and found["scored_rows"] == 6
        for name in found.keys() - {"scored_rows"}:
            assert torch.equal(found[name], expected[name]), name


def test_errors():
    with pytest.raises(
        ValueError, match="PreferenceCollator: view must be one of 'hidden', 'text'"
    ):
        PreferenceCollator(pad_token_id=0, view="tokens")
    with pytest.raises(ValueError, match="truncation_mode must be one of 'keep_end', 'keep_start'"):
        PreferenceCollator(pad_token_id=0, truncation_mode="middle")
    bare = {name: PAIRS[0][name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    with pytest.raises(ValueError, match="chosen_removal_levels must be a column of the examples"):
        PreferenceCollator(pad_token_id=0)([bare])
    with pytest.raises(ValueError, match="chosen_view_ids must be a column of the examples"):
        PreferenceCollator(pad_token_id=0, view="text")([bare])
    short = {**PAIRS[0], "chosen_removal_levels": [0]}
    with pytest.raises(ValueError, match="must have 4 levels like chosen_ids, got 1"):
        PreferenceCollator(pad_token_id=0)([short])
