"""The languages of prompts, by the model that filters rows by language; lent to the evaluation actor."""

from __future__ import annotations

from collections.abc import Sequence


def identify_languages(texts: Sequence[str]) -> list[str]:
    """The code of the language of each text (`ingest.language`): `und` where nothing can be told."""
    import pyarrow as pa

    from aifactory.ingest.language import languages

    # Lone surrogates are no text to Arrow.
    plain = [text.encode("utf-8", "replace").decode() for text in texts]
    return [str(code) for code in languages(pa.array(plain, pa.string())).codes.to_pylist()]
