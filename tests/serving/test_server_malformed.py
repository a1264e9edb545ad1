"""Whatever is sent, the service answers it or says in a sentence why not: no status of 500 or above."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm.serving.server.events import EventStore
from tests.serving.live import live, served

PATHS = ("/recommend", "/score", "/events")
BODIES = {
    "/recommend": {
        "users": [
            {
                "user": 1,
                "time": 978300000,
                "history": [{"item": 5, "rating": 4.0, "label": 1, "timestamp": 1}],
            },
            {"user": "new", "history": [{"item": "7"}]},
        ],
        "k": 3,
        "filter_viewed": True,
        "items_to_recommend": [5, 6, 7],
        "exclude": [8],
        "on_unknown": "error",
    },
    "/score": {"users": [{"user": 1, "items": [5, "6"], "history": [{"item": 5}], "time": "2001-01-01"}]},
    "/events": {
        "events": [
            {"user": 1, "item": 5, "rating": 4.0, "label": 1, "timestamp": "2001-01-01", "key": "own"},
            {"user": "new", "item": "7"},
        ]
    },
}
NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, 1e308, -0.0])
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "1", "\x00", "٣", "1e5", "nan", "2001-01-01T99", "9999-12-31T23:59:59+23:59", "\u202e"]
    ),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, TEXTS, st.floats(), st.just(float("nan")), st.just("\ud800")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["user", "users", "item", "items", "history", "time", "k", "rating", "label"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


def places(value, path=()):
    """Paths to everything within a value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


@st.composite
def mutated(draw, body):
    """A good body of which some parts are replaced, left out, or doubled."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(places(body))))
        if not path:
            return draw(VALUES)
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "remove", "double"]))
        if what == "remove":
            del parent[path[-1]]
        elif what == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif what == "double":
            parent[draw(TEXTS)] = copy.deepcopy(parent[path[-1]])
        else:
            parent[path[-1]] = draw(VALUES)
    return body


def as_bytes(value):
    return json.dumps(value).encode("utf-8", "surrogatepass")


def begun(content):
    """Content that ends too early."""
    return st.integers(0, len(content)).map(lambda end: content[:end])


@st.composite
def requests(draw):
    """Method, path, headers and body."""
    path = draw(st.sampled_from(PATHS))
    content = draw(
        st.one_of(
            mutated(BODIES[path]).map(as_bytes),
            VALUES.map(as_bytes),
            st.binary(max_size=40),
            mutated(BODIES[path]).map(as_bytes).flatmap(begun),
        )
    )
    kind = draw(st.sampled_from(["application/json"] * 6 + ["text/plain", "", "application/json; charset=x"]))
    method = draw(st.sampled_from(["POST"] * 8 + ["GET", "PUT", "DELETE", "HEAD"]))
    path = draw(
        st.sampled_from(
            [path] * 8
            + ["/info", "/health/", "/admin/reload", "/%ff", "/recommend?k=1", "/users/1/history?limit=0"]
        )
    )
    return method, path, {"Content-Type": kind}, content


@pytest.fixture(scope="module")
def service(retrieving, tmp_path_factory):
    store = EventStore(f"sqlite:///{tmp_path_factory.mktemp('store')}/events.db")
    with live(lambda: served(retrieving), events=store) as it:
        yield it


def check(service, request):
    method, path, headers, content = request
    response = service.client.request(method, path, headers=headers, content=content)
    assert response.status_code < 500, (request, response.text)
    if response.status_code >= 400 and method != "HEAD":
        assert list(response.json()) == ["error"]
        assert "\n" not in response.json()["error"]
        assert "Traceback" not in response.text
    return response.status_code


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=requests())
def test_no_request_is_a_failure(service, request):
    check(service, request)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=requests())
def test_no_request_of_ten_thousand_is_a_failure(service, request):
    check(service, request)


@pytest.mark.parametrize("path", PATHS)
def test_requests_are_good_and_bad(service, path):
    """The requests above would prove nothing if all of them failed at the first check."""
    kind = {"Content-Type": "application/json"}
    assert check(service, ("POST", path, kind, as_bytes(BODIES[path]))) == 200
    met = set()

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(body=mutated(BODIES[path]))
    def ask(body):
        met.add(check(service, ("POST", path, kind, as_bytes(body))))

    ask()
    assert {200, 422} <= met
