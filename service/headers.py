"""Headers that every answer carries, whoever makes it."""

# The answers are data for programs. A browser that is led to one must not run, frame, cache or guess anything.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}

DOCS_PATH = "/docs"
# Swagger's page, as FastAPI writes it: a script and a style sheet from one CDN, an inline script that starts it, and
# requests to this service.
DOCS_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net; img-src data: https://fastapi.tiangolo.com; "
    "connect-src 'self'; frame-ancestors 'none'"
)


def security_headers(path: str) -> dict[str, str]:
    """Return the headers of the answer to a path."""
    if path == DOCS_PATH:
        return {**SECURITY_HEADERS, "Content-Security-Policy": DOCS_POLICY}
    return SECURITY_HEADERS
