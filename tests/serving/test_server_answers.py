"""The service answers as the recommender does, whoever else asks at the same time; one failure stays one."""

import logging
import math

import polars as pl
import pytest

from recllm.serving.server import batching
from recllm.serving.server.messages import Health, Info, RecommendAnswer, ScoreAnswer
from tests.serving.live import lines, live, served, until

HISTORY = [{"item": 5, "rating": 5.0}, {"item": 7, "rating": 1.0}]


@pytest.fixture(scope="module")
def service(recommender):
    """Popularity -> SIM -> RecLoRA."""
    with live(lambda: served(recommender)) as it:
        yield it


@pytest.fixture(scope="module")
def retrieving_service(retrieving):
    """Retriever -> SIM."""
    with live(lambda: served(retrieving)) as it:
        yield it


def same(answer, table, names):
    """Whether a user's answer over HTTP is the recommender's table of him, scores within 1e-5."""
    assert answer["error"] is None
    lines = table.to_dicts()
    assert [item["item"] for item in answer["items"]] == [line["item"] for line in lines]
    for item, line in zip(answer["items"], lines, strict=True):
        assert item["title"] == line["title"]
        assert math.isclose(item["score"], line["score"], abs_tol=1e-5)
        assert item.get("rank") == line.get("rank")
        for name in names:
            if line[name] is None:
                assert item["steps"][name] is None
            else:
                assert math.isclose(item["steps"][name], line[name], abs_tol=1e-5)


def test_lists_are_the_recommenders(service, recommender):
    users = [{"user": 1}, {"user": "900", "history": HISTORY}, {"user": "nobody"}]
    response = service.post("/recommend", {"users": users, "k": 5})
    assert response.status_code == 200
    answer = RecommendAnswer.model_validate(response.json())
    assert answer.bundle == "first"
    assert [user.user for user in answer.answers] == [1, "900", "nobody"]
    assert [user.source for user in answer.answers] == ["cascade", "cascade", "popularity"]
    histories = pl.DataFrame([{"user": 900, **event} for event in HISTORY])
    table = recommender.recommend([1, 900, 901], k=5, histories=histories)
    for got, user in zip(response.json()["answers"], [1, 900, 901], strict=True):
        same(got, table.filter(pl.col("user") == user), recommender.cascade.names)


def test_scores_are_the_recommenders_and_an_unknown_item_fails_alone(service, recommender):
    users = [{"user": 1, "items": [5, 888888, 6]}, {"user": "new", "items": ["5"], "history": HISTORY}]
    response = service.post("/score", {"users": users})
    assert response.status_code == 200
    ScoreAnswer.model_validate(response.json())
    first, second = response.json()["answers"]
    unknown = first["items"].pop(1)
    assert unknown["score"] is None
    assert unknown["error"] == "the item is not in the log; wanted one of its items"
    same(first, recommender.score(pl.DataFrame({"user": [1, 1], "item": [5, 6]})), ["crm", "lm"])
    histories = pl.DataFrame([{"user": 900, **event} for event in HISTORY])
    alone = recommender.score(pl.DataFrame({"user": [900], "item": [5]}), histories=histories)
    assert math.isclose(second["items"][0]["score"], alone["score"][0], abs_tol=1e-5)


@pytest.fixture(scope="module")
def requests(recommender):
    """Requests that differ in all that may differ."""
    log = recommender.log
    at = int(log.timestamp[log.offsets[recommender.maker.users.dense([3])[0]] + 10])
    items = recommender.recommend([1], k=9, filter_viewed=False)["item"].to_list()
    return [
        {"users": [{"user": 1}], "k": 3},
        {"users": [{"user": 2}], "k": 40},
        {"users": [{"user": 3, "time": at}], "k": 4},
        {"users": [{"user": 1}], "k": 9, "filter_viewed": False},
        {"users": [{"user": 2}], "k": 5, "items_to_recommend": items},
        {"users": [{"user": 40}], "k": 5, "items_to_recommend": items[:2], "filter_viewed": False},
        {"users": [{"user": 1}], "k": 5, "exclude": items[:3]},
        {"users": [{"user": 4, "history": HISTORY}, {"user": "5"}], "k": 6},
        {"users": [{"user": "new", "history": HISTORY}], "k": 6},
        {"users": [{"user": "nobody"}], "k": 7},
        {"users": [{"user": "nobody"}], "k": 2, "items_to_recommend": items[:4]},
        {"users": [{"user": "nobody"}], "k": 2, "on_unknown": "error"},
    ]


