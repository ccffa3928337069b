"""Where the images of tasks are brought from, with whose token, and within which bounds."""

import base64
import json

import pytest

from app.errors import ClientError, ImageTooLargeError, InvalidFieldError, NotAnImageError, UnreachableImageError
from app.integrations.label_studio_images import TaskImages
from tests.api.live import live
from tests.conftest import picture
from tests.integrations.label_studio_server import LEGACY_TOKEN, PERSONAL_TOKEN, LabelStudio, Storage

pytestmark = pytest.mark.anyio

RED = picture("red")


@pytest.fixture
def studio():
    return LabelStudio()


@pytest.fixture
def studio_url(studio):
    with live(studio.app) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture
async def make():
    made = []

    def images(label_studio, token=LEGACY_TOKEN, **more):
        made.append(
            TaskImages(label_studio=label_studio, token=token, **{"max_bytes": 1_000_000, "timeout_s": 5} | more)
        )
        return made[-1]

    yield images
    for each in made:
        await each.aclose()


@pytest.mark.parametrize(
    "source",
    [
        "/data/upload/1/red.png",
        "data/upload/1/red.png",
        "upload/1/red.png",
        "/upload/1/red.png",
        "/data/local-files/?d=photos/red.png",
        "/storage-data/uploaded/?filepath=upload/1/red.png",
        "{url}/data/upload/1/red.png",
    ],
)
async def test_what_label_studio_keeps_is_fetched_with_its_token(make, studio, studio_url, source):
    assert await make(studio_url).fetch(source.replace("{url}", studio_url)) == RED
    assert {shown for _, shown in studio.asked} == {f"Token {LEGACY_TOKEN}"}


async def test_an_upload_is_had_also_where_the_proxy_has_none(make):
    studio = LabelStudio(has_proxy=False)
    with live(studio.app) as (host, port):
        assert await make(f"http://{host}:{port}/").fetch("/data/upload/1/red.png") == RED
    assert [path for path, _ in studio.asked] == ["/storage-data/uploaded/", "/data/upload/1/red.png"]


async def test_a_personal_access_token_is_exchanged_once_for_many_images(make, studio, studio_url):
    images = make(studio_url, PERSONAL_TOKEN)
    for _ in range(3):
        assert await images.fetch("/data/upload/1/red.png") == RED
    assert studio.refreshed == 1
    assert {shown for _, shown in studio.asked} == {f"Bearer {studio.access}"}


@pytest.mark.parametrize(
    "token", [None, "wrong", PERSONAL_TOKEN.replace("c2ln", "b3RoZXI")], ids=["none", "legacy", "personal"]
)
async def test_a_refused_token_is_an_error(make, studio_url, token):
    with pytest.raises(UnreachableImageError, match="LABEL_STUDIO_API_KEY"):
        await make(studio_url, token).fetch("/data/local-files/?d=red.png")


async def test_cloud_storage_is_fetched_where_label_studio_signs_it_without_its_token(make, studio, studio_url):
    storage = Storage()
    with live(storage.app) as (host, port):
        studio.storage = f"http://{host}:{port}"
        images = make(studio_url, trusted_hosts=[f"{host}:{port}"])
        assert await images.fetch("s3://bucket/photos/red.png", 7) == RED
        assert storage.asked == [("/7/red.png", None)]
        assert await images.fetch(f"http://{host}:{port}/red.png") == RED
        with pytest.raises(UnreachableImageError, match="redirects more than 5 times"):
            await images.fetch(f"http://{host}:{port}/around")
        with pytest.raises(InvalidFieldError, match="id of the task"):
            await images.fetch("gs://bucket/red.png")
        # Without that trust, no address of this network is asked, wherever a redirect comes from.
        before = len(storage.asked)
        with pytest.raises(ClientError):
            await make(studio_url).fetch("s3://bucket/photos/red.png", 7)
        with pytest.raises(ClientError):
            await make(studio_url).fetch(f"http://{host}:{port}/red.png")
        assert len(storage.asked) == before


async def test_data_urls_are_decoded(make):
    images = make(None)
    encoded = base64.b64encode(RED).decode()
    assert await images.fetch(f"data:image/png;base64,{encoded}") == RED
    assert await images.fetch("data:image/x-portable-pixmap,P3%201%201%201%201%200%200") == b"P3 1 1 1 1 0 0"
    with pytest.raises(NotAnImageError, match="is not base64"):
        await images.fetch("data:image/png;base64,&&&")
    with pytest.raises(ImageTooLargeError):
        await images.fetch("data:image/png;base64," + "A" * 1_500_000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/api/users/", "is not the location of an image"),
        ("/data/../api/users/", "is not the location of an image"),
        ("/data/%2e%2e/api/users/", "is not the location of an image"),
        ("file:///etc/passwd", "is not the location of an image"),
        ("C:\\photos\\cat.jpg", "is not the location of an image"),
        ("https://" + "a" * 5000, "at most 4,096"),
        ("http://[", "this is not a URL"),
        ("ftp://example.com/cat.jpg", "is not the location of an image"),
    ],
)
async def test_other_sources_are_refused(make, studio, studio_url, source, message):
    with pytest.raises(InvalidFieldError, match=message):
        await make(studio_url).fetch(source)
    assert studio.asked == []


async def test_without_an_address_its_files_are_refused_with_the_way_out(make):
    with pytest.raises(InvalidFieldError, match="LABEL_STUDIO_URL"):
        await make(None).fetch("/data/upload/1/red.png")
    for wrong in ("localhost:8080", "ftp://x", "http://"):
        with pytest.raises(InvalidFieldError, match="LABEL_STUDIO_URL"):
            make(wrong)


async def test_bounds_hold(make, studio_url):
    with pytest.raises(ImageTooLargeError, match="more than 1,000,000 bytes"):
        await make(studio_url).fetch("/data/local-files/?d=huge.png")
    with pytest.raises(UnreachableImageError, match="answered 404"):
        await make(studio_url).fetch("/data/local-files/?d=none.png")
    with pytest.raises(UnreachableImageError, match="gave no valid response"):
        await make("http://127.0.0.1:9").fetch("/data/local-files/?d=red.png")


async def test_what_comes_of_a_refused_refresh_is_no_secret(make, studio_url):
    other = PERSONAL_TOKEN.replace("c2ln", "b3RoZXI")
    with pytest.raises(UnreachableImageError) as raised:
        await make(studio_url, other).fetch("/data/local-files/?d=red.png")
    assert other not in json.dumps(raised.value.message)
