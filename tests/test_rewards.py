"""Rewards that can be checked, and one's own."""

import pytest

from lora_squeeze.data import Answered
from lora_squeeze.errors import SettingsError
from lora_squeeze.training.rewards import reward_of


@pytest.mark.parametrize(
    ("kind", "pattern", "completion", "answer", "expected"),
    [
        ("exact", "", " 7\n", "7", 1),
        ("exact", "", "07", "7", 0),
        ("numeric", "", "so it is 1,234.50", "1234.5", 1),
        ("numeric", "", "3 + 4 = 7.", "work\n#### 7", 1),
        ("numeric", "", "7 or 8", "7", 0),
        ("numeric", "", "none", "7", 0),
        ("numeric", "", "7", "none", 0),
        ("numeric", "", "-2e3", "-2000", 1),
        ("regex", r"^\s*{answer}\b", " 7 apples", "7", 1),
        ("regex", r"^\s*{answer}\b", "77", "7", 0),
        ("regex", r"\({answer}\)", "(a.b)", "a.b", 1),
        ("regex", r"\({answer}\)", "(axb)", "a.b", 0),
    ],
)
def test_rewards(kind, pattern, completion, answer, expected):
    assert reward_of(kind, pattern=pattern)(completion, Answered("?", answer, {})) == expected


@pytest.mark.parametrize("path", ["my_own_reward.length", "my_own_reward:length"])
def test_one_s_own_reward_is_found_in_the_current_folder(tmp_path, monkeypatch, path):
    (tmp_path / "my_own_reward.py").write_text(
        "def length(completion, example): return len(completion) * example.fields['by']"
    )
    monkeypatch.chdir(tmp_path)
    assert reward_of(path)("abc", Answered("?", "", {"by": 2})) == 6


@pytest.mark.parametrize(
    ("kind", "pattern", "said"),
    [
        ("exakt", "", "'exakt' is unknown; known are exact, numeric, regex"),
        ("regex", "(", "not a regular expression"),
        ("no_such_module.reward", "", "cannot be imported"),
        ("lora_squeeze.nothing", "", "cannot be imported"),
        ("lora_squeeze.__all__", "", "is a list, not a function"),
    ],
)
def test_rewards_that_there_are_not(kind, pattern, said):
    with pytest.raises(SettingsError, match=r"\[reward\]") as caught:
        reward_of(kind, pattern=pattern)
    assert said in str(caught.value)
