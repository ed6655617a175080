"""Store backends, one module for each URI scheme (`s3.py` for `s3://...`): adding a module adds a backend.

A module has one function, `open_blobs(uri: str) -> Blobs`. It is imported only when a store of its scheme is opened, so
that directories do without boto3.
"""

import pkgutil


def schemes() -> list[str]:
    """The URI schemes that a store can have, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
