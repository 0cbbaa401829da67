"""The configuration: what makes a model (the recipe), and how and where it runs (the runtime).

Every section but `runtime` bears identity: what it says is hashed into the fingerprints of what it makes. `runtime`
never does: other workers, another micro-batch or another storage root give the same fingerprints.

A configuration is read once, is checked as a whole and is never changed; `Config.from_yaml(path, overrides)` raises
`ConfigError` with the file and the line, and names the nearest key that is valid.

    section   what every part is: frozen, closed to unknown keys
    sources   where rows come from
    steps     what is done to them
    data      sources and steps together, tokens
    recipe    model, training, evaluation, gate, serving, improvement, traffic
    trial     how a release is tried beside production
    budget    what retrains may cost
    schedule  retrains at fixed times
    answer_guards  what answers may not hold
    judge     a model elsewhere that compares answers
    lm_eval   tasks of the lm-eval library
    trust     which feedback is believed
    watch     how what users ask is watched
    head      the Ray head that is started and kept alive
    site      what energy and machines cost
    gateway   who may ask the endpoint
    routing   which model answers what was asked for
    page      where the factory's page is served
    traces    where spans of requests and cycles go
    runtime   where and with what
    schema    the whole
    reading   from YAML and overrides to a checked model, or to an error with file and line
"""

from aifactory.config.answer_guards import AnswerGuards
from aifactory.config.budget import Budget
from aifactory.config.data import HoldoutStratum, Ingest, Tokenize
from aifactory.config.gateway import Gateway
from aifactory.config.head import Head
from aifactory.config.judge import Judge, LiveJudge
from aifactory.config.lm_eval import LmEval
from aifactory.config.page import Page
from aifactory.config.reading import plain_overrides
from aifactory.config.recipe import (
    Architecture,
    EarlyStopping,
    Evaluate,
    Guards,
    Improve,
    Lora,
    ModelBase,
    Preference,
    PromoteGate,
    Retrain,
    Serve,
    SourceShare,
    Traffic,
    Train,
)
from aifactory.config.routing import Outside, Route, Target
from aifactory.config.runtime import Endpoint, Runtime, StepExecution, expand_environment
from aifactory.config.schedule import RetrainSchedule
from aifactory.config.schema import Config, schema_json
from aifactory.config.section import Section
from aifactory.config.site import Site
from aifactory.config.sources import Columns, FeedbackSource, FileSource, ParquetSource, Source
from aifactory.config.steps import (
    AlphabeticStep,
    C4Step,
    CorpusStep,
    DecontaminateStep,
    FineWebStep,
    GopherQualityStep,
    GopherRepetitionStep,
    KeepLabelsStep,
    LabelByFunctionStep,
    LabelByModelStep,
    LabelByRuleStep,
    LabelRule,
    LabelStep,
    LanguageStep,
    LengthStep,
    LineLengthStep,
    ModelQualityStep,
    ModelStep,
    NearDuplicatesStep,
    PersonalStep,
    RowStep,
    Step,
    UnicodeStep,
)
from aifactory.config.traces import Traces
from aifactory.config.trial import ReleaseTrial
from aifactory.config.trust import Canary, FeedbackTrust
from aifactory.config.watch import PromptWatch

__all__ = [
    "AlphabeticStep",
    "AnswerGuards",
    "Architecture",
    "Budget",
    "C4Step",
    "Canary",
    "Columns",
    "Config",
    "CorpusStep",
    "DecontaminateStep",
    "EarlyStopping",
    "Endpoint",
    "Evaluate",
    "FeedbackSource",
    "FeedbackTrust",
    "FileSource",
    "FineWebStep",
    "Gateway",
    "GopherQualityStep",
    "GopherRepetitionStep",
    "Guards",
    "Head",
    "HoldoutStratum",
    "Improve",
    "Ingest",
    "Judge",
    "KeepLabelsStep",
    "LabelByFunctionStep",
    "LabelByModelStep",
    "LabelByRuleStep",
    "LabelRule",
    "LabelStep",
    "LanguageStep",
    "LengthStep",
    "LineLengthStep",
    "LiveJudge",
    "LmEval",
    "Lora",
    "ModelBase",
    "ModelQualityStep",
    "ModelStep",
    "NearDuplicatesStep",
    "Outside",
    "Page",
    "ParquetSource",
    "PersonalStep",
    "Preference",
    "PromoteGate",
    "PromptWatch",
    "ReleaseTrial",
    "Retrain",
    "RetrainSchedule",
    "Route",
    "RowStep",
    "Runtime",
    "Section",
    "Serve",
    "Site",
    "Source",
    "SourceShare",
    "Step",
    "StepExecution",
    "Target",
    "Tokenize",
    "Traces",
    "Traffic",
    "Train",
    "UnicodeStep",
    "expand_environment",
    "plain_overrides",
    "schema_json",
]
