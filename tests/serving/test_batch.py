"""Files in and out: a line an input, errors in their own lines, parts that a second run goes on from."""

import json

import polars as pl
import pytest

from recllm.serving import batch
from recllm.serving.batch import Options, recommend_file, score_file
from recllm.serving.recommender import Recommender


@pytest.fixture
def quiet():
    lines = []
    return lines


def answers_to(recommender, folder, lines):
    """What each of some JSON lines is answered, one item a list."""
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    out = folder / "out.jsonl"
    failed = recommend_file(recommender, folder / "in.jsonl", out, Options(k=1), None, lambda line: None)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert failed == sum(answer["error"] is not None for answer in answers)
    return answers


def test_parquet_in_and_out(recommender, tmp_path, quiet):
    users = [1, 2, 3, 4, 5]
    pl.DataFrame({"user": users}).write_parquet(tmp_path / "users.parquet")
    out = tmp_path / "out.parquet"
    assert (
        recommend_file(recommender, tmp_path / "users.parquet", out, Options(k=5), None, quiet.append, 2) == 0
    )
    table = pl.read_parquet(out)
    wanted = recommender.recommend(users, k=5)
    assert table["item"].to_list() == wanted["item"].to_list()
    assert table["error"].null_count() == table.height
    assert not list(tmp_path.glob("*.parts"))
    assert re_eta(quiet[0])


def re_eta(line):
    return "of 5 inputs" in line and "s left" in line


def test_csv_with_lines_that_cannot_be_answered(recommender, tmp_path, quiet):
    (tmp_path / "users.csv").write_text("user,time\n1,\n2,never\n1,2020-01-01\nnobody,\n3,2003-01-01\n")
    out = tmp_path / "out.csv"
    options = Options(k=3, on_unknown="error")
    failed = recommend_file(recommender, tmp_path / "users.csv", out, options, None, quiet.append, 3)
    assert failed == 3
    table = pl.read_csv(out, infer_schema=False)
    errors = table.filter(pl.col("error").is_not_null())
    assert errors["user"].to_list() == ["2", "1", "nobody"]
    assert "never" in errors["error"][0]
    assert "more than once" in errors["error"][1]
    assert "not in the log" in errors["error"][2]
    assert errors["item"].null_count() == 3
    answered = table.filter(pl.col("error").is_null())
    assert answered["user"].to_list() == ["1"] * 3 + ["3"] * 3


