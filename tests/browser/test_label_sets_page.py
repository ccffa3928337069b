"""Label sets and captions on the page: made, changed by two at a time, shown pictures, and tried."""

import re

import httpx
import pytest
import skimage.data
from playwright.sync_api import expect

from tests.conftest import photograph


@pytest.fixture(scope="session")
def shots(tmp_path_factory):
    """Four pictures each of a cat and of a cup, and a file that is none."""
    folder = tmp_path_factory.mktemp("shots")
    for name, pixels in (("cat", skimage.data.chelsea()), ("cup", skimage.data.coffee())):
        for number in range(4):
            cut = 10 * number + 1
            (folder / f"{name}-{number}.jpg").write_bytes(photograph(pixels[cut:-cut, cut:-cut]))
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def open_editor(open_page, server):
    def opened(**options):
        page = open_page(**options)
        page.click("nav a[href='#label-sets']")
        page.wait_for_selector("#sets li")
        return page

    return opened


@pytest.fixture
def stored(server):
    with server.client() as client:
        yield lambda name: client.get(f"/v1/label-sets/{name}").json()


def make(page, name, classes):
    page.click("#new-set")
    page.fill("#set-name", name)
    page.fill("#more-classes", classes)
    page.click("#save")
    expect(page.locator("#set-status")).to_contain_text(f"Saved: {name}, ")


def saved(page, version):
    expect(page.locator("#set-status")).to_have_text(re.compile(rf"Saved: .*, version {version}\.$"))


def open_class(page, name):
    page.locator("#classes summary", has_text=name).first.click()


def test_a_label_set_is_made_changed_and_deleted(open_editor, stored):
    page = open_editor()
    make(page, "pets", "cat, dog\nhamster, Cat")
    assert [each["name"] for each in stored("pets")["classes"]] == ["cat", "dog", "hamster"]
    open_class(page, "dog")
    dog = page.locator("#classes > li").nth(1)
    dog.locator(".synonyms").fill("hound\n\n puppy ")
    dog.locator(".descriptions").fill("a dog has a wet nose, and wags its tail")
    dog.locator(".prompt").fill("a photo of a {}, the animal.")
    page.locator("#classes > li").nth(2).locator("summary").click()
    page.locator("#classes > li").nth(2).get_by_role("button", name="Remove the class").click()
    page.fill("#set-template", "a picture of a {}")
    page.select_option("#merge", "max")
    page.click("#save")
    saved(page, 2)
    now = stored("pets")
    assert [each["name"] for each in now["classes"]] == ["cat", "dog"]
    assert now["classes"][1]["synonyms"] == ["hound", "puppy"]
    assert now["classes"][1]["descriptions"] == ["a dog has a wet nose, and wags its tail"]
    assert (now["templates"], now["merge_synonyms"]) == ("a picture of a {}", "max")
    assert "2 synonyms, 1 description" in page.locator("#classes > li").nth(1).inner_text()

    page.select_option("#version", "1")
    page.wait_for_selector("#classes > li:nth-child(3)")
    assert "version 1 of 2" in page.inner_text("#set-status")
    page.click("#save")
    saved(page, 3)
    assert len(stored("pets")["classes"]) == 3

    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#delete-set")
    expect(page.locator("#set-status")).to_have_text("Deleted: pets.")
    assert stored("pets")["status"] == 404


def test_of_two_who_edit_at_the_same_time_neither_loses_what_was_typed(open_editor, stored, server):
    page = open_editor()
    make(page, "shared", "cat, dog")
    with server.client() as other:
        other.put("/v1/label-sets/shared", json={"classes": ["theirs"]}).raise_for_status()
    page.fill("#more-classes", "mine")
    page.click("#save")
    page.wait_for_selector("#conflict:not([hidden])")
    assert "Somebody has saved another version" in page.inner_text("#set-error")
    assert page.locator("#classes > li").count() == 3
    page.click("#mine")
    saved(page, 3)
    assert [each["name"] for each in stored("shared")["classes"]] == ["cat", "dog", "mine"]
    with server.client() as other:
        other.put("/v1/label-sets/shared", json={"classes": ["theirs"]}).raise_for_status()
    page.fill("#more-classes", "again")
    page.click("#save")
    page.wait_for_selector("#conflict:not([hidden])")
    page.click("#theirs")
    page.wait_for_selector("#conflict", state="hidden")
    assert page.locator("#classes > li").count() == 1
    page.click("#new-set")
    page.fill("#set-name", "shared")
    page.fill("#more-classes", "other")
    page.click("#save")
    page.wait_for_selector("#conflict:not([hidden])")
    assert "There is a label set 'shared' already" in page.inner_text("#set-error")


