import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest

from recllm.config.merge import KEYS, SCHEMA, TEXTS, check_keys, load_yaml, merge, parse_overrides, value_at
from recllm.errors import ConfigError
from recllm.losses import PREFERENCE_LOSSES
from recllm.pipeline.stage_file import StageFile

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))


def refused(call, *arguments):
    """The error's text, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("stage2.lrr=1", "stage2.fit.lr"),
        ("stage2.fit.lrr=1", "stage2.fit.lr"),
        ("stge2.fit.lr=1", "stage2.fit.lr"),
        ("trainer.device=2", "trainer.devices"),
        ("stage1.epoch=2", "stage1.fit.epochs"),
        ("sed=1", "seed"),
        ("lm.tiny.layer=1", "lm.tiny.layers"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(word, nearest):
    text = refused(parse_overrides, [word])
    assert text.startswith(word.partition("=")[0])
    assert text.endswith(f"the nearest is {nearest}")


def test_a_section_is_no_key_and_the_line_names_one_that_is():
    text = refused(parse_overrides, ["stage2.fit=1"])
    nearest = text.rpartition(" ")[2]
    assert nearest.startswith("stage2.fit.")
    assert nearest in KEYS


def test_an_unknown_key_in_a_file_names_file_and_nearest_key(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("stage2:\n  fit:\n    learning_rat: 1\n  title_shar: 0.5\n")
    text = refused(load_yaml, path)
    assert "stage2.fit.learning_rat" in text
    assert str(path) in text
    assert "stage2.title_share" in refused(check_keys, {"stage2": {"title_shar": 0.5}}, "x")


@pytest.mark.parametrize("content", ["a: [1\n", "- 1\n- 2\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    assert str(path) in refused(load_yaml, path)


@pytest.mark.parametrize("word", ["stage2.fit.lr", "quick", ""])
def test_a_word_without_a_value_is_refused(word):
    assert "key=value" in refused(parse_overrides, [word])


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("stage2.fit.lr=1e-3", 1e-3),
        ("stage2.fit.batch_size=64", 64),
        ("prompt.retrieved=false", False),
        ("stage2.adapter.target_modules=[q_proj]", ["q_proj"]),
        ("stage2.fit.valid_rows=uniform100", "uniform100"),
        ("lm.model.path=null", None),
    ],
)
def test_values_are_read_as_yaml(word, value):
    assert parse_overrides([word]) == {word.partition("=")[0]: value}


WRITTEN = [
    "yes", "no", "on", "OFF", "true", "True", "1", "0", "007", "0x10", "1_000", "12:30", "1.50", "1e3", ".5",
    "+1", "2024-01-01", "buy", "y",
]  # fmt: skip


@pytest.mark.parametrize(
    "key",
    ["source.label.liked", "source.label.disliked", "source.label.history", "source.events.nulls",
     "source.items.lists", "source.users.columns", "prepare.user_fields"],
)  # fmt: skip
def test_a_list_of_texts_holds_what_is_written(tmp_path, key):
    """YAML reads yes as a truth value, 007 as 7 and 1.50 as 1.5; the file of a data set holds texts."""
    assert key in TEXTS
    *sections, last = key.split(".")
    lines = [f"{2 * depth * ' '}{name}:" for depth, name in enumerate(sections)]
    below = 2 * len(sections) * " "
    plain = ", ".join(WRITTEN)
    quoted = ", ".join(f"'{text}'" for text in WRITTEN)
    dashed = "".join(f"\n{below}  - {text}" for text in WRITTEN)
    for number, value in enumerate([f"[{plain}]", f"[{quoted}]", dashed]):
        path = tmp_path / f"{number}.yaml"
        path.write_text("\n".join([*lines, f"{below}{last}: {value}"]) + "\n")
        layer = load_yaml(path)
        assert value_at(layer, key) == WRITTEN
        got = merge([("layer", layer)], {})
        for name in key.split("."):
            got = getattr(got, name)
        assert got == WRITTEN
    assert parse_overrides([f"{key}=[{plain}]"]) == {key: WRITTEN}


@pytest.mark.parametrize(
    "key", ["source.label.column", "source.events.user", "prepare.category", "wording.item", "lm.model.path"]
)
@pytest.mark.parametrize("text", WRITTEN)
def test_a_text_is_what_is_written(tmp_path, key, text):
    """A column may be named on, 007 or 1.50."""
    *sections, last = key.split(".")
    above = "".join(f"{2 * depth * ' '}{name}:\n" for depth, name in enumerate(sections))
    for number, value in enumerate([text, f"'{text}'"]):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"{above}{2 * len(sections) * ' '}{last}: {value}\n")
        assert value_at(load_yaml(path), key) == text
    assert parse_overrides([f"{key}={text}"]) == {key: text}


def test_texts_within_lists_of_lists_are_what_is_written(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("source:\n  items:\n    aliases: [[on, 007], [1.50, x]]\n")
    assert load_yaml(path)["source"]["items"]["aliases"] == [["on", "007"], ["1.50", "x"]]


def test_what_is_no_text_is_read_as_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "source: {events: {rating_scale: [1, 5.0], decimal_comma: yes, nulls: [~, 'x']}}\nprompt:\n"
    )
    layer = load_yaml(path)
    assert layer["source"]["events"] == {
        "rating_scale": [1, 5.0],
        "decimal_comma": True,
        "nulls": [None, "x"],
    }
    assert layer["prompt"] is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage2.fit.lr", "fast"),
        ("stage2.fit.batch_size", 1.5),
        ("prompt.retrieved", "perhaps"),
        ("stage2.adapter.target_modules", 3),
        ("stage2.fit.epochs", None),
    ],
)
def test_a_wrong_type_names_key_and_value(key, value):
    text = refused(merge, [], {key: value})
    assert key in text
    assert str(value) in text


def test_a_wrong_type_in_a_layer_names_key_and_source():
    text = refused(merge, [("conf/mine.yaml", {"stage2": {"fit": {"lr": "fast"}}})], {})
    assert "stage2.fit.lr" in text
    assert "conf/mine.yaml" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage2.fit.epochs", 0),
        ("stage2.fit.lr", -1),
        ("stage2.fit.batch_size", 0),
        ("stage2.fit.warmup", 1),
        ("stage2.fit.precision", "fp8"),
        ("stage2.title_share", 1.0),
        ("stage3.loss", "softmax"),
        ("stage3.task", "pairs"),
        ("stage3.gate", "title"),
        ("stage3.sft_weight", -0.1),
        ("stage3.label_smoothing", 0.5),
        ("stage2.adapter.kind", "qlora"),
        ("stage2.adapter.init", "milo"),
        ("stage2.adapter.gate_input", "item"),
        ("stage2.adapter.mixture", "sum"),
        ("stage2.adapter.gate", "none"),
        ("stage2.adapter.gate_temperature", 0),
        ("stage2.adapter.num_meta", 0),
        ("stage1.objective", "regress"),
        ("stage1.recent", 0),
        ("stage1.retrieved", -1),
        ("stage1.negatives", 0),
        ("stage1.crm.name", "dinn"),
        ("stage3.negatives", 0),
        ("stage3.beta", 0),
        ("stage3.rows", 0),
        ("stage3.fit.valid_rows", "uniform100"),  # nothing would read it
        ("prompt.history", 0),
        ("prepare.ties", "loose"),
        ("retrieval.vectors", "images"),
        ("retrieval.k", 0),
        ("retrieval.metric", "dot"),
        ("retrieval.pooling", "first"),
        ("subsample", "a tenth"),
        ("evaluate.ctr_rows", "some"),
        ("trainer.devices", 0),
        ("trainer.checkpoint_every", 0),
    ],
)
def test_out_of_range_is_refused_by_a_line_with_key_and_value(key, value):
    text = refused(merge, [], {key: value})
    assert key.rpartition(".")[2] in text
    assert str(value) in text


@pytest.mark.parametrize("learned", [{"stage3.loss": "sft"}, {"stage3.sft_weight": 0.1}])
def test_a_title_is_not_gated_by_its_own_item_where_its_likelihood_is_learned(learned):
    text = refused(merge, [], {"stage3.gate": "item", **learned})
    assert "stage3.gate=item is not usable; wanted list" in text
    merge([], {"stage3.gate": "item"})
    merge([], learned)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_merges_with_the_schema(path):
    content = load_yaml(path)
    config = dataclasses.asdict(merge([(str(path), content)], {}))

    def agrees(part, whole):
        for key, value in part.items():
            if isinstance(value, dict):
                agrees(value, whole[key])
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                for one, other in zip(value, whole[key], strict=True):
                    agrees(one, other)
            else:
                assert whole[key] == value, key

    agrees(content, config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_value_has_a_comment(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        bare = re.sub(r'"[^"]*"', '""', line)
        if re.match(r'\s*[\w"]+:\s+[^\s#]', bare):
            assert re.search(r"\s#\s\S", bare), line


def test_later_layers_win_and_the_command_line_wins_over_all():
    def fit(**values):
        return {"stage2": {"fit": values}}

    layers = [
        ("base", fit(lr=1.0, epochs=1.0, batch_size=1, patience=1)),
        ("dataset", fit(lr=2.0, epochs=2.0, batch_size=2)),
        ("experiment", fit(lr=3.0, epochs=3.0)),
    ]
    got = merge(layers, {"stage2.fit.lr": 4.0}).stage2.fit
    assert (got.lr, got.epochs, got.batch_size, got.patience) == (4.0, 3.0, 2, 1)
    assert got.clip == SCHEMA["stage2"]["fit"]["clip"]


def test_the_result_is_frozen_all_the_way_down():
    config = merge([], {})
    for owner, name in ((config, "seed"), (config.stage2, "title_share"), (config.stage2.fit, "lr")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, 1)


def test_a_stage_sees_its_sections_and_execution_keys_only():
    file = StageFile("stage1", "demo", "stage1/sim", "", {}, {"seed": 3, "stage1": {"recent": 7}})
    config = file.sections(["trainer.devices=2"])
    assert (config.seed, config.stage1.recent, config.trainer.devices) == (3, 7, 2)
    assert config.stage2 is None
    assert config.lm is None
    text = refused(file.sections, ["stage1.recent=8"])
    assert "ARGS=stage1.recent=8" in text


def test_the_words_checked_here_are_those_that_the_rooms_know():
    from recllm.crm import models
    from recllm.crm.config import CrmName
    from recllm.reclora.config import GATE_INPUTS, GATES, INITS, MIXTURES

    words = {"mixture": MIXTURES, "gate": GATES, "gate_input": GATE_INPUTS, "init": INITS}
    for key, values in words.items():
        for value in values:
            merge([], {f"stage2.adapter.{key}": value})
    assert sorted(get_args(CrmName)) == sorted(models._MODELS)


def test_every_preference_loss_has_a_name_that_is_accepted():
    for name in PREFERENCE_LOSSES:
        assert merge([], {"stage3.loss": name}).stage3.loss == name


@pytest.mark.parametrize(
    "text", ["{title}", "{title}\nGenre: {genre}", "[{title}] {year", "{title}: {genre}"]
)
def test_a_text_is_taken_as_it_is_though_it_reads_as_something_else(text):
    """Format strings begin with braces, which are a mapping in YAML."""
    assert parse_overrides([f"dataset.description={text}"]) == {"dataset.description": text}
    assert merge([], parse_overrides([f"dataset.description={text}"])).dataset.description == text
