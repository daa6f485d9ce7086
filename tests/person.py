"""A person at a browser, for programs that open one: BROWSER="python tests/person.py %s &".

Signs in, allows what is asked, and follows the redirect to where the program listens.
"""

import os
import ssl
import sys
from urllib.parse import urlsplit

import httpx2

from browser import Browser

address = urlsplit(sys.argv[1])
with Browser(
    f"{address.scheme}://{address.netloc}", ssl.create_default_context(cafile=os.environ.get("PERSON_CA"))
) as mine:
    page = mine.allow(
        f"{address.path}?{address.query}",
        os.environ["PERSON_EMAIL"],
        os.environ["PERSON_PASSWORD"],
        os.environ.get("PERSON_DECISION", "allow"),
    )
httpx2.get(page.location, timeout=60)
