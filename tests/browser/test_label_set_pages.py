"""Label sets in a real browser: editing, versions, conflicts, example images, evaluation, test images."""

import re

import pytest

from tests.names.test_labels import ONE_TEXT

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

CONFLICT = "Another user saved version 2 while you edited version 1: it adds fox. Your edits are kept."


@pytest.fixture
def pets(client, request):
    """A new label set for each test."""
    name = re.sub(r"\W+", "-", request.node.name)[5:60]
    classes = ["cat", {"name": "dog", "descriptions": ["A dog has a long nose."]}, "hamster"]
    client.put(f"/v1/label-sets/{name}", json={"classes": classes}).raise_for_status()
    return name


@pytest.fixture
def with_examples(client, pictures, request):
    """A label set with four example images of each of two classes, and none of a third."""
    name = re.sub(r"\W+", "-", request.node.name)[5:60]
    client.put(f"/v1/label-sets/{name}", json={"classes": ["cat", "coffee cup", "rocket"]}).raise_for_status()
    for classname, motif in (("cat", "chelsea"), ("coffee cup", "coffee")):
        files = [("image", (file.name, file.read_bytes())) for file in sorted(pictures.glob(f"{motif}-?.jpg"))]
        added = client.post(f"/v1/label-sets/{name}/images", files=files, data={"class": classname}).json()
        assert added["added"] == 4
    return name


def stored(client, name, **query) -> dict:
    return client.get(f"/v1/label-sets/{name}", params=query).raise_for_status().json()


def names(label_set) -> list[str]:
    return [each["name"] for each in label_set["classes"]]


def shown_classes(page):
    return page.locator("#editor-classes summary strong")


def open_class(page, name):
    """Open a class's row and return it."""
    row = page.locator("#editor-classes > li").filter(has=page.get_by_text(name, exact=True))
    row.locator("summary").click()
    return row


def add_class(page, text):
    page.fill("#new-classes", text)
    page.press("#new-classes", "Enter")


def save(page):
    page.click("#save-label-set")


def saved(page, version):
    expect(page.locator("#editor-status")).to_have_text(f"Saved as version {version}.")


# --- editing ---------------------------------------------------------------------------------------------------------


def test_a_label_set_is_created_and_has_an_address(open_page, client, server):
    page = open_page("#label-sets")
    page.click("text=New label set")
    expect(page.locator("#editor-title")).to_be_focused()
    expect(page.locator("#delete-label-set")).to_be_hidden()
    page.fill("#editor-name", "birds of prey")
    add_class(page, "eagle, owl\nfalcon")
    add_class(page, "OWL, ")  # a duplicate
    page.fill("#new-classes", "kite")  # typed but not added: saving includes it
    save(page)
    saved(page, 1)
    assert page.url == f"{server.url}/#label-sets/birds%20of%20prey"
    assert page.locator("#label-set-list a[aria-current]").inner_text() == "birds of prey"
    assert names(stored(client, "birds of prey")) == ["eagle", "owl", "falcon", "kite"]
    page.reload()
    expect(page.locator("#editor-title")).to_have_text("birds of prey")
    page.click("#classify-with")
    expect(page.locator("#label-set")).to_have_value("birds of prey")


def test_thresholds_are_edited_if_an_image_may_have_several_labels(open_page, client, pets):
    page = open_page(f"#label-sets/{pets}")
    cat = open_class(page, "cat")
    threshold = cat.get_by_label("Threshold")
    expect(threshold).to_be_hidden()
    page.check("#editor-multi-label")
    expect(page.locator("#unsaved")).to_be_visible()
    threshold.fill("much")
    save(page)
    expect(cat.locator(".field-problem")).to_contain_text("valid number")
    expect(threshold).to_be_focused()
    threshold.fill("0")
    open_class(page, "dog").get_by_label("Threshold").fill("0.7")
    expect(cat.locator("summary")).to_contain_text("from 0")
    save(page)
    saved(page, 2)
    found = stored(client, pets)
    assert found["multi_label"] is True
    assert [entry["threshold"] for entry in found["classes"]] == [0, 0.7, None]
    page.reload()
    expect(page.locator("#editor-multi-label")).to_be_checked()
    page.uncheck("#editor-multi-label")
    expect(page.locator("#editor-classes summary").first).not_to_contain_text("from 0")
    save(page)
    saved(page, 3)
    found = stored(client, pets)
    assert found["multi_label"] is False
    assert [entry["threshold"] for entry in found["classes"]] == [0, 0.7, None]  # kept for the next time


