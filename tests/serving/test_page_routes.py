"""The page's routes: files of the package, searches, explanations over HTTP, and what is refused."""

import re
from importlib import resources
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm.serving.explain import Change, explain
from recllm.serving.server.events import EventStore
from recllm.serving.server.page_routes import ExplainAnswer, FoundItems, Start
from tests.serving.live import live, served
from tests.serving.test_server_malformed import TEXTS, VALUES, as_bytes, check, mutated

PAGE = resources.files("recllm.serving.server").joinpath("page")


@pytest.fixture(scope="module")
def service(recommender):
    with live(lambda: served(recommender), max_history=300, max_k=50, deadline=60) as it:
        yield it


def test_the_page_is_three_files_of_the_package_and_needs_nothing_else(service):
    page = service.client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.content == PAGE.joinpath("index.html").read_bytes()
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"', page.text)
    assert sorted(links) == ["/page/page.css", "/page/page.js", "data:,"]
    for link in ("/page/page.css", "/page/page.js"):
        answer = service.client.get(link)
        assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    assert service.client.get("/page/index.html").status_code == 404
    assert service.client.get("/page/../page_routes.py").status_code == 404


def test_no_text_of_the_service_becomes_markup():
    script = PAGE.joinpath("page.js").read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert way not in script, way


def test_every_control_has_a_name_and_headings_go_down_by_one():
    page = PAGE.joinpath("index.html").read_text(encoding="utf-8")
    labelled = set(re.findall(r'<label for="([^"]+)"', page))
    assert labelled == set(re.findall(r'<(?:input|select) id="([^"]+)"', page))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', page)) <= set(ids)
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.count('role="status"') == 2
    assert '<html lang="en">' in page
    # What the script asks for is on the page.
    script = PAGE.joinpath("page.js").read_text(encoding="utf-8")
    assert set(re.findall(r'\$\("([^"]+)"\)', script)) | set(re.findall(r'show\("([^"]+)"', script)) <= set(
        ids
    )


def test_what_the_page_begins_with(service, recommender):
    start = Start.model_validate(service.client.get("/page/start").json())
    assert (start.dataset, start.steps, start.bundle) == ("demo", recommender.cascade.names, "first")
    assert recommender.maker.users.dense(start.users).min() > 1
    assert start.ratings == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_items_are_found(service, recommender):
    title = recommender.item_titles[2]
    answer = service.client.get("/items", params={"query": title})
    assert title in [item.title for item in FoundItems.model_validate(answer.json()).items]
    assert len(service.client.get("/items").json()["items"]) == 20
    refused = service.client.get("/items", params={"query": "a" * 201})
    assert (refused.status_code, list(refused.json())) == (422, ["error"])


def test_an_explanation_over_http_is_the_functions(service, recommender):
    change = {"add": {"item": 5, "rating": 5}}
    request = {"user": 1, "removed": [0], "change": change, "k": 4, "target": 7}
    response = service.post("/explain", request)
    assert response.status_code == 200
    answer = ExplainAnswer.model_validate(response.json()).explanation
    without = explain(recommender, 1, removed=[0], k=4, target=7)
    assert [event.item for event in answer.history] == [event.item for event in without.history] + [5]
    assert answer.effect.gate_before.alpha == pytest.approx(without.gate.alpha, abs=1e-6)
    assert [step.name for step in answer.steps] == [step.name for step in without.steps]
    removed = service.post("/explain", {"user": 1, "change": {"remove": 0}, "k": 4}).json()["explanation"]
    wanted = explain(recommender, 1, change=Change(remove=0), k=4)
    assert [item["item"] for item in removed["steps"][-1]["items"]] == [
        listed.item for listed in wanted.steps[-1].items
    ]
    nobody = service.post("/explain", {}).json()["explanation"]
    assert (nobody["user"], nobody["source"]) == (None, "popularity")


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"user": 1, "removed": [100_000]}, "event 100000 is removed; wanted 0 to"),
        ({"user": 1, "change": {}}, "wanted either remove or add"),
        ({"user": 1, "change": {"remove": 1, "add": {"item": 5}}}, "wanted either remove or add"),
        ({"user": 1, "change": {"remove": -1}}, "change.remove"),
        ({"user": 1, "k": 51}, "k: 51 are asked for; wanted at most 50"),
        ({"user": 1, "history": [{"item": 5}] * 301}, "history: 301 are asked for; wanted at most 300"),
        ({"user": 1, "target": "no such item"}, "'no such item' is not in the log"),
        ({"user": 1, "time": 5, "history": [{"item": 5, "timestamp": 6}]}, "an event at second 6"),
        ({"user": 1, "hidden": True}, "hidden"),
        ({"user": 1, "two\nlines": True}, "two lines"),
        ({"user": 1, "removed": [2**40]}, "removed.0"),
    ],
)
def test_what_cannot_be_explained_is_one_sentence(service, request_, sentence):
    response = service.post("/explain", request_)
    assert response.status_code == 422
    assert list(response.json()) == ["error"]
    assert sentence in response.json()["error"]
    assert "\n" not in response.json()["error"]


def test_stored_events_are_shown_and_counted_as_in_every_list(recommender, tmp_path):
    with live(lambda: served(recommender), events=EventStore(f"sqlite:///{tmp_path}/events.db")) as it:
        before = it.post("/explain", {"user": 1}).json()["explanation"]
        event = {"user": 1, "item": 20, "rating": 5, "timestamp": before["history"][-1]["second"] + 60}
        assert it.post("/events", {"events": [event]}).status_code == 200
        after = it.post("/explain", {"user": 1}).json()["explanation"]
        assert after["length"] == before["length"] + 1
        assert (after["history"][-1]["item"], after["history"][-1]["rating"]) == (20, 5.0)
        (answer,) = it.post("/recommend", {"users": [{"user": 1}]}).json()["answers"]
        listed = after["steps"][-1]["items"]
        assert [item["item"] for item in listed] == [item["item"] for item in answer["items"]]
        assert [item["score"] for item in listed] == pytest.approx(
            [item["score"] for item in answer["items"]]
        )


def test_the_page_is_public_and_what_it_asks_for_is_not(recommender):
    with live(lambda: served(recommender), api_key="secret") as it:
        assert it.client.get("/").status_code == 200
        assert it.client.get("/page/page.js").status_code == 200
        for answer in (
            it.client.get("/page/start"),
            it.client.get("/items"),
            it.post("/explain", {"user": 1}),
        ):
            assert answer.status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert it.client.get("/items", headers=key).status_code == 200


BODY = {
    "user": 1,
    "history": [{"item": 5, "rating": 4.0, "label": 1, "timestamp": 1}, {"item": "7"}],
    "time": 978300000,
    "removed": [0],
    "change": {"add": {"item": 9, "rating": 2.5}},
    "k": 3,
    "target": 5,
}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def quick_service(retrieving):
    """Retriever -> SIM."""
    with live(lambda: served(retrieving)) as it:
        yield it


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.one_of(mutated(BODY), mutated({**BODY, "change": {"remove": 0}}), VALUES), query=TEXTS)
def test_nothing_that_is_sent_is_a_failure(quick_service, body, query):
    check(quick_service, ("POST", "/explain", JSON, as_bytes(body)))
    response = quick_service.client.get("/items", params={"query": query})
    assert response.status_code in (200, 422), (query, response.text)


def test_requests_are_good_and_bad(quick_service):
    met = set()

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(body=mutated(BODY))
    def ask(body):
        met.add(check(quick_service, ("POST", "/explain", JSON, as_bytes(body))))

    ask()
    assert {200, 422} <= met
