from stages import document

GRAPH = {
    "tables": {"ground"},
    "eventlog": {"tables", "ground"},
    "crm": {"eventlog", "tables"},
    "lm": {"eventlog"},
    "config": {"crm", "lm", "tables"},
    "stages": {"config", "lm"},
    "data": {"tables"},
    "bench": set(),
}


def test_levels_are_one_above_what_a_room_imports_and_what_is_run_is_on_top():
    levels = document.levels(GRAPH)
    assert [levels[room] for room in ("tables", "eventlog", "crm", "lm", "config")] == [0, 1, 2, 2, 3]
    assert levels["stages"] == levels["data"] == levels["bench"] == 4


def test_arrows_that_follow_from_others_are_left_out():
    assert document.direct_arrows(GRAPH) == [
        ("eventlog", "tables"),
        ("crm", "eventlog"),
        ("lm", "eventlog"),
        ("config", "crm"),
        ("config", "lm"),
        ("stages", "config"),
        ("data", "tables"),
    ]


def test_imports_are_found_wherever_they_stand(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import os\nfrom recllm import paths\n\ndef f():\n    from recllm.crm.din import DIN\n")
    assert list(document.imported_modules(file)) == ["os", "recllm.paths", "recllm.crm.din"]


def test_an_unknown_document_is_one_line(capsys):
    assert document.main(["poster"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: got poster, wanted some of results, architecture")
    assert error.count("\n") == 1
