"""Which hosts a service without keys answers for, and which pages may change its state."""

import socket

import pytest

from app.api.auth.policy import KeyPolicy
from app.api.hosts import HostRules
from app.errors import ConfigurationError, CrossSiteError, MisdirectedRequestError
from app.settings import load_settings

LABEL_SET = {"classes": [{"name": "cat"}, {"name": "dog"}]}


def refused(rules, method="GET", **headers):
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return type(rules.problem({"type": "http", "method": method, "headers": raw}))


SERVED = [
    # (listens on, allowed hosts, Host, whether it is served)
    *(
        ("127.0.0.1", (), host, True)
        for host in (
            *("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:9", "127.8.9.1", "[::1]:8000", "[::1%25lo]"),
            *("[::ffff:127.0.0.1]", "host.docker.internal:8000", ""),
        )
    ),
    *(
        ("127.0.0.1", (), host, False)
        for host in (
            *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.7", "[fe80::1]", "deixis"),
            *(
                "deixis.default.svc",
                "[::ffff:8.8.8.8]",
                "evil.example:localhost",
                "localhost/x",
                "a@localhost",
                "*",
                "[",
            ),
            *("localhost, evil.example", "xn--bcher-kva.example", "0.0.0.0", "localhost localhost"),
        )
    ),
    *((listens_on, (), "evil.example", False) for listens_on in ("localhost", "::1", "0.0.0.0", "::", "10.0.0.5")),
    *((listens_on, (), "localhost:1", True) for listens_on in ("localhost", "::1", "0.0.0.0", "::", "10.0.0.5")),
    *(
        ("0.0.0.0", (), host, True)
        for host in (
            *("10.1.2.3:8000", "[2001:db8::1]", "[fe80::1%eth0]:80", "deixis:8000", "deixis.default.svc:8000"),
            *("deixis.default.svc.cluster.local", socket.gethostname(), "host.docker.internal"),
        )
    ),
    *(("0.0.0.0", (), host, False) for host in ("deixis.example.com", "svc.evil.example", "10.1.2.3.evil.example")),
    ("deixis.lan", (), "Deixis.LAN:8000", True),
    ("127.0.0.1", ("Deixis.Example.com",), "deixis.example.com.:443", True),
    ("127.0.0.1", ("deixis.example.com",), "evil.deixis.example.com", False),
    ("127.0.0.1", ("*.example.com",), "a.b.example.com", True),
    ("127.0.0.1", ("*.example.com",), "example.com", False),
    ("127.0.0.1", ("*.example.com",), "evilexample.com", False),
    ("127.0.0.1", ("bücher.example",), "xn--bcher-kva.example", True),
    ("127.0.0.1", ("192.168.1.7", "[2001:db8::1]"), "192.168.1.7", True),
    ("127.0.0.1", ("192.168.1.7", "[2001:db8::1]"), "[2001:DB8::1]:8000", True),
    ("127.0.0.1", ("*",), "anything.example", True),
]


@pytest.mark.parametrize(("listens_on", "allowed", "host", "is_served"), SERVED)
def test_a_host_is_served_if_a_web_page_cannot_reach_the_service_under_it(listens_on, allowed, host, is_served):
    kind = refused(HostRules(listens_on, allowed), host=host)
    assert kind is (type(None) if is_served else MisdirectedRequestError)


def test_the_forwarded_host_does_not_replace_the_host():
    rules = HostRules("127.0.0.1", ["deixis.example.com"])
    assert refused(rules, host="evil.example", x_forwarded_host="localhost") is MisdirectedRequestError
    assert refused(rules, host="localhost", x_forwarded_host="evil.example") is type(None)


PAGES = [
    # (headers, whether an unsafe method is accepted)
    ({}, True),
    ({"sec_fetch_site": "same-origin", "origin": "https://proxy.example"}, True),
    ({"sec_fetch_site": "none"}, True),
    ({"sec_fetch_site": "cross-site"}, False),
    ({"sec_fetch_site": "cross-site", "origin": "https://evil.example"}, False),
    ({"sec_fetch_site": "cross-site", "origin": "http://localhost:8000"}, False),
    ({"sec_fetch_site": "same-site", "origin": "http://localhost:3000"}, False),
    ({"sec_fetch_site": "same-site"}, False),
    ({"sec_fetch_site": "nonsense"}, False),
    ({"sec_fetch_site": "cross-site", "origin": "https://app.example.com"}, True),
    ({"origin": "https://app.example.com"}, True),
    ({"origin": "https://APP.example.com"}, True),
    ({"origin": "https://app.example.com.evil.example"}, False),
    ({"origin": "http://localhost:8000"}, True),
    ({"origin": "http://LOCALHOST:8000"}, True),
    ({"origin": "http://localhost:3000"}, False),
    ({"origin": "http://localhost"}, False),
    ({"origin": "http://127.0.0.1:8000"}, False),
    ({"origin": "https://deixis.example.com"}, True),
    ({"origin": "null"}, False),
    ({"origin": ""}, False),
    ({"origin": "file://"}, False),
    ({"origin": "http://evil.example"}, False),
]