@pytest.mark.parametrize("name", ["service", "retrieving_service"])
def test_requests_that_wait_together_go_through_the_model_at_once(name, request, requests):
    """13 users, with lengths, filters, times and rules of their own: one batch, the answers of each alone."""
    it = request.getfixturevalue(name)
    alone = [it.post("/recommend", body).json() for body in requests]
    batches = it.metric("recllm_batch_size_count", kind="lists")
    asks = [lambda body=body: it.post("/recommend", body).json() for body in requests]
    together = it.in_turn(asks, [len(body["users"]) for body in requests])
    assert it.metric("recllm_batch_size_count", kind="lists") == batches + 1
    names = it.service.current.recommender.cascade.names
    for one, both in zip(alone, together, strict=True):
        for before, after in zip(one["answers"], both["answers"], strict=True):
            assert after["source"] == before["source"]
            if not before["items"]:
                assert after == before
                continue
            table = pl.DataFrame([{**item, **item["steps"]} for item in before["items"]])
            same(after, table.drop("steps"), names)
    lengths = [len(answer["answers"][0]["items"]) for answer in together]
    assert lengths[:4] == [3, 40, 4, 9]
    assert lengths[-3:] == [7, 2, 0]


def test_a_long_request_is_answered_over_several_batches(recommender):
    with live(lambda: served(recommender), batch_users=3) as it:
        users = [{"user": user} for user in range(1, 9)]
        answers = it.post("/recommend", {"users": users, "k": 2}).json()["answers"]
        assert [answer["user"] for answer in answers] == list(range(1, 9))
        assert it.metric("recllm_batch_size_count", kind="lists") == 3
        one = it.post("/recommend", {"users": users[7:], "k": 2}).json()["answers"][0]
        assert [item["item"] for item in one["items"]] == [item["item"] for item in answers[7]["items"]]


def test_a_short_request_waits_for_no_more_than_the_batch_at_work(recommender, monkeypatch):
    """8 users of one request and then 1 of another, 3 a batch: the second one is in the first batch."""
    batches = []
    answer_lists = batching.answer_lists

    def remember(recommender, questions):
        batches.append([question.user for question in questions])
        return answer_lists(recommender, questions)

    monkeypatch.setattr(batching, "answer_lists", remember)
    with live(lambda: served(recommender), batch_users=3) as it:
        asked = [list(range(1, 9)), [20]]
        bodies = [{"users": [{"user": user} for user in users], "k": 2} for users in asked]
        answers = it.in_turn(
            [lambda body=body: it.post("/recommend", body).json() for body in bodies], [8, 1]
        )
        assert [[answer["user"] for answer in one["answers"]] for one in answers] == asked
    assert batches == [[1, 20, 2], [3, 4, 5], [6, 7, 8]]


def test_lists_and_pairs_take_turns_in_one_queue(service):
    bodies = [
        ("/recommend", {"users": [{"user": 1}], "k": 2}),
        ("/score", {"users": [{"user": 1, "items": [5]}]}),
        ("/recommend", {"users": [{"user": 2}], "k": 2}),
    ]
    answers = service.in_turn([lambda body=body: service.post(*body) for body in bodies], [1, 1, 1])
    assert [answer.status_code for answer in answers] == [200] * 3
    assert "rank" not in answers[1].json()["answers"][0]["items"][0]


def test_a_history_beyond_its_time_fails_alone(service):
    late = {"user": 2, "time": 1000, "history": [{"item": 5, "timestamp": 2000}]}
    response = service.post("/recommend", {"users": [{"user": 1}, late, {"user": 3}], "k": 2})
    first, second, third = response.json()["answers"]
    assert (len(first["items"]), second["items"], len(third["items"])) == (2, [], 2)
    assert "wanted events of before, or a later time" in second["error"]
    scores = service.post("/score", {"users": [{**late, "items": [5]}, {"user": 1, "items": [5]}]}).json()
    assert "wanted events of before" in scores["answers"][0]["items"][0]["error"]
    assert scores["answers"][1]["items"][0]["error"] is None


