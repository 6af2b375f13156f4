"""Data recipes: reward goals in both orders, the margin filter, the on-policy mix."""

import json
import math
import pickle
import subprocess
import sys

import pytest

pytest.importorskip("datasets")
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher

from spo_kernels.integrations import RewardAugmentation, ScoreMarginFilter, mix_on_policy
from spo_kernels.integrations.data.preference_data import check_pairs

SHORT = RewardAugmentation(template="Goal {reward:g}.")
NO_SYSTEM = RewardAugmentation(template="Goal {reward:g}.", system_role=False)
SIDES = ("chosen", "rejected")


def message(role, content):
    return {"role": role, "content": content}


def talk(prompt="Why?", system=None, *, chosen="Good.", rejected="Bad."):
    """A conversational row with scores 8 and 3.5 and a column of each kind beside it."""
    start = [] if system is None else [message("system", system)]
    return {
        "prompt": [*start, message("user", prompt)],
        "chosen": [message("assistant", chosen)],
        "rejected": [message("assistant", rejected)],
        "score_chosen": 8.0,
        "score_rejected": 3.5,
        "chosen_model": "large",
        "rejected_model": "small",
        "source": "made",
    }


def whole(row):
    """The row with its prompt at the start of both responses."""
    prompt = row["prompt"]
    rest = {name: value for name, value in row.items() if name != "prompt"}
    return {**rest, **{side: prompt + row[side] for side in SIDES}}


def text_of(row):
    return {
        name: value if isinstance(value, str | float) else value[-1]["content"]
        for name, value in row.items()
    }


def augment(rows, recipe=SHORT):
    return Dataset.from_list(rows).map(recipe, batched=True, batch_size=2).to_list()


def test_relabels_both_ways():
    """Row 2i is the pair as it is, row 2i + 1 the whole pair swapped; other columns follow."""
    rows = [talk(f"Why {i}?", chosen=f"Good {i}.", rejected=f"Bad {i}.") for i in range(5)]
    out = augment(rows)
    assert len(out) == 10
    for i, row in enumerate(rows):
        kept, swapped = out[2 * i : 2 * i + 2]
        assert kept["prompt"] == [message("system", "Goal 8."), *row["prompt"]]
        assert swapped["prompt"] == [message("system", "Goal 3.5."), *row["prompt"]]
        unchanged = {name: value for name, value in row.items() if name != "prompt"}
        assert {**kept, "prompt": None} == {**unchanged, "prompt": None}
        for name in ("{}", "score_{}", "{}_model"):
            chosen, rejected = name.format("chosen"), name.format("rejected")
            assert swapped[chosen] == row[rejected] and swapped[rejected] == row[chosen]
        assert swapped["source"] == "made"


def test_no_system_role_swaps_the_whole_response():
    """The authors' code swaps message 0 alone, the user's, so these rows keep their order there."""
    row = talk(system="Be kind.")
    answer = [message("user", "And then?"), message("assistant", "Worse.")]
    row["rejected"] = row["rejected"] + answer
    start, (user,) = row["prompt"][:1], row["prompt"][1:]
    kept, swapped = augment([row], NO_SYSTEM)
    assert kept["prompt"] == [*start, message("user", "Goal 8.\n\nWhy?")]
    assert swapped["prompt"] == [*start, message("user", "Goal 3.5.\n\nWhy?")]
    assert swapped["chosen"] == row["rejected"] and swapped["rejected"] == row["chosen"]

    kept, swapped = augment([whole(row)], NO_SYSTEM)
    for version, goal, sides in ((kept, "8", SIDES), (swapped, "3.5", SIDES[::-1])):
        prompt = [*start, message("user", f"Goal {goal}.\n\n{user['content']}")]
        assert version["chosen"] == prompt + row[sides[0]]
        assert version["rejected"] == prompt + row[sides[1]]