def test_what_was_typed_is_kept_when_somebody_deletes_and_a_third_writer_is_seen(open_editor, stored, server):
    page = open_editor()
    make(page, "gone", "cat, dog")
    with server.client() as other:
        other.delete("/v1/label-sets/gone").raise_for_status()
    page.fill("#more-classes", "mine")
    page.click("#save")
    expect(page.locator("#set-error")).to_contain_text("deleted this label set meanwhile")
    assert page.is_hidden("#theirs")
    with server.client() as other:
        other.put("/v1/label-sets/gone", json={"classes": ["third"]}).raise_for_status()
    page.click("#mine")
    expect(page.locator("#set-error")).to_contain_text("another version meanwhile")
    assert [each["name"] for each in stored("gone")["classes"]] == ["third"]
    page.click("#mine")
    expect(page.locator("#set-status")).to_contain_text("Saved: gone")
    assert [each["name"] for each in stored("gone")["classes"]] == ["cat", "dog", "mine"]


def test_what_is_not_saved_is_not_left_without_a_question(open_editor):
    page = open_editor()
    make(page, "asked", "cat")
    page.fill("#set-template", "a {} at night")
    asked = []
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.click("#new-set")
    assert asked == ["What you changed is not saved. Leave it?"]
    assert page.input_value("#set-template") == "a {} at night"
    page.fill("#set-template", "photo")
    page.click("#new-set")
    assert len(asked) == 1
    assert page.inner_text("#editor-title") == "New label set"


def test_what_is_wrong_is_told_where_it_is(open_editor):
    page = open_editor()
    page.click("#new-set")
    page.click("#save")
    assert page.inner_text("#set-error") == "Give it a name."
    page.fill("#set-name", "bad/name")
    page.fill("#more-classes", "cat, dog")
    page.click("#save")
    expect(page.locator("#set-error")).to_contain_text("bad/name")
    page.fill("#set-name", "good")
    open_class(page, "dog")
    dog = page.locator("#classes > li").nth(1)
    dog.locator(".prompt").fill("a photo of a {animal}")
    dog.locator(".synonyms").fill("dog")
    page.click("#save")
    page.wait_for_selector("#classes > li:nth-child(2) .problem")
    assert dog.locator(".problem").first.is_visible()
    assert dog.locator(".prompt").input_value() == "a photo of a {animal}"


def test_pictures_teach_a_class_and_bad_ones_are_named(open_editor, shots, server):
    page = open_editor()
    make(page, "taught", "cat, cup")
    open_class(page, "cat")
    cat = page.locator("#classes > li").first
    example = cat.get_by_label("Choose example images of cat")
    example.set_input_files([shots / "cat-0.jpg", shots / "cat-1.jpg", shots / "broken.jpg"])
    status = cat.get_by_role("status")
    expect(status).to_have_text(re.compile(r"2 added; broken\.jpg: .*JPEG"))
    assert "2 example images" in cat.locator("summary").inner_text()
    drop(page, cat.locator(".drop").first, shots / "cat-2.jpg")
    expect(status).to_have_text("1 added.")
    with server.client() as client:
        assert client.get("/v1/label-sets/taught/images").json()["counts"]["labelled"] == {"cat": 3}
    example.set_input_files([shots / "broken.jpg"])
    expect(status).to_contain_text("0 added; broken.jpg: ")
    page.once("dialog", lambda dialog: dialog.accept())
    cat.get_by_role("button", name="delete its example images").click()
    expect(status).to_have_text("3 deleted.")


def drop(page, target, file):
    """Drop a file as a person does with the mouse."""
    held = page.evaluate_handle(
        """(bytes) => {
            const held = new DataTransfer();
            held.items.add(new File([new Uint8Array(bytes)], "dropped.jpg", { type: "image/jpeg" }));
            return held;
        }""",
        list(file.read_bytes()),
    )
    target.dispatch_event("dragenter", {"dataTransfer": held})
    target.dispatch_event("drop", {"dataTransfer": held})


