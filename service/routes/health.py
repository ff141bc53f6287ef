"""Is it alive, is it ready, what does it count."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.answers import Alive, Readiness
from service.collaborators import collaborators_of

router = APIRouter(tags=["health"])


@router.get("/livez", response_model=Alive)
async def livez() -> Alive:
    """Tell that the process answers. It says nothing of the model: restarting would not load it any faster."""
    return Alive()


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness, "description": "Not ready."}})
async def readyz(request: Request) -> Response:
    """Tell whether a request would be scored now: model loaded, verified and warmed up, store answering."""
    service = collaborators_of(request)
    readiness = await service.readiness()
    status = 200 if readiness.ready else 503
    return Response(readiness.model_dump_json(), status_code=status, media_type="application/json")


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}, "description": "Prometheus's text format."}})
async def metrics(request: Request) -> Response:
    """Return the metrics."""
    service = collaborators_of(request)
    service.metrics.ready((await service.readiness()).ready)
    service.metrics.engine.read(service.bundles.engines)
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