def test_system_message_and_implicit_prompt():
    """The goal joins a system message that is there, on both sides where they hold the prompt."""
    row = talk(system="Be kind.")
    kept, swapped = augment([row])
    assert kept["prompt"] == [message("system", "Be kind.\n\nGoal 8."), row["prompt"][1]]
    assert swapped["prompt"][0] == message("system", "Be kind.\n\nGoal 3.5.")
    for row in (talk(), talk(system="Be kind.")):
        explicit, implicit = augment([row]), augment([whole(row)])
        assert implicit == [whole(version) for version in explicit]
    # an empty system message is no paragraph, and further keys of messages survive
    row = talk()
    row["prompt"] = [{**message("system", None), "name": None}, {**row["prompt"][0], "name": "Jo"}]
    row["chosen"], row["rejected"] = (
        [{**row[side][0], "name": None}] for side in ("chosen", "rejected")
    )
    kept = augment([row])[0]
    assert kept["prompt"][0]["content"] == "Goal 8." and kept["prompt"][1]["name"] == "Jo"
    row["prompt"] = row["prompt"][1:]
    kept = augment([row])[0]
    assert kept["prompt"][0] == {**message("system", "Goal 8."), "name": None}


def test_trl_finds_the_goal_in_an_implicit_prompt():
    data_utils = pytest.importorskip("trl.data_utils")
    for recipe in (SHORT, NO_SYSTEM):
        for version in augment([whole(talk())], recipe):
            split = data_utils.extract_prompt(version)
            assert "Goal" in split["prompt"][0]["content"]
            assert [len(split[side]) for side in SIDES] == [1, 1]


def test_plain_text():
    row = text_of(talk())
    for recipe in (SHORT, NO_SYSTEM):
        kept, swapped = augment([row], recipe)
        assert [kept[name] for name in ("prompt", *SIDES)] == ["Goal 8.\n\nWhy?", "Good.", "Bad."]
        assert swapped["prompt"] == "Goal 3.5.\n\nWhy?"
        assert (swapped["chosen"], swapped["rejected"]) == ("Bad.", "Good.")
        kept, swapped = augment([whole(row)], recipe)
        assert (kept["chosen"], kept["rejected"]) == ("Goal 8.\n\nWhy?Good.", "Goal 8.\n\nWhy?Bad.")
        assert swapped["chosen"] == "Goal 3.5.\n\nWhy?Bad."


def test_templates_and_columns():
    row = {name: value for name, value in talk().items() if not name.startswith("score")}
    row |= {"best": 7, "worst": 2}
    recipe = RewardAugmentation("{{x}} {reward:.2f}", chosen_score="best", rejected_score="worst")
    kept, swapped = augment([row], recipe)
    assert kept["prompt"][0]["content"] == "{x} 7.00"
    assert swapped["prompt"][0]["content"] == "{x} 2.00"
    assert (swapped["best"], swapped["worst"]) == (2, 7)
    default = RewardAugmentation(chosen_score="best", rejected_score="worst")
    assert "score is 7." in augment([row], default)[0]["prompt"][0]["content"]


