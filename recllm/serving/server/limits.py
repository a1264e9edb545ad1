"""The service's own limits in its OpenAPI: what they refuse is no valid request by the schema either."""

from __future__ import annotations

from typing import Any

from recllm.serving.server.settings import Settings


def write_limits(schema: dict[str, Any], settings: Settings) -> None:
    """Put limits where the schema names what they are about.

    Args:
        schema: of OpenAPI, changed in place.
        settings: the limits.
    """
    lists = {
        ("RecommendRequest", "users"): settings.max_users,
        ("RecommendRequest", "items_to_recommend"): settings.max_items,
        ("RecommendRequest", "exclude"): settings.max_items,
        ("ScoreRequest", "users"): settings.max_users,
        ("OneUser", "history"): settings.max_history,
        ("UserItems", "history"): settings.max_history,
        ("UserItems", "items"): settings.max_items,
        ("EventsRequest", "events"): settings.max_events,
        ("ExplainRequest", "history"): settings.max_history,
        ("ExplainRequest", "removed"): settings.max_history,
    }
    messages = schema["components"]["schemas"]
    for (message, name), most in lists.items():
        of_list = messages[message]["properties"][name]
        choices = of_list.get("anyOf", [of_list])
        next(choice for choice in choices if choice.get("type") == "array")["maxItems"] = most
    for message in ("RecommendRequest", "ExplainRequest"):
        messages[message]["properties"]["k"]["maximum"] = settings.max_k
    (history,) = (path for name, path in schema["paths"].items() if name.endswith("/history"))
    limit = next(each for each in history["get"]["parameters"] if each["name"] == "limit")
    limit["schema"]["maximum"] = settings.max_history
