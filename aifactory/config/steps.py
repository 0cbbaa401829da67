"""The steps of `ingest.steps`: what is done to the rows of the sources."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from aifactory.config.section import Section


class StepSection(Section):
    """What is done to rows."""

    CHANGES_TEXT: ClassVar[bool] = False
    """Whether it changes texts, or only looks at them."""
    FOR_FEEDBACK: ClassVar[bool] = False
    """Whether it is for the users' feedback too, or for collected text alone."""

    def recipe(self) -> dict[str, Any]:
        """The step as plain JSON, without what bears no identity."""
        return self.model_dump(mode="json")


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class LengthStep(StepSection):
    """Rejects rows that are too short or too long."""

    step: Literal["length"]
    """Name of the step. No default."""
    min_bytes: int = Field(default=1, ge=0)
    """Shortest text that is kept, bytes of UTF-8. Default: 1."""
    max_bytes: int = Field(default=1_000_000, ge=1)
    """Longest text that is kept, bytes of UTF-8. Default: 1,000,000."""


class AlphabeticStep(StepSection):
    """Rejects tables, dumps and other text that is hardly made of letters."""

    step: Literal["alphabetic"]
    """Name of the step. No default."""
    min_share: float = Field(default=0.4, ge=0, le=1)
    """Least share of letters among the characters that are not white space. Default: 0.4."""


class LineLengthStep(StepSection):
    """Rejects minified or generated text by its mean line."""

    step: Literal["line_length"]
    """Name of the step. No default."""
    max_mean_chars: float = Field(default=200, gt=0)
    """Longest mean line that is kept, characters. Default: 200."""


class GopherQualityStep(StepSection):
    """Rejects text that is no prose by the rules of Gopher (Rae et al. 2021, appendix A.1.1)."""

    step: Literal["gopher_quality"]
    """Name of the step. No default."""
    min_doc_words: int = 50
    """Least number of words that are not punctuation alone. Default: 50."""
    max_doc_words: int = 100_000
    """Greatest number of them. Default: 100_000."""
    min_avg_word_length: float = 3
    """Least mean length of them, characters. Default: 3."""
    max_avg_word_length: float = 10
    """Greatest mean length of them, characters. Default: 10."""
    max_symbol_word_ratio: float = 0.1
    """Greatest number of # by word, and of ellipses (... or …) by word. Default: 0.1."""
    max_bullet_lines_ratio: float = 0.9
    """Greatest share of lines that begin with • or -. Default: 0.9."""
    max_ellipsis_lines_ratio: float = 0.3
    """Greatest share of lines that end with an ellipsis. Default: 0.3."""
    max_non_alpha_words_ratio: float = 0.8
    """Least share of words that have a letter. The name is the library's, which says it is the wrong way round. Default: 0.8."""
    min_stop_words: int = 2
    """Least number of different stop words. Default: 2."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Words, in the case that they are written in. Default: the, be, to, of, and, that, have, with."""


