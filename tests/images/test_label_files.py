"""Files with the labels of images: CSV, JSON and COCO annotations."""

import json

import pytest

from app.errors import InvalidFieldError
from app.images.label_files import read_label_file

BOTH = {"a.jpg": ("cat", "sofa"), "sub/b.jpg": ("sofa",), "c.jpg": ()}
COCO = {
    "images": [
        {"id": 7, "file_name": "a.jpg"},
        {"id": 8, "file_name": "sub/b.jpg"},
        {"id": 9, "file_name": "c.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1]},
        {"id": 2, "image_id": 7, "category_id": 1},
        {"id": 3, "image_id": 7, "category_id": 3},
        {"id": 4, "image_id": 8, "category_id": 1},
    ],
    "categories": [{"id": 1, "name": "sofa"}, {"id": 3, "name": "cat", "supercategory": "animal"}],
    "info": {},
}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("file,labels\na.jpg,cat|sofa\nsub/b.jpg,sofa\nc.jpg,\n", id="bars"),
        pytest.param("\ufeffFile,Labels\r\na.jpg, cat ; sofa\r\n./sub/b.jpg,sofa;\r\nc.jpg\r\n", id="semicolons"),
        pytest.param("a.jpg,cat\na.jpg,sofa\nsub/b.jpg,sofa\nc.jpg,\n", id="one row per label"),
        pytest.param('id,label,path\n1,"cat|sofa",a.jpg\n2,sofa,sub/b.jpg\n\n3,,c.jpg\n', id="columns by name"),
        pytest.param(json.dumps({"a.jpg": ["cat", "sofa", "cat"], "sub/b.jpg": "sofa", "c.jpg": []}), id="json"),
        pytest.param(json.dumps(COCO), id="coco"),
    ],
)
def test_each_form_gives_the_labels_of_each_image(tmp_path, text):
    file = tmp_path / "labels"
    file.write_text(text, "utf-8", newline="")
    assert {path: tuple(sorted(labels)) for path, labels in read_label_file(file).items()} == BOTH


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "names no image"),
        (b"file,labels\n", "has no labels of images"),
        (b"a.jpg\nb.jpg\n", "has no labels of images"),
        (b"[1, 2]", "has no labels of images"),
        (b'{"a.jpg": 3}', r"labels.csv: has 3 for 'a.jpg', which is neither"),
        (b'{"a.jpg": "cat", "b.jpg": ["cat", 3]}', r"""has \["cat", 3\] for 'b.jpg'"""),
        (b"{", "is not JSON"),
        (b'{"a":' + b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "cannot be read"),
        (json.dumps(COCO | {"images": COCO["images"][1:]}).encode(), r"labels.csv: annotations.0 has the image_id 7,"),
        (
            json.dumps(COCO | {"categories": COCO["categories"][:1]}).encode(),
            "annotations.0 has the category_id 3, which",
        ),
        (
            json.dumps(COCO | {"annotations": [{"image_id": "7", "category_id": 1}]}).encode(),
            "the image_id '7', which no",
        ),
        (json.dumps(COCO | {"annotations": [{"image_id": 7}]}).encode(), "annotations.0 has no category_id"),
        (json.dumps(COCO | {"annotations": [{"image_id": [7], "category_id": 1}]}).encode(), "has no image_id"),
        (json.dumps(COCO | {"images": [*COCO["images"], COCO["images"][0]]}).encode(), "images.3 has the id 7 of an"),
        (json.dumps(COCO | {"categories": [1]}).encode(), "categories.0 has no id"),
        (json.dumps(COCO | {"images": None}).encode(), "has null as 'images'"),
    ],
)
def test_another_file_is_refused_with_what_is_wrong_in_it(tmp_path, content, problem):
    file = tmp_path / "labels.csv"
    file.write_bytes(content)
    with pytest.raises(InvalidFieldError, match=problem):
        read_label_file(file)
    with pytest.raises(InvalidFieldError, match="cannot be read"):
        read_label_file(tmp_path / "nothing.csv")
