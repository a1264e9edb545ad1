import polars as pl
import pytest

from recllm.tables import titles


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Grand Day Out, A (1992)", "A Grand Day Out (1992)"),
        ("Bye Bye, Love (1995)", "Bye Bye, Love (1995)"),
        ("Enfer, L' (1994)", "L'Enfer (1994)"),
        ("Hate (Haine, La) (1995)", "Hate (La Haine) (1995)"),
        (
            "Umbrellas of Cherbourg, The (Parapluies de Cherbourg, Les) (1964)",
            "The Umbrellas of Cherbourg (Les Parapluies de Cherbourg) (1964)",
        ),
        ("Wind, The (a.k.a. The Gale) (1994)", "The Wind (a.k.a. The Gale) (1994)"),
        ("X (a.k.a. Other Name, The) (1994)", "X (a.k.a. The Other Name) (1994)"),
        ("Slingshot, The (Kådisbellan ) (1993)", "The Slingshot (Kådisbellan) (1993)"),
        ("Untimely, The", "The Untimely"),
    ],
)
def test_articles_move_to_the_front(stored, read):
    assert pl.select(titles.natural(pl.lit(stored))).item() == read


def test_year_is_the_last_parenthesis():
    frame = pl.DataFrame({"title": ["2001 (1968) (2010) ", "1984", "Blade (1998)"]})
    assert frame.select(titles.year(pl.col("title")))["title"].to_list() == [2010, None, 1998]
