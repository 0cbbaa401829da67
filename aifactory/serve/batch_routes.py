"""The routes of files and batches, in OpenAI's forms.

    GET POST   /v1/files                  GET DELETE /v1/files/{file}      GET  /v1/files/{file}/content
    GET POST   /v1/batches                GET        /v1/batches/{batch}   POST /v1/batches/{batch}/cancel

Source   OpenAI API reference, "Files" and "Batch" (2026-11).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from aifactory.errors import BadRequestError
from aifactory.records.batch_jobs import BatchJob, BatchQueue, UploadedFile
from aifactory.serve.access import caller_of
from aifactory.serve.bodies import BatchBody, BatchesQuery, FilesQuery
from aifactory.serve.wire import StatusError, json_response, parse, parse_query

Handler = Callable[[Request], Awaitable[Response]]
_ENDED_AT = {"completed": "completed_at", "failed": "failed_at", "cancelled": "cancelled_at", "expired": "expired_at"}


class BatchRoutes:
    """Files and batch jobs over HTTP."""

    def __init__(self, queue: BatchQueue, *, read: Callable[[Request], Awaitable[bytes]], max_file_bytes: int) -> None:
        self._queue = queue
        self._read = read
        self._max_file_bytes = max_file_bytes
        self.handlers: Mapping[tuple[str, str], Handler] = {
            ("GET", "/v1/files"): self._files,
            ("POST", "/v1/files"): self._upload,
            ("GET", "/v1/files/{file}"): self._file,
            ("DELETE", "/v1/files/{file}"): self._delete,
            ("GET", "/v1/files/{file}/content"): self._content,
            ("GET", "/v1/batches"): self._jobs,
            ("POST", "/v1/batches"): self._open,
            ("GET", "/v1/batches/{batch}"): self._job,
            ("POST", "/v1/batches/{batch}/cancel"): self._cancel,
        }

    async def _upload(self, request: Request) -> Response:
        """Upload a file of requests (multipart/form-data: `file`, and `purpose` of batch)."""
        parser = MultiPartParser(request.headers, self._limited(request), max_files=1, max_fields=4)
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError, UnicodeDecodeError) as error:
            raise BadRequestError(f"Expected multipart/form-data, found: {error}.", field="file") from error
        try:
            file, purpose = form.get("file"), form.get("purpose")
            if purpose != "batch":
                raise BadRequestError(f"Expected a purpose of batch, found {str(purpose)[:40]!r}.", field="purpose")
            if not isinstance(file, UploadFile):
                raise BadRequestError("Expected a file, found none.", field="file")
            data = await file.read()
            name = "".join(each for each in (file.filename or "file") if each.isprintable())[:256]
        finally:
            await form.close()
        caller = caller_of(request)
        kept = await asyncio.to_thread(
            self._queue.add_file, data, filename=name, purpose="batch", key_id=caller.key_id, team=caller.team
        )
        return json_response(_file_card(kept))

    async def _limited(self, request: Request) -> AsyncGenerator[bytes, None]:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            if size > self._max_file_bytes:
                raise StatusError(
                    413, f"Expected a file of at most {self._max_file_bytes} bytes.", kind="invalid_request_error"
                )
            yield piece

    async def _files(self, request: Request) -> Response:
        """The files that were uploaded or written, newest first unless it is asked otherwise."""
        asked = parse_query(FilesQuery, request.query_params.multi_items())
        caller = caller_of(request)
        files = await asyncio.to_thread(self._queue.files)
        files = [
            file for file in files if caller.may_see(file.key_id, file.team) and asked.purpose in (None, file.purpose)
        ]
        page, has_more = _page(files if asked.order == "desc" else files[::-1], asked)
        return _list([_file_card(file) for file in page], has_more=has_more)

    async def _file(self, request: Request) -> Response:
        """One file."""
        return json_response(_file_card(await self._find(request)))

    async def _content(self, request: Request) -> Response:
        """What is in it."""
        file = await self._find(request)
        data = await asyncio.to_thread(self._queue.read_file, file.id)
        return Response(data or b"", media_type="application/octet-stream")

    async def _delete(self, request: Request) -> Response:
        """Delete a file."""
        file = await self._find(request)
        deleted = await asyncio.to_thread(self._queue.delete_file, file.id)
        return json_response({"id": file.id, "object": "file", "deleted": deleted})

    async def _find(self, request: Request) -> UploadedFile:
        name = _name(request, "files")
        file = await asyncio.to_thread(self._queue.file, name)
        if file is None or not caller_of(request).may_see(file.key_id, file.team):
            raise _unknown("file", name)
        return file

    async def _open(self, request: Request) -> Response:
        """Ask for the answers to a file of requests."""
        body = parse(BatchBody, await self._read(request))
        caller, file = caller_of(request), await asyncio.to_thread(self._queue.file, body.input_file_id)
        if file is None or not caller.may_see(file.key_id, file.team):
            raise BadRequestError(
                f"Expected the id of an uploaded file, found {body.input_file_id!r}.", field="input_file_id"
            )
        job = await asyncio.to_thread(
            self._queue.open_job,
            endpoint=body.endpoint,
            input_file=body.input_file_id,
            note=body.metadata or {},
            key_id=caller.key_id,
            team=caller.team,
        )
        return json_response(await self._job_card(job))

    async def _jobs(self, request: Request) -> Response:
        """The batches, newest first."""
        asked = parse_query(BatchesQuery, request.query_params.multi_items())
        caller, jobs = caller_of(request), await asyncio.to_thread(self._queue.jobs)
        page, has_more = _page([job for job in jobs if caller.may_see(job.key_id, job.team)], asked)
        return _list([await self._job_card(job) for job in page], has_more=has_more)

    async def _job(self, request: Request) -> Response:
        """One batch."""
        return json_response(await self._job_card(await self._find_job(request)))

    async def _cancel(self, request: Request) -> Response:
        """End a batch with what is answered."""
        job = await asyncio.to_thread(self._queue.cancel, (await self._find_job(request)).id)
        assert job is not None, "jobs stay"
        return json_response(await self._job_card(job))

    async def _find_job(self, request: Request) -> BatchJob:
        name = _name(request, "batches")
        job = await asyncio.to_thread(self._queue.job, name)
        if job is None or not caller_of(request).may_see(job.key_id, job.team):
            raise _unknown("batch", name)
        return job

    async def _job_card(self, job: BatchJob) -> dict[str, Any]:
        answered, failed = await asyncio.to_thread(self._queue.counts, job)
        card: dict[str, Any] = {
            "id": job.id,
            "object": "batch",
            "endpoint": job.endpoint,
            "errors": {"object": "list", "data": list(job.problems)} if job.problems else None,
            "input_file_id": job.input_file,
            "completion_window": "24h",
            "status": job.state,
            "output_file_id": job.output_file,
            "error_file_id": job.error_file,
            "created_at": int(job.created_at),
            "in_progress_at": _whole(job.started_at),
            "expires_at": int(job.expires_at),
            "finalizing_at": None,
            "cancelling_at": _whole(job.cancelling_at),
            "request_counts": {"total": job.total, "completed": answered, "failed": failed},
            "metadata": dict(job.note) or None,
        }
        return card | {name: _whole(job.ended_at) if job.state == state else None for state, name in _ENDED_AT.items()}


def _file_card(file: UploadedFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _name(request: Request, kind: str) -> str:
    """The name after `/v1/<kind>/` in the path. Raises StatusError for one that PostgreSQL can't look for."""
    name = str(request.scope["path"]).rpartition(f"/v1/{kind}/")[2].split("/")[0]
    if "\0" in name:
        raise _unknown("file" if kind == "files" else "batch", name)
    return name


def _unknown(kind: str, name: str) -> StatusError:
    return StatusError(404, f"Expected the id of a {kind}, found {name[:64]!r}.", kind="invalid_request_error")


Kept = TypeVar("Kept", UploadedFile, BatchJob)


def _page(kept: Sequence[Kept], asked: FilesQuery | BatchesQuery) -> tuple[Sequence[Kept], bool]:
    """The part that is asked for, and whether there are more after it."""
    if asked.after is not None:
        places = [place for place, each in enumerate(kept) if each.id == asked.after]
        if not places:
            raise BadRequestError(f"Expected the id of one of those listed, found {asked.after!r}.", field="after")
        kept = kept[places[0] + 1 :]
    return kept[: asked.limit], len(kept) > asked.limit


def _list(cards: list[dict[str, Any]], *, has_more: bool) -> Response:
    ids = [card["id"] for card in cards]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return json_response({"object": "list", "data": cards, "first_id": first, "last_id": last, "has_more": has_more})