def scored(path):
    """Real pairs; the scores are made up from the lengths of the responses."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        lengths = [len(row[side][-1]["content"]) for side in SIDES]
        row["score_chosen"], row["score_rejected"] = (round(n**0.5 / 10, 1) for n in lengths)
    return rows


def test_real_pairs(real_pairs):
    rows = scored(real_pairs)
    pairs = Dataset.from_list(rows)
    for recipe in (RewardAugmentation(), NO_SYSTEM):
        out = pairs.map(recipe, batched=True)
        assert len(out) == 2 * len(rows) and set(out.column_names) == set(pairs.column_names)
        # what `spo-kernels train` asks of its rows
        check_pairs(out)
        for i, row in enumerate(rows):
            kept, swapped = out[2 * i], out[2 * i + 1]
            assert kept["chosen"] == swapped["rejected"] == row["chosen"]
            assert kept["rejected"] == swapped["chosen"] == row["rejected"]
            assert len(kept["prompt"]) - len(row["prompt"]) == (
                recipe.system_role and row["prompt"][0]["role"] != "system"
            )
    margins = [row["score_chosen"] - row["score_rejected"] for row in rows]
    for threshold in (0, 0.1, 0.5, 1):
        kept = pairs.filter(ScoreMarginFilter(threshold))
        assert len(kept) == sum(margin > threshold - 1e-9 for margin in margins)
    mixed = mix_on_policy(pairs, out.select(range(300)), on_policy_ratio=0.7, seed=3)
    check_pairs(mixed)


def test_streams():
    rows = [talk(f"Why {i}?") | {"score_rejected": float(i)} for i in range(12)]
    pairs = Dataset.from_list(rows)
    stream = pairs.to_iterable_dataset(num_shards=3)
    assert list(stream.map(SHORT, batched=True, batch_size=5)) == augment(rows)
    kept = [row["score_rejected"] for row in stream.filter(ScoreMarginFilter(2.5))]
    assert kept == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_settings_are_the_fingerprint(tmp_path):
    """Equal settings hash and pickle alike, in another process too; other settings do not."""
    code = """
from datasets.fingerprint import Hasher
from spo_kernels.integrations import RewardAugmentation, ScoreMarginFilter
print(Hasher.hash(RewardAugmentation(template="Goal {reward:g}.")))
print(Hasher.hash(ScoreMarginFilter(0.5)))
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert printed == [Hasher.hash(SHORT), Hasher.hash(ScoreMarginFilter(0.5))]
    assert len({Hasher.hash(recipe) for recipe in (SHORT, NO_SYSTEM, RewardAugmentation())}) == 3
    assert Hasher.hash(ScoreMarginFilter(0.5)) != Hasher.hash(ScoreMarginFilter(1.0))
    for recipe in (SHORT, ScoreMarginFilter(0.5)):
        assert pickle.loads(pickle.dumps(recipe)) == recipe

    Dataset.from_list([talk(), talk()]).save_to_disk(tmp_path)
    pairs = Dataset.load_from_disk(tmp_path)
    first, again = (
        pairs.map(RewardAugmentation(template="Goal {reward:g}."), batched=True) for _ in range(2)
    )
    assert first._fingerprint == again._fingerprint
    assert first.cache_files and first.cache_files == again.cache_files


def test_margin_filter():
    def kept(threshold, chosen, rejected):
        return ScoreMarginFilter(threshold)({"score_chosen": chosen, "score_rejected": rejected})

    assert kept(0, 2, 2) and kept(1, 3, 2) and not kept(1, 2.9, 2)
    # signed: scores that contradict the labels are no reason to keep a pair
    assert not kept(0, 2, 3) and not kept(0.5, 2, 3) and kept(-1, 2, 3)
    # a difference that should be the threshold
    assert 7.6 - 7.5 < 0.1 and kept(0.1, 7.6, 7.5) and not kept(0.1, 7.59, 7.5)
    rows = [talk() | {"margin": chosen, "other": 0.0} for chosen in (0.0, 0.5, 1.0)]
    recipe = ScoreMarginFilter(0.5, chosen_score="margin", rejected_score="other")
    assert len(Dataset.from_list(rows).filter(recipe)) == 2


def pool(start, count):
    return Dataset.from_list([{"id": start + i, "prompt": "p"} for i in range(count)])


