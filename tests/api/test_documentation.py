import re
from urllib.parse import urljoin

import pytest

PAGE = "http://testserver/docs"


def references(html: str) -> list[str]:
    """Return every address that a browser loads for the page, and the one that its script reads."""
    return re.findall(r'(?:href|src)="([^"]*)"', html) + re.findall(r"url: '([^']*)'", html)


def test_the_page_and_all_that_it_loads_come_from_this_service(client):
    page = client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    found = references(page.text)
    assert {address.rpartition(".")[2] for address in found} == {"css", "png", "js", "json"}
    for address in found:
        answer = client.get(urljoin(PAGE, address))
        assert answer.status_code == 200, address
        assert answer.content, address


def test_the_page_names_no_other_host(client):
    html = client.get("/docs").text
    assert "http:" not in html
    assert "https:" not in html
    assert '"//' not in html
    assert '"validatorUrl": null' in html


def test_a_browser_is_told_to_load_from_nowhere_else(client):
    policy = client.get("/docs").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "*" not in policy


def test_the_style_sheet_loads_nothing_from_elsewhere(client):
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
def test_an_asset_says_what_it_is_and_may_be_kept(client, asset, media_type):
    answer = client.get(f"/docs/{asset}")
    assert answer.headers["content-type"].startswith(media_type)
    assert "max-age" in answer.headers["cache-control"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/docs/__init__.py", "/docs/..%2Fmain.py", "/redoc", "/docs/oauth2-redirect"])
def test_nothing_else_is_served_beside_the_page(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["type"] == "urn:deixis:problem:unknown-route"


def test_the_page_is_no_part_of_the_api_that_it_shows(client):
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path.startswith("/docs")]
