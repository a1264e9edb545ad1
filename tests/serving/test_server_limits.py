"""What the service refuses, in one sentence and with which status; keys, hosts, reloads."""

import http.client
import socket
import threading

import pytest

from recllm.errors import ConfigError, StageError
from recllm.serving.server.flags import parse
from recllm.serving.server.refusals import Refusal
from recllm.serving.server.service import Service
from recllm.serving.server.settings import Settings
from tests.serving.live import live, served, until

ONE = {"users": [{"user": 1}], "k": 2}


@pytest.fixture(scope="module")
def service(recommender):
    limits = {"max_users": 3, "max_items": 4, "max_history": 2, "max_k": 20, "max_body": 2000}
    with live(lambda: served(recommender), **limits) as it:
        yield it


def test_the_openapi_names_the_limits_of_this_service(service):
    schema = service.client.get("/openapi.json").json()
    messages = schema["components"]["schemas"]
    recommend = messages["RecommendRequest"]["properties"]
    assert recommend["users"]["maxItems"] == 3
    assert recommend["k"]["maximum"] == 20
    assert recommend["items_to_recommend"]["anyOf"][0]["maxItems"] == recommend["exclude"]["maxItems"] == 4
    assert messages["OneUser"]["properties"]["history"]["maxItems"] == 2
    (limit,) = (
        each
        for each in schema["paths"]["/users/{user}/history"]["get"]["parameters"]
        if each["name"] == "limit"
    )
    assert limit["schema"]["maximum"] == 2