@pytest.mark.parametrize(("headers", "is_accepted"), PAGES)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_a_page_of_another_site_changes_nothing(headers, is_accepted, method):
    rules = HostRules("127.0.0.1", ["deixis.example.com"], ["https://app.example.com"])
    kind = refused(rules, method, host="localhost:8000", **headers)
    assert kind is (type(None) if is_accepted else CrossSiteError)
    assert refused(rules, host="localhost:8000", **headers) is type(None)


@pytest.mark.parametrize(
    ("host", "origin", "is_accepted"),
    [
        ("localhost", "http://localhost:80", True),
        ("localhost:443", "https://localhost", True),
        ("localhost:80", "https://localhost", False),
        ("[::1]:8000", "http://[::1]:8000", True),
    ],
)
def test_the_origin_and_the_host_are_compared_with_their_ports(host, origin, is_accepted):
    kind = refused(HostRules("127.0.0.1"), "POST", host=host, origin=origin)
    assert kind is (type(None) if is_accepted else CrossSiteError)


def test_every_origin_may_be_allowed():
    rules = HostRules("127.0.0.1", cors_origins=["*"])
    assert refused(rules, "POST", host="localhost", origin="null", sec_fetch_site="cross-site") is type(None)


def test_a_host_that_is_not_served_gets_421_on_every_route(client):
    for method, path in (("GET", "/"), ("GET", "/healthz"), ("GET", "/v1/models"), ("PUT", "/v1/label-sets/pets")):
        response = client.request(method, path, headers={"Host": "evil.example"})
        assert response.status_code == 421
        assert response.json()["type"] == "urn:deixis:problem:misdirected-request"
        assert "DEIXIS_ALLOWED_HOSTS" in response.json()["detail"]
        assert response.headers["connection"] == "close"
        assert response.headers["x-content-type-options"] == "nosniff"


def test_a_form_of_another_site_is_refused_and_changes_nothing(client):
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    response = client.put("/v1/label-sets/pets", json=LABEL_SET, headers=headers)
    assert response.status_code == 403
    assert response.json()["type"] == "urn:deixis:problem:cross-site"
    assert client.get("/v1/label-sets/pets").status_code == 404
    assert client.put("/v1/label-sets/pets", json=LABEL_SET).status_code == 201


def test_configured_hosts_and_origins_are_served(make_client):
    client = make_client(allowed_hosts=("deixis.example.com",), cors_origins=("https://app.example.com",))
    headers = {"Host": "deixis.example.com", "Origin": "https://app.example.com", "Sec-Fetch-Site": "cross-site"}
    response = client.put("/v1/label-sets/pets", json=LABEL_SET, headers=headers)
    assert response.status_code == 201
    assert response.headers["access-control-allow-origin"] == "https://app.example.com"


def test_a_service_that_requires_keys_answers_for_every_host(make_client):
    client = make_client(keys=KeyPolicy.REQUIRED)
    headers = {"Host": "deixis.example.com", "Origin": "https://evil.example"}
    assert client.get("/healthz", headers=headers).status_code == 200
    assert client.put("/v1/label-sets/pets", json=LABEL_SET, headers=headers).status_code == 401


@pytest.mark.parametrize("hosts", [["localhost", "localhost"], ["localhost", "evil.example"]])
def test_several_host_headers_are_malformed(client, hosts):
    response = client.get("/v1/models", headers=[("Host", host) for host in hosts])
    assert response.status_code == 400
    assert response.json()["type"] == "urn:deixis:problem:malformed-request"


@pytest.mark.parametrize("host", ["http://deixis.example.com", "deixis.example.com:8000", "a b", "*.*", ".example"])
def test_an_allowed_host_is_a_name_without_scheme_and_port(host):
    with pytest.raises(ConfigurationError, match="is not a host name"):
        load_settings(allowed_hosts=host)


def test_allowed_hosts_are_separated_by_commas():
    allowed = ("deixis.example.com", "*.example.org", "bücher.example", "::1", "*")
    assert load_settings(allowed_hosts=",".join(allowed)).allowed_hosts == allowed
