import csv

import pytest

from app.cli.label_set_files import classes_of_csv, classes_of_text, csv_of, indented_text_of
from app.errors import InvalidFieldError
from app.names.hierarchy import forest_of
from app.types import ClassEntry

TEXT = "animal\n  dog\n    poodle\n    beagle\n  cat\ncoffee, black\n"


def paths_of(classes):
    forest = forest_of(classes)

    def path_of(index):
        return [] if index < 0 else [*path_of(forest.parents[index]), forest.names[index]]

    return ["|".join(path_of(index)) for index in range(len(classes))]


def test_indented_lines_are_below_the_line_above():
    classes = classes_of_text(TEXT, "x.txt")
    assert paths_of(classes) == ["animal|dog|poodle", "animal|dog|beagle", "animal|cat", "coffee, black"]
    assert classes_of_text("\ta\n\n\tb\n", "x.txt") == [ClassEntry("a"), ClassEntry("b")]


def test_text_and_csv_are_read_as_they_were_written():
    classes = classes_of_text(TEXT, "x.txt")
    assert indented_text_of(classes) == TEXT
    again = classes_of_csv(csv_of(classes), "x.csv")
    assert paths_of(again) == paths_of(classes)
    assert list(csv.reader(csv_of(classes).splitlines()))[1] == ["poodle", "animal|dog"]
    flat = [ClassEntry("cat"), ClassEntry("=1+1")]
    assert classes_of_text(indented_text_of(flat), "x.txt") == flat
    assert classes_of_csv(csv_of(flat), "x.csv") == flat


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (classes_of_text, "a\n    b\n  c\n", "line 3 is indented by 2 characters"),
        (classes_of_csv, "label,parent\na,b\n", "first line must be name,parent"),
        (classes_of_csv, "name\na,b\n", "row 2 has 2 cells"),
    ],
)
def test_files_that_break_a_rule_are_refused(read, text, words):
    with pytest.raises(InvalidFieldError, match=words):
        read(text, "x")


def test_a_class_above_others_cannot_be_written_as_text():
    classes = [ClassEntry("dog"), ClassEntry("poodle", parent="dog")]
    with pytest.raises(InvalidFieldError, match=r"suffix \.csv or \.json"):
        indented_text_of(classes)
    assert paths_of(classes_of_csv(csv_of(classes), "x.csv")) == ["dog", "dog|poodle"]


def test_csv_keeps_a_class_below_one_whose_name_has_the_separator():
    classes = [ClassEntry("a|b", parent="letters"), ClassEntry("c", parent="a|b"), ClassEntry("d", parent="c|small")]
    again = classes_of_csv(csv_of(classes), "x.csv")
    assert [entry.parent for entry in again] == ["letters", "a|b", "c|small"]