def test_every_field_of_a_class_can_be_edited_and_saved(open_page, client, pets):
    page = open_page(f"#label-sets/{pets}")
    cat = open_class(page, "cat")
    cat.get_by_label("Other names").fill("kitten\n\n  tabby  ")
    cat.get_by_label("Descriptions").fill("A cat has whiskers.\nA cat has slit pupils.")
    cat.get_by_label("Features").fill("whiskers")
    cat.get_by_label("Class prompt").fill("a photo of a {}, the pet.")
    assert "2 other names · 2 descriptions · 1 feature · class prompt" in cat.locator("summary").inner_text()
    dog = open_class(page, "dog")
    dog.get_by_label("Name", exact=True).fill("hound")
    page.click("[aria-label='Remove class hamster']")
    add_class(page, "parrot")
    page.click("#label-set-form > details summary")
    page.fill("#editor-templates", "a sketch of a {}.")
    page.select_option("#editor-merge", "max")
    expect(page.locator("#unsaved")).to_be_visible()
    save(page)
    saved(page, 2)
    expect(page.locator("#unsaved")).to_be_hidden()
    expect(page.locator("#editor-classes details[open]")).to_have_count(2)  # open rows stay open
    found = stored(client, pets)
    assert (found["version"], found["templates"], found["merge_synonyms"]) == (2, "a sketch of a {}.", "max")
    assert found["classes"] == [
        {
            "name": "cat",
            "descriptions": ["A cat has whiskers.", "A cat has slit pupils."],
            "synonyms": ["kitten", "tabby"],
            "features": ["whiskers"],
            "prompt": "a photo of a {}, the pet.",
            "threshold": None,
            "parent": None,
        },
        {
            "name": "hound",
            "descriptions": ["A dog has a long nose."],
            "synonyms": [],
            "features": [],
            "prompt": None,
            "threshold": None,
            "parent": None,
        },
        {
            "name": "parrot",
            "descriptions": [],
            "synonyms": [],
            "features": [],
            "prompt": None,
            "threshold": None,
            "parent": None,
        },
    ]
    save(page)
    expect(page.locator("#editor-status")).to_have_text("There are no changes to save.")
    assert stored(client, pets)["version"] == 2


def test_old_versions_can_be_viewed_and_made_the_latest(open_page, client, pets):
    client.put(f"/v1/label-sets/{pets}", json={"classes": ["lion"]}).raise_for_status()
    page = open_page(f"#label-sets/{pets}")
    assert page.locator("#editor-version option").all_inner_texts() == ["2 (latest)", "1"]
    expect(shown_classes(page)).to_have_text(["lion"])
    page.select_option("#editor-version", "1")
    expect(page.locator("#old-version")).to_have_text(
        "This is the old version 1. Saving it makes it the latest version, 3."
    )
    expect(shown_classes(page)).to_have_text(["cat", "dog", "hamster"])
    save(page)
    saved(page, 3)
    expect(page.locator("#old-version")).to_be_hidden()
    assert stored(client, pets)["classes"] == stored(client, pets, version=1)["classes"]


