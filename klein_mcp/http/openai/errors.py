"""Errors of the OpenAI API: their shape, and the status of each."""

import logging
import math
from dataclasses import dataclass, field

from starlette.responses import JSONResponse, Response

from engine.contract import Busy, EngineError, InvalidJob, ModelNotFound, OutOfMemory
from klein_mcp.errors import Refused, RequestError, explain, one_line
from klein_mcp.http.surface import error_line, status_of

log = logging.getLogger(__name__)

NEVER_RETRY = {"x-should-retry": "false"}
"""Both SDKs retry 5xx twice; this header stops them where a repetition meets the same error."""


@dataclass(eq=False, slots=True)
class ApiError(Exception):
    """An error with everything a client of the API sees of it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    type: str = "invalid_request_error"
    headers: dict[str, str] = field(default_factory=dict)

    def payload(self) -> dict[str, object]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        return JSONResponse(self.payload(), self.status, self.headers)


def refusal(status: int, message: str) -> Response:
    """Make the response for a request that authorisation refuses."""
    code = "invalid_api_key" if status == 401 else None
    kind = "authentication_error" if status == 401 else "permission_error"
    return ApiError(status, message, code=code, type=kind).response()


def to_api_error(exc: Exception) -> ApiError:
    """Translate any exception. One that nobody expected is logged."""
    message = one_line(str(exc))
    if isinstance(exc, EngineError):
        message = explain(exc)
    elif isinstance(exc, RequestError):
        message = error_line(exc)
    match exc:
        case ApiError():
            return exc
        case Busy():
            wait = str(max(1, math.ceil(exc.retry_after)))
            return ApiError(429, message, None, "rate_limit_exceeded", "rate_limit_error", {"retry-after": wait})
        case ModelNotFound():
            return ApiError(404, message, "model", "model_not_found")
        case OutOfMemory():
            return ApiError(400, message, None, "out_of_memory")
        case InvalidJob():
            return ApiError(400, message)
        case Refused():
            return ApiError(403, message, type="permission_error")
        case RequestError():
            status = status_of(exc)
            if status < 500:
                return ApiError(status, message)
            return ApiError(status, message, type="server_error", headers=dict(NEVER_RETRY) if status == 500 else {})
        case EngineError():
            return ApiError(500, message, type="server_error", headers=dict(NEVER_RETRY))
    log.error("an unexpected error reached the API", exc_info=exc)
    kind = type(exc).__name__
    message = f"Internal error ({kind}); the log of klein-mcp serve has details."
    return ApiError(500, message, type="server_error", headers=dict(NEVER_RETRY))
