"""The section `runtime.head`: the Ray head that `aifactory up` starts and keeps alive."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aifactory.config.section import Section


class Head(Section):
    """A head of the factory's own, on this machine."""

    host: str = "127.0.0.1"
    """Address of this machine by which drivers, and nodes that join, reach the head, and on which its dashboard listens. Ray 2.60's
    other ports listen on all interfaces whatever this says: `auth` and a firewall keep strangers out. Default: 127.0.0.1."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port by which nodes and drivers join; 0 takes a free one, and keeps it while the head is started again. Default: 0."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs that Ray may give away on this machine. Default: all of it."""
    gpus: int | None = Field(default=None, ge=0)
    """GPUs that Ray may give away on this machine. Default: all of it."""
    dashboard: bool = False
    """Whether Ray's dashboard and job server run, on `host`: retrains are jobs then, which outlive the evaluation actor, for about
    a gigabyte of memory. Default: false, they are tasks."""
    auth: Literal["token", "disabled"] = "token"
    """Whether who joins or submits a job must know the head's token, which lies in its folder. Default: token."""
    folder: str | None = None
    """Local folder of the head's sessions, logs and store, of at most 38 characters, for Ray puts sockets below it. What is in it
    is worth nothing once the head has come down. Default: `~/.aifactory/<8 digits>`."""
