"""Browser sessions: a one-time link is exchanged for a cookie.

So no token stays in a URL, a browser's history or a log.
"""

import hashlib
import hmac
import secrets
import time

from starlette.requests import Request
from starlette.responses import Response

CSRF_HEADER = "x-csrf-token"

INVITATION_LIFETIME = 600.0
"""Seconds in which a one-time link must be opened: long enough to copy it to another machine's browser."""

SESSION_LIFETIME = 30 * 24 * 3600
"""Seconds a cookie is good for; sessions also end with the process."""

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Sessions:
    """Open invitations and the sessions made from them, in memory only."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        # Cookies know no ports: the cookie of another server on this machine must not replace ours.
        self.cookie = f"klein-session-{secrets.token_hex(4)}"
        self.invite_key = secrets.token_urlsafe(32)
        self._invitations: dict[str, float] = {}
        self._sessions: dict[str, float] = {}

    def invite(self) -> str:
        """Return a code for a one-time link."""
        code = secrets.token_urlsafe(24)
        self._invitations[code] = time.monotonic() + INVITATION_LIFETIME
        return code

    def redeem(self, code: str) -> str | None:
        """Return a new session id, None for a used or expired code."""
        expires = self._invitations.pop(code, None)
        if expires is None or expires < time.monotonic():
            return None
        session = secrets.token_urlsafe(32)
        self._sessions[session] = time.monotonic() + SESSION_LIFETIME
        return session

    def set_cookie(self, response: Response, session: str, *, secure: bool = False) -> None:
        response.set_cookie(
            self.cookie, session, max_age=SESSION_LIFETIME, httponly=True, samesite="strict", secure=secure, path="/"
        )

    def find(self, request: Request) -> str | None:
        """Return the request's session id if it is valid."""
        session = request.cookies.get(self.cookie, "")
        return session if self._sessions.get(session, 0.0) > time.monotonic() else None

    def csrf_token(self, session: str) -> str:
        """Return the token a page must send with every change it requests."""
        return hmac.new(self._secret, session.encode(), hashlib.sha256).hexdigest()

    def allows(self, request: Request) -> bool:
        """True for a valid session. Unsafe methods need its CSRF token too."""
        session = self.find(request)
        if session is None:
            return False
        given = request.headers.get(CSRF_HEADER, "")
        return request.method in SAFE_METHODS or hmac.compare_digest(given.encode(), self.csrf_token(session).encode())
