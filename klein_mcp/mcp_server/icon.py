"""The server's icon, an SVG small enough to travel in every result."""

import base64

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="4" fill="#1f6feb"/>'
    '<circle cx="11" cy="5" r="2" fill="#fd3"/><path d="m2 13 4-6 3 4 2-2 3 4z" fill="#fff"/></svg>'
)
MEDIA_TYPE = "image/svg+xml"
DATA_URI = f"data:{MEDIA_TYPE};base64,{base64.b64encode(SVG.encode()).decode()}"
"""In the 2026 era a server names itself in each result, so this is paid every time: 300 bytes, which no model reads."""