def test_a_whole_number_may_be_written_with_a_point(service):
    asks = [{"users": [{"user": user, "history": [{"item": item}]}]} for user, item in ((1, 5), (1.0, 5.0))]
    whole, pointed = (service.post("/recommend", body).json() for body in asks)
    assert pointed == whole
    assert pointed["answers"][0]["source"] == "cascade"


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/recommend", {"users": [{"user": 1}] * 4}, 422, "users: 4 are asked for; wanted at most 3"),
        ("/recommend", {**ONE, "k": 21}, 422, "k: 21 are asked for; wanted at most 20"),
        ("/recommend", {**ONE, "k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ("/recommend", {**ONE, "k": True}, 422, "k: Input should be a valid integer"),
        ("/recommend", {**ONE, "exclude": [1] * 5}, 422, "exclude: 5 are asked for; wanted at most 4"),
        ("/recommend", {**ONE, "items_to_recommend": [10**9]}, 422, "none of the 1 items_to_recommend"),
        ("/recommend", {"users": []}, 422, "users: List should have at least 1 item"),
        (
            "/recommend",
            {"users": [{"user": None}]},
            422,
            "users.0.user: wanted a whole number, or a text of 1",
        ),
        ("/recommend", {"users": [{"user": 2**63}]}, 422, "users.0.user: wanted a whole number of 64 bits"),
        (
            "/recommend",
            {"users": [{"user": True}]},
            422,
            "users.0.user: wanted a whole number, or a text of 1",
        ),
        (
            "/recommend",
            {**ONE, "items_to_recommend": []},
            422,
            "items_to_recommend: List should have at least",
        ),
        ("/recommend", {"users": [{"user": 1, "history": [{"item": 5}] * 3}]}, 422, "users.0.history: 3 are"),
        ("/recommend", {"users": [{"user": 1, "time": "soon"}]}, 422, "wanted Unix seconds or ISO text"),
        ("/recommend", {"users": [{"user": 1, "time": "0" * 41}]}, 422, "users.0.time: wanted Unix seconds"),
        ("/recommend", {"users": [{"user": 1, "time": 10**30}]}, 422, "wanted a second before the year"),
        (
            "/recommend",
            {"users": [{"user": 1.5}]},
            422,
            "users.0.user: wanted a whole number, or a text of 1",
        ),
        (
            "/recommend",
            {"users": [{"user": 1, "history": [{"item": 5, "label": False}]}]},
            422,
            "users.0.history.0.label: wanted 1 (liked), 0 or null",
        ),
        (
            "/recommend",
            {"users": [{"user": 1, "history": [{"item": 5, "rating": "4"}]}]},
            422,
            "users.0.history.0.rating: Input should be a valid number",
        ),
        ("/recommend", {**ONE, "nonsense": 1}, 422, "nonsense: Extra inputs are not permitted"),
        ("/score", {"users": [{"user": 1, "items": [1, 2, 3, 4, 5]}]}, 422, "items, of all users together"),
        ("/recommend", {"users": [{"user": "x" * 3000}]}, 413, "the body has more than 2,000 bytes"),
        ("/recommend", "text", 422, "the body: "),
        ("/users", {}, 404, "there is nothing at this address"),
        ("/health", {}, 405, "Method Not Allowed"),
    ],
)
def test_a_refusal_is_one_sentence(service, path, body, status, sentence):
    response = service.post(path, body)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert sentence in error
    assert "\n" not in error
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"users": [{"user": "\xff"}]}', b"[" * 1900, b"NaN", b"1" * 1990]
)
def test_what_is_no_json_is_refused(service, body):
    response = service.client.post("/recommend", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert list(response.json()) == ["error"]


def test_a_body_of_unknown_length_is_bounded_too(service):
    def parts():
        for _ in range(100):
            yield b" " * 1000

    response = service.client.post("/recommend", content=parts())
    assert response.status_code == 413


def test_no_other_site_may_read_answers(service):
    response = service.post("/recommend", ONE, headers={"Origin": "https://elsewhere.example"})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    assert service.client.options("/recommend", headers=preflight).status_code == 405
    plain = service.client.post(
        "/recommend", content=b'{"users": [{"user": 1}]}', headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 422


def test_hosts(recommender):
    with live(lambda: served(recommender), hosts="127.0.0.1,[::1]") as it:
        assert it.client.get("/health").status_code == 200
        assert it.client.get("/health", headers={"Host": "[::1]:80"}).status_code == 200
        response = it.client.get("/info", headers={"Host": "elsewhere.example"})
        assert response.status_code == 400
        assert "Host header" in response.json()["error"]


def test_a_full_queue_and_a_full_house_say_when_to_ask_again(recommender):
    limits = {"max_waiting": 4, "max_users": 4, "max_items": 4, "max_requests": 3, "retry_after": 7}
    with live(lambda: served(recommender), **limits) as it:
        answers = []

        def ask(count):
            body = {"users": [{"user": user} for user in range(1, count + 1)], "k": 2}
            answers.append(it.post("/recommend", body))

        threads = [threading.Thread(target=ask, args=(count,)) for count in (2, 1)]
        with it.blocked():
            for place, thread in enumerate(threads):
                thread.start()
                until(lambda place=place: it.waiting == (2, 3)[place])
            too_many = it.post("/recommend", {"users": [{"user": 1}, {"user": 2}], "k": 2})
            assert too_many.status_code == 503
            assert too_many.json() == {"error": "too much waits for the model; ask again soon"}
            assert too_many.headers["retry-after"] == "7"
            threads.append(threading.Thread(target=ask, args=(1,)))
            threads[2].start()
            until(lambda: it.waiting == 4)
            full = it.post("/recommend", ONE)
            assert (full.status_code, full.headers["retry-after"]) == (503, "7")
            assert full.json() == {"error": "too many requests are at work; ask again soon"}
            # Whoever looks after the service is answered all the same.
            assert it.client.get("/health").json() == {"status": "ready"}
            assert "recllm_waiting 4.0" in it.client.get("/metrics").text
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 3


def test_a_deadline_ends_a_request_and_takes_it_out_of_the_queue(recommender):
    with live(lambda: served(recommender), deadline=0.5) as it:
        with it.blocked():
            late = it.post("/recommend", ONE)
            assert late.status_code == 504
            assert late.json() == {"error": "there was no answer within 0.5 seconds; ask for less"}
            assert it.waiting == 0
        assert it.post("/recommend", {"users": [{"user": "nobody"}]}).status_code in (200, 504)


def test_a_body_that_does_not_come_is_not_waited_for(recommender):
    with live(lambda: served(recommender), deadline=0.5) as it:
        host, port = it.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 408


def test_an_api_key(recommender):
    with live(lambda: served(recommender), api_key="right") as it:
        assert it.client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            for method, path in (("POST", "/recommend"), ("GET", "/info"), ("POST", "/admin/reload")):
                response = it.client.request(method, path, json=ONE, headers=headers)
                assert response.status_code == 401
                assert "API key" in response.json()["error"]
        key = {"Authorization": "Bearer right"}
        assert it.post("/recommend", ONE, headers=key).status_code == 200
        assert it.client.get("/metrics", headers=key).status_code == 200
        assert "security" in it.client.get("/openapi.json").json()["paths"]["/recommend"]["post"]


def test_without_a_key_nobody_reloads(service):
    assert "security" not in service.client.get("/openapi.json").json()["paths"]["/recommend"]["post"]
    response = service.client.post("/admin/reload")
    assert response.status_code == 403
    assert "SIGHUP" in response.json()["error"]


def test_a_reload_switches_and_what_is_in_flight_ends_on_the_old_bundle(recommender, retrieving):
    bundles = iter(
        [
            lambda: served(recommender, "first"),
            lambda: served(retrieving, "second"),
            lambda: _raise(StageError("log/item.npy has changed\nsince the bundle was made")),
            lambda: _raise(ZeroDivisionError("inner workings")),
        ]
    )
    key = {"Authorization": "Bearer right"}
    with live(lambda: next(bundles)(), api_key="right") as it:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(it.post("/recommend", ONE, headers=key)))
        with it.blocked():
            thread.start()
            until(lambda: it.waiting == 1)
            reloaded = it.client.post("/admin/reload", headers=key)
            assert reloaded.json() == {"before": "first", "bundle": "second"}
        thread.join()
        assert answers[0].json()["bundle"] == "first"
        assert "lm" in answers[0].json()["answers"][0]["items"][0]["steps"]
        after = it.post("/recommend", ONE, headers=key).json()
        assert after["bundle"] == "second"
        assert list(after["answers"][0]["items"][0]["steps"]) == ["retriever", "crm"]
        refused = it.client.post("/admin/reload", headers=key)
        assert refused.status_code == 422
        assert refused.json()["error"] == (
            "the bundle is refused, and what answered before stays: "
            "log/item.npy has changed since the bundle was made"
        )
        broken = it.client.post("/admin/reload", headers=key)
        assert broken.status_code == 422
        assert broken.json()["error"].endswith("it cannot be loaded (ZeroDivisionError)")
        assert it.post("/recommend", ONE, headers=key).json()["bundle"] == "second"
        assert it.client.get("/health").json() == {"status": "ready"}
        assert it.metric("recllm_reloads_total", result="refused") == 2
        assert it.metric("recllm_reloads_total", result="loaded") == 2
        assert it.metric("recllm_bundle", bundle="second") == 1
        assert it.metric("recllm_bundle", bundle="first") == 0


def test_not_ready_before_a_model_has_answered_and_one_reload_at_a_time(recommender):
    loads = threading.Semaphore(0)

    def load():
        loads.acquire()
        return served(recommender)

    key = {"Authorization": "Bearer right"}
    state = {}

    def look(it):
        state["starting"] = it.client.get("/health")
        state["asked"] = it.post("/recommend", ONE, headers=key)
        state["reload"] = it.client.post("/admin/reload", headers=key)
        loads.release()

    with live(load, api_key="right", before_ready=look) as it:
        assert state["starting"].status_code == 503
        assert state["starting"].json() == {"status": "starting"}
        assert state["asked"].status_code == 503
        assert "retry-after" in state["asked"].headers
        assert state["reload"].status_code == 409
        assert it.client.get("/health").status_code == 200


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--k", "3"], None),
        (["--deadline", "0"], "deadline=0.0 is not usable; wanted more than 0"),
        (["--port", "70000"], "port=70000 is not usable"),
        (["--max-waiting", "10"], "max_waiting=10 is not usable; wanted max_users or more"),
        (["--host", "0.0.0.0"], "listens beyond this machine without an API key"),
    ],
)
def test_flags_that_cannot_be_used(cascades, monkeypatch, flags, line):
    monkeypatch.delenv("RECLLM_API_KEY", raising=False)
    folder = str(cascades["reclora"].folder)
    if line is None:
        with pytest.raises(SystemExit):
            parse([folder, *flags])
        return
    with pytest.raises(ConfigError, match=line):
        parse([folder, *flags])


def test_flags(cascades, monkeypatch, tmp_path):
    monkeypatch.setenv("RECLLM_API_KEY", "secret")
    folder = cascades["reclora"].folder
    bundle, settings, key = parse([str(folder), "--max-k", "7", "--gather-ms", "0.5"])
    assert (bundle, key) == (folder, "secret")
    assert settings == Settings(max_k=7, gather_ms=0.5, hosts="localhost,127.0.0.1,[::1]")
    assert parse([str(folder), "--host", "0.0.0.0"])[1].hosts == ""
    with pytest.raises(ConfigError, match="is no bundle"):
        parse([str(tmp_path)])


def test_a_key_is_compared_as_a_digest():
    """Keys of any length are compared by 32 bytes, so that neither length nor beginning shows in the time."""
    service = Service(Settings(), lambda: None, "right")
    service.check_key("right")
    for wrong in (None, "", "righ", "right ", "\udcff"):
        with pytest.raises(Refusal, match="API key is missing or another"):
            service.check_key(wrong)
