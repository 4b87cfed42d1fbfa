"""The paths that there are, and what answers each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs

from pydantic_core import to_json
from starlette.routing import compile_path

from service.answers import require_once
from service.errors import InvalidParameter, MethodNotAllowed, NotFound
from service.observability.request_record import RequestRecord
from service.web.exchange import Handler, Reply

_MAX_FIELDS = 16  # of a query, before it is taken apart


class Route:
    """One method of one path. GET answers HEAD too: a carrier sends its answer without the body.

    A segment ``{name}`` of ``path`` is variable, ``{name:path}`` is all that follows. ``parameters`` are OpenAPI's: the query
    may have those of its place and no others, unless ``any_query``. ``declaration`` is what FastAPI's ``APIRoute`` takes, and
    ``request_model``, the body as JSON; id, summary and description of the operation are by default the name of the handler's
    function and its docstring.
    """

    def __init__(
        self,
        path: str,
        handler: Handler,
        *,
        method: str = "GET",
        parameters: Sequence[Mapping[str, Any]] = (),
        any_query: bool = False,
        **declaration: Any,
    ) -> None:
        self.path = path
        self.handler = handler
        self.method = method
        self.parameters = parameters
        self._any_query = any_query
        function = getattr(handler, "func", handler)  # of a partial
        summary, _, description = (inspect.getdoc(function) or "").partition("\n\n")
        self.declaration = {
            "operation_id": re.sub("_(.)", lambda match: match[1].upper(), function.__name__.strip("_")),
            "summary": summary.rstrip("."),
            "description": " ".join(description.split()),
            **declaration,
        }

    def read_query(self, query: bytes) -> dict[str, str]:
        """Return the parameters; raise InvalidParameter for those that the route does not have, or that come twice."""
        if self._any_query:
            return {}
        known = [parameter["name"] for parameter in self.parameters if parameter["in"] == "query"]
        are_few = query.count(b"&") < _MAX_FIELDS
        sent = parse_qs(query.decode("latin-1"), keep_blank_values=True) if are_few else {}
        if not are_few or not sent.keys() <= set(known):
            takes = f"only the query parameters {', '.join(known)}" if known else "no query parameters"
            raise InvalidParameter(f"this path takes {takes}; leave out the others")
        require_once(name for name, values in sent.items() if len(values) > 1)
        return {name: value for name, (value,) in sent.items()}


class RouteTable:
    """Finds the route of a request: paths without variable segments first, then the others in order."""

    def __init__(self, routes: Iterable[Route]) -> None:
        methods: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods.setdefault(route.path, {})[route.method] = route
        self.paths = list(methods)
        self._methods = methods
        self._patterns = [(compile_path(path)[0], path) for path in methods if "{" in path]

    def find(self, record: RequestRecord) -> Route:
        """Return the route, and note its path in ``record`` and the variable segments in its scope.

        Raises NotFound and MethodNotAllowed.
        """
        scope = record.scope
        if (methods := self._methods.get(scope.path)) is None:
            for pattern, path in self._patterns:
                if match := pattern.fullmatch(scope.path):
                    scope.params, record.route, methods = match.groupdict(), path, self._methods[path]
                    break
            else:
                raise NotFound("there is nothing at this path; see /docs for what there is")
        route = methods.get("GET" if scope.method == "HEAD" else scope.method)
        if route is None:
            allowed = ", ".join("GET, HEAD" if method == "GET" else method for method in methods)
            raise MethodNotAllowed(f"this path answers {allowed} only", allowed=allowed)
        return route


def json_reply(content: object) -> Reply:
    """Make an answer of ``content``: a pydantic model, all of its fields, or a list of them."""
    return Reply(to_json(content))