def test_showing_another_version_asks_before_discarding_edits(open_page, client, pets):
    client.put(f"/v1/label-sets/{pets}", json={"classes": ["lion"]}).raise_for_status()
    page = open_page(f"#label-sets/{pets}")
    add_class(page, "tiger")
    page.select_option("#editor-version", "1")
    page.click("dialog >> text=Cancel")
    expect(page.locator("#editor-version")).to_have_value("2")
    expect(shown_classes(page)).to_have_text(["lion", "tiger"])
    page.click("#undo-changes")
    page.click("dialog .danger")
    expect(page.locator("#editor-classes > li")).to_have_count(1)
    expect(page.locator("#undo-changes")).to_be_hidden()


def test_unsaved_edits_survive_leaving_the_view(open_page, pets):
    page = open_page(f"#label-sets/{pets}")
    add_class(page, "parrot")
    expect(page.locator("#label-set-list li").filter(has_text=pets)).to_contain_text("not saved")
    page.click("nav a[href='#classify']")
    page.click("nav a[href='#label-sets']")
    page.locator("#label-set-list").get_by_text(pets, exact=True).click()
    expect(page.locator("#editor-classes > li")).to_have_count(4)
    expect(page.locator("#unsaved")).to_be_visible()


def test_an_unknown_label_set_is_reported(open_page):
    page = open_page("#label-sets/nobody")
    expect(page.locator("#editor-failed")).to_contain_text("unknown label set 'nobody'")
    expect(page.locator("#label-set-form")).to_be_hidden()
    page.click("text=New label set")
    expect(page.locator("#label-set-form")).to_be_visible()
    expect(page.locator("#editor-failed")).to_be_hidden()


def test_deleting_asks_for_confirmation(open_page, client, pets):
    page = open_page(f"#label-sets/{pets}")
    page.click("#delete-label-set")
    assert page.locator("dialog :focus").inner_text() == "Cancel"
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    expect(page.locator("#delete-label-set")).to_be_focused()
    assert client.get(f"/v1/label-sets/{pets}").status_code == 200
    page.click("#delete-label-set")
    page.click("dialog >> text=Delete >> nth=-1")
    expect(page.locator("#label-sets-status")).to_have_text(f"“{pets}” is deleted.")
    assert client.get(f"/v1/label-sets/{pets}").status_code == 404
    expect(page.locator("#editor")).to_be_hidden()
    expect(page.locator("#label-set-list").get_by_text(pets, exact=True)).to_have_count(0)