@pytest.mark.parametrize("ratio", [0, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(("on_rows", "off_rows"), [(50, 50), (1, 30), (30, 1), (7, 100)])
def test_mix_counts(ratio, on_rows, off_rows):
    """Exact shares, as many rows as fit, none of them twice."""
    sources = pool(0, on_rows), pool(1000, off_rows)
    most = max(
        n
        for n in range(on_rows + off_rows + 1)
        if round(ratio * n) <= on_rows and n - round(ratio * n) <= off_rows
    )
    for num_rows in (None, 1, most):
        ids = mix_on_policy(*sources, on_policy_ratio=ratio, num_rows=num_rows)["id"]
        want = num_rows or most
        assert len(ids) == len(set(ids)) == want
        assert sum(i < 1000 for i in ids) == round(ratio * want)
    with pytest.raises(ValueError, match=f"num_rows must be at most {most} with on_policy_ratio="):
        mix_on_policy(*sources, on_policy_ratio=ratio, num_rows=most + 1)


def test_mix_is_seeded():
    sources = pool(0, 60), pool(1000, 60)

    def ids(seed):
        mixed = mix_on_policy(*sources, on_policy_ratio=0.5, num_rows=40, seed=seed)
        return mixed["id"][:], mixed._fingerprint

    assert ids(4) == ids(4) and ids(4) != ids(5)
    drawn, _ = ids(4)
    is_on_policy = [i < 1000 for i in drawn]
    assert is_on_policy != sorted(is_on_policy) and is_on_policy != sorted(is_on_policy)[::-1]
    # rows of one place in both datasets, one prompt perhaps, are drawn independently
    assert {i for i in drawn if i < 1000} != {i - 1000 for i in drawn if i >= 1000}


def test_mix_streams():
    streams = [pool(start, 3000).to_iterable_dataset() for start in (0, 10_000)]

    def ids(**settings):
        return [row["id"] for row in mix_on_policy(*streams, **settings)]

    first = ids(on_policy_ratio=0.7, num_rows=2000)
    assert first == ids(on_policy_ratio=0.7, num_rows=2000) and len(set(first)) == 2000
    assert first != ids(on_policy_ratio=0.7, num_rows=2000, seed=1)
    # four standard deviations
    assert abs(sum(i < 10_000 for i in first) - 1400) < 4 * math.sqrt(2000 * 0.7 * 0.3)
    assert ids(on_policy_ratio=0.0) == list(range(10_000, 13_000))
    assert ids(on_policy_ratio=1, num_rows=5) == list(range(5))
    longest = ids(on_policy_ratio=0.9)
    assert sum(i < 10_000 for i in longest) == 3000


def test_errors_of_rows():
    """One sentence for each mistake, without a word of the data."""

    def refuse(text, row, recipe=SHORT, **settings):
        settings = settings or {"batched": True}
        with pytest.raises(ValueError) as raised:
            Dataset.from_list([row]).map(recipe, **settings)
        assert str(raised.value) == f"RewardAugmentation: {text}"

    row = talk()
    names = sorted(name for name in row if name != "score_rejected")
    refuse(
        f"the dataset must have a column 'score_rejected', got {names}. chosen_score and "
        "rejected_score name the score columns.",
        {name: row[name] for name in names},
    )
    names = sorted(name for name in row if name != "chosen")
    refuse(
        f"the dataset must have a column 'chosen', got {names}",
        {name: row[name] for name in names},
    )
    for name in ("ref_chosen_logps", "ref_rejected_logps", "prompt_ids", "chosen_ids"):
        refuse(
            f"the dataset must have no column {name!r}, got one. A goal changes the prompt: remove "
            "the column and compute it again afterwards.",
            row | {name: [1.0]},
        )
    for batched_row in (row, row | {"score_chosen": None}, row | {"score_chosen": "8"}):
        refuse(
            "dataset.map must be called with batched=True, got a single row",
            batched_row,
            batched=False,
        )
    for value, got in (
        (math.nan, "NaN or infinity"),
        (-math.inf, "NaN or infinity"),
        ("secret", "str"),
        (None, "NoneType"),
        (True, "bool"),
    ):
        refuse(
            f"'score_rejected' must be a finite number in row 0 of a batch, got {got}",
            row | {"score_rejected": value},
        )
    way_out = "Remove the column 'prompt' if chosen and rejected repeat it."
    refuse(
        "row 0 of a batch must be all text or all lists of messages, got prompt: text, "
        f"chosen: messages, rejected: messages. {way_out}",
        row | {"prompt": "Why?"},
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "secret"}]}]
    refuse(
        "row 0 of a batch must be all text or all lists of messages, got prompt: neither, "
        f"chosen: messages, rejected: messages. {way_out}",
        row | {"prompt": parts},
    )
    refuse("row 0 of a batch must have at least one message in 'prompt'", row | {"prompt": []})
    refuse(
        "row 0 of a batch must have at least one user message in 'prompt'",
        row | {"prompt": [message("system", "secret")]},
        NO_SYSTEM,
    )

    with pytest.raises(ValueError) as raised:
        Dataset.from_list([row | {"score_chosen": "secret"}]).filter(ScoreMarginFilter(1))
    text = "ScoreMarginFilter: 'score_chosen' must be a finite number in every row, got str"
    assert str(raised.value) == text
    with pytest.raises(ValueError) as raised:
        Dataset.from_list([{"score_chosen": 1.0}]).filter(ScoreMarginFilter(1))
    assert str(raised.value) == (
        "ScoreMarginFilter: the dataset must have a column 'score_rejected', got ['score_chosen']. "
        "chosen_score and rejected_score name the score columns."
    )


