"""What a browser shows instead of the page while it has no token: a field to write it into.

It needs no other file, for all of them ask for the token too. What is sent is ``/?token=…``, which
:class:`~imprompt.app.server.guard.Guard` answers with a cookie.
"""

import base64
import hashlib

from starlette.responses import HTMLResponse

_STYLE = (
    ":root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}"
    "body{min-height:90vh;margin:0;display:grid;place-content:center;padding:16px}"
    "form{display:grid;gap:12px;max-width:26rem}h1{font-size:1.25rem;margin:0}p{margin:0}"
    "input,button{font:inherit;min-height:44px;padding:0 12px;border-radius:9px;border:1px solid}"
    "button{background:#b93f0b;color:#fff;border-color:#b93f0b;font-weight:650;cursor:pointer}"
)
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def door(headers: dict[str, str], *, wrong: bool) -> HTMLResponse:
    """The page that asks for the token, with the ``headers`` of every answer; ``wrong``: one was given."""
    said = "That is not this server's token." if wrong else "This server asks for a token."
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>imprompt</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<form action="/">
<h1>imprompt</h1>
<p role="status">{said} Whoever started it has it: it follows <code>--token</code>.</p>
<label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Open the page</button>
</form>
</main>
</body>
</html>
"""
    own = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store", "WWW-Authenticate": "Bearer"}
    return HTMLResponse(page, 401, {**headers, **own})
