"""Is it alive, is it ready, what does it count."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.answers import Alive, Readiness, Ready
from service.collaborators import collaborators_of

router = APIRouter(tags=["health"])


@router.get("/livez", response_model=Alive)
async def livez() -> Alive:
    """Tell that the process answers. It says nothing of the model: restarting would not load it any faster."""
    return Alive()


@router.get(
    "/readyz",
    response_model=Readiness | Ready,
    responses={503: {"model": Readiness | Ready, "description": "Not ready."}},
)
async def readyz(request: Request) -> Response:
    """Tell whether a request would be scored now: model loaded, verified and warmed up, store answering.

    Callers who may see the metrics get the details too.
    """
    service = collaborators_of(request)
    readiness = await service.readiness()
    status = 200 if readiness.ready else 503
    told = readiness if request.state.trusted else Ready(ready=readiness.ready)
    return Response(told.model_dump_json(), status_code=status, media_type="application/json")


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}, "description": "Prometheus's text format."}})
async def metrics(request: Request) -> Response:
    """Return the metrics."""
    service = collaborators_of(request)
    service.metrics.ready((await service.readiness()).ready)
    service.metrics.engine.read(service.bundles.engines)
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


for _path, _endpoint in (("/livez", livez), ("/readyz", readyz), ("/metrics", metrics)):
    router.add_api_route(_path, _endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)