def test_every_model_answers_before_a_bundle_is_ready(recommender, monkeypatch):
    lm = recommender.parts.lm
    asked = []
    for name in ("scores", "answers"):
        answer = getattr(lm, name)
        monkeypatch.setattr(
            lm, name, lambda *given, name=name, answer=answer: asked.append(name) or answer(*given)
        )
    served(recommender).warm()
    assert asked == ["scores", "answers"]
    assert recommender.counts["without_history"] == 0


def test_times_may_be_text(service):
    at = 978_300_000
    texts = ["2000-12-31T22:00:00", "2000-12-31T22:00:00+00:00", str(at), at]
    lists = [
        service.post("/recommend", {"users": [{"user": 1, "time": time}], "k": 3}).json()["answers"]
        for time in texts
    ]
    assert all(one == lists[0] for one in lists)


def test_a_failing_batch_is_answered_request_by_request(service, monkeypatch, caplog):
    """A bug in the model's code fails the request that meets it, and is logged without what it says."""
    answer_lists = batching.answer_lists

    def fail(recommender, questions):
        if any(question.user == "secret-name" for question in questions):
            raise KeyError("secret-name has no such thing")
        return answer_lists(recommender, questions)

    monkeypatch.setattr(batching, "answer_lists", fail)
    users = ["secret-name", 1, 2]
    with caplog.at_level(logging.INFO, "recllm.serving"):
        asks = [lambda user=user: service.post("/recommend", {"users": [{"user": user}]}) for user in users]
        answers = service.in_turn(asks, [1, 1, 1])
    assert [answer.status_code for answer in answers] == [500, 200, 200]
    assert answers[0].json() == {"error": "the service failed at this request; its log says where"}
    failures = [line for line in lines(caplog) if line["event"] == "a request failed"]
    assert failures[0]["exception"] == "KeyError"
    assert any("fail" in call for call in failures[0]["calls"])
    assert "secret-name" not in str(lines(caplog))


def test_a_client_that_has_gone_is_taken_out_of_the_queue(service):
    import socket

    host, port = service.url.removeprefix("http://").split(":")
    body = b'{"users": [{"user": 1}, {"user": 2}]}'
    head = b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    dropped = service.metric("recllm_dropped_total")
    with service.blocked():
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: service.waiting == 2)
        until(lambda: service.waiting == 0)
    assert service.metric("recllm_dropped_total") == dropped + 2
    assert service.metric("recllm_requests_total", route="/recommend", method="POST", status="499") == 1


def test_examples_of_the_openapi_are_answered_and_answers_are_what_it_says(service):
    schema = service.client.get("/openapi.json").json()
    for path, model in (("/recommend", RecommendAnswer), ("/score", ScoreAnswer)):
        name = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        (example,) = schema["components"]["schemas"][name.rsplit("/", 1)[-1]]["examples"]
        response = service.post(path, example)
        assert response.status_code == 200
        model.model_validate(response.json())
        (shown,) = schema["components"]["schemas"][model.__name__]["examples"]
        model.model_validate(shown)
    Health.model_validate(service.client.get("/health").json())
    info = Info.model_validate(service.client.get("/info").json())
    assert info.steps == ["popularity", "crm", "lm"]
    assert info.users == 40
    assert info.data_until is not None


def test_logs_and_metrics_say_nothing_of_users(service, caplog):
    with caplog.at_level(logging.INFO, "recllm.serving"):
        service.post("/recommend", {"users": [{"user": "jane-doe", "history": HISTORY}], "k": 2})
        service.client.request("JANE", "/recommend")
        service.client.get("/users/jane-doe?secret=1")
        # A line follows its answer.
        until(lambda: any(line.get("route") == "unmatched" for line in lines(caplog)))
    told = [line for line in lines(caplog) if line.get("route") != "/info"]  # asked by the fixture before
    assert [line["route"] for line in told if line["event"] == "request"] == [
        *("/recommend", "/recommend", "unmatched")
    ]
    assert "jane" not in str(told)
    assert set(told[0]) == {"time", "level", "event", "route", "method", "status", "ms"}
    metrics = service.client.get("/metrics").text
    assert "jane" not in metrics.lower()
    assert 'recllm_lists_total{source="cascade"}' in metrics
    assert "recllm_ready 1.0" in metrics
