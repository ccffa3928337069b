"""Labeling configurations of Label Studio: which choices are asked about, and what is refused."""

import pytest

from app.errors import InvalidFieldError
from app.integrations.label_studio_config import Choice, read_config

CONFIG = """
<View>
  <Header value="What is it?"/>
  <Image name="picture" value="$image" zoom="true"/>
  <View style="display: flex">
    <Choices name="animal" toName="picture" choice="single-radio">
      <Choice value="Cat" alias="felis"/>
      <Choice value="Dog"/>
      <Choice value="Wear" predicted_values="shirt,  dress"/>
    </Choices>
  </View>
  <Choices name="tags" toName="picture" choice="multiple"><Choice value="indoor"/><Choice value="outdoor"/></Choices>
  <TextArea name="note" toName="picture"/>
</View>
"""


def test_choices_about_an_image_are_read_with_the_values_of_annotations():
    animal, tags = read_config(CONFIG)
    assert (animal.name, animal.image, animal.source, animal.is_multiple) == ("animal", "picture", "$image", False)
    assert animal.choices == (Choice("felis", ("Cat",)), Choice("Dog", ("Dog",)), Choice("Wear", ("shirt", "dress")))
    assert (tags.name, tags.is_multiple) == ("tags", True)
    assert animal.source_in({"image": " /data/upload/1/a.jpg "}) == "/data/upload/1/a.jpg"


def test_choices_can_come_with_the_task():
    (control,) = read_config(
        '<View><Image name="i" value="$url"/><Choices name="c" toName="i" value="$options"/></View>'
    )
    data = {"url": "x", "options": [{"value": "Cat", "alias": "felis"}, "dog  bed"]}
    assert control.choices_in(data) == (Choice("felis", ("Cat",)), Choice("dog  bed", ("dog bed",)))
    for wrong in (
        {"url": "x"},
        {"url": "x", "options": "cat"},
        {"url": "x", "options": []},
        {"options": [{"value": 3}]},
    ):
        with pytest.raises(InvalidFieldError):
            control.choices_in(wrong)


def test_a_task_without_an_image_is_an_error_that_names_the_field():
    (control, *_) = read_config(CONFIG)
    for data in ({}, {"image": None}, {"image": ["a"]}, {"image": " "}):
        with pytest.raises(InvalidFieldError, match="no image in the field 'image'"):
            control.source_in(data)


IMAGE = '<Image name="i" value="$image"/>'
PAIR = '<Choice value="a"/><Choice value="b"/>'


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ("", "no <Choices> about a whole <Image>"),
        (f'<Text name="i" value="$text"/><Choices name="c" toName="i">{PAIR}</Choices>', "no <Choices>"),
        (f'{IMAGE}<Choices name="c" toName="other">{PAIR}</Choices>', "no <Choices>"),
        (f'{IMAGE}<Choices name="c" toName="i" perRegion="true">{PAIR}</Choices>', "does not predict regions"),
        (f'<Image name="i" valueList="$all"/><Choices name="c" toName="i">{PAIR}</Choices>', "several pages"),
        (f'{IMAGE}<Choices name="c" toName="i"><Choice value="a">{PAIR}</Choice></Choices>', "nested choices"),
        (f'{IMAGE}<Choices name="c" toName="i"><Choice value=""/></Choices>', "a choice without a value in 'c'"),
        (f'{IMAGE}<Choices name="c" toName="i"><Choice value="Cat"/><Choice value="cat"/></Choices>', "choices of 'c'"),
        ("<Choices", "is not valid XML"),
    ],
)
def test_a_configuration_that_cannot_be_predicted_is_an_error_with_the_reason(inner, message):
    with pytest.raises(InvalidFieldError, match=message):
        read_config(f"<View>{inner}</View>")


def test_entities_and_huge_configurations_are_refused():
    bomb = '<!DOCTYPE v [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><View><Header value="&b;"/></View>'
    with pytest.raises(InvalidFieldError, match="is not valid XML"):
        read_config(bomb)
    with pytest.raises(InvalidFieldError, match="at most 1,048,576 are allowed"):
        read_config("<View>" + " " * 2_000_000 + "</View>")
