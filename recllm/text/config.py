"""What a prompt shows, and in which words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recllm.errors import check
from recllm.text.formats import Format


@dataclass(frozen=True)
class PromptConfig:
    """What a prompt shows."""

    history: int = 10
    """Short history: events in a prompt."""
    retrieved: bool = True
    """Whether a Yes/No prompt shows the events nearest to the target (true) or the most recent (false)."""
    statistics: bool = False
    """Whether a Yes/No prompt says how often user, item and its category were met before, and how liked."""
    list_candidates: bool = False
    """Whether a next-title prompt lists the candidates; a tiny LM does not learn to read the list."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check(self.history >= 1, "prompt.history", self.history, "at least 1 event")


@dataclass(frozen=True)
class Wording:
    r"""The words of a dataset's prompts. Sentences end in "\n", so that every title starts a line."""

    profile: str = ""
    r"""Format string over the user's columns, for example "The user is a {gender}.\n"; empty: no profile."""
    intro: str = "The user watched these films in this order, and rated them:\n"
    """Sentence before the history."""
    item: str = "{title}"
    """Format string of a film's name, filled with its title."""
    rating: str = " ({rating} stars)\n"
    """Format string behind a film of the history, filled with the text of its rating level."""
    liked: str = " (liked)\n"
    """Text behind a film of the history that was liked and has no rating (`prepare.history_labels`)."""
    disliked: str = " (not liked)\n"
    """Text behind one that was not liked and has no rating."""
    question: str = "Will the user like this film?\n"
    """Sentence before the film that is asked about."""
    known: str = (
        "\nLiked before:{user_likes} of{user_count}, of this kind{category_likes} of{category_count}; "
        "by others{item_likes} of{item_count}."
    )
    """Format string behind that film with `prompt.statistics`; each statistic brings the space before it."""
    ask: str = "\nAnswer yes or no:"
    """What follows; the answer comes next."""
    yes: str = " Yes"
    """Answer for a liked film, with its leading space, which is left out where a chat template ends in a line
    break."""
    no: str = " No"
    """Answer for any other film, with its leading space."""
    next: str = "The next film that the user will like:\n"
    """Sentence before the title that is to be completed."""
    choose: str = "It is one of these films:\n"
    """Sentence before a list of candidates."""

    def __post_init__(self) -> None:
        """Check what the texts of items and ratings are filled with."""
        for key, template, column in (("item", self.item, "title"), ("rating", self.rating, "rating")):
            Format.of(template, [column], f"wording.{key}")
        wanted = f"another text than wording.disliked={self.disliked!r}"
        check(self.liked != self.disliked, "wording.liked", repr(self.liked), wanted)

    def names(self, titles: Iterable[str | None]) -> list[str]:
        """Texts of items with these titles; empty where there is no title."""
        form = Format.of(self.item, ["title"], "wording.item")
        return [form.text({"title": title}) if title else "" for title in titles]

    def ratings(self, levels: Sequence[str], shows_labels: bool = False) -> list[str]:
        """Texts of the rating codes: code 0 (no rating) is a line break, code c is level c - 1.

        With `shows_labels` there are two more, of disliked and liked events without a rating.
        """
        form = Format.of(self.rating, ["rating"], "wording.rating")
        labels = [self.disliked, self.liked] if shows_labels else []
        return ["\n", *(form.text({"rating": level}) for level in levels), *labels]
