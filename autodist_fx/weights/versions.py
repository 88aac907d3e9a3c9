"""What differs between the versions of transformers, and of the huggingface_hub under them, where weights are read.

Which of two ways is taken follows from what is there, never from a version number.
"""

from __future__ import annotations

import importlib

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

# huggingface_hub speaks HTTP through requests before 1.0, and through httpx (httpx2) since.
_HTTP = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])

NO_NETWORK: tuple[type[Exception], ...]
HTTP_ERROR: type[Exception]
if hasattr(_HTTP, "TransportError"):
    NO_NETWORK = (_HTTP.TransportError, OfflineModeIsEnabled)
    HTTP_ERROR = _HTTP.HTTPError
else:
    NO_NETWORK = (_HTTP.ConnectionError, _HTTP.Timeout, OfflineModeIsEnabled)
    HTTP_ERROR = _HTTP.RequestException
