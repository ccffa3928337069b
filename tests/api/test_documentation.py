"""The page /docs: works offline and loads only its own files."""

import re
from urllib.parse import urljoin

import pytest

PAGE = "http://localhost/docs"


@pytest.fixture
def client(shared_client):
    return shared_client


def references(html: str) -> list[str]:
    """Return every URL that the page or its script loads."""
    return re.findall(r'(?:href|src)="([^"]*)"', html) + re.findall(r"url: '([^']*)'", html)


def test_the_page_loads_only_files_of_this_service(client):
    page = client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    found = references(page.text)
    assert {address.rpartition(".")[2] for address in found} == {"css", "png", "js", "json"}
    for address in found:
        response = client.get(urljoin(PAGE, address))
        assert response.status_code == 200, address
        assert response.content, address


def test_the_page_names_no_other_host(client):
    html = client.get("/docs").text
    assert "http:" not in html
    assert "https:" not in html
    assert '"//' not in html
    assert '"validatorUrl": null' in html


def test_the_policy_forbids_loading_from_other_hosts(client):
    policy = client.get("/docs").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "*" not in policy


def test_the_style_sheet_loads_nothing_from_other_hosts(client):
    style = client.get("/docs/swagger-ui.css").text
    assert "@import" not in style
    assert all(target.startswith("data:") for target in re.findall(r"""url\(["']?([^)"']*)""", style))


@pytest.mark.parametrize(
    ("asset", "media_type"),
    [
        ("swagger-ui-bundle.js", "text/javascript"),
        ("swagger-ui.css", "text/css"),
        ("favicon-32x32.png", "image/png"),
    ],
)
def test_an_asset_has_its_media_type_and_may_be_cached(client, asset, media_type):
    response = client.get(f"/docs/{asset}")
    assert response.headers["content-type"].startswith(media_type)
    assert "max-age" in response.headers["cache-control"]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/docs/__init__.py", "/docs/..%2Fmain.py", "/redoc", "/docs/oauth2-redirect"])
def test_no_other_files_are_served(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["type"] == "urn:deixis:problem:unknown-route"


def test_the_page_is_not_part_of_the_described_api(client):
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path.startswith("/docs")]