@pytest.mark.parametrize(
    "template",
    ["no field", "{reward", "{reward} {other}", "{}", "{0}", "{reward.real}", "{reward:d}", 5],
)
def test_errors_of_templates(template):
    with pytest.raises(ValueError) as raised:
        RewardAugmentation(template=template)
    assert str(raised.value) == (
        "RewardAugmentation: template must be text with {reward} and no other field, got "
        f"{template!r}. Write a brace that is meant literally twice."
    )


def test_errors_of_numbers_and_sources():
    def refuse(text, *sources, error=ValueError, **settings):
        with pytest.raises(error) as raised:
            mix_on_policy(*sources, **{"on_policy_ratio": 0.5, **settings})
        assert str(raised.value) == f"mix_on_policy: {text}"

    for value in (math.nan, math.inf, "1", None, True):
        with pytest.raises(ValueError) as raised:
            ScoreMarginFilter(value)
        text = f"ScoreMarginFilter: threshold must be a finite number, got {value!r}"
        assert str(raised.value) == text
    pairs = pool(0, 4)
    for ratio in (-0.1, 1.1, math.nan, "0.5", True):
        text = f"on_policy_ratio must be a number from 0 to 1, got {ratio!r}"
        refuse(text, pairs, pairs, on_policy_ratio=ratio)
    for name, low in (("num_rows", 1), ("seed", 0)):
        for value in (low - 1, 1.5, True):
            text = f"{name} must be an integer >= {low}, got {value!r}"
            refuse(text, pairs, pairs, **{name: value})
    refuse("seed must be an integer >= 0, got None", pairs, pairs, seed=None)
    refuse(
        "num_rows must be at most 8 with on_policy_ratio=0.5, 4 rows on-policy and 4 off-policy, "
        "got 9",
        pairs,
        pairs,
        num_rows=9,
    )
    stream = pairs.to_iterable_dataset()
    for empty in (pairs.select([]), stream.take(0)):
        refuse("off_policy must have at least one row, got none", pairs, empty)
    refuse(
        "off_policy must have the columns ['id', 'prompt'] of on_policy, got ['id']",
        pairs,
        pairs.remove_columns("prompt"),
    )
    refuse(
        "off_policy must be a Dataset like on_policy, got IterableDataset. "
        "dataset.to_iterable_dataset() makes a stream.",
        pairs,
        stream,
        error=TypeError,
    )
    for other in (DatasetDict(train=pairs), [1]):
        text = f"on_policy must be one split of a dataset, got {type(other).__name__}"
        refuse(text, other, pairs, error=TypeError)


def test_needs_no_trl():
    code = """
import sys
sys.modules["trl"] = sys.modules["transformers"] = None
from spo_kernels.integrations import RewardAugmentation, ScoreMarginFilter, mix_on_policy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