def test_a_label_set_is_created_with_the_keyboard_alone(open_page, client):
    page = open_page("#new-label-set")
    page.focus("#editor-name")
    page.keyboard.type("by keyboard")
    page.keyboard.press("Tab")
    expect(page.locator("#new-classes")).to_be_focused()
    page.keyboard.type("cat, dog")
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # opens the first class
    expect(page.locator("#editor-classes .class-fields")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("tabby")
    page.focus("#editor-name")
    page.keyboard.press("Enter")
    saved(page, 1)
    expect(page.locator("#save-label-set")).to_be_focused()
    assert stored(client, "by keyboard")["classes"][0]["synonyms"] == ["tabby"]


def test_a_list_that_fails_to_load_leaves_the_focus_where_somebody_types(open_page):
    page = open_page("#label-sets")
    held = []
    page.route("**/v1/label-sets?*", lambda route: held.append(route))  # noqa: PLW0108 - playwright marks the function
    page.click("text=New label set")
    page.focus("#editor-name")
    page.wait_for_function("true")
    assert held, "the list is loaded along with the editor"
    for route in held:
        route.fulfill(status=401, content_type="application/problem+json", body='{"title": "a key", "status": 401}')
    expect(page.locator("#label-sets-error")).to_be_visible()
    expect(page.locator("#editor-name")).to_be_focused()


def test_removing_a_class_with_the_keyboard_keeps_the_focus_in_place(open_page, pets):
    page = open_page(f"#label-sets/{pets}")
    page.focus("[aria-label='Remove class dog']")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove class hamster"


def test_a_thousand_classes_can_be_edited(open_page, client):
    classes = [f"class {index}" for index in range(1000)]
    client.put("/v1/label-sets/many", json={"classes": classes}).raise_for_status()
    page = open_page("#label-sets/many")
    expect(page.locator("#class-count")).to_have_text("1,000 classes")
    page.fill("#class-filter", "999")
    expect(page.locator("#editor-classes > li:visible")).to_have_count(1)
    open_class(page, "class 999").get_by_label("Features").fill("four digits")
    save(page)
    saved(page, 2)
    assert stored(client, "many")["classes"][999]["features"] == ["four digits"]
    expect(page.locator("#test-zones li")).to_have_count(60)
    page.fill("#test-class-filter", "998")
    expect(page.locator("#test-zones li")).to_have_count(1)


# --- errors -----------------------------------------------------------------------------------------


def test_errors_of_a_class_are_shown_next_to_its_fields(open_page, client, pets):
    page = open_page(f"#label-sets/{pets}")
    cat = open_class(page, "cat")
    cat.get_by_label("Descriptions").fill("A cat has whiskers.\n\n" + "very long " * 110)
    cat.locator("summary").click()
    add_class(page, "parrot")
    open_class(page, "parrot")
    parrot = page.locator("#editor-classes > li").nth(3)
    parrot.get_by_label("Name", exact=True).fill("DOG")
    parrot.locator("summary").click()
    save(page)
    description = cat.locator(".field").filter(has=page.get_by_text("Descriptions", exact=True))
    expect(description.locator(".field-problem")).to_contain_text("'very long very long very long very long '... has")
    name = parrot.locator(".field").first
    expect(name.locator(".field-problem")).to_contain_text("letter case is ignored")
    assert page.inner_text("#editor-error") == "2 entries are invalid; see the message next to it."
    expect(description.locator("textarea")).to_be_focused()
    assert name.locator("input").get_attribute("aria-invalid") == "true"
    assert stored(client, pets)["version"] == 1
    description.locator("textarea").fill("A cat has whiskers.")
    name.locator("input").fill("parrot")
    save(page)
    saved(page, 2)
    expect(page.locator(".field-problem")).to_have_count(0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "Enter a name."),
        ("a/b", "A name must not contain /; use -."),
        ("..", "A name must not start with a dot."),
        ("a:b", "'a:b' contains : , and a name may contain none of"),
    ],
)
def test_an_invalid_name_is_reported_next_to_its_field(open_page, name, message):
    page = open_page("#new-label-set")
    page.fill("#editor-name", name)
    add_class(page, "cat")
    save(page)
    expect(page.locator("#editor-name-field .field-problem")).to_contain_text(message)
    expect(page.locator("#editor-name")).to_be_focused()


def test_invalid_templates_and_missing_classes_are_reported_next_to_their_fields(open_page, pets):
    page = open_page(f"#label-sets/{pets}")
    templates = page.locator("#label-set-form > details")
    templates.locator("summary").click()
    page.fill("#editor-templates", "sketches")
    templates.locator("summary").click()
    save(page)
    expect(templates.locator(".field-problem")).to_contain_text("unknown template set 'sketches'; known:")
    page.fill("#editor-templates", "photo")
    for name in ("cat", "dog", "hamster"):
        page.click(f"[aria-label='Remove class {name}']")
    expect(page.locator("#no-classes")).to_be_visible()
    save(page)
    expect(page.locator("#label-set-form > .field .field-problem")).to_contain_text("at least 1 item")
    expect(page.locator("#new-classes")).to_be_focused()


# --- conflicts -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_conflict(open_page, client, pets):
    """The page after saving was refused because another user has added the class fox."""
    page = open_page(f"#label-sets/{pets}")
    add_class(page, "parrot")
    open_class(page, "dog").get_by_label("Features").fill("a long nose")
    client.post(f"/v1/label-sets/{pets}/classes", json={"classes": ["fox"]}).raise_for_status()
    save(page)
    expect(page.locator("#conflict p").first).to_have_text(CONFLICT)
    expect(shown_classes(page)).to_have_text(["cat", "dog", "hamster", "parrot"])
    assert stored(client, pets)["version"] == 2
    return page


