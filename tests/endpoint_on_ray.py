"""An endpoint on Ray that tests kill parts of, and clients of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil

PROMPT = "the quick "
TOKENS = 100


class Served:
    """A factory that is served by Ray, and clients of it."""

    def __init__(self, factory, url):
        self.factory = factory
        self.url = url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(self, **options):
        return self.client.completions.create(**body_of(options))

    def ask_many(self, requests, *, when_begun):
        """Ask all at once; `when_begun` is called when a text has come. What each came to: its text and its error."""
        begun = threading.Event()

        def ask(options):
            text, ended = "", False
            try:
                answer = self.ask(**options)
                if not options.get("stream"):
                    begun.set()
                    return answer.choices[0].text, None
                for chunk in answer:
                    if chunk.choices:
                        text += chunk.choices[0].text
                        ended = ended or chunk.choices[0].finish_reason is not None
                    begun.set()
            except openai.APIError as error:
                return text, error
            return text, None if ended else "without an end"

        with ThreadPoolExecutor(len(requests)) as pool:
            asked = [pool.submit(ask, options) for options in requests]
            assert begun.wait(120)
            when_begun()
            return [one.result() for one in asked]


def body_of(options):
    return {"model": "alpha", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **options}


def replicas(deployment="replica"):
    """The processes of a deployment's replicas."""
    return processes(f"ServeReplica:aifactory-alpha:{deployment}")


def processes(name):
    """Those of this test whose command line holds a name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def kill(pid):
    """SIGKILL, after a moment in which nothing more can come: what had been sent has arrived."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
