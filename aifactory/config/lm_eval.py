"""The section `evaluate.lm_eval`: tasks of the lm-eval library beside the factory's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from aifactory.config.section import Section
from aifactory.errors import ConfigError

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class LmEval(Section):
    """Tasks that lm-eval runs on a candidate, and on the release in production: every example's score is kept, and a candidate fails
    where it is established to be worse by more than the margin. Needs the extra `lm-eval`, here or in `runtime.lm_eval_python`."""

    tasks: Mapping[_Name, _Name] = Field(min_length=1)
    """By name of a task, as lm-eval knows it, the metric that counts, such as {arc_easy: acc_norm}. No default."""
    include_path: str | None = None
    """A folder with tasks of your own, in lm-eval's YAML. What lies in it bears identity, where it lies does not; data elsewhere that
    a task names does neither. Default: none."""
    limit: int | None = Field(default=None, ge=1)
    """Most examples of each task, its first ones. Default: all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples that are shown before each question. Default: as the task has it."""
    margin: float = Field(default=0.05, ge=0)
    """How far below 0 the interval of candidate minus production may reach, in the metric. Default: 0.05."""
    batch_size: int = Field(default=8, ge=1)
    """Questions at once. It bears no identity. Default: 8."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """Longest time for all tasks on one model, seconds. It bears no identity. Default: 3600."""

    def folder(self) -> Path | None:
        """The folder of the tasks of your own. Raises ConfigError if there is none."""
        if self.include_path is None:
            return None
        folder = Path(self.include_path).expanduser().absolute()
        if not folder.is_dir():
            raise ConfigError(
                f"expected a folder in evaluate.lm_eval.include_path, found {self.include_path}; correct the path."
            )
        return folder

    def recipe(self) -> dict[str, Any]:
        """What bears identity."""
        folder = self.folder()
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*")) if folder is not None else ():
            if file.is_file() and "__pycache__" not in file.parts:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                digest.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())  # type: ignore[arg-type]
        plain = self.model_dump(mode="json", exclude={"include_path", "batch_size", "timeout_s"})
        return {**plain, "include": None if folder is None else digest.hexdigest()}
