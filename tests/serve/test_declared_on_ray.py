"""The endpoint as Ray Serve's declarative form has it, which KubeRay's RayService is: by import path and arguments."""

from __future__ import annotations

import httpx
import pytest
import yaml

from aifactory.cluster.kubernetes import IMPORT_PATH
from aifactory.errors import StateError

pytestmark = pytest.mark.slow


def test_the_import_path_of_the_manifests_serves_the_release_in_production(
    ray_session, module_factory, tmp_path, says, wait_until
):
    from ray import serve
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    factory = module_factory(tmp_path, port=0, poll_s=0.2)
    file = tmp_path / "factory.yaml"
    file.write_text(yaml.safe_dump(factory.books.resolved_config().model_dump(mode="json", exclude_defaults=True)))
    arguments = {"config": str(file)}
    with pytest.raises(StateError, match="run a cycle first"):
        import_attr(IMPORT_PATH)(arguments)
    factory.promote(factory.publish(1))
    application = {
        "name": "aifactory-alpha",
        "route_prefix": "/declared",
        "import_path": IMPORT_PATH,
        "args": arguments,
    }
    ServeDeploySchema.model_validate({"applications": [application]})

    serve.run(import_attr(IMPORT_PATH)(arguments), name="aifactory-alpha", route_prefix="/declared")
    try:
        from aifactory.serve.app import _url

        body = {"model": "alpha", "prompt": "the quick ", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{_url('/declared')}/v1/completions", json=body, timeout=60).json()
        assert answer["model"] == "alpha-r1"
        assert answer["choices"][0]["text"] == says(1, "the quick ", 8)
    finally:
        # All of Serve: its proxies do not have what `start` gives them, and other tests would find them there.
        serve.shutdown()
        factory.books.close()