def test_the_edits_of_two_users_can_be_merged(in_conflict, client, pets):
    assert in_conflict.locator("#conflict :focus").inner_text() == "Merge both"
    in_conflict.keyboard.press("Enter")
    expect(shown_classes(in_conflict)).to_have_text(["cat", "dog", "hamster", "parrot", "fox"])
    save(in_conflict)
    saved(in_conflict, 3)
    found = stored(client, pets)
    assert names(found) == ["cat", "dog", "hamster", "parrot", "fox"]
    assert found["classes"][1]["features"] == ["a long nose"]
    expect(in_conflict.locator("#conflict")).to_be_hidden()


def test_my_edits_can_replace_theirs(in_conflict, client, pets):
    in_conflict.click("#conflict >> text=Save my edits as version 3")
    saved(in_conflict, 3)
    assert names(stored(client, pets)) == ["cat", "dog", "hamster", "parrot"]


def test_my_edits_can_be_discarded_for_theirs(in_conflict, client, pets):
    in_conflict.click("#conflict >> text=Discard my edits, use version 2")
    expect(shown_classes(in_conflict)).to_have_text(["cat", "dog", "hamster", "fox"])
    expect(in_conflict.locator("#unsaved")).to_be_hidden()
    assert stored(client, pets)["version"] == 2


def test_merging_keeps_their_changes_unless_the_same_class_was_edited_here(open_page, client, pets):
    page = open_page(f"#label-sets/{pets}")
    open_class(page, "dog").get_by_label("Features").fill("a long nose")
    theirs = [{"name": "cat", "synonyms": ["tabby"]}, {"name": "dog", "synonyms": ["hound"]}]
    client.put(f"/v1/label-sets/{pets}", json={"classes": theirs}).raise_for_status()
    save(page)
    expect(page.locator("#conflict")).to_contain_text("it removes hamster, changes cat, dog")
    page.click("#conflict >> text=Merge both")
    save(page)
    saved(page, 3)
    cat, dog = stored(client, pets)["classes"]
    assert cat["synonyms"] == ["tabby"]  # untouched here, so theirs
    assert (dog["features"], dog["synonyms"]) == (["a long nose"], [])  # changed here, so mine


def test_a_label_set_deleted_by_another_user_can_be_created_again(open_page, client, pets):
    page = open_page(f"#label-sets/{pets}")
    add_class(page, "parrot")
    client.delete(f"/v1/label-sets/{pets}").raise_for_status()
    save(page)
    expect(page.locator("#conflict")).to_contain_text(f"Another user deleted “{pets}” while you edited it.")
    page.click("#conflict >> text=Create it again")
    saved(page, 2)  # version numbers are never reused
    assert names(stored(client, pets)) == ["cat", "dog", "hamster", "parrot"]


def test_an_existing_name_is_reported_and_the_edits_are_kept(open_page, client, pets):
    page = open_page("#new-label-set")
    page.fill("#editor-name", pets)
    add_class(page, "eagle")
    save(page)
    expect(page.locator("#conflict")).to_contain_text(f"A label set “{pets}” exists already.")
    expect(page.locator("#editor-name")).to_be_focused()
    assert names(stored(client, pets)) == ["cat", "dog", "hamster"]
    page.fill("#editor-name", f"{pets}-2")
    save(page)
    saved(page, 1)
    assert names(stored(client, f"{pets}-2")) == ["eagle"]


# --- example images --------------------------------------------------------------------------------------------------


