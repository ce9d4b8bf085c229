"""What a model lacks for one part of a diagnosis: the part is listed with the reason, and the others go on."""

from __future__ import annotations

from zoo.errors import ZooError


class Unavailable(ZooError):
    """This model, or this run, does not have what the part needs."""