def test_json_lines_with_histories(recommender, tmp_path, quiet):
    lines = [
        '{"user": 1}',
        '{"user": "stranger", "history": [5, {"item": 7, "rating": 5, "timestamp": 1000}]}',
        "not json",
        '{"name": 3}',
        '{"user": 2, "time": 500, "history": [{"item": 5, "timestamp": 600}]}',
        '{"user": 3, "history": [{"rating": 3}]}',
        '{"user": 4}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.jsonl"
    failed = recommend_file(recommender, tmp_path / "in.jsonl", out, Options(k=2), None, quiet.append, 4)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 7
    assert failed == 4
    wanted = ["", "", "no JSON", "no user", "second 600", "cannot be read", ""]
    for answer, error in zip(answers, wanted, strict=True):
        if error:
            assert error in answer["error"]
            assert answer["output"] is None
        else:
            assert answer["error"] is None
            assert [line["rank"] for line in answer["output"]] == [1, 2]
    assert answers[0]["input"] == {"user": 1}
    assert answers[2]["input"] == "not json"
    assert answers[1]["output"][0]["crm"] is not None


def test_a_second_run_goes_on_behind_what_is_done(recommender, tmp_path, monkeypatch, quiet):
    pl.DataFrame({"user": [1, 2, 3, 4, 5, 6]}).write_parquet(tmp_path / "users.parquet")
    out = tmp_path / "out.parquet"
    write = batch._write

    def full_disk(path, *rest):
        if path.name == "part-000002.parquet":
            raise OSError(28, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(batch, "_write", full_disk)
    arguments = (recommender, tmp_path / "users.parquet", out, Options(k=2), None, quiet.append, 2)
    with pytest.raises(OSError, match="No space left"):
        recommend_file(*arguments)
    assert not out.exists()
    kept = sorted(path.name for path in (tmp_path / "out.parquet.parts").iterdir())
    assert kept == ["part-000000.parquet", "part-000001.parquet", "parts.json"]
    written = []

    def remember(path, *rest):
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(batch, "_write", remember)
    recommend_file(*arguments)
    assert written == ["part-000002.parquet"]
    assert pl.read_parquet(out)["user"].to_list() == [user for user in range(1, 7) for _ in range(2)]


def test_other_options_begin_anew(recommender, tmp_path, quiet):
    folder = tmp_path / "out.csv.parts"
    folder.mkdir()
    (folder / "parts.json").write_text('{"made_of": "other", "parts": {"0": {"inputs": 1, "errors": 0}}}')
    (tmp_path / "users.csv").write_text("user\n1\n")
    recommend_file(
        recommender, tmp_path / "users.csv", tmp_path / "out.csv", Options(k=1), None, quiet.append
    )
    assert pl.read_csv(tmp_path / "out.csv").height == 1


def test_another_model_of_the_same_name_begins_anew(recommender, tmp_path, monkeypatch, quiet):
    (tmp_path / "users.csv").write_text("user\n1\n2\n")
    arguments = (tmp_path / "users.csv", tmp_path / "out.csv", Options(k=1), None, quiet.append, 1)
    remade = Recommender(recommender.parts, recommender.name, recommender.dataset, "remade")
    assert recommender.version not in ("", "remade")
    written = []
    write = batch._write

    def full_disk(path, *rest):
        if path.name == "part-000001.csv" and len(written) == 1:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(batch, "_write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        recommend_file(recommender, *arguments)
    recommend_file(remade, *arguments)
    assert written == ["part-000000.csv", "part-000000.csv", "part-000001.csv"]


@pytest.mark.parametrize("time", ["[1]", "1e400", "1e30", '"1e3"', "true", "{}"])
def test_a_time_that_is_none_spoils_its_own_line_only(recommender, tmp_path, time):
    lines = [
        f'{{"user": 1, "time": {time}}}',
        f'{{"user": 2, "history": [{{"item": 5, "timestamp": {time}}}]}}',
        '{"user": 3}',
    ]
    answers = answers_to(recommender, tmp_path, lines)
    assert [answer["error"] is None for answer in answers] == [False, False, True]


def test_numbers_and_nesting_beyond_measure_spoil_their_own_line_only(recommender, tmp_path):
    lines = [
        f'{{"user": 1, "history": [{{"item": 5, "rating": {"9" * 400}}}]}}',
        "[" * 100_000,
        '{"user": 3}',
    ]
    answers = answers_to(recommender, tmp_path, lines)
    assert [answer["error"] is None for answer in answers] == [False, False, True]


def test_a_line_with_a_history_beside_a_file_of_them(recommender, tmp_path, quiet):
    (tmp_path / "in.jsonl").write_text('{"user": 901, "history": [5]}\n{"user": 902}\n')
    (tmp_path / "events.csv").write_text("user,item\n901,5\n902,6\n")
    out = tmp_path / "out.jsonl"
    failed = recommend_file(
        recommender, tmp_path / "in.jsonl", out, Options(k=1), tmp_path / "events.csv", quiet.append
    )
    assert failed == 1
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert "wanted one of the two" in answers[0]["error"]
    assert answers[1]["output"][0]["crm"] is not None


def test_pairs_are_scored(recommender, tmp_path, quiet):
    (tmp_path / "pairs.csv").write_text("user,item\n1,5\n1,777777\n2,6\n")
    failed = score_file(recommender, tmp_path / "pairs.csv", tmp_path / "out.jsonl", None, None, quiet.append)
    assert failed == 1
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["error"] is None for answer in answers] == [True, False, True]
    wanted = recommender.score(pl.DataFrame({"user": [1, 2], "item": [5, 6]}))
    assert [answers[0]["output"][0]["score"], answers[2]["output"][0]["score"]] == pytest.approx(
        wanted["score"].to_list(), abs=1e-5
    )


def test_histories_of_a_file(recommender, tmp_path, quiet):
    pl.DataFrame({"user": [901, 1], "item": [5, 6], "rating": [5.0, 5.0]}).write_parquet(
        tmp_path / "events.parquet"
    )
    (tmp_path / "users.csv").write_text("user\n901\n902\n")
    out = tmp_path / "out.parquet"
    arguments = (tmp_path / "users.csv", out, Options(k=3), tmp_path / "events.parquet", quiet.append)
    recommend_file(recommender, *arguments)
    table = pl.read_parquet(out)
    assert table.filter(pl.col("user") == "901")["crm"].null_count() == 0
    assert table.filter(pl.col("user") == "902")["crm"].null_count() == 3


@pytest.mark.parametrize(
    ("name", "content", "out", "line"),
    [
        ("in.txt", "user\n1\n", "out.csv", "in.txt ends with '.txt'"),
        ("in.csv", "name\n1\n", "out.csv", "columns name; wanted one named user"),
        ("in.csv", "user\n1\n", "out.xls", "out.xls ends with '.xls'"),
        ("in.csv", None, "out.csv", "in.csv is not there"),
        ("in.csv", "user\n", "out.parquet", "in.csv has no line to answer"),
        ("in.parquet", "user\n1\n", "out.csv", "in.parquet cannot be read"),
    ],
)
def test_files_that_cannot_be_used(recommender, tmp_path, name, content, out, line):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=line):
        recommend_file(recommender, tmp_path / name, tmp_path / out, Options())
    with pytest.raises(ValueError, match="k is 0"):
        recommend_file(recommender, tmp_path / name, tmp_path / out, Options(k=0))
