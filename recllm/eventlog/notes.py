"""What the choices of a preparation mean for whoever reads the figures, in words."""

from __future__ import annotations

from typing import Any

from recllm.eventlog.config import PrepareConfig


def notes(config: PrepareConfig, metrics: dict[str, Any]) -> list[str]:
    """What the choices mean for whoever reads the figures: one sentence each, none for the paper's."""
    sentences = []
    if "shared_second_share" not in metrics:
        sentences.append(
            "no event has a timestamp: within a user they stand in the order of the file; time intervals, "
            "a split by time and results by the time since the last event are lost"
        )
    if config.split == "last":
        sentences.append("split=last: training events of one user may be later than test events of another")
    if config.split == "user":
        sentences.append("split=user: every user of the validation and test split is cold")
    if config.split == "items":
        sentences.append(
            f"split=items: {metrics['held_items_valid']:,} items validate and {metrics['held_items_test']:,} "
            f"test; {metrics['held_events']:,} events of theirs are in no history, count or text"
        )
    if config.split == "random":
        sentences.append(
            "split=random: test events stand in histories of training samples, and later events train what "
            "earlier ones test; figures are better than those of a split by time"
        )
    if config.split == "given":
        sentences.append(
            f"split=given: {metrics['train_after_held_out']:,} of {metrics['train']:,} training samples have "
            "held-out events in their histories"
        )
    if config.window:
        sentences.append(f"window={config.window}: a history is the last {config.window} events before")
    if config.labels == "liked" and not config.sampled_negatives and metrics["positive_rate_train"] == 1:
        sentences.append("labels=liked: all samples are liked; nothing learns to answer Yes or No here")
    tied = metrics.get("tied_sample_share", 0.0)
    if config.ties == "strict":
        sentences.append(
            f"ties=strict: the histories of {tied:.1%} of the samples have lost events of their own second, "
            f"{metrics['not_sample_same_second']:,} rows are no samples for it"
        )
    elif tied:
        sentences.append(
            f"ties=rows: {tied:.1%} of the samples have an event of their own second as their last one"
        )
    if config.sampled_negatives:
        which = "met or not" if config.draws_met else "that the user had not met"
        sentences.append(
            f"{metrics['sampled_negatives']:,} samples are drawn items {which} "
            f"({config.sampled_by}); nobody is known to dislike them"
        )
    if seen := metrics.get("liked_without_negatives", 0):
        sentences.append(
            f"{seen:,} liked samples have no drawn items beside them: fewer than {config.sampled_negatives} "
            "are new to their users"
        )
    seen_much = {name: metrics.get(f"not_ranking_{name}_seen_much", 0) for name in ("valid", "test")}
    if any(seen_much.values()):
        counts = ", ".join(f"{count:,} {name}" for name, count in seen_much.items())
        sentences.append(
            f"liked samples that are no ranking rows, as fewer than {config.candidates - 1} items are new to "
            f"their users: {counts}"
        )
    sentences += _notes_on_repeats(config, metrics)
    sentences += _notes_on_histories(config, metrics)
    early = metrics.get("events_before_1973", 0)
    late = metrics.get("events_of_the_future", 0)
    if early or late:
        sentences.append(
            f"{early:,} events are of before 1973 and {late:,} of the future, as in no log; see whether "
            "times are in another unit, or stand for a missing one"
        )
    if merged := metrics["dropped_duplicates"]:
        less = metrics["dropped_duplicates_saying_less"]
        sentences.append(
            f"{merged:,} rows were merged into another of their user, item and second: {merged - less:,} are "
            f"like it ({metrics['dropped_duplicates_labeled']:,} with a label), {less:,} have neither rating "
            "nor label"
        )
    if differing := metrics["differing_at_one_moment"]:
        sentences.append(
            f"{differing:,} rows differ from another of their user, item and second in rating or label only; "
            "all of them are events"
        )
    return sentences


def _notes_on_repeats(config: PrepareConfig, metrics: dict[str, Any]) -> list[str]:
    """What samples of an item that was met before do to lists and to drawn dislikes, where there are any."""
    sentences = []
    left_out = {name: metrics.get(f"not_ranking_{name}_met_before", 0) for name in ("valid", "test")}
    if any(left_out.values()):
        shares = ", ".join(
            f"{count / metrics[f'liked_{name}']:.1%} of {metrics[f'liked_{name}']:,} {name}"
            for name, count in left_out.items()
            if count
        )
        sentences.append(
            "repeats=leave_out: liked samples of items that their users had met before are no ranking rows: "
            f"{shares}"
        )
    for name in ("valid", "test"):
        if kept := metrics.get(f"ranking_{name}_met_before", 0):
            rows = metrics[f"ranking_{name}_rows"]
            others = metrics[f"ranking_{name}_candidates_met_before_share"]
            sentences.append(
                f"repeats=keep: the target of {kept / rows:.1%} of {rows:,} {name} ranking rows was met "
                f"before, and {others:.1%} of the other candidates: see the row 'met-before'"
            )
    if share := metrics.get("liked_met_before_share", 0.0):
        sentences.append(
            f"{share:.1%} of the liked samples are of an item that the user had met before, "
            f"{metrics['drawn_met_before_share']:.1%} of the drawn ones: see the row 'met-before'"
        )
    return sentences


def _notes_on_histories(config: PrepareConfig, metrics: dict[str, Any]) -> list[str]:
    """What of the events in histories is disliked or says nothing, and whether anything shows it."""
    sentences = []
    if disliked := metrics.get("unrated_disliked_share", 0.0):
        shown = "nothing shows it (history_labels=hide)"
        if metrics["shows_labels"]:
            shown = "histories mark which are liked and which are not (history_labels=mark)"
        sentences.append(
            f"{disliked:.1%} of the events that stand in histories are disliked and have no rating; {shown}"
        )
    if unlabeled := metrics.get("unrated_unlabeled_share", 0.0):
        sentences.append(
            f"{unlabeled:.1%} of the events that stand in histories have neither rating nor label: "
            "their items stand there alone"
        )
    if hidden := metrics.get("label_beside_rating_share", 0.0):
        sentences.append(
            f"{hidden:.1%} of the events have a rating that others have too whose label is the other one: "
            "histories show the rating alone"
        )
    return sentences
