"""Libraries that only some runs need."""

import logging
from importlib import import_module
from types import ModuleType

from lorand.errors import ModelError


def optional(name: str, needed: str, extra: str) -> ModuleType:
    """Return a library of an optional extra of lorand.

    Raises ModelError, a sentence that begins with what needs it, when it is not installed.
    """
    # Also imported by others, bitsandbytes tells of optional parts that are not used here.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return import_module(name)
    except ImportError as error:
        raise ModelError(f"{needed}: pip install 'lorand[{extra}]'") from error
    finally:
        logger.setLevel(level)