def test_example_images_are_dropped_on_a_class_and_unreadable_ones_are_named(open_page, client, pets, pictures, drop):
    page = open_page(f"#label-sets/{pets}")
    expect(page.locator("#examples-counts")).to_have_text("There are no example images yet.")
    cat = open_class(page, "cat")
    drop(
        page,
        "#editor-classes .drop-area",
        pictures / "chelsea-1.jpg",
        pictures / "broken.jpg",
        pictures / "chelsea-2.jpg",
    )
    status = cat.locator(".status")
    expect(status).to_contain_text("2 images added. Not added: broken.jpg: the JPEG image is damaged")
    expect(cat.locator(".tile img")).to_have_count(2)  # shown from this tab's memory
    expect(cat.locator("summary")).to_contain_text("2 example images")
    expect(page.locator("#examples-counts")).to_have_text("2 labelled images in 1 class, 0 unlabelled.")
    cat.locator("input[type=file]").set_input_files([pictures / "chelsea-2.jpg", pictures / "chelsea-3.jpg"])
    expect(status).to_have_text("1 image added. 1 was stored already.")
    assert client.get(f"/v1/label-sets/{pets}/images").json()["counts"]["labelled"] == {"cat": 3}
    cat.locator("input[type=file]").set_input_files([pictures / "broken.jpg"])
    expect(status).to_contain_text("0 images added. Not added: broken.jpg:")


def test_example_images_are_deleted_one_by_one_or_by_class(open_page, client, with_examples):
    page = open_page(f"#label-sets/{with_examples}")
    cat = open_class(page, "cat")
    expect(cat.locator(".tile")).to_have_count(4)
    cat.locator("[aria-label^='Delete example image']").first.click()
    page.click("dialog .danger")
    expect(cat.locator(".tile")).to_have_count(3)
    expect(cat.locator("summary")).to_contain_text("3 example images")
    cat.get_by_text("Delete all images of cat…").click()
    page.click("dialog .danger")
    expect(cat.locator(".status")).to_have_text("3 images deleted.")
    expect(cat.locator(".tile")).to_have_count(0)
    assert client.get(f"/v1/label-sets/{with_examples}/images").json()["counts"]["labelled"] == {"coffee cup": 4}


def test_unlabelled_images_and_images_of_a_removed_class_can_be_deleted(
    open_page, client, with_examples, pictures, drop
):
    client.delete(f"/v1/label-sets/{with_examples}/classes/cat").raise_for_status()
    page = open_page(f"#label-sets/{with_examples}")
    drop(page, "#unlabelled-zone .drop-area", pictures / "chelsea.jpg")
    expect(page.locator("#unlabelled-status")).to_have_text("1 image added.")
    expect(page.locator("#examples-counts")).to_contain_text("8 labelled images in 2 classes, 1 unlabelled.")
    page.click("#delete-unlabelled")
    page.click("dialog .danger")
    expect(page.locator("#delete-unlabelled")).to_be_hidden()
    expect(page.locator("#stray-examples")).to_contain_text(
        "cat, a class that the latest version does not have: 4 images"
    )
    page.click("#stray-examples button")
    page.click("dialog .danger")
    expect(page.locator("#examples-counts")).to_have_text("4 labelled images in 1 class, 0 unlabelled.")
    expect(page.locator("#stray-examples li")).to_have_count(0)


def test_an_unsaved_class_explains_when_images_can_be_added(open_page, pets):
    page = open_page(f"#label-sets/{pets}")
    add_class(page, "parrot")
    expect(open_class(page, "parrot")).to_contain_text("Save the label set before adding example images to this class.")
    save(page)
    saved(page, 2)
    expect(page.locator("#editor-classes > li").nth(3).locator(".drop-area")).to_be_visible()


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_methods_are_compared_on_the_example_images(open_page, with_examples):
    page = open_page(f"#label-sets/{with_examples}")
    page.click("#evaluate")
    expect(page.locator("#evaluate-status")).to_have_text(
        re.compile(r"Compared on 8 images by cross-validation \(\d folds\), model embedded\."), timeout=30_000
    )
    rows = page.locator("#leaderboard tbody tr")
    shown = rows.locator("th").all_inner_texts()
    assert {"zero-shot", "gda"} <= {each.split("\n")[0].strip() for each in shown}
    accuracies = [float(each.split(" %")[0]) for each in page.locator(".accuracy span").all_inner_texts()]
    assert accuracies == sorted(accuracies, reverse=True)
    assert re.fullmatch(r"[\d.]+ % \([\d.]+ to [\d.]+\)", page.locator(".accuracy span").first.inner_text())
    bar = page.locator(".interval .fill").first
    assert bar.bounding_box()["width"] == pytest.approx(
        accuracies[0] / 100 * page.locator(".interval").first.bounding_box()["width"], abs=4
    )
    assert "No class of this label set has descriptions" in page.inner_text("#verdict")
    page.click("#not-run summary")
    assert "zlap: there are no unlabelled images" in page.inner_text("#not-run-list")
    page.select_option("#confusion-of", "gda")
    expect(page.locator("#held-out-confusion caption")).to_contain_text("Predictions of gda")
    assert page.locator("#held-out-confusion tbody th").all_inner_texts() == ["cat", "coffee cup"]


