"""Film titles as people write them: "Matrix, The (1999)", stored so for sorting, is "The Matrix (1999)"."""

import polars as pl

_ARTICLES = "The|An|A|Le|La|Les|El|Los|Las|Il|Lo|Gli|Der|Das|Die|Den|Det|Une|Un|Una|O"
_ELIDED = "L'"  # takes no blank


def natural(titles: pl.Expr) -> pl.Expr:
    """Moves trailing articles to the front, in the title and in its other titles in parentheses.

    Args:
        titles: strings like `Umbrellas of Cherbourg, The (Parapluies de Cherbourg, Les) (1964)`.

    Returns:
        Strings like `The Umbrellas of Cherbourg (Les Parapluies de Cherbourg) (1964)`.
    """
    aka = r"((?:a\.k\.a\. )?)"
    return (
        titles.str.strip_chars()
        .str.replace_all(r"\s+", " ")
        .str.replace_all(" )", ")", literal=True)
        .str.replace(rf"^([^(]+), ({_ARTICLES})( \(|$)", "$2 $1$3")
        .str.replace(rf"^([^(]+), ({_ELIDED})( \(|$)", "$2$1$3")
        .str.replace_all(rf"\({aka}([^()]+), ({_ARTICLES})\)", "($1$3 $2)")
        .str.replace_all(rf"\({aka}([^()]+), ({_ELIDED})\)", "($1$3$2)")
    )


def year(titles: pl.Expr) -> pl.Expr:
    """The year at the end of a title, e.g. 1999 of `The Matrix (1999)`; null where there is none. Int32."""
    return titles.str.extract(r"\((\d{4})\)\s*$").cast(pl.Int32)
