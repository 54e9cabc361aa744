"""Study files: every field is checked before anything trains."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from miti_detr.study.study_file import read_study

ARM = {"config": "detr.yaml"}
START = {"overrides": {"MODEL.WEIGHTS": "arm://a"}}
CHOOSE = {"key": "SOLVER.BASE_LR", "values": ["1e-3", 1e-4], "seeds": [100, 101]}


def write_study(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump({"arms": {"a": ARM}, **content}))
    return path


def error_of(path: Path) -> str:
    """Return the message, which is one line that names the file."""
    with pytest.raises(ValueError, match=r"study\.yaml") as error:
        read_study(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"arm": {}}, "unknown field 'arm'"),
        ({"arms": 5}, "arms is 5. It must be a mapping"),
        ({"arms": {}}, "arms is {}"),
        ({"arms": {"a": 5}}, "arm a: 5 is not a mapping"),
        ({"arms": {"a": {}}}, "arm a: the field 'config' is missing"),
        ({"arms": {"a": {"config": 3}}}, "arm a: config is 3"),
        ({"arms": {"a": {**ARM, "seed": 1}}}, "arm a: unknown field 'seed'"),
        ({"arms": {"a": {**ARM, "seeds": 0}}}, "arm a: seeds is 0"),
        ({"arms": {"a": {**ARM, "overrides": [1]}}}, "arm a: overrides is [1]"),
        ({"arms": {"a": {**ARM, "reference": "b"}}}, "reference is 'b'. It must be another arm: a"),
        ({"arms": {"a": {**ARM, "reference": "a"}}}, "reference is 'a'"),
        (
            {"arms": {"a": {**ARM, "metric": "mAP"}}},
            "arm a: metric is 'mAP'. It must be one of AP,",
        ),
        (
            {"arms": {"a": {**ARM, "overrides": {"W": "arm://b"}}, "b": ARM}},
            "overrides have arm://b",
        ),
        ({"arms": {"a": ARM, "b": {**ARM, "seeds": 9, **START}}}, "before it and has all of its"),
        ({"arms": {"a": ARM, "b": {**ARM, **START}}, "choose": CHOOSE}, "study without choose"),
        ({"title": 3}, "title is 3. It must be a text"),
        ({"groups": ["a"]}, "groups is ['a']. It must be a mapping"),
        ({"groups": {"All": ["c"]}}, "groups is {'All': ['c']}"),
        ({"groups": {"All": "a"}}, "groups is {'All': 'a'}"),
        ({"overrides": 5}, "overrides is 5"),
        ({"iterations": "1000"}, "iterations is '1000'"),
        ({"iterations": True}, "iterations is True"),
        ({"minutes": 0}, "minutes is 0. It must be a number above 0"),
        ({"minutes": 5, "iterations": 9}, "minutes is 5. It must be left out where there are"),
        ({"evaluations": 0}, "evaluations is 0. It must be an integer of 1 or more"),
        ({"seeds": None}, "seeds is null. It must be a number of seeds"),
        ({"seeds": []}, "seeds is []"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]"),
        ({"seeds": [-1]}, "seeds is [-1]"),
        ({"seeds": [2**32]}, "seeds is [4294967296]"),
        ({"seeds": 10**9}, "seeds is 1000000000"),
        ({"aps": ["a"]}, "aps is ['a']"),
        ({"aps": [float("nan")]}, "aps is [nan]"),
        ({"aps": 5}, "aps is 5. It must be a list"),
        ({"threshold": None}, "threshold is null"),
        ({"threshold": 1.5}, "threshold is 1.5. It must be a number from 0 to 1"),
        ({"choose": 5}, "choose: 5 is not a mapping. Write the fields key, values, seeds"),
        ({"choose": {"key": "A"}}, "choose: the field 'values' is missing"),
        ({"choose": {**CHOOSE, "key": 1}}, "choose: key is 1"),
        ({"choose": {**CHOOSE, "values": [1]}}, "choose: values is [1]. It must be a list of two"),
        ({"choose": {**CHOOSE, "values": [1, 1.0]}}, "choose: values is [1, 1.0]"),
        ({"choose": {**CHOOSE, "values": "12"}}, "choose: values is '12'"),
        ({"choose": {**CHOOSE, "values": ["a", 1]}}, "choose: values is ['a', 1]"),
        ({"choose": {**CHOOSE, "seeds": 0}}, "choose: seeds is 0"),
        ({"choose": {**CHOOSE, "seeds": [2]}}, "choose: seeds has 2, on which arm a is measured"),
        ({"title": "x" * 10_000, "seeds": "y" * 10_000}, "seeds is 'yyy"),
    ],
)
def test_a_faulty_field_is_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    text = error_of(write_study(tmp_path / "study.yaml", **content))
    assert message in text
    assert len(text) < len(str(tmp_path)) + 400


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "/tmp", "a\\b", ".hidden", "", "figures", "report.html", "a\n", 5.5]
)
def test_an_arm_is_a_folder_of_the_study(tmp_path: Path, name: Any) -> None:
    path = write_study(tmp_path / "study.yaml", arms={name: ARM})
    if name == 5.5:  # a name that YAML reads as a number is that text
        assert read_study(path).arms[0].name == "5.5"
    else:
        assert "cannot name a folder of the study" in error_of(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "null is not a mapping"),
        ("null", "null is not a mapping"),
        ("- a", "['a'] is not a mapping"),
        ("text", "'text' is not a mapping"),
        ("arms: [", "Correct the YAML"),
        ("arms: {a: {config: b}}\narms: {c: {config: d}}", "the key arms appears twice"),
        ("arms: {a: {config: b, config: c}}", "the key config appears twice"),
        ("arms: !!python/object/apply:os.getcwd []", "builds a Python object"),
        ("_BASE_: study.yaml\narms: {a: {config: b}}", "unknown field '_BASE_'"),
        ("[" * 1200, "Correct the YAML"),
        ("title: \x00", "Correct the YAML"),
    ],
)
def test_what_is_no_study(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert message in error_of(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "is not text in UTF-8" in error_of(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FIELDS = [*("title", "arms", "groups", "overrides", "iterations", "evaluations", "seeds", "aps")]
FIELDS += ["minutes", "threshold", "rank_period", "config", "reference", "choose"]


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=1),
)
def test_any_values_work_or_give_one_line(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], of_arm: dict[str, Any]
) -> None:
    content = {"arms": {"a": {**ARM, **of_arm}, "b": ARM}, **fields}
    path = tmp_path_factory.getbasetemp() / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    message = ""
    try:
        read_study(path)
    except ValueError as error:
        message = str(error)
    assert not message or (message.startswith(str(path)) and len(message.splitlines()) == 1)


def test_values_to_choose_from_are_sorted_numbers(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path / "study.yaml", choose=CHOOSE))
    assert study.choose is not None
    assert (study.choose.values, study.choose.seeds) == ((1e-4, 1e-3), (100, 101))


def test_seeds_are_a_number_or_a_list(tmp_path: Path) -> None:
    arms = {"a": ARM, "b": {**ARM, "seeds": [3, 4]}, "c": {**ARM, "seeds": 1}}
    study = read_study(write_study(tmp_path / "study.yaml", arms=arms, seeds=2))
    assert [arm.seeds for arm in study.arms] == [(0, 1), (3, 4), (0,)]


def test_overrides_of_an_arm_replace_those_of_all(tmp_path: Path) -> None:
    common = {"SOLVER.BASE_LR": 0.1, "SEED": 3}
    arms = {"a": ARM, "b": {**ARM, "overrides": {"SOLVER.BASE_LR": 0.2}}}
    study = read_study(write_study(tmp_path / "study.yaml", arms=arms, overrides=common))
    assert [arm.overrides for arm in study.arms] == [
        ("SEED", "3", "SOLVER.BASE_LR", "0.1"),
        ("SEED", "3", "SOLVER.BASE_LR", "0.2"),
    ]