def test_labels_are_measured_if_an_image_may_have_several(open_page, client, with_examples):
    classes = ["cat", {"name": "coffee cup", "threshold": 0.4}, "rocket"]
    client.put(f"/v1/label-sets/{with_examples}", json={"classes": classes, "multi_label": True}).raise_for_status()
    page = open_page(f"#label-sets/{with_examples}")
    page.click("#evaluate")
    expect(page.locator("#evaluate-status")).to_have_text("Measured on 8 images, model embedded.", timeout=30_000)
    expect(page.locator("#evaluation")).to_be_hidden()
    expect(page.locator("#label-evaluation strong")).to_have_text("1.000")
    totals, by_label = (each.locator("tbody tr").all() for each in page.locator("#label-evaluation table").all())
    assert [row.locator("th").inner_text().split(",")[0] for row in totals] == [
        "in use",
        "one for all labels",
        "one for each label",
    ]
    assert all(re.fullmatch(r"[01]\.\d{3}", text) for row in totals for text in row.locator("td").all_inner_texts())
    cells = {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in by_label}
    assert [cells[name][:2] for name in ("cat", "coffee cup")] == [["4", "1.000"]] * 2
    assert cells["coffee cup"][2] == "0.40"
    assert float(cells["cat"][4]) > 0.5


def test_without_example_images_the_reason_is_shown(open_page, pets):
    page = open_page(f"#label-sets/{pets}")
    page.click("#evaluate")
    expect(page.locator("#evaluate-status")).to_contain_text("There are no labelled example images yet.")
    expect(page.locator("#evaluate")).to_be_enabled()


def test_what_the_server_has_not_said_yet_is_not_taken_for_nothing(open_page, client, with_examples):
    client.put("/v1/label-sets/without-examples", json={"classes": ["cat"]}).raise_for_status()
    page = open_page(f"#label-sets/{with_examples}")
    expect(page.locator("#examples-counts")).to_contain_text("labelled images")
    held = []
    page.route(re.compile(r"/images\?limit=1$"), lambda route: held.append(route) or None)
    page.evaluate("location.hash = '#label-sets'")
    page.evaluate("location.hash = '#label-sets/without-examples'")
    expect(page.locator("#editor-title")).to_have_text("without-examples")
    expect(page.locator("#examples-counts")).to_be_empty()
    page.evaluate(f"location.hash = '#label-sets/{with_examples}'")
    expect(page.locator("#editor-title")).to_have_text(with_examples)
    page.click("#delete-label-set")
    expect(page.locator("dialog")).to_contain_text("with its version and its example images?")
    page.keyboard.press("Escape")
    page.click("#evaluate")
    expect(page.locator("#evaluate-status")).to_contain_text("Compared on 8 images", timeout=30_000)
    for route in held:
        route.continue_()
    expect(page.locator("#examples-counts")).to_contain_text("8 labelled images in 2 classes")