def test_methods_are_tried_on_test_pictures_with_what_they_confuse(open_editor, shots, server, shoot):
    page = open_editor(viewport={"width": 1280, "height": 900})
    make(page, "tried", "cat, cup, dog")
    assert page.is_disabled("#evaluate-tests")
    assert page.is_disabled("#evaluate-examples")
    for place, (label, name) in enumerate((("cat", "cat"), ("cup", "cup"))):
        open_class(page, label)
        item = page.locator("#classes > li").nth(place)
        item.get_by_label(f"Choose test pictures of {label}").set_input_files(sorted(shots.glob(f"{name}-*.jpg")))
    assert page.inner_text("#test-count") == "8"
    page.click("#evaluate-tests")
    page.wait_for_selector("#leaderboard table", timeout=60_000)
    rows = page.locator("#leaderboard tr").all_inner_texts()
    assert any(row.startswith("zero-shot") and re.search(r"\d+ % \(\d+(\.\d)? % to \d+ %\)", row) for row in rows)
    cells = page.locator("#confusion tr").nth(1).locator("td").all_inner_texts()
    assert cells == ["4", "", ""]
    page.get_by_role("button", name="zero-shot", exact=True).click()
    assert "What zero-shot takes" in page.inner_text("#confusion caption")
    shoot(page, "label-sets-desktop")
    with server.client() as client:
        assert client.get("/v1/label-sets/tried/images").json()["images"] == []
        for name in ("cat", "cup"):
            files = [("image", shot.read_bytes()) for shot in sorted(shots.glob(f"{name}-*.jpg"))]
            client.post("/v1/label-sets/tried/images", files=files, data={"class": name}).raise_for_status()
    page.reload()
    page.get_by_role("button", name=re.compile("^tried")).click()
    page.wait_for_selector("#evaluate-examples:not([disabled])")
    page.click("#evaluate-examples")
    page.wait_for_selector("#leaderboard table", timeout=60_000)
    assert "8 pictures, by embedded" in page.inner_text("#set-status")


@pytest.mark.parametrize(("name", "width", "scheme"), [("phone", 390, "light"), ("dark", 1280, "dark")])
def test_the_editor_fits_a_phone_and_the_dark(open_editor, shoot, name, width, scheme):
    page = open_editor(viewport={"width": width, "height": 800}, color_scheme=scheme)
    make(
        page, f"shown-{name}", "cat, a class with a name that is very much longer than anybody would ever want it to be"
    )
    open_class(page, "cat")
    page.locator("#classes .descriptions").first.fill("a cat has whiskers\na cat has pointed ears")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, f"label-sets-{name}")


def test_views_have_addresses_and_one_can_go_back(open_page, server):
    page = open_page(f"{server.url}/#captions")
    assert page.is_visible("#search")
    assert page.get_attribute("nav a[href='#captions']", "aria-current") == "page"
    page.focus("nav a[href='#classify']")
    page.keyboard.press("Enter")
    page.wait_for_selector("#question")
    assert page.is_hidden("#search")
    page.go_back()
    page.wait_for_selector("#search")
    page.goto(f"{server.url}/#nothing")
    assert page.is_visible("#question")


def test_captions_are_found_by_text_and_by_picture_page_by_page(open_page, server, pictures):
    page = open_page(f"{server.url}/#captions")
    page.wait_for_selector("#database option", state="attached")
    page.click("#find")
    assert page.inner_text("#search-error") == "Say a text, or choose a picture."
    page.fill("#search-text", "a dog at the sea")
    page.click("#find")
    page.wait_for_selector("#found li:nth-child(20)")
    assert "a dog on beach" in page.locator("#found li").first.inner_text()
    page.click("#more")
    page.wait_for_selector("#found li:nth-child(21)")
    page.fill("#contains", "number 7")
    page.click("#find")
    expect(page.locator("#found li")).to_have_count(1)
    page.fill("#search-text", "")
    page.fill("#contains", "")
    page.set_input_files("#search-picture", str(pictures / "chelsea.jpg"))
    page.click("#find")
    page.wait_for_selector("#found li")
    assert "a cat" in page.locator("#found li").first.inner_text()
    page.set_input_files("#search-picture", str(pictures / "broken.jpg"))
    page.click("#find")
    page.wait_for_selector("#search-error:not([hidden])")
    assert "image" in page.inner_text("#search-error")


def test_the_names_of_others_are_text_here_too(open_editor, server):
    with server.client() as client:
        client.put("/v1/label-sets/<b>bold<b>", json={"classes": ["<img src=x onerror=alert(1)>"]})
        assert httpx.codes.is_success(client.get("/v1/label-sets").status_code)
    page = open_editor()
    make(page, "marked", "<i>up</i>")
    assert page.locator("#sets i, #classes i, #sets b b, #classes img").count() == 0
    assert "<i>up</i>" in page.inner_text("#classes")
