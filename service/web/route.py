"""The paths that there are, and what answers each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs

from pydantic import BaseModel

from service.answers import require_once
from service.errors import InvalidParameter, MethodNotAllowed, NotFound
from service.observability.request_record import RequestRecord
from service.web.exchange import Handler, Reply

_SEGMENT = re.compile(r"{(\w+)(:path)?}")


class Route:
    """One method of one path. GET answers HEAD too: a carrier sends its answer without the body.

    A segment ``{name}`` of ``path`` is variable, ``{name:path}`` is all that follows. ``name`` becomes the operation's id in
    the OpenAPI document. ``parameters`` are OpenAPI's: the query may have those of its place and no others, unless
    ``any_query``. ``declaration`` is what FastAPI's ``APIRoute`` takes, and ``request_model``, the body as JSON.
    """

    def __init__(
        self,
        path: str,
        handler: Handler,
        name: str,
        summary: str = "",
        *,
        method: str = "GET",
        parameters: Sequence[Mapping[str, Any]] = (),
        any_query: bool = False,
        **declaration: Any,
    ) -> None:
        self.path = path
        self.handler = handler
        self.name = name
        self.summary = summary
        self.method = method
        self.parameters = parameters
        self.segments = [match[1] for match in _SEGMENT.finditer(path)]
        self.declaration = declaration
        self._any_query = any_query

    def check_query(self, query: bytes) -> None:
        """Raise InvalidParameter for query parameters that the route does not have, or that come twice."""
        if self._any_query:
            return
        known = [parameter["name"] for parameter in self.parameters if parameter["in"] == "query"]
        sent = parse_qs(query.decode("latin-1"), keep_blank_values=True)
        if not sent.keys() <= set(known):
            takes = f"only the query parameters {', '.join(known)}" if known else "no query parameters"
            raise InvalidParameter(f"this path takes {takes}; leave out the others")
        require_once(name for name, values in sent.items() if len(values) > 1)


class RouteTable:
    """Finds the route of a request: paths without variable segments first, then the others in order."""

    def __init__(self, routes: Iterable[Route]) -> None:
        methods: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods.setdefault(route.path, {})[route.method] = route
        self.paths = list(methods)
        self._methods = methods
        self._patterns = [(_pattern(path), path) for path in methods if "{" in path]

    def find(self, record: RequestRecord) -> Route:
        """Return the route, and note its path in ``record`` and the variable segments in its scope.

        Raises NotFound and MethodNotAllowed.
        """
        scope = record.scope
        if (methods := self._methods.get(scope.path)) is None:
            for pattern, path in self._patterns:
                if match := pattern.fullmatch(scope.path):
                    scope.path_params, record.route, methods = match.groupdict(), path, self._methods[path]
                    break
            else:
                raise NotFound("there is nothing at this path; see /docs for what there is")
        route = methods.get("GET" if scope.method == "HEAD" else scope.method)
        if route is None:
            allowed = ", ".join("GET, HEAD" if method == "GET" else method for method in methods)
            raise MethodNotAllowed(f"this path answers {allowed} only", allowed=allowed)
        return route


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(_SEGMENT.sub(lambda match: f"(?P<{match[1]}>{'.*' if match[2] else '[^/]+'})", path))


def json_reply(content: BaseModel) -> Reply:
    """Make an answer of all fields of ``content``."""
    return Reply(content.model_dump_json().encode())