def test_test_images_make_a_confusion_matrix_and_are_not_stored(open_page, client, with_examples, pictures, drop):
    before = client.get(f"/v1/label-sets/{with_examples}/images").json()["counts"]
    page = open_page(f"#label-sets/{with_examples}")
    page.click("#test")
    expect(page.locator("#test-status")).to_contain_text("Add test images to at least one class first.")
    drop(
        page,
        "#test-zones li:nth-child(1)",
        pictures / "chelsea.jpg",
        pictures / "chelsea-1.jpg",
        pictures / "broken.jpg",
    )
    page.locator("#test-zones input").nth(2).set_input_files([pictures / "coffee.jpg"])
    expect(page.locator("#test-zones li").first).to_contain_text("3 images")
    page.select_option("#test-method", "zero-shot")
    page.click("text=Classify 4 test images")
    expect(page.locator("#test-status")).to_have_text("2 of 3 correct: 67 %, method zero-shot.")
    table = page.locator("#test-result table")
    assert table.locator("thead th").all_inner_texts() == ["cat", "coffee cup", "rocket", "correct"]
    rows = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    assert table.locator("tbody th").all_inner_texts() == ["cat", "coffee cup", "rocket"]
    assert rows == [["2", "0", "0", "100 %"], ["0", "0", "0", "\u2013"], ["0", "1", "0", "0 %"]]
    shares = [
        each.evaluate("each => each.style.getPropertyValue('--share')")
        for each in table.locator("tbody td.right").all()
    ]
    assert shares == ["1", "0", "0"]
    assert "rocket predicted as coffee cup" in page.inner_text(".mistakes")
    assert "Could not be read: broken.jpg: the JPEG image is damaged" in page.inner_text("#test-result")
    assert client.get(f"/v1/label-sets/{with_examples}/images").json()["counts"] == before
    page.click("#forget-tests")
    expect(page.locator("#test-result *")).to_have_count(0)
    expect(page.locator("#test-zones li").first).to_contain_text("drop here")


def test_test_images_have_one_class_also_where_the_label_set_allows_several(open_page, client, with_examples, pictures):
    classes = ["cat", "coffee cup", "rocket"]
    client.put(f"/v1/label-sets/{with_examples}", json={"classes": classes, "multi_label": True}).raise_for_status()
    page = open_page(f"#label-sets/{with_examples}")
    page.locator("#test-zones input").nth(0).set_input_files([pictures / "chelsea.jpg"])
    page.select_option("#test-method", "gda")  # which gives each image one label
    page.click("#test")
    expect(page.locator("#test-status")).to_have_text("1 of 1 correct: 100 %, method gda.")


def test_unreadable_test_images_are_named(open_page, with_examples, pictures):
    page = open_page(f"#label-sets/{with_examples}")
    page.locator("#test-zones input").nth(0).set_input_files([pictures / "broken.jpg"])
    page.click("#test")
    expect(page.locator("#test-status")).to_have_text("None of the images could be read.")
    assert "broken.jpg" in page.inner_text("#test-result")


def test_no_name_that_a_browser_removes_from_a_url_becomes_a_part_of_one(open_page):
    paths = open_page().evaluate(
        """async (names) => {
            const { pathOf } = await import("./playground/requests.js");
            return names.map((name) => {
                try {
                    return new URL(pathOf("label-sets", name, "images"), "http://host/").pathname;
                } catch {
                    return null;
                }
            });
        }""",
        ["", ".", "..", "a/..", "..\\a", "...", "a/b", "a?b#c", "%2e%2e", "a;b"],
    )
    kept = ["...", "a%2Fb", "a%3Fb%23c", "%252e%252e", "a%3Bb"]
    assert paths == [None] * 5 + [f"/v1/label-sets/{name}/images" for name in kept]


def test_the_page_splits_labels_as_the_service_does(open_page):
    texts = [text for text, _ in ONE_TEXT]
    found = open_page().evaluate(
        'async (texts) => texts.map((await import("./playground/elements.js")).splitLabels)', texts
    )
    assert found == [expected for _, expected in ONE_TEXT]
