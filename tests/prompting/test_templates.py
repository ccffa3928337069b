from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import ConfigurationError, InvalidFieldError, UnknownNameError
from app.prompting.templates import TemplateLibrary, fill, template_problem

SHIPPED = Path(__file__).parents[2] / "prompts" / "templates"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photo.txt").write_text("# a comment\n\n  a photo of a {}.  \n", encoding="utf-8")
    (tmp_path / "two.txt").write_text("a {}.\nthe {}, a kind of {}.\n", encoding="utf-8")
    return tmp_path


def test_a_set_is_resolved_by_its_file_name(folder):
    library = TemplateLibrary(folder, {})
    assert library.names() == ("photo", "two")
    assert library.resolve("photo") == ("a photo of a {}.",)
    assert library.resolve("two") == ("a {}.", "the {}, a kind of {}.")


def test_files_are_read_once(folder):
    library = TemplateLibrary(folder, {})
    (folder / "photo.txt").unlink()
    assert library.resolve("photo") == ("a photo of a {}.",)


def test_an_extra_set_is_created_once_on_first_use(folder):
    calls = []

    def make():
        calls.append(None)
        return ("an extra {}.",)

    library = TemplateLibrary(folder, {"imagenet": make})
    assert library.names() == ("imagenet", "photo", "two")
    assert calls == []
    assert library.resolve("imagenet") == library.resolve("imagenet") == ("an extra {}.",)
    assert len(calls) == 1


def test_a_file_cannot_have_the_name_of_an_extra_set(folder):
    with pytest.raises(ConfigurationError, match=r"photo\.txt.*rename"):
        TemplateLibrary(folder, {"photo": lambda: ("{}",)})


@pytest.mark.parametrize(
    "template", ["{}", "a photo of a {}.", "{} or {}?", "ein Foto von {}", "\u5199\u771f\uff1a{}\u3000", " {} "]
)
def test_a_reference_with_a_placeholder_is_the_template(folder, template):
    assert TemplateLibrary(folder, {}).resolve(template) == (template,)


def test_the_error_for_an_unknown_set_names_the_sets_and_the_placeholder(folder):
    with pytest.raises(UnknownNameError) as caught:
        TemplateLibrary(folder, {"imagenet": lambda: ("{}",)}).resolve("foto")
    assert caught.value.message == (
        "unknown template set 'foto'; known: imagenet, photo, two; or give one template that contains {}"
    )


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("a {name}.", "brace"),
        ("a {0}.", "brace"),
        ("a {} and {0.__class__}.", "brace"),
        ("a {{}}.", "brace"),
        ("a {!r}", "brace"),
        ("a {} }", "brace"),
        ("a {", "brace"),
        ("a\n{}", "control character"),
        ("a {}\x00", "control character"),
        ("a {}\u2028", "control character"),
        ("a {}\ud800", "control character"),
        ("{}" * 11, "11 times; at most 10"),
        ("x" * 299 + "{}", "301 characters"),
        ("x" * 301, "301 characters"),
    ],
)
def test_an_invalid_template_is_rejected_with_the_field_of_the_request(folder, template, rule):
    with pytest.raises(InvalidFieldError, match=rule) as caught:
        TemplateLibrary(folder, {}).resolve(template, field="templates")
    assert [problem.field for problem in caught.value.problems] == ["templates"]


def test_a_template_of_the_maximum_length_is_accepted(folder):
    template = "x" * 298 + "{}"
    assert TemplateLibrary(folder, {}).resolve(template) == (template,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# only a comment\n", r"broken\.txt contains no template"),
        (b"", r"broken\.txt contains no template"),
        (b"a {}.\na photo\n", r"broken\.txt, line 2: 'a photo' has no \{\}"),
        (b"a {}.\n\na {name}\n", r"broken\.txt, line 3: .*brace"),
        (b"\xff{}", r"broken\.txt is not UTF-8"),
    ],
)
def test_an_invalid_file_stops_the_start_with_its_name_and_line(tmp_path, content, message):
    (tmp_path / "broken.txt").write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        TemplateLibrary(tmp_path, {})


def test_the_error_for_a_missing_folder_names_it(tmp_path):
    with pytest.raises(ConfigurationError, match="nowhere"):
        TemplateLibrary(tmp_path / "nowhere", {})


def test_every_placeholder_is_filled():
    assert fill(("a {}.", "the {}, a kind of {}."), "lynx") == ("a lynx.", "the lynx, a kind of lynx.")


def test_a_class_name_with_braces_is_used_literally():
    assert fill(("a {}.",), "{0.__class__} {}") == ("a {0.__class__} {}.",)


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.text(max_size=20))
def test_a_valid_template_has_no_braces_after_filling(template, classname):
    if template_problem(template) is None:
        (filled,) = fill((template,), classname.translate({ord("{"): None, ord("}"): None}))
        assert "{" not in filled
        assert "}" not in filled


def test_the_shipped_sets_are_one_plain_template_and_an_ensemble_of_seven():
    library = TemplateLibrary(SHIPPED, {})
    assert library.resolve("photo") == ("a photo of a {}.",)
    assert len(set(library.resolve("ensemble"))) == 7
