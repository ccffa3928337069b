"""Question sets are validated strictly, and placeholders are replaced."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.describing.questions import fill_question, load_feature_question, load_question_sets
from app.errors import ConfigurationError
from app.runtime.data_files import resources

SHIPPED = resources("prompts") / "questions"

GOOD = 'summary = "Things."\nbase = ["Describe {a_name}."]\nfull = ["What is {name}?", "Where is {a_name}?"]\n'


def broken(folder, **changes):
    """Write a valid set with some changed keys, and return the error."""
    fields = {"summary": '"Things."', "base": '["Describe {a_name}."]', "full": '["What is {name}?"]'} | changes
    text = "\n".join(f"{name} = {value}" for name, value in fields.items() if value is not None)
    (folder / "things.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        load_question_sets(folder)
    assert str(folder / "things.toml") in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("classname", "question"),
    [
        ("lynx", "Is it a lynx or a lynx, lynx?"),
        ("owl", "Is it an owl or an owl, owl?"),
        ("Abyssinian", "Is it an Abyssinian or an Abyssinian, Abyssinian?"),
        ("747", "Is it a 747 or a 747, 747?"),
        ("élan", "Is it a élan or a élan, élan?"),
    ],
)
def test_every_placeholder_is_replaced_by_the_name_with_the_article_of_its_first_letter(classname, question):
    assert fill_question("Is it {a_name} or {a_name}, {name}?", classname) == question


@pytest.mark.parametrize("classname", ["{name}", "{a_name}", "{0.__class__}", "{}", "a{name}b", "\\1", "\\g<0>"])
def test_a_placeholder_in_a_class_name_is_not_replaced(classname):
    article = "an" if classname.startswith("a") else "a"
    assert fill_question("{name}, {a_name}", classname) == f"{classname}, {article} {classname}"


@given(st.text(max_size=30))
def test_any_text_can_be_a_class_name(classname):
    assert fill_question("<{name}>", classname) == f"<{classname}>"
    assert fill_question("<{a_name}>", classname) in {f"<a {classname}>", f"<an {classname}>"}


def test_a_question_set_has_the_name_of_its_file_and_its_questions_in_order(tmp_path):
    (tmp_path / "things.toml").write_text(GOOD, encoding="utf-8")
    sets = load_question_sets(tmp_path)
    assert list(sets) == ["things"]
    assert sets["things"].name == "things"
    assert sets["things"].summary == "Things."
    assert sets["things"].base == ("Describe {a_name}.",)
    assert sets["things"].full == ("What is {name}?", "Where is {a_name}?")


def test_question_sets_are_immutable(tmp_path):
    (tmp_path / "things.toml").write_text(GOOD, encoding="utf-8")
    sets = load_question_sets(tmp_path)
    with pytest.raises(TypeError):
        sets["others"] = sets["things"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"base": '["Describe it."]'}, r"base\.0: 'Describe it\.' has no \{name\} or \{a_name\}; write one"),
        ({"full": '["{name}?", "It?"]'}, r"full\.1: 'It\?' has no"),
        ({"full": '["What of {name} and {}?"]'}, r"full\.0: .*has a brace that is not part of"),
        ({"full": '["What of {{name}}?"]'}, r"full\.0: .*has a brace"),
        ({"full": '["What of {name.__class__}?"]'}, r"full\.0: .*has a brace"),
        ({"base": "[]"}, r"base: .*at least 1"),
        ({"base": '["{name}?", "{name}?"]'}, r"base: '\{name\}\?' is in the list twice"),
        ({"base": r'["{name}\n?"]'}, r"base\.0: .*control character"),
        ({"base": '"{name}?"'}, r"base: .*list"),
        ({"full": None}, r"full: .*required"),
        ({"summary": '" "'}, r"summary: .*empty"),
        ({"fully": '["{name}?"]'}, r"fully: .*not permitted"),
    ],
)
def test_the_error_of_an_invalid_question_set_names_the_file_and_the_fault(tmp_path, changes, fault):
    assert re.search(fault, broken(tmp_path, **changes))


def test_the_error_lists_every_fault_of_a_file(tmp_path):
    result = broken(tmp_path, base="[]", full='["It?"]', fully="1")
    assert all(f"{key}: " in result for key in ("base", "full.0", "fully"))


@pytest.mark.parametrize("content", [b"summary = ", b"\xff = 1"])
def test_the_error_of_a_file_that_is_not_toml_names_it(tmp_path, content):
    (tmp_path / "things.toml").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"things\.toml: not a TOML file"):
        load_question_sets(tmp_path)


def test_a_folder_that_is_missing_or_empty_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"there is no folder of questions at .*nowhere"):
        load_question_sets(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=f"there is no question set in '{re.escape(str(tmp_path))}'"):
        load_question_sets(tmp_path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('summary = "s"\nquestion = "Which?"', r"features\.toml: question: 'Which\?' has no \{name\}"),
        ('summary = "s"\nquestion = "{name} {"', r"features\.toml: question: .*brace"),
        ('summary = "s"', r"features\.toml: question: .*required"),
        (None, r"features\.toml: cannot be read"),
    ],
)
def test_the_error_of_an_invalid_question_for_features_names_the_fault(tmp_path, content, fault):
    if content is not None:
        (tmp_path / "features.toml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=fault):
        load_feature_question(tmp_path)


def test_nine_question_sets_are_shipped_with_three_base_and_at_least_five_full_questions():
    sets = load_question_sets(SHIPPED)
    assert sorted(sets) == sorted(
        ["general", "birds", "pets", "food", "cars", "textures", "scenes", "satellite", "actions"]
    )
    for item in sets.values():
        assert len(item.base) == 3, item.name
        assert len(item.full) >= 5, item.name
        assert not set(item.base) & set(item.full), item.name


def test_shipped_questions_contain_no_article_before_a_name():
    questions = [
        question
        for load_question_set in load_question_sets(SHIPPED).values()
        for question in (*load_question_set.base, *load_question_set.full)
    ]
    for question in [*questions, load_feature_question(SHIPPED)]:
        assert not re.search(r"\b(an?|the) \{", question), question
        assert " a owl" not in fill_question(question, "owl")


def test_the_question_for_features_has_two_worked_examples_and_ends_with_the_class():
    prompt = fill_question(load_feature_question(SHIPPED), "owl")
    assert prompt.count("\nQ: ") == prompt.count("\nA:") == 3
    first, second, last = prompt.split("\nQ: ")[1:]
    assert first.count("\n- ") >= 5
    assert second.count("\n- ") >= 5
    assert "an owl" in last
    assert last.endswith("\nA:")
    assert "\n- " not in last