class GopherRepetitionStep(StepSection):
    """Rejects text that repeats itself by the rules of Gopher (Rae et al. 2021, table A1)."""

    step: Literal["gopher_repetition"]
    """Name of the step. No default."""
    dup_line_frac: float = Field(default=0.3, ge=0)
    """Greatest share of lines that occurred before in the text. Default: 0.3."""
    dup_para_frac: float = Field(default=0.3, ge=0)
    """Greatest share of paragraphs that did. Default: 0.3."""
    dup_line_char_frac: float = Field(default=0.2, ge=0)
    """Greatest share of the text's characters in such lines. Default: 0.2."""
    dup_para_char_frac: float = Field(default=0.2, ge=0)
    """Greatest share of the text's characters in such paragraphs. Default: 0.2."""
    top_n_grams: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    """Words of an n-gram, and the greatest share of the text's characters in the most frequent of these n-grams. Default: ((2, 0.2), (3, 0.18), (4, 0.16))."""
    dup_n_grams: tuple[tuple[int, float], ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    """Words of an n-gram, and the greatest share of the text's characters in n-grams that occurred before in it. Default: ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))."""


class FineWebStep(StepSection):
    """Rejects lists and menus by the rules of FineWeb (Penedo et al. 2024, section 3.6)."""

    step: Literal["fineweb"]
    """Name of the step. No default."""
    line_punct_thr: float = Field(default=0.12, ge=0)
    """Least share of lines that end with a mark that ends sentences in some script. Default: 0.12."""
    line_punct_exclude_zero: bool = False
    """Whether to keep texts of which no line does. Default: false."""
    short_line_thr: float = Field(default=0.67, ge=0)
    """Greatest share of short lines. Default: 0.67."""
    short_line_length: int = 30
    """Length of the longest short line, characters. Default: 30."""
    char_duplicates_ratio: float = Field(default=0.01, ge=0)
    """Greatest share of the text's characters, LF apart, in lines that occurred before in it. Default: 0.01."""
    new_line_ratio: float = Field(default=0.3, ge=0)
    """Greatest number of LF by word. Default: 0.3."""


class C4Step(StepSection):
    """Drops lines that are no sentences, and texts with few of them, by the rules of C4 (Raffel et al. 2020, section 2.2)."""

    CHANGES_TEXT: ClassVar[bool] = True

    step: Literal["c4"]
    """Name of the step. No default."""
    remove_citations: bool = True
    """Whether to remove [edit], [citation needed] and brackets around digits, or around nothing. Default: true."""
    filter_no_terminal_punct: bool = True
    """Whether to drop lines that do not end with one of . ? ! " ' or that end with three dots. Default: true."""
    min_num_sentences: int = 5
    """Least number of sentences in the lines that are kept; -1 for any. Default: 5."""
    min_words_per_line: int = 3
    """Least number of words, citations included, of a line that is kept; -1 for any. Default: 3."""
    max_word_length: int = 1000
    """Greatest length of a word in a line that is kept, characters; -1 for any. Default: 1000."""
    filter_lorem_ipsum: bool = True
    """Whether to reject texts with a line that has "lorem ipsum" in it, in either case. Default: true."""
    filter_javascript: bool = True
    """Whether to drop lines with "javascript" in them, in either case. Default: true."""
    filter_curly_bracket: bool = True
    """Whether to reject texts with a line that has { in it. Default: true."""
    filter_policy: bool = True
    """Whether to drop lines about terms of use, privacy and cookies, in either case. Default: true."""


class UnicodeStep(StepSection):
    """Repairs texts and brings them to one normal form (ftfy, unicodedata)."""

    CHANGES_TEXT: ClassVar[bool] = True
    FOR_FEEDBACK: ClassVar[bool] = True

    step: Literal["unicode"]
    """Name of the step. No default."""
    form: Literal["none", "nfc", "nfkc"] = "nfc"
    """Normal form (Unicode Standard Annex 15). Default: nfc."""
    mojibake: bool = True
    """Whether text that was decoded in a wrong encoding is mended. Default: true."""
    line_ends: bool = True
    """Whether CR LF, CR and Unicode's line separators become LF. Default: true."""
    controls: bool = True
    """Whether control characters without an effect and terminal escapes are removed. Default: true."""
    entities: bool = False
    """Whether HTML entities become characters. Default: false."""


class LanguageStep(StepSection):
    """Names the language of each row (py3langid's model), and rejects rows in others than those that are kept."""

    step: Literal["language"]
    """Name of the step. No default."""
    keep: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages that are kept. Default: all."""
    min_probability: float = Field(default=0.0, ge=0, le=1)
    """Least probability of the language that was found. Default: 0."""
    sample_bytes: int = Field(default=1024, ge=0)
    """How much of the beginning of a text is looked at, bytes; 0: all of it. Default: 1,024."""


class PersonalStep(StepSection):
    """Masks personal data and secrets with typed placeholders such as <EMAIL>."""

    CHANGES_TEXT: ClassVar[bool] = True
    FOR_FEEDBACK: ClassVar[bool] = True

    step: Literal["personal"]
    """Name of the step. No default."""
    kinds: tuple[Literal["email", "phone", "ip", "credit_card", "iban", "secret", "name"], ...] = (
        "email",
        "phone",
        "ip",
        "credit_card",
        "iban",
        "secret",
    )
    """What is looked for; `name` needs a model for names that is installed. Default: all but name."""
    names_model: str = ""
    """The installed spaCy pipeline that finds names. Default: the only one that is installed."""


# ── labels, and what a model says ─────────────────────────────────────────────────────────────────────────────────────


class LabelRule(Section):
    """A label, and the texts that get it."""

    label: str = Field(min_length=1)
    """The label. No default."""
    pattern: str
    """Regular expression (RE2 syntax) that is looked for anywhere in the text; (?i), (?s) and (?m) as in RE2. No default."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            pc.match_substring_regex(pa.array([""]), pattern)
        except pa.ArrowInvalid as error:
            raise ValueError(f"expected a regular expression of RE2, found {pattern!r}: {error}") from error
        return pattern


class LabelByRuleStep(StepSection):
    """Labels each row by the first rule whose pattern is found in it. Feedback is labelled too."""

    FOR_FEEDBACK: ClassVar[bool] = True

    step: Literal["label_by_rule"]
    """Name of the step. No default."""
    rules: tuple[LabelRule, ...] = Field(min_length=1)
    """The rules, in the order in which they are tried. No default."""
    default: str | None = None
    """Label of rows that no rule matches. Default: none."""
    on: Literal["text", "prompt", "source", "origin"] = "text"
    """What the patterns are looked for in. Default: text."""
    keep_existing: bool = True
    """Whether a row that has a label already keeps it; the two are compared in any case. Default: true."""


class LabelByFunctionStep(StepSection):
    """Labels rows by a function of yours. Feedback is labelled too.

    It is called with a list of rows (dicts with text, prompt, messages as JSON, source, origin, label; "" for what is not
    there) and returns a list of as many labels, each a str, or None for no label. What it says of a row must depend on
    that row alone: how rows are put into lists is not promised. It must be importable on the workers: with Ray jobs it lies
    in the job's working directory.
    """

    FOR_FEEDBACK: ClassVar[bool] = True

    step: Literal["label_by_function"]
    """Name of the step. No default."""
    function: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")
    """`package.module:name`. No default."""
    version: str = "1"
    """Bears identity, as the source file of the module does: change it where what the function says changes for another
    reason, such as a file that it reads or a module that it imports. Default: 1."""
    keep_existing: bool = True
    """Whether a row that has a label already keeps it; the two are compared in any case. Default: true."""


def _names_one(model: str) -> str:
    if model in ("", "registry:"):
        raise ValueError(f"expected registry:production, registry:NUMBER, a folder or a hub id, found {model!r}")
    return model


ModelName = Annotated[str, AfterValidator(_names_one)]
"""How a configuration names a model."""


class LabelByModelStep(StepSection):
    """Labels each row by the continuation of a prompt to which a model gives the highest probability. Feedback is labelled
    too.

    The probability of a label is its share among the labels alone: they add up to 1.
    """

    FOR_FEEDBACK: ClassVar[bool] = True

    step: Literal["label_by_model"]
    """Name of the step. No default."""
    model: ModelName
    """`registry:production` (bound when a cycle begins), `registry:` and the name or number of a release, a folder in Hugging
    Face form on a disk that all workers share, or a hub id (fetched to the driver's cache, which they then share). What it
    holds bears identity, its name does not. No default."""
    prompt: str
    """What the model reads: {text} stands for the row's text and {prompt} for its prompt, if it has one. No default."""
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=2)
    """The labels. No default."""
    continuation: str = " {label}"
    """How a label goes on from the prompt. Where one label begins another it must have an end. Default: " {label}"."""
    length_normalised: bool = False
    """Whether each label's log-probability is divided by the number of its tokens, for labels of very different length
    (Brown et al. 2020, section 2.4). Default: false."""
    max_text_bytes: int = Field(default=4096, ge=1)
    """How much of the beginning of {text} and of {prompt} the model reads, bytes of UTF-8; less where that does not fit its
    context. Default: 4,096."""
    min_confidence: float = Field(default=0.0, ge=0, le=1)
    """Least probability of the label; a row below it gets none. Default: 0."""
    keep_existing: bool = True
    """Whether a row that has a label already keeps it; the two are compared in any case. Default: true."""

    @model_validator(mode="after")
    def _is_a_choice(self) -> LabelByModelStep:
        if "{text}" not in self.prompt:
            raise ValueError(f"expected a prompt with {{text}} in it, found {self.prompt!r}")
        if "{label}" not in self.continuation:
            raise ValueError(f"expected a continuation with {{label}} in it, found {self.continuation!r}")
        written = sorted(self.continuation.replace("{label}", label) for label in self.labels)
        for one, next_one in pairwise(written):
            if next_one.startswith(one):
                raise ValueError(
                    f"expected labels of which none begins another, found {one!r} and {next_one!r}: the shorter would "
                    "always be likelier; rename one, or give `continuation` an end such as ' {label}.'"
                )
        return self

    def recipe(self) -> dict[str, Any]:
        """The step without the name of its model: what it stands for counts, wherever that lies."""
        return self.model_dump(mode="json", exclude={"model"})


