"""The page at / for people who would rather look: its bytes, and the headers that keep it to this server."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


def digest_of(tag: str) -> str:
    """Return what the policy calls the page's one <style> or <script>: no other is followed."""
    content = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


POLICY = {
    "default-src": "'none'",
    "script-src": digest_of("script"),
    "style-src": digest_of("style"),
    "connect-src": "'self'",
    "img-src": "data:",  # the icon that is none
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # text becomes HTML nowhere
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