class KeepLabelsStep(StepSection):
    """Rejects rows by their label, whoever gave it; after `label_by_model` it is a filter by a classifier.

    The ledger has the label in words and, as the score, its probability: 1 where no model gave it.
    """

    step: Literal["keep_labels"]
    """Name of the step. No default."""
    keep: tuple[str, ...] = ()
    """Labels of the rows that are kept; "" stands for no label. Default: all."""
    drop: tuple[str, ...] = ()
    """Labels of the rows that are rejected; "" stands for no label. Default: none."""

    @model_validator(mode="after")
    def _says_something(self) -> KeepLabelsStep:
        if not self.keep and not self.drop:
            raise ValueError("expected labels in keep or in drop, found none")
        if both := sorted(set(self.keep) & set(self.drop)):
            raise ValueError(f"expected each label in keep or in drop, found {both} in both")
        return self


class ModelQualityStep(StepSection):
    """Rejects text that a model finds too surprising (noise) or too predictable (repetition, boilerplate)."""

    step: Literal["model_quality"]
    """Name of the step. No default."""
    model: ModelName
    """`registry:production` (bound when a cycle begins), `registry:` and the name or number of a release, a folder in Hugging
    Face form on a disk that all workers share, or a hub id (fetched to the driver's cache, which they then share). What it
    holds bears identity, its name does not. No default."""
    max_bits_per_byte: float = Field(default=3.0, gt=0)
    """Most bits that the model needs for a byte of the text, after the row's prompt if it has one. Default: 3."""
    min_bits_per_byte: float = Field(default=0.3, ge=0)
    """Fewest bits that it needs. Default: 0.3."""
    sample_bytes: int = Field(default=4096, ge=1)
    """How much of the beginning of a text (and of the end of its prompt) is looked at, bytes of UTF-8. Default: 4,096."""

    @model_validator(mode="after")
    def _is_a_range(self) -> ModelQualityStep:
        if self.min_bits_per_byte >= self.max_bits_per_byte:
            raise ValueError(
                f"expected min_bits_per_byte below max_bits_per_byte, found {self.min_bits_per_byte:g} and "
                f"{self.max_bits_per_byte:g}"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """The step without the name of its model: what it stands for counts, wherever that lies."""
        return self.model_dump(mode="json", exclude={"model"})


class NearDuplicatesStep(StepSection):
    """Rejects rows that nearly equal another one, of the corpus or of those that ancestors were trained on (MinHash)."""

    FOR_FEEDBACK: ClassVar[bool] = True

    step: Literal["near_duplicates"]
    """Name of the step. No default."""
    threshold: float = Field(default=0.45, gt=0, le=1)
    """Least estimated Jaccard similarity of two rows' runs of words at which one of them goes: 0.45 finds documents of
    which one word in ten was replaced; short rows of one form (queries) want 0.8 or more. Default: 0.45."""
    ngram_words: int = Field(default=3, ge=1)
    """Words of a run. Default: 3."""
    num_bands: int = Field(default=32, ge=1)
    """Bands of a signature: rows that agree in all of one band are compared. Default: 32."""
    rows_per_band: int = Field(default=3, ge=1)
    """Components of a band. Default: 3."""


class DecontaminateStep(StepSection):
    """Rejects rows that would train and hold passages of what is held out, in this cycle or an earlier one."""

    FOR_FEEDBACK: ClassVar[bool] = True

    step: Literal["decontaminate"]
    """Name of the step. No default."""
    max_share: float = Field(default=0.2, gt=0, le=1)
    """Share of a row's runs of words that occur in a holdout at which it goes. Default: 0.2."""
    max_passage_words: int = Field(default=50, ge=1)
    """Longest passage out of a holdout at which it goes, words. Default: 50."""
    ngram_words: int = Field(default=13, ge=1)
    """Words of a run. Default: 13."""
    min_words: int = Field(default=8, ge=1)
    """Words that a text has at least for it to be looked at. Default: 8."""
    max_documents: int = Field(default=10, ge=1)
    """What occurs in more rows that train than so many is common to all and leaks nothing. Default: 10."""

    @model_validator(mode="after")
    def _runs_are_long_enough(self) -> DecontaminateStep:
        if self.min_words > self.ngram_words:
            raise ValueError(f"expected min_words up to ngram_words, found {self.min_words} and {self.ngram_words}")
        return self


RowStep = (
    UnicodeStep
    | LanguageStep
    | LengthStep
    | AlphabeticStep
    | LineLengthStep
    | GopherQualityStep
    | GopherRepetitionStep
    | FineWebStep
    | C4Step
    | PersonalStep
    | LabelByRuleStep
    | LabelByFunctionStep
    | LabelByModelStep
    | KeepLabelsStep
    | ModelQualityStep
)
"""Steps that look at one row alone."""
LabelStep = LabelByRuleStep | LabelByFunctionStep | LabelByModelStep
"""Steps that give rows a label, and compare it with the one that a row had."""
ModelStep = LabelByModelStep | ModelQualityStep
"""Steps that ask a model."""
CorpusStep = NearDuplicatesStep | DecontaminateStep
"""Steps that look at all rows."""
Step = Annotated[RowStep | CorpusStep, Field(discriminator="step")]
